"""A job's code is confined: every attack is held, what hangs is cut off and named, and the rows after it go on."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core.confinement import seccomp
from grpo_core.rewards.graders import proof
from grpo_core.rewards.graders.confined import ConfinedProcess, Outcome, RowFailure, why_not_confined
from grpo_core.rewards.graders.models import GraderLimits
from grpo_core.rewards.graders.packages import packages_for
from grpo_core.spec import parse_spec
from jobs.store.workers import WorkerInfo
from jobs.worker.worker import Worker
from tests.clock import patience
from tests.grader_attacks import ATTACKS, bait, carry_out, got_through

pytestmark = pytest.mark.skipif(bool(why_not_confined()), reason=why_not_confined())

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Any]]:
    with bait() as item:
        yield item


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_held(name: str, told: dict[str, Any]) -> None:
    outcome = carry_out(ATTACKS[name], told)
    assert not got_through(ATTACKS[name], outcome)
    assert len(outcome.printed) <= 16 * 1024


@pytest.mark.parametrize("name", ["read /etc/passwd", "fork", "an endless loop", "a segmentation fault", "os._exit"])
def test_an_attack_is_held_in_a_fresh_process_too(name: str, told: dict[str, Any]) -> None:
    assert not got_through(ATTACKS[name], carry_out(ATTACKS[name], told, fresh=True))


def test_the_bait_would_be_taken_without_confinement(told: dict[str, Any]) -> None:
    """The attacks are held by the confinement and not by this machine."""
    for name in ("read a file of the trainer's", "list the root", "signal the trainer", "a pair of sockets"):
        process = ConfinedProcess("free", ATTACKS[name].source, limits=GraderLimits(), environment={}, confined=False)
        try:
            outcome = process.run(rows([told]), row_seconds=5.0, seconds=10.0)
        finally:
            process.close()
        assert got_through(ATTACKS[name], outcome), name


def rows(items: list[dict[str, Any]]) -> list[bytes]:
    sample = {"output_text": "x" * 800}
    return [
        json.dumps({"sample": sample, "item": item, "seed": str(n)}).encode() + b"\n" for n, item in enumerate(items)
    ]


def graded(source: str, items: list[dict[str, Any]], *, fresh: bool = False, row_seconds: float = 1.0) -> Outcome:
    process = ConfinedProcess("mine", source, limits=GraderLimits(fresh_process=fresh), environment={})
    try:
        return process.run(rows(items), row_seconds=row_seconds, seconds=30.0)
    finally:
        process.close()


HANGS_AND_EXITS = """
def grade(sample, item):
    if item["n"] == 3:
        while True: pass
    if item["n"] == 5:
        import os; os._exit(1)
    return item["n"]
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_the_first_unanswered_row_is_to_blame_and_the_rest_go_on(fresh: bool) -> None:
    results = graded(HANGS_AND_EXITS, [{"n": n} for n in range(8)], fresh=fresh).results
    kinds = [result.type if isinstance(result, RowFailure) else result for result in results]
    assert kinds == [0.0, 1.0, 2.0, "Timeout", 4.0, "Crash", 6.0, 7.0]


def test_a_row_that_hangs_is_cut_within_25_ms_of_its_limit() -> None:
    process = ConfinedProcess("slow", HANGS_AND_EXITS, limits=GraderLimits(), environment={})
    late: list[float] = []
    try:
        process.start()
        for _ in range(8):
            began = time.perf_counter()
            process.run(rows([{"n": 3}]), row_seconds=0.2, seconds=10.0)
            late.append(time.perf_counter() - began - 0.2)
            process.run(rows([{"n": 1}]), row_seconds=5.0, seconds=10.0)
    finally:
        process.close()
    assert min(late) < 0.025, late


REWRITES = """
import builtins
def grade(sample, item):
    exec(item["code"])
    return len(getattr(builtins, "stolen", ""))
"""


def test_a_fresh_process_is_not_reached_by_the_completion_before() -> None:
    hostile = {"code": "import builtins; builtins.stolen = 'x' * 9"}
    assert graded(REWRITES, [hostile, {"code": "pass"}]).results == [9.0, 9.0]
    assert graded(REWRITES, [hostile, {"code": "pass"}], fresh=True).results == [9.0, 0.0]


def test_what_it_prints_is_kept_up_to_a_limit() -> None:
    source = "import sys\ndef grade(s, i):\n    print('to', i['n'])\n    print('error', file=sys.stderr)\n    return 1"
    outcome = graded(source, [{"n": 1}])
    assert sorted(outcome.printed.split("\n")) == ["", "error", "to 1"]


def test_random_numbers_depend_on_the_row_alone() -> None:
    source = "import random\ndef grade(sample, item):\n    return random.random()"
    assert graded(source, [{}] * 3).results == graded(source, [{}] * 3, fresh=True).results


def test_numbers_of_any_kind_are_scores() -> None:
    source = "import numpy\ndef grade(s, i):\n    return [True, 1, numpy.float32(0.5), numpy.int64(2)][i['n']]"
    assert graded(source, [{"n": n} for n in range(4)], row_seconds=20.0).results == [1.0, 1.0, 0.5, 2.0]


def test_an_error_names_its_line() -> None:
    (failure,) = graded("def grade(sample, item):\n    x = 1\n    return item['nope']", [{}]).results
    assert failure == RowFailure("KeyError", "'nope'", ("line 3 in grade",))


def test_a_grader_ends_with_the_trainer(tmp_path: Path) -> None:
    program = f"""
import json, os, sys, threading
from grpo_core.rewards.graders.confined import ConfinedProcess
from grpo_core.rewards.graders.models import GraderLimits
process = ConfinedProcess("orphan", "def grade(s, i):\\n    while True: pass", limits=GraderLimits(), environment={{}})
process.start()
open({str(tmp_path / "pid")!r}, "w").write(str(process._process.pid))
threading.Timer(0.5, lambda: os.kill(os.getpid(), 9)).start()
process.run([b'{{"sample": {{}}, "item": {{}}, "seed": "0"}}\\n'], row_seconds=60, seconds=60)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=60)
    group = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + patience(5)
    while alive_in(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive_in(group)


def alive_in(group: int) -> list[int]:
    found: list[int] = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def test_what_packages_ask_of_the_interpreter_itself_is_there() -> None:
    source = "import sysconfig\ndef grade(s, i):\n    return float(bool(sysconfig.get_config_vars()))"  # as pandas does
    assert graded(source, [{}], row_seconds=20.0).results == [1.0]


def test_no_torch_and_no_store_is_offered() -> None:
    offered = packages_for({})
    assert offered.names is not None
    assert "numpy" in offered.names
    assert not {"torch", "boto3", "grpo_core", "jobs"} & set(offered.names)


def test_another_interpreter_brings_its_own_packages() -> None:
    process = ConfinedProcess(
        "own",
        "import sys\ndef grade(sample, item):\n    return sys.version_info[0]",
        limits=GraderLimits(),
        environment={"GRPO_GRADER_PYTHON": sys.executable},
    )
    try:
        assert process.run(rows([{}]), row_seconds=5.0, seconds=10.0).results == [3.0]
        assert process.isolation["isolation"] == "landlock+seccomp"
    finally:
        process.close()


def test_three_graders_of_256_rows_take_little_time() -> None:
    """Of the processor, for this machine may be busy: less than 50 ms a step."""
    source = "def grade(sample, item):\n    return float(len(sample['output_text']) < 800 and item['n'] % 2)"
    process = ConfinedProcess("fast", source, limits=GraderLimits(), environment={})
    batch = rows([{"n": n} for n in range(256)])
    try:
        process.start()
        pids = alive_in(process._process.pid) if process._process else []
        process.run(batch, row_seconds=5.0, seconds=30.0)
        before, own = sum(map(cpu_seconds, pids)), time.process_time()
        for _ in range(20):
            process.run(batch, row_seconds=5.0, seconds=30.0)
        spent = sum(map(cpu_seconds, pids)) - before + time.process_time() - own
    finally:
        process.close()
    assert 3 * spent / 20 < 0.05, f"{3 * spent / 20 * 1000:.1f} ms"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The filter, read as the kernel does


def answer_of(program: bytes, machine: int, number: int) -> int:
    instructions = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    loaded, at = 0, 0
    while True:
        code, yes, no, value = instructions[at]
        at += 1
        if code == 0x20:
            loaded = {0: number, 4: machine}[value]
        elif code == 0x06:
            return value
        else:
            at += yes if (loaded == value if code == 0x15 else loaded >= value) else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_nothing_else_through(machine: str) -> None:
    allow, kill, deny, missing = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    ours, other = (seccomp._MACHINE[name] for name in (machine, "aarch64" if machine == "x86_64" else "x86_64"))
    strict, forking = seccomp.program(machine, forks=False), seccomp.program(machine, forks=True)
    compute, fork = set(seccomp._COMPUTE[machine].values()), set(seccomp._FORK[machine].values())
    assert not compute & fork
    for number in range(600):
        wanted = allow if number in compute else missing if number == 435 else deny
        assert answer_of(strict, ours, number) == wanted
        assert answer_of(forking, ours, number) == (allow if number in fork else wanted)
        assert answer_of(strict, other, number) == kill
    assert answer_of(forking, ours, 0x40000000 | min(compute)) == kill
    named = {"execve": {"x86_64": 59, "aarch64": 221}, "socket": {"x86_64": 41, "aarch64": 198}}
    for numbers in named.values():
        assert answer_of(forking, ours, numbers[machine]) == deny


# What a worker does with it


def test_a_worker_proves_the_confinement_before_it_trusts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proof.prove({}, os.getpid()) == proof.Proof("landlock+seccomp", "")
    assert proof.prove({"GRPO_GRADERS_UNCONFINED": "1"}, os.getpid()).isolation == "unconfined"

    def unconfined(*arguments: Any, **options: Any) -> ConfinedProcess:
        return ConfinedProcess(*arguments, **options, confined=False)

    monkeypatch.setattr(proof, "ConfinedProcess", unconfined)
    assert proof.prove({}, os.getpid()) == proof.Proof("none", "it could read a file")
    monkeypatch.setattr(proof, "why_not_confined", lambda: "there is no Landlock")
    assert proof.prove({}, os.getpid()) == proof.Proof("none", "there is no Landlock")


@pytest.mark.parametrize(
    ("grader", "isolation", "taken"),
    [
        ({"type": "length", "maximum": 9}, "none", True),
        ({"type": "python", "source": "def grade(s, i): return 1"}, "none", False),
        ({"type": "math", "input": "a", "reference": "b"}, "none", False),
        ({"type": "python", "source": "def grade(s, i): return 1"}, "landlock+seccomp", True),
        ({"type": "python", "source": "def grade(s, i): return 1"}, "unconfined", True),
    ],
)
def test_a_job_with_code_waits_for_a_worker_that_confines_it(
    grader: dict[str, Any], isolation: Any, taken: bool
) -> None:
    worker = Worker.__new__(Worker)
    worker._proof = proof.Proof(isolation, "because")
    multi = {"type": "multi", "graders": {"a": grader}, "calculate_output": "a"}
    for one in (grader, multi):
        spec = parse_spec({"rewards": {"graders": {"g": one}}})
        record = SimpleNamespace(id="job", spec=spec.as_dict())
        assert worker._can_grade(record) == taken  # type: ignore[arg-type]


def test_workers_say_how_they_confine_graders_and_older_ones_say_nothing() -> None:
    info = WorkerInfo(name="w", queues=["q"], device="cpu", grader_isolation="landlock+seccomp")
    body, later = info.written()
    assert "grader_isolation" not in body  # the first release refuses an entry with more fields
    assert WorkerInfo.read(json.dumps(body), json.dumps(later)) == info
    assert WorkerInfo.read(json.dumps(body), None).grader_isolation == "none"
