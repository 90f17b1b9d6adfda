"""One HTML file that tells how a run went, from the run folder's files: for when the service is gone.

Owns what the page says and shows; `run_files` reads, `charts` draws, the words are in `page.html.j2`. Invariant: the
page is one file that loads nothing from anywhere, every text in it is escaped, and it stays below `MAX_BYTES`
whatever a run left behind, half a run included.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from grpo_core.report_page.run_files import EARLIER, RunFiles
from grpo_core.report_page.view import page_of
from grpo_core.runfolder import write_text

__all__ = ["EARLIER", "MAX_BYTES", "NAME", "steps_shown", "write"]

NAME: Final = "report.html"
MAX_BYTES: Final = 2_000_000
TRIES: Final = 5


def write(folder: Path, *, status: str | None = None, error: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` into a run folder; returns its path.

    `status` and `error` are how the job ended where another than the run itself says so: a worker that cancelled it, or
    saw it die. Raises `FileNotFoundError` if there is no `spec.json`.
    """
    for left in reversed(range(TRIES)):
        run = RunFiles(folder, status=status, error=error)
        try:
            text = _template().render(page_of(run))
        except FileNotFoundError:
            # A worker joins the files of single steps into parts meanwhile: those that are read may be gone.
            if not left:
                raise
        else:
            write_text(folder / NAME, text.encode("utf-8", "replace").decode())
            break
    return folder / NAME


def steps_shown(folder: Path) -> set[int]:
    """The steps of which the page of this run folder shows completions, if it has them; raises as `write`."""
    return RunFiles(folder, status=None, error=None).steps_shown


def _template() -> Any:
    # By name: the page is made by few, and the template engine is imported only then.
    jinja2 = import_module("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
