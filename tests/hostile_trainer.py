"""A training process that attacks its host, for tests of what it may do: one attack, named in the job's metadata.

Uses the standard library alone, so that any Python can run it as any user. What it found out is in `report.json`, which
is shipped like any other, and which a test reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECRETS = ("AWS_SECRET_ACCESS_KEY", "REDIS_URL")


def attempt(what: Callable[[], object]) -> str:
    """How it went, in a word or two."""
    try:
        return f"done {what()!r}"[:200]
    except OSError as error:
        return type(error).__name__


def look_around(how: dict[str, str]) -> dict[str, object]:
    """Who this is, and what of other processes and files it can read or change."""
    stolen: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        text = b""
        try:
            text = (process / "environ").read_bytes()
            (process / "mem").open("rb").close()
        except OSError:
            pass
        stolen += [f"{name} of {process.name}" for name in SECRETS if f"{name}=".encode() in text]
    status = Path("/proc/self/status").read_text()
    signalled = attempt(lambda: os.kill(int(how["worker"]), 0)) if "worker" in how else ""
    return {
        "user": os.getuid(),
        "groups": os.getgroups(),
        "capabilities": status.partition("CapEff:")[2].split()[0],
        "core": Path("/proc/self/limits").read_text().partition("Max core file size")[2].split()[:2],
        "stolen": stolen,
        "signalled": signalled,
        "secret": attempt(lambda: Path(how["secret"]).read_text()),
        "planted": attempt(lambda: Path(how["plant"]).write_text("x")),
        "cache": attempt(lambda: sorted(path.name for path in Path(how["other_cache"]).iterdir())),
        "own_cache": attempt(lambda: Path(os.environ.get("HF_HOME", "/none/at/all")).mkdir(exist_ok=True)),
        "temporary": attempt(lambda: (Path(os.environ["TMPDIR"]) / "x").write_text("x")),
    }


def detach(mark: Path) -> None:
    """Leave behind a process with another parent, session and working directory, deaf to every polite signal."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        mark.write_text(str(os.getpid()))
        os.chdir("/")
        while True:
            time.sleep(60)
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.01)


def lay_traps(out: Path, target: str) -> None:
    """Put what leads elsewhere wherever the worker reads and writes."""
    (out / "adapter").mkdir()
    (out / "adapter" / "environ").symlink_to("/proc/self/environ")
    (out / "adapter" / "secret").symlink_to(target)
    os.mkfifo(out / "adapter" / "pipe")
    (out / "adapter" / "plain").write_text("plain")
    (out / "tensorboard").symlink_to(Path(target).parent)
    (out / "metrics.jsonl").symlink_to(target)
    (out / "report.html").symlink_to(f"{target}.html")
    (out / "rollouts").symlink_to(Path(target).parent)
    (out / "inputs").rename(out / "old-inputs")
    (out / "inputs").symlink_to(Path(target).parent)
    checkpoint = out / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").symlink_to(target)
    (checkpoint / "manifest.json").write_text(json.dumps({"files": [{"path": "weights", "sha256": "0" * 64}]}))
    (out / "checkpoints" / "step-000002").symlink_to(Path(target).parent)


def event(out: Path, kind: str, data: dict[str, object], step: int = 0) -> None:
    body = {"v": 1, "seq": 1, "epoch": 1, "type": kind, "step": step, "data": data, "time": "2026-01-01T00:00:00Z"}
    with (out / "events.jsonl").open("a") as file:
        file.write(json.dumps(body) + "\n")


def main() -> int:
    out = Path(sys.argv[sys.argv.index("--out") + 1]).resolve()
    how: dict[str, str] = json.loads(Path(sys.argv[1]).read_text())["metadata"]
    # While it loads, a smaller step would be no help.
    event(out, "status", {"phase": "loading" if how["attack"] == "memory" else "training"})
    found: dict[str, object] = {}
    match how["attack"]:
        case "look":
            found = look_around(how)
        case "detach":
            detach(out / "mark")
            found = {"pid": int((out / "mark").read_text())}
            event(out, "warning", {"code": "detached", "message": (out / "mark").read_text()})
        case "traps":
            lay_traps(out, how["target"])
            time.sleep(3)  # for rounds of the uploader
        case "memory":
            held = [bytearray(b"a" * 10**7) for _ in range(int(how["megabytes"]) // 10)]
            subprocess.run(["sleep", str(len(held) and 30)], check=False)
        case "guardian":
            detach(out / "mark")
            event(out, "warning", {"code": "detached", "message": (out / "mark").read_text()})
            with contextlib.suppress(PermissionError):
                os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        case _:
            return 16
    (out / "report.json").write_text(json.dumps(found))
    if how.get("stay"):
        time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
