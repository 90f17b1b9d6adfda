"""A hub that is away is waited for; one that says no, or is turned off, is not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from grpo_core import hub
from grpo_core.errors import JobFailure
from grpo_core.failures import failure_of
from grpo_core.models import MODEL_DIR_VARIABLE, find_model
from grpo_core.spec import parse_spec

ROOT = Path(__file__).resolve().parents[2]
FIND = """
import json, sys
from grpo_core import hub
from grpo_core.failures import failure_of
from grpo_core.datasets import load_rows
from grpo_core.models import find_model
from grpo_core.spec import parse_spec

hub.WAIT_SECONDS = (0.01, 0.01)
told, spec = [], parse_spec({"model": {"name": "owner/model"}})
tell = lambda code, message: told.append(code)
try:
    load_rows(spec.data, None, warn=tell) if sys.argv[1] == "data" else find_model(spec.model, tell)
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


AWAY = {"HF_ENDPOINT": "http://127.0.0.1:9"}
OFF = {"HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("what", "environment", "failure", "told"),
    [
        ("model", AWAY, ("infra", "hub_unreachable", True), ["hub_away"] * 2),
        ("model", OFF, ("user_config", "hub_unreachable", False), []),
        ("data", OFF, ("dataset", "hub_unreachable", False), []),
    ],
)
def test_a_hub_that_is_away_is_nobodys_mistake_and_one_that_is_off_is_not_waited_for(
    tmp_path: Path, what: str, environment: dict[str, str], failure: tuple[str, str, bool], told: list[str]
) -> None:
    """By the real libraries."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRPO_"))}
    done = subprocess.run(
        [sys.executable, "-c", FIND, what],
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
    assert ("GRPO_MODEL_DIR" if what == "model" else "GRPO_DATASET_DIR") in report["hint"]


@pytest.mark.parametrize("error", [httpx.ReadError("cut"), httpx.RemoteProtocolError("half"), httpx.ProxyError("no")])
def test_a_connection_that_breaks_in_a_download_is_the_hub_being_away(
    error: Exception, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    monkeypatch.delenv(MODEL_DIR_VARIABLE, raising=False)
    with pytest.raises(JobFailure) as failure:
        find_model(parse_spec({"model": {"name": "owner/model"}}).model, lambda *_: None)
    assert (failure.value.report.failure_class, failure.value.report.code) == ("infra", "hub_unreachable")
    assert waits == list(hub.WAIT_SECONDS)


def test_a_full_disk_in_a_download_is_no_hub_being_away(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    monkeypatch.delenv(MODEL_DIR_VARIABLE, raising=False)
    with pytest.raises(OSError, match="No space left") as failure:
        find_model(parse_spec({"model": {"name": "owner/model"}}).model, lambda *_: None)
    assert failure_of(failure.value).report.code == "disk_full"
    assert waits == []
