"""`python -m jobs.health`: exits 0 while the worker of this host is announced in Valkey; for a container's HEALTHCHECK.

A worker announces itself every ten seconds and is forgotten after a minute. So 1 tells of a worker that has gone, is
frozen, or cannot reach Valkey. Not for a liveness probe: training goes on through an outage of Valkey.
"""

from __future__ import annotations

import os
import socket
import sys

from jobs.errors import Unavailable
from jobs.ledger import Ledger
from jobs.registry import WorkerRegistry
from jobs.settings import QueueSettings


def main() -> int:
    """Look for this host's worker: by its name where it was given one, else by the host's."""
    name = os.environ.get("GRPO_WORKER_NAME")
    host = socket.gethostname()
    try:
        workers = WorkerRegistry(Ledger(QueueSettings())).all()
    except Unavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if any(worker.name == name if name else worker.name.rpartition("-")[0] == host for worker in workers):
        return 0
    sys.stderr.write(f"The worker {name or host} has not announced itself within the last minute.\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
