"""The launcher, with ranks that are small programs: who fails, hangs or is killed ends the others, and it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_core.ranks import Launcher, Rank, interface_to, take_rank
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import read_jsonl
from tests.clock import patience
from tests.integration.running import wait_until

LAUNCH = """
import sys
from pathlib import Path
from grpo_core import ranks
from grpo_core.run_dir.layout import RunFolder
ranks.SILENT_SECONDS, ranks.WAITING_SECONDS, ranks.GRACE_SECONDS = float(sys.argv[3]), 3.0, 2.0
sys.exit(ranks.Launcher([sys.executable, "-c", sys.argv[2]], RunFolder(Path(sys.argv[1])), 2, epoch=3).run())
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from grpo_core.errors import JobFailure
from grpo_core.ranks import lost, take_rank
from grpo_core.run_dir.layout import RunFolder
from grpo_core.run_dir.records import EventWriter
rank = take_rank(os.environ)
folder = RunFolder(Path({root!r})).of_rank(rank.number)
folder.create()
events = EventWriter(folder.events, epoch=3)
events.log("began")
Path(folder.root / "pid").write_text(str(os.getpid()))
"""


class Launched:
    """A launcher of two ranks, rank 0 doing `lead` and rank 1 `other`."""

    def __init__(self, root: Path, lead: str, other: str, *, silent: float = 20.0) -> None:
        self.folder = RunFolder(root)
        program = RANK.format(root=str(root)) + f"exec({lead!r} if rank.is_lead else {other!r})"
        self.process = subprocess.Popen([sys.executable, "-c", LAUNCH, str(root), program, str(silent)])

    def pid(self, number: int) -> int:
        file = self.folder.of_rank(number).root / "pid"
        deadline = time.monotonic() + patience(20)
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return int(file.read_text())

    def end(self, seconds: float = 15) -> int:
        code = self.process.wait(patience(seconds))
        for number in (0, 1):
            with pytest.raises(ProcessLookupError):
                os.kill(self.pid(number), 0)
        assert not list(self.folder.ranks.glob("meeting-*"))
        return code

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self.folder.events))


FOREVER = "time.sleep(60)"
OOM = "events.error(JobFailure('out_of_memory', 'Too little.').report); sys.exit(13)"


def test_a_job_ends_as_its_ranks_do(tmp_path: Path) -> None:
    assert Launched(tmp_path / "done", "", "").end() == 0
    assert Launched(tmp_path / "saved", "sys.exit(75)", "sys.exit(75)").end() == 75


def test_what_the_lead_wrote_of_its_failure_stays(tmp_path: Path) -> None:
    launched = Launched(tmp_path, OOM, FOREVER)
    assert launched.end() == 13
    assert [event["type"] for event in launched.events] == ["log", "error"]


def test_what_another_rank_says_of_its_failure_becomes_the_jobs(tmp_path: Path) -> None:
    """The lead, which only misses it, says nothing; the number of the event follows the lead's."""
    launched = Launched(tmp_path, "time.sleep(0.5); sys.exit(17)", OOM)
    assert launched.end() == 13
    assert [(e["seq"], e["epoch"], e["type"]) for e in launched.events] == [(1, 3, "log"), (2, 3, "error")]
    assert launched.events[-1]["data"]["code"] == "out_of_memory"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_within_seconds(tmp_path: Path, victim: int) -> None:
    launched = Launched(tmp_path, FOREVER, FOREVER)
    launched.pid(1 - victim)
    os.kill(launched.pid(victim), signal.SIGKILL)
    began = time.monotonic()
    assert launched.end() == 17
    assert time.monotonic() - began < patience(5)
    error = launched.events[-1]["data"]
    assert (error["class"], error["code"], error["retryable"]) == ("infra", "rank_lost", True)
    assert f"Rank {victim} of 2 was killed by signal 9" in error["message"]


def test_a_torn_last_line_of_a_killed_lead_is_removed(tmp_path: Path) -> None:
    torn = 'events._lines._file.write(\'{"v": 1, "se\'); events._lines._file.flush(); os.kill(os.getpid(), 9)'
    launched = Launched(tmp_path, torn, FOREVER)
    assert launched.end() == 17
    lines = launched.folder.events.read_text("utf-8").splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["log", "error"]


def test_a_stopped_rank_is_found_though_nobody_dies(tmp_path: Path) -> None:
    launched = Launched(tmp_path, FOREVER, FOREVER, silent=3.0)
    launched.pid(0)
    os.kill(launched.pid(1), signal.SIGSTOP)
    assert launched.end() == 17
    assert "Rank 1 of 2 sent no heartbeat" in launched.events[-1]["data"]["message"]


def test_ranks_that_all_wait_for_each_other_are_ended(tmp_path: Path) -> None:
    wait = f"with rank.pulse.waiting(): {FOREVER}"
    launched = Launched(tmp_path, wait, wait)
    assert launched.end() == 17
    assert "waited" in launched.events[-1]["data"]["message"]


def test_one_that_works_may_be_waited_for(tmp_path: Path) -> None:
    over = tmp_path / "over"
    waits = f"with rank.pulse.waiting(): time.sleep(6)\nPath({str(over)!r}).touch()"
    works = f"while not Path({str(over)!r}).exists(): time.sleep(0.1)"
    assert Launched(tmp_path / "run", waits, works).end() == 0


def test_many_short_waits_are_no_long_one(tmp_path: Path) -> None:
    waits = "for _ in range(12):\n    with rank.pulse.waiting(): time.sleep(0.5)"
    assert Launched(tmp_path, waits, waits).end() == 0


def test_term_reaches_every_rank(tmp_path: Path) -> None:
    polite = "signal.signal(15, lambda *_: sys.exit(75)); Path(folder.root / 'polite').touch(); "
    launched = Launched(tmp_path, polite + FOREVER, polite + FOREVER)
    for number in (0, 1):
        file = launched.folder.of_rank(number).root / "polite"
        wait_until(file.exists, seconds=20)
    launched.process.terminate()
    assert launched.end() == 75
    assert [event["type"] for event in launched.events] == ["log"]


def test_a_rank_that_is_done_may_end_as_it_likes(tmp_path: Path) -> None:
    assert Launched(tmp_path, "time.sleep(2)", "rank.pulse.done(); os.kill(os.getpid(), 9)").end() == 0


def test_the_last_word_of_a_rank_counts_though_it_ended_before_it_was_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a look at the pipes and a look at the processes a rank may say that it is done, and end."""
    program = (
        "import os, sys; os.write(int(os.environ['GRPO_RANK_PULSE']), b'd'); "
        "sys.exit(0 if os.environ['RANK'] == '0' else 9)"
    )
    launcher = Launcher([sys.executable, "-c", program], RunFolder(tmp_path), 2, epoch=3)
    listen, heard = launcher._listen, list[float]()

    def late() -> None:
        """The first look is over before either has started, and the next comes after both have ended."""
        if heard:
            for child in launcher._children:
                child.process.wait()
            return
        heard.append(0.0)
        listen()

    monkeypatch.setattr(launcher, "_listen", late)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launcher.run() == 0


def test_the_environment_names_a_rank_and_is_cleared() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "7", "A": "b"}
    assert take_rank(environment) == Rank(1, 4, "tcp://h:7", local=1)
    assert environment == {"A": "b"}
    assert take_rank({"RANK": "1"}) is None


SPREAD = """
import sys
from pathlib import Path
from grpo_core.ranks import Host, Launcher
from grpo_core.run_dir.layout import RunFolder
host = Host(int(sys.argv[3]), 2, "127.0.0.2:29500")
sys.exit(Launcher([sys.executable, "-c", sys.argv[2]], RunFolder(Path(sys.argv[1])), 2, epoch=3, host=host).run())
"""
TELL = """
import os, sys
from pathlib import Path
from grpo_core.ranks import take_rank
rank = take_rank(os.environ)
told = (rank.number, rank.local, rank.count, rank.interface, rank.address)
Path({root!r}, f"told-{{rank.number}}").write_text(repr(told))
sys.exit({code} if rank.number == 3 else 0)
"""


def test_each_host_starts_its_own_ranks_of_the_job(tmp_path: Path) -> None:
    codes: list[int] = []
    for host in (0, 1):
        program = TELL.format(root=str(tmp_path), code=13)
        folder = tmp_path / f"host-{host}"
        codes.append(subprocess.run([sys.executable, "-c", SPREAD, folder, program, str(host)], check=False).returncode)
    told = [(tmp_path / f"told-{number}").read_text() for number in range(4)]
    assert told == [repr((n, n % 2, 4, "lo", "tcp://127.0.0.2:29500")) for n in range(4)]
    assert codes == [0, 13], "the first failing rank's code is its host's"


def test_the_interface_to_an_address_is_named() -> None:
    far = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid"}
    rank = take_rank(far)
    assert rank is not None
    assert rank.interface is None, "by its name alone a host would be 127.0.0.1 to the others"
    assert interface_to("tcp://127.0.0.1:7") == "lo"
    assert interface_to("tcp://no-such-host.invalid:7") is None
