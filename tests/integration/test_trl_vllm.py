"""The engine `trl` with vLLM, by a stand-in on a CPU: how vLLM is started, what it serves, and that it is compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration import vllm_stand_in
from tests.integration.children import Run
from tests.integration.native.test_loop import rollouts_of
from tests.integration.rank_runs import STEPS, Forks, assert_same_training, end, start
from tests.integration.test_trl_ranks import SPEC as PLAIN

SPEC: dict[str, Any] = PLAIN | {"model": PLAIN["model"] | {"gpu_memory_share": 0.4}}


def with_vllm(folder: Path, fault: Callable[[], None] | None = None) -> None:
    os.environ["VLLM_STAND_IN"] = str(folder)
    vllm_stand_in.install()
    if fault is not None:
        fault()


def serve_another(folder: Path) -> None:
    """As a server that applies an adapter at twice its scale."""
    with_vllm(folder)
    load = vllm_stand_in.LLM._with

    def load_wrong(self: Any, request: Any) -> Any:
        if request is not None and "grpo-adapter-" in request.lora_path:
            path = Path(request.lora_path, "adapter_config.json")
            path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"lora_alpha": 800}), encoding="utf-8")
        return load(self, request)

    vllm_stand_in.LLM._with = load_wrong


@pytest.fixture(scope="module")
def served(finish: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("served")
    run = finish(folder / "run", SPEC, epoch=1, fault=partial(with_vllm, folder))
    assert run.exit_code == 0, (run.folder.root / "stderr.log").read_text("utf-8")
    return run


def test_the_present_adapter_generates_and_is_compared(served: Run) -> None:
    rows, said = rollouts_of(served), vllm_stand_in.read(served.folder.root.parent)
    assert all(line["logprob_diff_max"] < 1e-3 for line in served.metrics if line["logprob_diff_max"] is not None)
    assert any(line["logprob_diff_max"] is not None for line in served.metrics)
    report = json.loads(served.folder.report.read_text("utf-8"))
    assert report["rollout_server"]["logprobs"] == "processed_logprobs"
    assert report["selftest"]["served"]["mean"] < 1e-4
    assert report["selftest"]["served"]["adapter_effect"] > 0
    first, *calls, last = said
    assert last == {"ended": True}
    started = first["started"]
    assert started["gpu_memory_utilization"] == pytest.approx(0.4 * 0.5)
    assert (started["max_lora_rank"], started["max_num_seqs"], started["max_model_len"]) == (8, 16, 256)
    assert "distributed_executor_backend" not in started
    assert first["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    rollouts = [call for call in calls if call["prompts"] == 12]
    assert len(rollouts) == STEPS
    assert [seed for call in rollouts for seed in call["seeds"]] == [row["seed"] for row in rows]
    served_adapters = [call["adapter"] for call in calls if call["adapter"]]
    numbers = [number for number, _ in served_adapters]
    assert len({*numbers}) == len(numbers), "a number is never used for other files"
    saved = str(served.folder.adapter.absolute())
    assert [path for _, path in served_adapters].count(saved) == 1
    assert not any(Path(path).exists() for _, path in served_adapters if path != saved)
    assert all({"adapter_config.json", "adapter_model.safetensors"} <= {*call["files"]} for call in rollouts)


def test_it_learns_as_without_vllm(served: Run, finish: Callable[..., Run], tmp_path: Path) -> None:
    plain = finish(tmp_path / "run", SPEC, epoch=1)
    assert plain.exit_code == 0
    assert rollouts_of(plain) == rollouts_of(served)


def test_two_ranks_have_an_engine_each(forks: Forks, served: Run, tmp_path: Path) -> None:
    assert end(start(forks, tmp_path / "run", 2, SPEC, fault=partial(with_vllm, tmp_path), epoch=1)) == [0, 0], (
        tmp_path / "run" / "rank-1.log"
    ).read_text("utf-8")
    assert_same_training(Run(tmp_path / "run", 0), served)
    for number in (0, 1):
        first, *calls = vllm_stand_in.read(tmp_path, number)
        assert first["started"]["distributed_executor_backend"] == "external_launcher"
        assert first["started"]["max_num_seqs"] == 8
        environment = {name: first["environment"][name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        assert environment == {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        assert sum(len(call["seeds"]) == 4 or len(call["seeds"]) == 8 for call in calls if "seeds" in call) >= STEPS


def refuse() -> None:
    def start(*_: Any, **__: Any) -> None:
        raise ValueError("Model architectures ['Odd'] are not supported")

    vllm_stand_in.LLM.__init__ = start


def test_a_model_that_vllm_does_not_serve_is_sampled_by_transformers(
    finish: Callable[..., Run], tmp_path: Path, served: Run
) -> None:
    """It is said why, and the job learns the same."""
    run = finish(tmp_path / "run", SPEC, epoch=1, fault=partial(with_vllm, tmp_path, refuse))
    assert run.exit_code == 0, run.error
    said = [event["data"]["message"] for event in run.of_type("log")]
    assert any("by transformers" in text and "['Odd'] are not supported" in text for text in said)
    assert rollouts_of(run) == rollouts_of(served)


def test_a_server_with_another_adapter_fails_the_run(finish: Callable[..., Run], tmp_path: Path) -> None:
    changed = {"training": SPEC["training"] | {"steps": 5}}
    run = finish(tmp_path / "run", SPEC | changed, epoch=1, fault=partial(serve_another, tmp_path))
    assert run.exit_code == 15, run.events[-1]
    assert run.error["code"] == "rollouts_differ"
    assert len(run.metrics) == 5
