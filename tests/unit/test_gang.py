"""What several hosts say of their ends becomes the end of one run. The driver is a small program; there is no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.worker import gang
from jobs.worker.gang import GangProcess, Reservation
from jobs.worker.trainer_process import TrainerProcess
from tests.clock import patience

DRIVER = """
import sys, time
for line in sys.argv[1:]:
    print(line, flush=True)
sys.stdin.read()
"""
PLACED = {"event": "placed", "hosts": ["a", "b"], "meeting": "a:1", "cards": "2,3"}
ERROR = {"code": "out_of_memory", "class": "oom", "message": "Too little.", "hint": "Less.", "retryable": False}


def ended(code: int, error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"event": "ended", "host": "b", "code": code, "error": error, "said": "its last words"}


def reservation(*events: dict[str, Any]) -> Reservation:
    command = [sys.executable, "-c", DRIVER, *map(json.dumps, events)]
    return Reservation(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(gang, "EXPLAIN_SECONDS", 1.0)


class Gang:
    """A gang whose host 0 runs `program`, and of whose others the driver says `events`."""

    def __init__(self, folder: Path, program: str, *events: dict[str, Any]) -> None:
        self.folder = folder
        self.lead = TrainerProcess({"argv": [sys.executable, "-c", program]}, folder, {})
        self.cards = reservation(PLACED, *events)
        self.process = GangProcess(self.lead, self.cards)

    def end(self) -> int:
        until = time.monotonic() + patience(15)
        while (code := self.process.exit_code) is None:
            assert time.monotonic() < until
            self.process.wait(0.05)
        return code


@pytest.fixture
def gangs(tmp_path: Path) -> Iterator[Any]:
    made: list[Gang] = []

    def make(program: str, *events: dict[str, Any]) -> Gang:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Gang(folder, program, *events))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()


FOREVER, LOST = "import time; time.sleep(600)", "import sys; sys.exit(17)"


def test_a_gang_ends_as_its_lead_does(gangs: Any) -> None:
    assert gangs("").end() == 0
    assert gangs("import sys; sys.exit(75)", ended(75)).end() == 75
    done = gangs("import sys; sys.exit(13)", ended(17))
    assert (done.end(), done.process.failure) == (13, None), "what the lead wrote says why"


def test_the_failure_of_another_host_is_the_cause(gangs: Any) -> None:
    for lead in (FOREVER, LOST):
        failed = gangs(lead, ended(17), ended(13, ERROR))
        assert failed.end() == 13
        report = failed.process.failure
        assert (report.code, report.message, report.hint) == ("out_of_memory", "On host b: Too little.", "Less.")
        assert "its last words" in (failed.folder / "stderr.log").read_text()


def test_a_lost_host_is_named(gangs: Any) -> None:
    lost = gangs(FOREVER, {"event": "lost", "message": "Host 1 of 2, b, did not answer for 10 s."})
    assert lost.end() == 17
    report = lost.process.failure
    assert (report.code, report.retryable) == ("rank_lost", True)
    assert "did not answer" in report.message


def test_without_a_cause_the_lead_is_believed_after_a_while(gangs: Any) -> None:
    assert gangs(LOST).end() == 17


def test_a_driver_that_dies_ends_the_run(gangs: Any) -> None:
    one = gangs(FOREVER)
    one.cards._driver.kill()
    assert one.end() == 17
    assert "Ray cluster was lost" in one.process.failure.message


def test_cards_that_are_not_free_are_told_with_the_hosts_that_have_them() -> None:
    refused = reservation({"event": "refused", "hosts": 1})
    assert not refused.await_hosts(patience(10))
    assert (refused.hosts, refused.fitting) == ([], 1)
    refused.close()
    placed = reservation(PLACED)
    assert placed.await_hosts(patience(10))
    assert (placed.meeting, placed.cards) == ("a:1", "2,3")
    placed.close()
