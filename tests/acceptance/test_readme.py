"""The README's walkthrough and its Python example run as they are printed, in a separate folder and on free ports."""

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
    """The commands of all marked blocks, in order, those in Python included."""
    blocks = re.findall(
        r"<!-- tested: walkthrough -->\n```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert [language for language, _ in blocks] == ["sh", "python", "sh"], "README.md has other blocks marked as tested"
    return "".join(
        text if language == "sh" else f".venv/bin/python - <<'END'\n{text}END\n" for language, text in blocks
    )


@pytest.mark.timeout(900)
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
            timeout=800,
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
    assert run.stdout.count('{"status":"succeeded"}') == 1
    assert '"status":"succeeded"' in next(line for line in run.stdout.splitlines() if line.startswith('{"id":"job-'))
    assert "\nmetric 50\n" in run.stdout, "the Python example waited to the end"
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
