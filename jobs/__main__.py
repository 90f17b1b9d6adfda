"""`python -m jobs`: a worker, configured by the environment alone."""

from __future__ import annotations

from jobs import logs
from jobs.settings import QueueSettings, StorageSettings
from jobs.worker import Worker, WorkerSettings


def main() -> None:
    """Serve until TERM."""
    logs.configure()
    Worker(WorkerSettings(), StorageSettings(), QueueSettings()).serve()


if __name__ == "__main__":
    main()
