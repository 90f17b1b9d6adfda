"""A hub that is away is waited for; one that says no, or is turned off, is not."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from grpo_core import hub
from grpo_core.datasets import DATASET_DIR_VARIABLE, DatasetUnreachableError, load_rows
from grpo_core.errors import JobFailure
from grpo_core.hardware.models import MODEL_DIR_VARIABLE, find_model
from grpo_core.spec import parse_spec
from grpo_core.training.classify_error import failure_of

ROOT = Path(__file__).resolve().parents[2]
FIND = """
import json, sys
from grpo_core import hub
from grpo_core.training.classify_error import failure_of
from grpo_core.datasets import load_rows
from grpo_core.hardware.models import find_model
from grpo_core.spec import parse_spec

hub.WAIT_SECONDS, hub.TIMEOUT_SECONDS = (0.01, 0.01), 0.5
told, spec = [], parse_spec({"model": {"name": "owner/model"}})
tell = lambda code, message: told.append([code, message])
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
    """What was waited, none of it truly, on a host that knows the hub's name."""
    waited: list[float] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def patiently(fetch: Fetch, warn: hub.Warn) -> str:
    return hub.patiently(fetch, warn, what="the thing", otherwise="bring it")


def wrapped(cause: Exception) -> Exception:
    error = ValueError("could not be read")
    error.__cause__ = cause
    return error


def test_a_hub_that_comes_back_was_worth_waiting_for(waits: list[float]) -> None:
    told: list[str] = []
    fetch = Fetch(ConnectionError("reset"), wrapped(TimeoutError()))
    assert patiently(fetch, lambda code, message: told.append(f"{code}: {message}")) == "rows"
    assert waits == [5, 15]
    assert told[0] == (
        "hub_away: The run waits for the thing: the Hugging Face hub did not answer. The next try is in 5 s. "
        "If this worker has no internet, bring it; with HF_HUB_OFFLINE=1 it does not wait."
    )
    assert len(told) == 2


def test_a_hub_that_stays_away_is_not_waited_for_for_ever(waits: list[float]) -> None:
    with pytest.raises(ConnectionError, match="the fourth"):
        patiently(Fetch(*[ConnectionError("no")] * 3, ConnectionError("the fourth")), lambda *_: None)
    assert waits == list(hub.WAIT_SECONDS)


def test_tries_that_take_their_time_count_towards_the_wait(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    """A hub that accepts connections and says nothing: each try takes 20 seconds."""
    clock = 0.0

    class Silent(Fetch):
        def __call__(self) -> str:
            nonlocal clock
            clock += 20
            return super().__call__()

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        waits.append(seconds)

    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(TimeoutError):
        patiently(Silent(*[TimeoutError()] * 9), lambda *_: None)
    assert (waits, clock) == ([5, 15], 80)


TOLD = {
    "model": ("the model 'owner/model'", "$GRPO_MODEL_DIR", "HF_HUB_OFFLINE=1"),
    "data": ("the data set 'owner/data'", "$GRPO_DATASET_DIR", "HF_HUB_OFFLINE=1"),
}


@pytest.mark.parametrize("what", ["model", "data"])
@pytest.mark.parametrize(
    ("code", "proxies", "waited"),
    [
        (socket.EAI_NONAME, {}, hub.WAIT_SECONDS[:1]),
        (socket.EAI_NONAME, {"no": "127.0.0.1,localhost"}, hub.WAIT_SECONDS[:1]),
        (socket.EAI_NONAME, {"https": "http://proxy:3128"}, hub.WAIT_SECONDS),
        (socket.EAI_AGAIN, {}, hub.WAIT_SECONDS),
    ],
)
def test_a_hub_that_no_name_server_knows_is_not_waited_for_as_one_whose_network_is_away(
    waits: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    code: int,
    proxies: dict[str, str],
    waited: tuple[float, ...],
) -> None:
    """By the real libraries."""

    def look_up(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "no address")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(hub, "getproxies", lambda: proxies)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for variable in (MODEL_DIR_VARIABLE, DATASET_DIR_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    told: list[str] = []
    spec = parse_spec({"model": {"name": "owner/model"}, "data": {"dataset": "owner/data"}})

    def warn(_code: str, message: str) -> None:
        told.append(message)

    with pytest.raises((JobFailure, DatasetUnreachableError)) as caught:
        find_model(spec.model, warn) if what == "model" else load_rows(spec.data, tmp_path, warn=warn)
    assert len(told) == len(waited)
    assert all(name in message for message in told for name in TOLD[what])
    assert failure_of(caught.value).report.failure_class == "infra"
    assert [seconds for seconds in waits if seconds in hub.WAIT_SECONDS] == list(waited)  # less the library's own


def test_an_answer_that_says_no_is_an_answer(waits: list[float]) -> None:
    with pytest.raises(KeyError):
        patiently(Fetch(KeyError("no such split")), lambda *_: pytest.fail("told"))
    assert waits == []


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """Accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


AWAY = {"HF_ENDPOINT": "http://127.0.0.1:9"}
OFF = {"HF_HUB_OFFLINE": "1"}
SILENT = {"HF_ENDPOINT": "of the silent hub"}


@pytest.mark.parametrize(
    ("what", "environment", "failure", "told"),
    [
        ("model", AWAY, ("infra", "hub_unreachable", True), ["hub_away"] * 2),
        ("model", SILENT, ("infra", "hub_unreachable", True), ["hub_away"] * 2),
        ("data", SILENT, ("infra", "hub_unreachable", True), ["hub_away"] * 2),
        ("model", OFF, ("user_config", "hub_unreachable", False), []),
        ("data", OFF, ("dataset", "hub_unreachable", False), []),
    ],
)
def test_a_hub_that_is_away_is_nobodys_mistake_and_one_that_is_off_is_not_waited_for(
    tmp_path: Path,
    silent_hub: str,
    what: str,
    environment: dict[str, str],
    failure: tuple[str, str, bool],
    told: list[str],
) -> None:
    """By the real libraries."""
    if environment is SILENT:
        environment = {"HF_ENDPOINT": silent_hub}
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
    assert [code for code, _ in warned] == told
    names = ("the model 'owner/model'", "$GRPO_MODEL_DIR") if what == "model" else ("the data set", "$GRPO_DATASET_DIR")
    assert all(name in message for _, message in warned for name in names)
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
