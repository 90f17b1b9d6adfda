"""`python -m api`: the command line, for where the `grpo` script is not installed."""

from __future__ import annotations

from api.cli import ALL
from grpo_client.cli import main

if __name__ == "__main__":
    main(sets=ALL)
