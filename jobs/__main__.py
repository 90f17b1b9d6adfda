"""`python -m jobs`: a worker, configured by the environment alone."""

from __future__ import annotations

import sys

from grpo_core.confinement.rights import hide_memory
from grpo_core.signals import end_on_term
from jobs import logs
from jobs.errors import JobsError
from jobs.settings import QueueSettings, StorageSettings
from jobs.worker.worker import Worker, WorkerSettings


def main() -> None:
    """Serve until TERM."""
    hide_memory()  # before secrets are read
    end_on_term()
    logs.configure()
    Worker(WorkerSettings(), StorageSettings(), QueueSettings()).serve()


if __name__ == "__main__":
    try:
        main()
    except JobsError as error:
        sys.exit(f"error: {error}")
