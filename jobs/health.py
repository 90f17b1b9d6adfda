"""`python -m jobs.health`: exits 0 while the worker of this host is announced in Valkey; for a container's HEALTHCHECK.

A worker announces itself every ten seconds, and its entry expires after a minute. So 1 means that the worker has ended,
is frozen, or cannot reach Valkey. Not for a liveness probe: training continues during an outage of Valkey.
"""

from __future__ import annotations

import os
import socket
import sys

from jobs.errors import Unavailable
from jobs.settings import QueueSettings
from jobs.store.job_store import JobStore
from jobs.store.workers import WorkerRegistry


def main() -> int:
    """Look for this host's worker: by its configured name, otherwise by the host's name."""
    name = os.environ.get("GRPO_WORKER_NAME")
    host = socket.gethostname()
    try:
        workers = WorkerRegistry(JobStore(QueueSettings())).all()
    except Unavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if any(worker.name == name if name else worker.name.rpartition("-")[0] == host for worker in workers):
        return 0
    sys.stderr.write(f"The worker {name or host} has not announced itself within the last minute.\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
