"""Threads and places that owners share: nobody's fill keeps the others waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import copy_context

import pytest

from api.places import Places
from api.problems import ApiError
from api.threads import OWNER, FairThreads
from tests.clock import patience


@pytest.fixture
def threads() -> Iterator[FairThreads]:
    with FairThreads(4, per_owner=2, waiting=5, name="test") as found:
        yield found


def submit(threads: FairThreads, owner: str, call: Callable[[], object]) -> Future[object]:
    def as_owner() -> Future[object]:
        OWNER.set(owner)
        return threads.submit(call)

    return copy_context().run(as_owner)


def test_slow_calls_of_one_owner_leave_threads_for_the_others(threads: FairThreads) -> None:
    release = threading.Event()
    slow = [submit(threads, "ann", release.wait) for _ in range(7)]
    assert [submit(threads, "bob", lambda: 1).result(timeout=patience(5)) for _ in range(20)] == [1] * 20
    release.set()
    assert all(call.result(timeout=patience(5)) for call in slow)


def test_owners_take_turns(threads: FairThreads) -> None:
    release = threading.Event()
    blocked = [submit(threads, owner, release.wait) for owner in ("x", "x", "y", "y")]
    order: list[str] = []
    calls = [submit(threads, owner, lambda owner=owner: order.append(owner)) for owner in ("ann",) * 4 + ("bob", "eve")]
    release.set()
    for call in (*blocked, *calls):
        call.result(timeout=patience(5))
    assert {*order[:4]} == {"ann", "bob", "eve"}


def test_what_one_owner_has_waiting_is_bounded(threads: FairThreads) -> None:
    release = threading.Event()
    calls = [submit(threads, "ann", release.wait) for _ in range(2 + 5)]
    with pytest.raises(ApiError) as refused:
        submit(threads, "ann", release.wait)
    assert (refused.value.code, refused.value.headers) == ("too_many_requests", {"Retry-After": "1"})
    calls.append(submit(threads, "bob", release.wait))
    release.set()
    assert all(call.result(timeout=patience(5)) for call in calls)


def test_an_error_is_its_callers(threads: FairThreads) -> None:
    with pytest.raises(ZeroDivisionError):
        submit(threads, "ann", lambda: 1 // 0).result(timeout=patience(5))


def test_calls_that_wait_at_the_end_are_cancelled() -> None:
    threads, release = FairThreads(1, per_owner=1, name="test"), threading.Event()
    running, waiting = submit(threads, "ann", release.wait), submit(threads, "ann", release.wait)
    threads.shutdown(wait=False)
    release.set()
    assert running.result(timeout=patience(5))
    with pytest.raises(BaseException):  # noqa: B017 - CancelledError is none of Exception's
        waiting.result(timeout=patience(5))


def test_places_are_an_owners_and_everyones() -> None:
    places = Places("too_many_streams", "event streams", per_owner=2, in_all=3, settings=("MINE", "ALL"))
    mine = [places.take("ann"), places.take("ann")]
    with pytest.raises(ApiError, match=r"You have 2 event streams.*MINE"):
        places.take("ann")
    with places.take("bob"), pytest.raises(ApiError, match=r"3 event streams are open here.*ALL"):
        places.take("eve")
    mine[0].release()
    mine[0].release()
    mine.append(places.take("ann"))
    with pytest.raises(ApiError):
        places.take("ann")
    mine.clear()  # a place that nobody can release any more is free
    assert [places.take("ann"), places.take("ann")]
