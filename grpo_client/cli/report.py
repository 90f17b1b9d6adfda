"""`grpo report`: download the report of a job."""

from __future__ import annotations

from pathlib import Path

from grpo_client.cli.output import AsJson, CommandError, check_place, connected, print_json, say
from grpo_client.cli.text import count

ARTIFACT = "report.html"


def report(job_id: str, file: Path | None = None, /, *, json: AsJson = False) -> None:
    """Download the report of a job that has ended: one HTML file that opens without the service.

    Parameters
    ----------
    file
        Where to write it, in an existing folder; default report-JOB_ID.html.
    """
    target = file or Path(f"report-{Path(job_id).name}.html")
    check_place(target)
    with connected() as client:
        try:
            artifact = client.download_file(job_id, ARTIFACT, target)
        except OSError as error:
            raise CommandError(f"{target} cannot be written: {error.strerror or error}.") from error
    if json:
        names = ("key", "size", "sha256")
        print_json({"job": job_id, "file": str(target), **{name: artifact[name] for name in names}})
        return
    say(f"{target}: {count(artifact.size, 'byte')}; open it in a browser.")
