"""The report of a run as one HTML file, made from the files of the run folder, so that it can be read without the
service. Owns the content of the page; `run_files` reads, `charts` draws, and the text is in `page.html.j2`. Invariant:
the page is one file that loads nothing from anywhere, every text in it is escaped, and it stays below `MAX_BYTES`
whatever a run left behind, half a run included.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from grpo_core.report_page.run_files import EARLIER, RunFiles
from grpo_core.report_page.view import page_of
from grpo_core.retry import AT_ONCE, retry
from grpo_core.run_dir.layout import write_text

__all__ = ["EARLIER", "MAX_BYTES", "NAME", "steps_shown", "write"]

NAME: Final = "report.html"
MAX_BYTES: Final = 2_000_000


def write(folder: Path, *, status: str | None = None, error: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` into a run folder; returns its path.

    `status` and `error` say how the job ended if the run itself did not: a worker cancelled it, or saw it die. Raises
    `FileNotFoundError` if there is no `spec.json`.
    """

    def render() -> str:
        return _template().render(page_of(RunFiles(folder, status=status, error=error)))

    # A worker joins the files of single steps into parts meanwhile: those that are read may be gone.
    text = retry(render, FileNotFoundError, [AT_ONCE] * 4)
    write_text(folder / NAME, text.encode("utf-8", "replace").decode())
    return folder / NAME


def steps_shown(folder: Path) -> set[int]:
    """The steps whose completions the page of this run folder shows, if it has them; raises like `write`."""
    return RunFiles(folder, status=None, error=None).steps_shown


def _template() -> Any:
    # Imported here, because few processes make the page.
    jinja2 = import_module("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
