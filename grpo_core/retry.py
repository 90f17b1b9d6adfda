"""Repeats a call that may succeed a moment later.

Owns the loop and the pauses between attempts. A wait that must notice a cancel is `jobs.worker.interruptible_retry`,
which takes its pauses from here; a grader's calls (`rewards.graders.calls`) are asynchronous and obey `Retry-After`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

AT_ONCE = 0.0


def retry(
    action: Callable[[], T],
    on: type[Exception],
    pauses: Iterable[float],
    *,
    note: Callable[[Exception, float], None] = lambda error, pause: None,  # noqa: ARG005
) -> T:
    """Call `action` until it returns, and sleep one of `pauses` (seconds) whenever it raises `on`.

    The attempt after the last pause may raise. `note` is called with each error and the pause that follows; an
    exception that it raises ends the attempts.
    """
    for pause in pauses:
        try:
            return action()
        except on as error:
            note(error, pause)
        time.sleep(pause)
    return action()


def backoff(first: float, longest: float) -> Iterator[float]:
    """Endless pauses in seconds, each twice the one before and at most `longest`."""
    pause = first
    while True:
        yield pause
        pause = min(2 * pause, longest)
