"""`grpo usage`: GPU-hours, storage and jobs of the key's owner, and their limits."""

from __future__ import annotations

from grpo_client.cli.output import AsJson, connected, print_json, say


def usage(*, json: AsJson = False) -> None:
    """Show your GPU-hours, storage and jobs, and their limits."""
    with connected() as client:
        found = client.usage()
    if json:
        print_json(found)
        return
    gpu, stored, jobs = found.gpu_hours, found.stored_bytes, found.unfinished_jobs
    until = f"; more from {gpu.frees_at:%Y-%m-%d %H:%M} UTC" if gpu.frees_at else ""
    say(f"GPU-hours        {_of(gpu.used, gpu.limit, 1)} in {gpu.window_days} days{until}")
    counted = f"; counted {stored.measured_at:%Y-%m-%d %H:%M} UTC" if stored.measured_at else "; not counted yet"
    say(f"Storage (GB)     {_of(stored.used, stored.limit, 1e9)}{counted}")
    say(f"Unfinished jobs  {_of(jobs.used, jobs.limit, 1)}")


def _of(used: float, limit: float | None, unit: float) -> str:
    text = f"{used / unit:.2f}".rstrip("0").rstrip(".")
    return f"{text} of {limit / unit:g}" if limit is not None else text
