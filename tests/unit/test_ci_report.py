"""`.ci/run` with a `make` and a pytest that end as a test says: what it tries again, and what it prints last."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = """<testsuites><testsuite><testcase classname="tests.test_a" name="test_quick"/>{}</testsuite></testsuites>"""
FAILED = """<testcase classname="tests.test_a" name="test_racing"><failure>{}</failure>
<system-out>noise of the server</system-out></testcase>"""
TRACEBACK = "\n".join(f"line {number}" for number in range(100)) + "\nE   assert 1 == 2"

# Ends with 1 for what is named in the file `failing`, with a report as pytest's, and takes that name off.
RUNS = """#!/bin/sh
echo "$*" >> ran
report=${PYTEST_ADDOPTS#--junitxml=}
for name in "$@"; do
  if [ "$name" = "$(head -n 1 failing)" ]; then
    sed -i 1d failing
    [ -z "$report" ] || cp failed.xml "$report"
    exit 1
  fi
done
[ -z "$report" ] || cp passed.xml "$report"
"""
# `timeout`, which leads the stage's processes, takes this signal for its limit.
HANGS = """
import os, signal, time

def test_that_waits():
    os.kill(os.getpgrp(), signal.SIGALRM)
    time.sleep(600)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for script in (".ci/run", "scripts/ci_report.py"):
        (tmp_path / script).parent.mkdir()
        shutil.copy(ROOT / script, tmp_path / script)
    for stub in (
        "tests/containers/install.sh",
        "tests/browser/install.sh",
        ".venv/bin/python",
        "bin/make",
        "bin/apt-get",
    ):
        path = tmp_path / stub
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RUNS if path.name in ("make", "python") else "#!/bin/sh\n")
        path.chmod(0o755)
    (tmp_path / "passed.xml").write_text(REPORT.format(""))
    (tmp_path / "failed.xml").write_text(REPORT.format(FAILED.format(TRACEBACK)))
    return tmp_path


def run(checkout: Path, *failing: str) -> tuple[int, str, list[str]]:
    """The exit status, what was printed, and what `make` and pytest were asked, where these fail in this order."""
    (checkout / "failing").write_text("".join(f"{name}\n" for name in failing))
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # of the process that runs this test
    ended = subprocess.run(
        [checkout / ".ci/run"], env=environment, capture_output=True, text=True, check=False, start_new_session=True
    )
    assert ended.stderr == ""
    return ended.returncode, ended.stdout, (checkout / "ran").read_text().splitlines()


RETRY = "-m pytest -p no:randomly --last-failed --last-failed-no-failures=none"
TOGETHER = "--jobs=2 --output-sync=target containers check site demo"


def test_each_stage_runs_once_where_nothing_fails(checkout: Path) -> None:
    code, printed, ran = run(checkout)
    assert (code, ran) == (0, ["setup", TOGETHER, "test", "long", "alone", "browser"])
    told = printed[printed.index("Stages:") :]
    assert [line.split(" s  ")[1] for line in told.splitlines()[1:]] == [
        "setup",
        "containers check site demo",
        "test",
        "long",
        "alone",
        "browser",
        "together",
    ]


def test_what_passes_at_a_later_try_is_named(checkout: Path) -> None:
    code, printed, ran = run(checkout, "check", "browser", "--last-failed")
    assert code == 0
    assert ran[2] == "check site demo containers"
    assert ran[-3:] == ["browser", RETRY, RETRY]
    assert "browser: tests.test_a::test_racing passed at try 3" in printed
    assert "browser, try 2  FAILED" in printed


@pytest.mark.parametrize(("stage", "tries"), [("test", 2), ("browser", 3)])
def test_what_never_passes_is_printed_last(checkout: Path, stage: str, tries: int) -> None:
    code, printed, ran = run(checkout, stage, *["--last-failed"] * (tries - 1))
    assert code == 1
    assert ran[-tries:] == [stage, *[RETRY] * (tries - 1)], "nothing runs after it"
    end = printed[printed.index("FAILED " + stage) :]
    assert end.splitlines()[0] == f"FAILED {stage}: tests.test_a::test_racing"
    assert end.splitlines()[-1] == "E   assert 1 == 2"
    assert len(end.splitlines()) == 41
    assert "noise" not in printed
    assert "later try" not in printed


def test_a_stage_that_hangs_ends_with_the_stacks_of_its_tests_and_is_not_tried_again(checkout: Path) -> None:
    """With processes as `make test` has: both are shown, and the one that waits says in which test."""
    (checkout / "conftest.py").write_text("from tests.conftest import pytest_configure")
    (checkout / "test_hangs.py").write_text(HANGS)
    pytest_ = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", "--rootdir", str(checkout)]
    hangs = f"cd {ROOT} && exec {shlex.join(pytest_)} {checkout / 'test_hangs.py'} 2>&1"
    (checkout / "bin" / "make").write_text(f'{RUNS}\n[ "$*" != long ] || (unset PYTEST_ADDOPTS; {hangs})\n')
    code, printed, ran = run(checkout)
    assert code == 124
    assert ran[-1] == "long"
    assert "stacks/pytest-" in printed
    assert "stacks/gw0-" in printed
    assert printed.count("in test_that_waits") == 1
    assert "long was ended at its limit of " in printed
    assert "long  ENDED AT ITS LIMIT" in printed
