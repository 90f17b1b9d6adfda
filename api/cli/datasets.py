"""`grpo datasets upload`: send a JSONL file to the service."""

from __future__ import annotations

import sys
from pathlib import Path

from api.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, print_json, say
from api.cli.progress import show_bytes


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
    say(f"{dataset['id']}: {dataset['rows']} rows with the columns {', '.join(dataset['columns'])}")
    say(f"Use it: --set data.source=upload --set data.dataset={dataset['id']}")
