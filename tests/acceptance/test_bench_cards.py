"""The command that measures several GPUs, on CPU ranks to its end: a call on rented GPUs must not find its faults."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clock import patience

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cards")
    # So slow that other processes on the same cores do not hide it in one of ten steps in a row.
    slow = ["--slow", "1:6"]
    command = [sys.executable, "scripts/bench_cards.py", "--cpu", "--gpus", "2", *slow, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(900), check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def lines(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "cards.jsonl").read_text("utf-8").splitlines()]
    assert not [line for line in lines if "error" in line and line["error"] != ["rank_lost"]]
    return lines


def test_each_number_of_ranks_is_measured_and_the_slow_one_is_named(out: Path, lines: list[dict[str, Any]]) -> None:
    two, one = (line for line in lines if line.get("part") == "scale")
    assert (two["gpus"], one["gpus"]) == (2, 1)
    assert two["slowest_rank"] == 1
    assert two["worked_s"][1] > 1.5 * two["worked_s"][0]
    assert len(two["warned"]) == 1
    assert "rank 1 of 2" in two["warned"][0]
    for line in (two, one):
        assert {"draw", "forward and backward"} <= line["parts"].keys()
        assert line["step_s"] == pytest.approx(sum(line["parts"].values()), rel=0.5)
    table = (out / "cards.md").read_text("utf-8")
    assert "| 2 | 9 × 4 |" in table
    assert "| 1 | 4 × 4 |" in table


def test_what_was_killed_goes_on_as_if_it_had_not_been(lines: list[dict[str, Any]]) -> None:
    large = [line for line in lines if line.get("part") == "large"]
    one, every = (line for line in large if "killed" in line)
    assert (one["exit"], one["error"], one["after_steps"]) == (17, ["rank_lost"], 5)
    assert every["killed"] == "all processes"
    compared = [line for line in large if "compared" in line]
    assert [line["step"] for line in compared] == [3, 4, 5]
    assert all(value for line in compared for name, value in line.items() if name.startswith("same_"))
    loaded = [line for line in large if "sharded" in line]
    assert len(loaded) == 3
    assert all(line["sharded"] and line["base_differs"] == [] for line in loaded)
    (held,) = (line for line in large if "checkpoint" in line)
    assert held["beside_adapter_and_moments_mb"] < 0.1


def test_what_no_gpu_does_is_measured(lines: list[dict[str, Any]]) -> None:
    two, one = (line for line in lines if line.get("part") == "host")
    assert (two["shape"], one["shape"]) == ("64x8", "32x8")
    assert 0 < one["cpu_s"] < two["cpu_s"]
