"""The names of queues: one for each resource class and spec format.

Owns in which queue a job waits and which queues a worker serves. Invariant: no worker listens to a queue with jobs that
it may be unable to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from grpo_core.ranks import MAX_RANKS
from grpo_core.spec import SPEC_FORMAT, JobSpec

MEMORY_CLASSES_GB = (16, 24, 40, 48, 80, 96, 141, 192, 288, 1024)
"""Memory sizes of GPUs on the market. A request is rounded up to one of them, so that there are few queues."""


_HOSTS = ".hosts"
"""Ends the queues of jobs that ask for several hosts, however many: only workers in a Ray cluster serve them."""
_FORMAT_SUFFIX = re.compile(r"\.f\d+$")


def queue_for(spec: JobSpec, prefix: str = "grpo") -> str:
    """Return the queue of a job's resource class, for workers that can read its spec."""
    needed = spec.needed_format()
    return _class_queue(spec, prefix) + (f".f{needed}" if needed > 1 else "")


def _class_queue(spec: JobSpec, prefix: str) -> str:
    resources = spec.resources
    hosts = _HOSTS if resources.hosts > 1 else ""
    if resources.gpus == 0:
        return f"{prefix}.cpu{hosts}"
    memory = resources.min_gpu_memory_gb
    suffix = "" if memory is None else f".{_memory_class(memory)}gb"
    return f"{prefix}.gpu{resources.gpus}{suffix}{hosts}"


def with_formats(queues: Iterable[str]) -> list[str]:
    """Return these queues of resource classes, each with its queues of later spec formats that this release reads.

    Workers of earlier releases listen to the first ones alone, so they get no job that they cannot read.
    """
    return [
        f"{queue}.f{number}" if number > 1 else queue
        for queue in queues
        for number in range(1, 2 if _FORMAT_SUFFIX.search(queue) else SPEC_FORMAT + 1)
    ]


def any_format(queue: str) -> str:
    """Return the queue of the same resource class to which workers of every release listen."""
    return _FORMAT_SUFFIX.sub("", queue)


def queues_served(
    gpu_memory_gb: float | None, prefix: str = "grpo", *, gpus: int = 1, hosts: bool = False
) -> list[str]:
    """Return the queues of every class that `gpus` GPUs with `gpu_memory_gb` (10^9 bytes) each can run.

    None stands for a host without a GPU. A worker runs one job at a time, with as many GPUs as the job requests; with
    `hosts` also jobs of several hosts, of which it is the first.
    """
    classes = [size for size in MEMORY_CLASSES_GB if size <= (gpu_memory_gb or 0)]
    alone = (
        [f"{prefix}.cpu"]
        if gpu_memory_gb is None
        else [
            f"{prefix}.gpu{count}{suffix}"
            for count in range(min(gpus, MAX_RANKS), 0, -1)
            for suffix in (*(f".{size}gb" for size in reversed(classes)), "")
        ]
    )
    return [queue + end for queue in alone for end in ((_HOSTS, "") if hosts else ("",))]


def _memory_class(gigabytes: int) -> int:
    return next((size for size in MEMORY_CLASSES_GB if size >= gigabytes), MEMORY_CLASSES_GB[-1])
