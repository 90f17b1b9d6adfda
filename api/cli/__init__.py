"""The commands that run and administer the service; the client's package runs them as `grpo`.

Owns their table, which `grpo_client` finds by the entry point in pyproject.toml. Invariant: reading it imports nothing
of the service.
"""

from __future__ import annotations

from grpo_client.cli.commands import CLIENT, Command, CommandSet

SERVICE = CommandSet(
    title="The service",
    groups=(
        ("rewards", "Try the reward functions; needs no service."),
        ("keys", "Manage API keys: with the environment of the service, or else with your own key."),
        ("admin", "Administer the service; needs its environment, not a key."),
    ),
    commands=(
        Command("up", "api.cli.stack:up", "Start the whole service on this machine, in the background."),
        Command("down", "api.cli.stack:down", "Stop what `grpo up` started; stored data stays."),
        Command("api", "api.cli.processes:api", "Run the HTTP service in the foreground."),
        Command("worker", "api.cli.processes:worker", "Run a worker in the foreground."),
        Command("rewards list", "api.cli.rewards:list_rewards", "List the reward functions."),
        Command("rewards score", "api.cli.rewards:score", "Score completions from a JSONL file."),
        Command("keys create", "api.cli.keys:create", "Create an API key and print it."),
        Command("keys list", "api.cli.keys:list_keys", "List API keys."),
        Command("keys revoke", "api.cli.keys:revoke", "Revoke an API key permanently."),
        Command("admin retention", "api.cli.admin:retention", "Show what is past its retention."),
        Command("admin usage", "api.cli.admin:usage", "Show what every owner has used."),
        Command("admin seal", "api.cli.admin:seal", "Seal the secrets of webhooks in storage, and count them."),
        Command("admin rebuild", "api.cli.admin:rebuild", "Restore from storage what Valkey has lost."),
    ),
)

ALL = (CLIENT.without((SERVICE,)), SERVICE)
