"""Tries again after each pause, for the named error alone, and ends with what the last try raised."""

from __future__ import annotations

import time
from itertools import islice

import pytest

from grpo_core.retry import backoff, retry


class Flaky:
    """Fails a number of times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError(self.calls)
        return "answer"


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def test_a_call_that_works_is_made_once(waited: list[float]) -> None:
    flaky = Flaky(0)
    assert retry(flaky, ConnectionError, [1, 2]) == "answer"
    assert (flaky.calls, waited) == (1, [])


def test_a_call_that_fails_is_made_again_after_each_pause(waited: list[float]) -> None:
    noted: list[tuple[int, float]] = []
    flaky = Flaky(2)
    answer = retry(flaky, ConnectionError, [1, 2, 3], note=lambda error, pause: noted.append((error.args[0], pause)))
    assert (answer, waited, noted) == ("answer", [1, 2], [(1, 1), (2, 2)])


def test_the_last_error_is_raised(waited: list[float]) -> None:
    flaky = Flaky(9)
    with pytest.raises(ConnectionError, match="3"):
        retry(flaky, ConnectionError, [1, 2])
    assert waited == [1, 2]


def test_another_error_is_not_tried_again(waited: list[float]) -> None:
    flaky = Flaky(1)
    with pytest.raises(ConnectionError):
        retry(flaky, TimeoutError, [1, 2])
    assert (flaky.calls, waited) == (1, [])


def test_what_is_told_of_an_error_may_end_the_tries(waited: list[float]) -> None:
    def give_up(error: Exception, pause: float) -> None:
        raise RuntimeError(f"not in {pause} s") from error

    with pytest.raises(RuntimeError, match="not in 1 s"):
        retry(Flaky(1), ConnectionError, [1, 2], note=give_up)
    assert waited == []


def test_pauses_double_up_to_the_longest() -> None:
    assert list(islice(backoff(0.5, 3), 5)) == [0.5, 1, 2, 3, 3]
