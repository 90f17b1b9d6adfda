"""OpenAI's own package in earlier majors, and calls made with one of them in a separate process.

Owns which majors are tested and where they are installed; the calls are scripts beside this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clock import patience

ROOT = Path(__file__).resolve().parents[2]
DISTRO = "distro==1.9.0 --hash=sha256:7bffd925d65168f85027d8da9af6bddab658135b840670a223589bc0c8ef02b2"
OLDER = {
    "2.54.0": "89089789197ccdb87f173a03145ed1598d00795220c93e96cf712b1cbf5e5f2b",
    "1.109.1": "6bcaf57086cf59159b8e27447e4e7dd019db5d29a438072fbd49c290c7e65315",
}
"""Earlier majors with the hash of their wheel."""


def older_package(version: str, request: pytest.FixtureRequest) -> Path:
    """The folder with an earlier major, installed once."""
    folder = request.config.cache.mkdir(f"openai-{version}")
    if (folder / "openai" / "__init__.py").is_file():
        return folder
    wanted = folder / "wanted.txt"
    wanted.write_text(f"openai=={version} --hash=sha256:{OLDER[version]}\n{DISTRO}\n")
    command = [
        ROOT / ".venv/bin/uv",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    done = subprocess.run(
        [*map(str, command), "--python", sys.executable, "--target", str(folder), "--requirement", str(wanted)],
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    if done.returncode:
        pytest.skip(f"openai {version} cannot be fetched from PyPI: {done.stderr.strip()[-200:]}")
    return folder


def run_calls(script: str, *words: str, folder: Path | None = None) -> dict[str, Any]:
    """What a script prints as JSON, with the package in `folder`, or the installed one."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *words],
        capture_output=True,
        text=True,
        timeout=patience(200),
        check=False,
        env={**os.environ, **({"PYTHONPATH": str(folder)} if folder else {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
