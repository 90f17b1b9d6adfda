"""The training process itself, with model and data from a hub that lay traps: it trains, and calls nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import TOKEN, Recorder, Repo, Server, hub_with, serve
from tests.integration.children import MODELS, ROWS, Run, prepare, spec_with

pytestmark = pytest.mark.timeout(300)

DATA, MODEL = "owner/sums", "owner/tiny"
PLAIN = {"source": "hub", "dataset": DATA, "question_column": "question", "answer_column": "answer"}


def train(root: Path, hub: Server, spec: dict[str, Any], **environment: str) -> Run:
    """By the real command, with the environment of a worker's training process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRPO_"))}
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root.parent / "hf"), "OMP_NUM_THREADS": "1", **environment}
    argv = [sys.executable, "-m", "grpo_core", *prepare(root, spec)]
    with (root / "stderr.log").open("wb") as log:
        done = subprocess.run(argv, env={**own, **given}, stdout=log, stderr=log, check=False, timeout=240)
    return Run(root, done.returncode)


def tiny_model(traps: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """The demo's model, with more in its JSON files."""
    files = {path.name: path.read_bytes() for path in (MODELS / "tiny-arithmetic").iterdir() if path.is_file()}
    for name, more in traps.items():
        files[name] = json.dumps({**json.loads(files.get(name, b"{}")), **more}).encode()
    return files


@pytest.mark.long
def test_a_run_trains_on_what_the_hub_has_and_follows_nothing_in_it(tmp_path: Path) -> None:
    with serve(Recorder) as internal:
        elsewhere = f"{internal.url}/x"
        program = {"AutoModelForCausalLM": "owner/evil--modeling.Evil", "AutoTokenizer": ["owner/evil--t.Evil", None]}
        traps: dict[str, dict[str, Any]] = {
            "config.json": {"auto_map": program, "_name_or_path": elsewhere},
            "tokenizer_config.json": {"auto_map": program, "name_or_path": elsewhere},
            "generation_config.json": {"_from_model_config": True},
            "adapter_config.json": {"base_model_name_or_path": "owner/evil", "peft_type": "LORA"},
        }
        row = json.dumps({"question": {"path": elsewhere}, "answer": 1}).encode() + b"\n"
        repos = {
            MODEL: Repo(tiny_model(traps)),
            DATA: Repo({"train.jsonl": row + ROWS.read_bytes(), "README.md": b"---\nlicense: mit\n---\n"}),
            "owner/evil": Repo({"modeling.py": b"raise SystemExit(99)"}),
        }
        spec = spec_with(
            model={"name": MODEL}, data={**PLAIN, "max_rows": 50}, training={"steps": 2, "checkpoint_every": 2}
        )
        with hub_with(repos) as hub:
            run = train(tmp_path / "run", hub, spec, HF_TOKEN=TOKEN, GRPO_HF_TOKEN_REPOS="")
    assert run.exit_code == 0, (tmp_path / "run" / "stderr.log").read_text()
    assert internal.asked == []
    assert [path for _, path in hub.asked if "evil" in path] == []
    assert {token for _, token in hub.tokens} == {None}
    assert [event["data"]["code"] for event in run.of_type("warning")][:1] == ["rows_without_values"]


@pytest.mark.parametrize(
    ("card", "code"),
    [
        ("dataset_info:\n  features:\n  - name: question\n    dtype: image\n", "unsupported_column"),
        ("configs:\n- config_name: default\n  data_files: {internal}/rows.jsonl\n", "foreign_files"),
    ],
)
def test_the_reproduced_attacks_end_the_job_and_reach_nobody(tmp_path: Path, card: str, code: str) -> None:
    with serve(Recorder) as internal:
        cell = {"question": {"path": f"{internal.url}/cell"}, "answer": 1}
        described = f"---\n{card.format(internal=internal.url)}---\n".encode()
        repo = Repo({"README.md": described, "train.jsonl": json.dumps(cell).encode() + b"\n"})
        with hub_with({DATA: repo}) as hub:
            run = train(tmp_path / "run", hub, spec_with(data=PLAIN))
    assert (run.exit_code, run.error["class"], run.error["code"]) == (11, "dataset", code)
    assert internal.asked == []
