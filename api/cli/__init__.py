"""The command line, `grpo`: the table of commands, and what becomes of their errors.

A command is imported when it is run, so that `grpo rewards list` starts without an HTTP client and `grpo list`
without a server. Invariant: errors a user can mend are one message and an exit code, never a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App

from api.cli.output import CommandError, report
from grpo_core import __version__

app = App(
    name="grpo", version=__version__, help="Train LoRA adapters with GRPO: submit a job, follow it, fetch the result."
)

COMMANDS = (
    ("up", "stack:up", "Start the whole service on this machine, in the background."),
    ("down", "stack:down", "Stop what `grpo up` started; everything stored stays."),
    ("api", "processes:api", "Run the HTTP service in the foreground."),
    ("worker", "processes:worker", "Run a worker in the foreground."),
    ("submit", "submit:submit", "Submit a job, and follow it with --wait."),
    ("list", "jobs:list_jobs", "List your jobs, newest first."),
    ("show", "jobs:show", "Show one job."),
    ("watch", "watch:watch", "Follow a job to its end."),
    ("cancel", "jobs:cancel", "Cancel a job."),
    ("pause", "jobs:pause", "Pause a job: it saves a checkpoint and frees its GPU."),
    ("resume", "jobs:resume", "Put a paused job back into the queue."),
    ("delete", "jobs:delete", "Delete a job that has ended, with everything it left."),
    ("metrics", "metrics:metrics", "Print the metrics of each step of a job; --csv for a file."),
    ("download", "jobs:download", "Download what a job left and check every hash."),
    ("rollouts", "rollouts:rollouts", "Read a job's completions with their rewards, the worst or the best first."),
    ("compare", "compare:compare", "Compare two jobs: settings, rewards, results, and whether they can be compared."),
    ("report", "run_report:report", "Download the report of a job that has ended: one HTML file."),
    ("rewards list", "rewards:list_rewards", "List the reward functions."),
    ("rewards score", "rewards:score", "Score completions from a JSONL file."),
    ("datasets upload", "datasets:upload", "Upload a data set as JSONL."),
    ("datasets list", "datasets:list_datasets", "List your data sets, newest first."),
    ("datasets delete", "datasets:delete", "Delete a data set."),
    ("keys create", "keys:create", "Create an API key and print it."),
    ("keys list", "keys:list_keys", "List API keys."),
    ("keys revoke", "keys:revoke", "Revoke an API key for good."),
    ("admin rebuild", "admin:rebuild", "Put back what Valkey has lost, from storage."),
)
"""Words, function below `api.cli`, and a sentence: the help shows it without importing the function."""

_GROUPS = {
    "rewards": App(name="rewards", help="The reward functions; needs no service."),
    "datasets": App(name="datasets", help="Data sets of your own."),
    "keys": App(name="keys", help="API keys; needs the environment of the service, not a key."),
    "admin": App(name="admin", help="For who runs the service; needs its environment, not a key."),
}

for _words, _target, _help in COMMANDS:
    *_group, _name = _words.split()
    _parent = _GROUPS[_group[0]] if _group else app
    _parent.command(f"api.cli.{_target}", name=_name, help=_help)
for _app in _GROUPS.values():
    app.command(_app)
app.register_install_completion_command(help="Let the shell complete commands and options (bash, zsh, fish).")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words, result_action="return_value")
    except CommandError as error:
        code = report(error, as_json="--json" in words)
    except BrokenPipeError:
        # Whoever read our output has had enough, as `head` does. Python would complain once more while closing it.
        sys.stdout = None  # type: ignore[assignment]
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
