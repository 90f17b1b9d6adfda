"""The README's walkthrough runs as it stands there, in a folder of its own and on ports that are free."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from deploy.local.ports import pick_port, pick_s3_port

ROOT = Path(__file__).resolve().parents[2]
STRICT = """\
set -euo pipefail
curl() { command curl --fail-with-body "$@"; echo; }
"""
"""A line that fails ends it, and so does an answer that is an error."""


def walkthrough() -> str:
    """The marked block's commands."""
    match = re.search(r"<!-- tested: walkthrough -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert match is not None, "README.md has no block marked as tested"
    return match[1]


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "grpo").exists(), reason="the README begins after `make setup`")
def test_every_line_of_the_walkthrough_runs(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ports = f"--port {pick_port()} --valkey-port {pick_port()} --s3-port {pick_s3_port()}"
    script = walkthrough()
    assert script.count("grpo up\n") == script.count("grpo down") == 1
    script = script.replace("grpo up\n", f"grpo up {ports}\n").replace("/tmp/job.json", f"{tmp_path}/job.json")
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    try:
        run = subprocess.run(
            ["bash", "-c", STRICT + script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    finally:
        down = [".venv/bin/grpo", "down", "--json"]
        left = subprocess.run(down, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(left.stdout) == {"stopped": False}, "its last line had stopped everything"
    answers = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {answer["object"] for answer in answers} == {"dry_run", "job", "list"}
    assert re.findall(r"^event: (\w+)$", run.stdout, re.MULTILINE)[-1] == "status", "the stream ended with the job"
    assert run.stdout.count('{"status":"cancelled"}') == 1
