"""`grpo datasets upload`, `list`, `show`, `rows` and `delete`: your data in the service."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, Yes, confirm, connected, note, print_json, say
from grpo_client.cli.progress import show_bytes
from grpo_client.cli.text import count
from grpo_client.results import Dataset

DEFAULT_COLUMNS = ("question", "answer")
CHAT_COLUMN = "messages"


def upload(file: Path, /, *, name: str | None = None, json: AsJson = False) -> None:
    """Upload a data set: rows with a question and an answer, or OpenAI's chats.

    Parameters
    ----------
    file
        JSON lines, or by its suffix .csv, .tsv, .parquet or .json (a list of objects).
    name
        A label.
    """
    with connected() as client, show_bytes(sys.stderr if json else sys.stdout, lines=False) as on_bytes:
        try:
            dataset = client.upload_dataset(file, name=name, on_progress=on_bytes)
        except OSError as error:
            raise CommandError(f"{file} cannot be read: {error.strerror or error}.", EXIT_REFUSED) from error
    if json:
        print_json(dataset)
        return
    shown = [*dataset.columns, *(name for name in dataset.chats or [] if name not in dataset.columns)]
    say(f"{dataset.id}: {count(dataset.rows, 'row')} with the columns {', '.join(shown)}")
    say(f"Use it: --set data.source=upload --set data.dataset={dataset.id}{_columns(dataset)}")


def list_datasets(
    *, limit: int = 20, cursor: str | None = None, owner: str | None = None, json: AsJson = False
) -> None:
    """List your data sets, newest first.

    Parameters
    ----------
    owner
        For operators: this owner's data sets; '*': those of all owners.
    limit
        Data sets per page, at most 100.
    cursor
        Where the next page starts, as printed by the previous one.
    """
    with connected() as client:
        page = client.datasets(limit=limit, cursor=cursor, owner=owner)
    if json:
        print_json(page)
        return
    if not page.data:
        note("No data sets yet: upload one with grpo datasets upload.")
    for dataset in page.data:
        size = f"{count(dataset.rows, 'row'):>14}  {count(dataset.bytes, 'byte'):>20}"
        whose = [f"{dataset.owner:<16}"] if owner else []
        say("  ".join([dataset.id, *whose, size, ",".join(dataset.columns), dataset.name or ""]).rstrip())
    if page.next_cursor:
        say(f"More: grpo datasets list --cursor {page.next_cursor}" + (f" --owner '{owner}'" if owner else ""))


def show(dataset_id: str, /, *, json: AsJson = False) -> None:
    """Show a data set and the jobs that use it."""
    with connected() as client:
        dataset = client.dataset(dataset_id)
        jobs = client.dataset_jobs(dataset_id, limit=100)
    if json:
        print_json({**dataset, "jobs": list(jobs.data)})
        return
    say(f"{dataset.id}  {dataset.name or ''}".rstrip())
    say(f"owner    {dataset.owner}, {dataset.created_at:%Y-%m-%d %H:%M} UTC")
    say(f"size     {count(dataset.rows, 'row')}, {count(dataset.bytes, 'byte')}")
    say(f"columns  {', '.join(dataset.columns)}")
    say(f"sha256   {dataset.sha256}")
    for job in jobs.data:
        say(f"used by  {job.id}  {job.status:<10}  {job.name or ''}".rstrip())
    if jobs.next_cursor:
        say("used by  further jobs")


def rows(dataset_id: str, /, *, limit: int = 20, cursor: str | None = None, json: AsJson = False) -> None:
    """Print rows of a data set as JSON lines.

    Parameters
    ----------
    limit
        Rows per page, at most 100.
    cursor
        Where the next page starts, as printed by the previous one.
    """
    with connected() as client:
        page = client.dataset_rows(dataset_id, limit=limit, cursor=cursor)
    if json:
        print_json(page)
        return
    for row in page.data:
        print_json(row["values"])
    if page.next_cursor:
        note(f"More: grpo datasets rows {dataset_id} --cursor {page.next_cursor}")


def delete(dataset_id: str, /, *, yes: Yes = False, json: AsJson = False) -> None:
    """Delete a data set that no unfinished job names. This cannot be undone; jobs keep their completions."""
    if not yes:
        confirm(f"Delete {dataset_id}?")
    with connected() as client:
        client.delete_dataset(dataset_id)
    if json:
        print_json({"dataset": dataset_id, "deleted": True})
    else:
        say(f"{dataset_id}: deleted")


def _columns(dataset: Dataset) -> str:
    """The settings a job needs if the columns do not have the default names."""
    names = dataset.columns
    chats = dataset.chats or []
    if chats and DEFAULT_COLUMNS[0] not in names:
        other = "" if CHAT_COLUMN in chats else f" --set data.question_column={shlex.quote(chats[0])}"
        return f" --set data.format=messages{other}"
    missing = [name for name in DEFAULT_COLUMNS if name not in names]
    others = [name for name in names if name not in DEFAULT_COLUMNS]
    # Only if exactly the missing number is left; the first is taken as the question. Otherwise users choose.
    meant = dict(zip(missing, others, strict=True)) if len(missing) == len(others) else {}
    return "".join(f" --set data.{name}_column={shlex.quote(meant.get(name, 'COLUMN'))}" for name in missing)
