"""`python -m grpo_client`: the command line, for where the `grpo` script is not on the path."""

from __future__ import annotations

from grpo_client.cli import main

if __name__ == "__main__":
    main()
