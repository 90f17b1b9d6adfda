"""The table of commands: the client's own, and those that other installed packages add by entry point.

Owns which module has a command, and the list in `grpo --help`. Invariant: reading the table imports no command.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

ENTRY_POINTS = "grpo_client.commands"
"""The group in which a package names its `CommandSet`."""

INSTALL_COMPLETION = "--install-completion"
OPTIONS = {
    "--help": "Show this, or the options of a command.",
    "--version": "Show the version.",
    INSTALL_COMPLETION: "Let the shell complete commands and options (bash, zsh, fish).",
}
"""The options of `grpo` itself, with what they do."""
REPLACED = frozenset({"keys"})
"""First words of the client's commands in whose place another package may have its own."""


class Command(NamedTuple):
    """One command of `grpo`."""

    words: str
    """What a user types after `grpo`."""
    function: str
    """`module:function`, imported when the command runs."""
    help: str

    @property
    def first(self) -> str:
        """The first of its words."""
        return self.words.split()[0]


@dataclass(frozen=True, slots=True)
class CommandSet:
    """The commands of one package."""

    title: str
    """Their heading in `grpo --help`."""
    commands: tuple[Command, ...]
    groups: tuple[tuple[str, str], ...] = ()
    """First words that several commands share, each with a description."""

    def has(self, word: str) -> bool:
        """Whether one of these commands begins with `word`."""
        return any(command.first == word for command in self.commands)

    def only(self, word: str) -> Self:
        """The commands that begin with `word`: a parser of all of them takes longer to build than most commands run."""
        commands = tuple(command for command in self.commands if command.first == word)
        return replace(self, commands=commands, groups=tuple(group for group in self.groups if group[0] == word))

    def without(self, others: tuple[CommandSet, ...]) -> Self:
        """The commands that none of these sets has too."""
        first = {command.first for each in others for command in each.commands}
        commands = tuple(command for command in self.commands if command.first not in first)
        return replace(self, commands=commands, groups=tuple(group for group in self.groups if group[0] not in first))


CLIENT = CommandSet(
    title="Jobs and data",
    groups=(
        ("datasets", "Manage data sets."),
        ("graders", "Try graders before a job uses them."),
        ("keys", "Manage API keys."),
        ("webhooks", "Have events of your jobs posted to a URL."),
        ("workers", "Look at the fleet, and drain workers."),
    ),
    commands=(
        Command("submit", "grpo_client.cli.submit:submit", "Submit a job, and follow it with --wait; or a sweep."),
        Command("try", "grpo_client.cli.trial:run_trial", "See whether a job would learn anything, before training."),
        Command("chat", "grpo_client.cli.chat:chat", "Talk to a job's model; serves it if nothing does."),
        Command("serve", "grpo_client.cli.chat:serve", "Serve a job's adapters, for chat and OpenAI's SDK."),
        Command("list", "grpo_client.cli.jobs:list_jobs", "List your jobs, newest first."),
        Command("show", "grpo_client.cli.jobs:show", "Show one job."),
        Command("watch", "grpo_client.cli.watch:watch", "Follow a job to its end."),
        Command("cancel", "grpo_client.cli.jobs:cancel", "Cancel jobs, or a group."),
        Command("pause", "grpo_client.cli.jobs:pause", "Pause jobs: each saves a checkpoint and frees its GPU."),
        Command("resume", "grpo_client.cli.jobs:resume", "Queue paused jobs again."),
        Command("priority", "grpo_client.cli.jobs:priority", "Change the priority of a job that waits."),
        Command("usage", "grpo_client.cli.usage:usage", "Show your GPU-hours, storage and jobs, and their limits."),
        Command("delete", "grpo_client.cli.jobs:delete", "Delete jobs that have ended, with all their files."),
        Command(
            "metrics", "grpo_client.cli.metrics:metrics", "Print the metrics of each step of a job; --csv for a file."
        ),
        Command("download", "grpo_client.cli.jobs:download", "Download a job's files and check every hash."),
        Command("export", "grpo_client.cli.export:export", "Take a model away: merged, as GGUF, or to a hub."),
        Command(
            "rollouts",
            "grpo_client.cli.rollouts:rollouts",
            "Read a job's completions with their rewards, lowest or highest first.",
        ),
        Command(
            "compare",
            "grpo_client.cli.compare:compare",
            "Compare jobs, or the jobs of a group: settings, rewards, results, mean and spread.",
        ),
        Command(
            "report",
            "grpo_client.cli.report:report",
            "Download the report of a job that has ended: one HTML file.",
        ),
        Command("graders run", "grpo_client.cli.graders:run", "Score completions with a grader, or a spec's rewards."),
        Command("graders validate", "grpo_client.cli.graders:validate", "Check a grader."),
        Command("workers list", "grpo_client.cli.workers:list_workers", "List the workers of the fleet."),
        Command("workers drain", "grpo_client.cli.workers:drain", "Let a worker take no new job; for operators."),
        Command("workers undrain", "grpo_client.cli.workers:undrain", "Let a drained worker take jobs again."),
        Command(
            "import-openai",
            "grpo_client.cli.openai_jobs:import_job",
            "Turn a reinforcement job of OpenAI or Azure into a job spec.",
        ),
        Command(
            "export-openai", "grpo_client.cli.openai_jobs:export_job", "Turn a job spec into a job for OpenAI's SDK."
        ),
        Command("datasets upload", "grpo_client.cli.datasets:upload", "Upload a data set: JSONL, CSV, TSV or Parquet."),
        Command("datasets list", "grpo_client.cli.datasets:list_datasets", "List your data sets, newest first."),
        Command("datasets show", "grpo_client.cli.datasets:show", "Show a data set and the jobs that use it."),
        Command("datasets rows", "grpo_client.cli.datasets:rows", "Print rows of a data set."),
        Command("datasets delete", "grpo_client.cli.datasets:delete", "Delete a data set."),
        Command("keys create", "grpo_client.cli.keys:create", "Create an API key and print it."),
        Command("keys list", "grpo_client.cli.keys:list_keys", "List API keys."),
        Command("keys revoke", "grpo_client.cli.keys:revoke", "Revoke an API key permanently."),
        Command("webhooks add", "grpo_client.cli.webhooks:add", "Register a webhook, and print its secret once."),
        Command("webhooks list", "grpo_client.cli.webhooks:list_webhooks", "List your webhooks."),
        Command("webhooks test", "grpo_client.cli.webhooks:send_test", "Send a test event, and enable the webhook."),
        Command("webhooks deliveries", "grpo_client.cli.webhooks:deliveries", "Show what was sent, with the status."),
        Command("webhooks remove", "grpo_client.cli.webhooks:remove", "Delete a webhook."),
    ),
)


def installed() -> tuple[CommandSet, ...]:
    """All commands: the client's, then those that other packages add."""
    from importlib.metadata import entry_points  # here, because it takes 10 ms that `grpo list` does not need

    found = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    sets: tuple[CommandSet, ...] = tuple(point.load() for point in found)
    return (CLIENT.without(sets), *sets)


def overview(sets: tuple[CommandSet, ...], description: str) -> str:
    """The text of `grpo --help`."""
    width = max(len(command.words) for commands in sets for command in commands.commands)
    lines = [description, "", "Usage: grpo COMMAND [ARGUMENTS] [OPTIONS]"]
    for commands in sets:
        lines += ["", f"{commands.title}:", *(f"  {c.words:<{width}}  {c.help}" for c in commands.commands)]
    width = max(map(len, OPTIONS))
    return "\n".join([*lines, "", "Options:", *(f"  {name:<{width}}  {text}" for name, text in OPTIONS.items())])
