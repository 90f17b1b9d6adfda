"""The command line, `grpo`: finds the command, runs it, and reports errors.

A command is imported when it runs, so `grpo list` starts without the libraries of `grpo watch`. Invariant: an error
that a user can fix is one message and an exit code, never a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpo_client
from grpo_client.cli import commands
from grpo_client.cli.commands import CommandSet

if TYPE_CHECKING:
    from cyclopts import App

DESCRIPTION = "Train LoRA adapters with GRPO: submit a job, follow it, fetch the result."
HELP = ([], ["--help"], ["-h"])


def main(arguments: Sequence[str] | None = None, sets: tuple[CommandSet, ...] = ()) -> None:
    """Run one command and exit; `sets` stands in for what is installed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not sets:
        # The client's own commands need no search through installed packages.
        own = commands.CLIENT.only(words[0]) if words and words[0] not in commands.REPLACED else None
        sets = (own,) if own and own.commands else commands.installed()
    try:
        code = _run(words, sets)
    except BrokenPipeError:
        # The reader of our output has stopped, like `head`. Python would report it again while closing the pipe.
        sys.stdout = None  # type: ignore[assignment]
        code = 0
    sys.exit(code)


def _require(word: str, sets: tuple[CommandSet, ...]) -> None:
    """Say where the service's commands come from, if they are not installed."""
    if sets == (commands.CLIENT,) and not word.startswith("-") and not commands.CLIENT.has(word):
        from grpo_client.cli.output import EXIT_REFUSED, CommandError

        raise CommandError(
            f"There is no command {word!r} here; grpo --help lists all. The commands that run a service, "
            "such as grpo up, come with a checkout of its repository: pip install ./grpo_client '.[api,local]'.",
            EXIT_REFUSED,
        )


def make_app(sets: tuple[CommandSet, ...]) -> App:
    """The parser of these commands."""
    from cyclopts import App

    app = App(name="grpo", version=lambda: grpo_client.__version__, help=DESCRIPTION, help_format="plaintext")
    for each in sets:
        groups = {name: App(name=name, help=sentence) for name, sentence in each.groups}
        for command in each.commands:
            *group, name = command.words.split()
            parent = groups[group[0]] if group else app
            parent.command(command.function, name=name, help=command.help)
        for group in groups.values():
            app.command(group)
    return app


def _run(words: list[str], sets: tuple[CommandSet, ...]) -> int:
    if words in HELP:
        sys.stdout.write(commands.overview(sets, DESCRIPTION) + "\n")
        return 0
    from grpo_client.cli.output import CommandError, report

    try:
        _require(words[0], sets)
        app = make_app(sets)
        if words[0] == commands.INSTALL_COMPLETION:
            app.register_install_completion_command(words[0], help=commands.OPTIONS[words[0]])
        code = app(words, result_action="return_value")
    except CommandError as error:
        code = report(error, as_json="--json" in words)
    return code if isinstance(code, int) else 0
