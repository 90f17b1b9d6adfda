"""A trained adapter is taken away: merged and as GGUF, over HTTP, by a worker that may be killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo_client import GrpoClient
from grpo_client.errors import ProblemError
from grpo_core.spec import parse_spec
from jobs.service import JobService
from jobs.store.job import JobRecord, JobStatus
from tests.acceptance.conftest import OWNER, ROOT, WorkerProcess, wait_for
from tests.acceptance.test_graders import stored_rows
from tests.integration.running import RunningApi, wait_until
from tests.lazy import lazy

torch = lazy("torch")
PeftModel = lazy("peft", "PeftModel")
AutoModelForCausalLM, AutoTokenizer = lazy("transformers", "AutoModelForCausalLM AutoTokenizer")

BASE = ROOT / "examples" / "models" / "tiny-arithmetic"
QUESTION = "小明有3个苹果，又买了14个，现在有几个？"


@pytest.fixture
def api(service: JobService) -> Iterator[RunningApi]:
    running = RunningApi(service)
    with running.run():
        yield running


def client_of(service: JobService, api: RunningApi, owner: str) -> GrpoClient:
    key, _ = service.keys.create(owner, ["jobs:read", "jobs:write"])
    return GrpoClient(api.url, key)


def start(start_worker: Callable[..., WorkerProcess]) -> WorkerProcess:
    return start_worker(
        [sys.executable, "-m", "grpo_core", "train"],
        GRPO_MODEL_DIR=str(ROOT / "examples" / "models"),
        OMP_NUM_THREADS="1",
    )


def trained(service: JobService, folder: Path) -> JobRecord:
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text("utf-8"))
    spec["data"]["dataset"] = stored_rows(service, folder)
    spec["training"] = {"steps": 6, "save_steps": 3, "checkpoint_every": 3}
    spec["evaluation"] = {"questions": 16, "max_completion_tokens": 48, "every": 0}
    done = wait_for(service, service.submit(parse_spec(spec), OWNER).id, seconds=600)
    assert done.status is JobStatus.SUCCEEDED, done.error
    return done


def answer(model: Any) -> str:
    """What the model says to the question, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    said = model.eval().generate(input_ids=ids, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.timeout(1800)
def test_a_trained_model_is_taken_away_in_every_form(
    service: JobService, api: RunningApi, start_worker: Callable[..., WorkerProcess], tmp_path: Path
) -> None:
    first = start(start_worker)
    job = trained(service, tmp_path)
    with client_of(service, api, "bob") as bob, pytest.raises(ProblemError) as refused:
        bob.export(job.id)
    assert refused.value.status == 404
    with client_of(service, api, OWNER) as ann:
        with pytest.raises(ProblemError) as refused:
            ann.export(job.id, step=4)
        assert [(one.pointer, one.remedy) for one in refused.value.errors] == [("/step", "Use one of 3, 6.")]
        with pytest.raises(ProblemError) as refused:
            ann.export(job.id, type="q8_0")
        assert [one.pointer for one in refused.value.errors] == ["/type"]

        merged = ann.export(job.id, step=3, idempotency_key="once")
        assert ann.export(job.id, step=3, idempotency_key="once").id == merged.id
        # A worker that is killed in the middle loses the export to another one.
        wait_until(lambda: service.get(merged.id, OWNER).phase == "exporting", seconds=300)
        os.kill(first.process.pid, signal.SIGKILL)
        start(start_worker)
        gguf = ann.export(job.id, format="gguf")
        for one in (merged, gguf):
            ended = wait_for(service, one.id, seconds=600)
            assert ended.status is JobStatus.SUCCEEDED, ended.error
        ann.download(job.id, tmp_path / "trained")
        ann.download(merged.id, tmp_path / "merged", only=["export"])
        ann.download(gguf.id, tmp_path / "gguf", only=["export"])
        (lost,) = [e for e in ann.events(merged.id, limit=1000, types=["warning"]) if e.data["code"] == "run_lost"]
        assert lost.data["message"].endswith("The job starts over.")
        told = [e for e in ann.events(gguf.id, limit=1000, types=["log"]) if e.data.get("code") == "export_progress"]
        assert told[0].data["message"].startswith("Writing about")
        (found,) = [e for e in ann.events(gguf.id, limit=1000, types=["log"]) if e.data.get("code") == "export"]
        assert found.data["result"]["mean"] <= found.data["result"]["bound"]

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(BASE)

    checkpoint = tmp_path / "trained" / "checkpoints" / "step-000003"
    folder = tmp_path / "merged" / "export"
    assert answer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)) == answer(
        PeftModel.from_pretrained(base(), checkpoint)
    )
    figures = json.loads((folder / "export.json").read_text())
    assert (figures["format"], figures["type"], figures["questions"]) == ("merged", "bf16", 8)
    folder = tmp_path / "gguf" / "export"
    best = tmp_path / "trained" / "checkpoints" / f"step-{job.best_step or 0:06d}"
    last = best if best.is_dir() else tmp_path / "trained" / "adapter"
    assert answer(AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-f16.gguf")) == answer(
        PeftModel.from_pretrained(base(), last)
    )
    for card in (folder / "README.md", tmp_path / "trained" / "adapter" / "README.md"):
        text = card.read_text("utf-8")
        assert "`tiny-arithmetic`, a folder of models of the service" in text
        assert "licence unknown: see the base model" in text
        assert "95 % interval" in text
        assert "16 questions that were not trained on" in text
