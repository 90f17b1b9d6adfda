"""A hub that is away is waited for; one that says no, or is turned off, is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_core import hub

ROOT = Path(__file__).resolve().parents[2]
FIND = """
import json, sys
from grpo_core import hub
from grpo_core.failures import failure_of
from grpo_core.models import find_model
from grpo_core.spec import parse_spec

hub.WAIT_SECONDS = (0.01, 0.01)
told = []
try:
    find_model(parse_spec({"model": {"name": "owner/model"}}).model, lambda code, message: told.append(code))
except Exception as error:
    print(json.dumps([failure_of(error).report.as_dict(), told]))
"""


class Fetch:
    """Fails in turn as it is told, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "rows"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def wrapped(cause: Exception) -> Exception:
    error = ValueError("could not be read")
    error.__cause__ = cause
    return error


def test_a_hub_that_comes_back_was_worth_waiting_for(waits: list[float]) -> None:
    told: list[str] = []
    fetch = Fetch(ConnectionError("reset"), wrapped(TimeoutError()))
    assert hub.patiently(fetch, lambda code, message: told.append(f"{code}: {message}")) == "rows"
    assert waits == [5, 15]
    assert told[0] == "hub_away: The hub does not answer; the next try is in 5 s."
    assert len(told) == 2


def test_a_hub_that_stays_away_is_not_waited_for_for_ever(waits: list[float]) -> None:
    with pytest.raises(ConnectionError, match="the fifth"):
        hub.patiently(Fetch(*[ConnectionError("no")] * 4, ConnectionError("the fifth")), lambda *_: None)
    assert waits == list(hub.WAIT_SECONDS)


def test_an_answer_that_says_no_is_an_answer(waits: list[float]) -> None:
    with pytest.raises(KeyError):
        hub.patiently(Fetch(KeyError("no such split")), lambda *_: pytest.fail("told"))
    assert waits == []


@pytest.mark.parametrize(
    ("environment", "failure", "told"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ("infra", "hub_unreachable", True), ["hub_away"] * 2),
        ({"HF_HUB_OFFLINE": "1"}, ("user_config", "hub_unreachable", False), []),
    ],
)
def test_a_model_of_a_hub_that_is_away_is_nobodys_mistake(
    tmp_path: Path, environment: dict[str, str], failure: tuple[str, str, bool], told: list[str]
) -> None:
    """By the real library. Where the operator turned the hub off, the model's name is one to mend."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRPO_"))}
    done = subprocess.run(
        [sys.executable, "-c", FIND],
        cwd=ROOT,
        env={**own, "HF_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    report, warned = json.loads(done.stdout)
    assert (report["class"], report["code"], report["retryable"]) == failure
    assert warned == told
    assert "GRPO_MODEL_DIR" in report["hint"]
