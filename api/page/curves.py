"""Small reward curves for the list of jobs: a few points of each, in one request for the whole list.

Owns the thinning and a cache, so that a list that is looked at all day reads each finished job once. Invariant: what
is cached is kept under the job's epoch and step, so a job that moves on is read again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Annotated, Any

from litestar import get
from litestar.params import QueryParameter

from api.auth import scope
from api.dependencies import Owner, Service
from jobs.errors import NotFound
from jobs.store.job import TERMINAL, JobRecord

POINTS = 48
"""Points of a curve: about as many as its width has room for."""
MAX_CACHED = 2000
MAX_JOBS = 100

Curve = list[tuple[int, float]]


class Curves:
    """The curves of one process; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cached: OrderedDict[str, tuple[tuple[int, int, bool], Curve]] = OrderedDict()

    def of(self, service: Any, record: JobRecord) -> Curve:
        """A job's mean total reward by step; raises what reading its metrics does."""
        # A step more or less of hundreds does not show: read again when a point's worth has passed.
        stride = max(1, record.total_steps // POINTS)
        mark = (record.epoch, record.step // stride, record.status in TERMINAL)
        with self._lock:
            found = self._cached.get(record.id)
            if found is not None and found[0] == mark:
                self._cached.move_to_end(record.id)
                return found[1]
        curve = thin([(m["step"], m["reward"]) for m in service.metrics(record.id, record.owner) if "reward" in m])
        with self._lock:
            self._cached[record.id] = (mark, curve)
            while len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        return curve


def thin(points: list[tuple[int, float]]) -> Curve:
    """At most `POINTS` points: means of equal stretches, each at its last step."""
    if len(points) <= POINTS:
        return [(step, round(reward, 4)) for step, reward in points]
    stretches = [points[i * len(points) // POINTS : (i + 1) * len(points) // POINTS] for i in range(POINTS)]
    return [(part[-1][0], round(sum(reward for _, reward in part) / len(part), 4)) for part in stretches]


_CURVES = Curves()


@get("/page/curves", opt=scope("jobs:read"), include_in_schema=False, sync_to_thread=True)
def reward_curves(
    owner: Owner, service: Service, job: Annotated[list[str], QueryParameter(max_items=MAX_JOBS)]
) -> dict[str, Curve]:
    """The curves of some of the caller's jobs by id; ids that are not there are left out."""
    found: dict[str, Curve] = {}
    for job_id in job:
        try:
            record = service.get(job_id, owner)
        except NotFound:
            continue
        if record.step:
            found[job_id] = _CURVES.of(service, record)
    return found
