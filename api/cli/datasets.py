"""`grpo datasets upload`, `list` and `delete`: JSONL files of your own in the service."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from api.cli.output import EXIT_REFUSED, AsJson, CommandError, Yes, confirm, connected, note, print_json, say
from api.cli.progress import show_bytes
from api.cli.text import count

DEFAULT_COLUMNS = ("question", "answer")


def upload(file: Path, /, *, name: str | None = None, json: AsJson = False) -> None:
    """Upload a data set, one JSON object with a question and an answer a line.

    Parameters
    ----------
    name
        A label for people.
    """
    with connected() as client, show_bytes(sys.stderr if json else sys.stdout, lines=False) as on_bytes:
        try:
            dataset = client.upload_dataset(file, name=name, on_progress=on_bytes)
        except OSError as error:
            raise CommandError(f"{file} cannot be read: {error.strerror or error}.", EXIT_REFUSED) from error
    if json:
        print_json(dataset)
        return
    say(f"{dataset['id']}: {count(dataset['rows'], 'row')} with the columns {', '.join(dataset['columns'])}")
    say(f"Use it: --set data.source=upload --set data.dataset={dataset['id']}{_columns(dataset)}")


def list_datasets(*, limit: int = 20, cursor: str | None = None, json: AsJson = False) -> None:
    """List your data sets, newest first.

    Parameters
    ----------
    limit
        Data sets on a page, at most 100.
    cursor
        Where the page before said that the next one starts.
    """
    with connected() as client:
        page = client.datasets(limit=limit, cursor=cursor)
    if json:
        print_json(page)
        return
    if not page["data"]:
        note("No data sets yet: upload one with grpo datasets upload.")
    for dataset in page["data"]:
        size = f"{count(dataset['rows'], 'row'):>14}  {count(dataset['bytes'], 'byte'):>20}"
        say("  ".join([dataset["id"], size, ",".join(dataset["columns"]), dataset["name"] or ""]).rstrip())
    if page["next_cursor"]:
        say(f"More: grpo datasets list --cursor {page['next_cursor']}")


def delete(dataset_id: str, /, *, yes: Yes = False, json: AsJson = False) -> None:
    """Delete a data set that no unfinished job names. There is no way back; jobs keep the completions they drew."""
    if not yes:
        confirm(f"Delete {dataset_id}?")
    with connected() as client:
        client.delete_dataset(dataset_id)
    if json:
        print_json({"dataset": dataset_id, "deleted": True})
    else:
        say(f"{dataset_id}: deleted")


def _columns(dataset: dict[str, Any]) -> str:
    """What else a job must say where the columns have other names than the service expects."""
    names = dataset["columns"]
    missing = [name for name in DEFAULT_COLUMNS if name not in names]
    others = [name for name in names if name not in DEFAULT_COLUMNS]
    # As many as are missing: the first is taken for the question. Of more, people choose.
    meant = dict(zip(missing, others, strict=True)) if len(missing) == len(others) else {}
    return "".join(f" --set data.{name}_column={shlex.quote(meant.get(name, 'COLUMN'))}" for name in missing)
