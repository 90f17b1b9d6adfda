"""Whole runs of `grpo_core` in processes of their own, with the demo's tiny model: files, numbers, exits.

A job that names no engine runs on `native`. One run of each engine is the real command. The others are forked from a
process that has imported TRL already (18 seconds of processor time), and run the same `main`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from grpo_core.datasets import Row
from grpo_core.evaluation.generate import Sampling, evaluate, is_right_leniently
from grpo_core.rewards import REWARD_NAMES, get_rewards, scorers
from grpo_core.run_dir.records import read_jsonl, read_rollouts
from grpo_core.spec import DataSection
from tests.clock import patience
from tests.integration.children import (
    ENGINES,
    EVALUATION,
    GENERATIONS,
    MODELS,
    PROMPTS,
    ROWS,
    SPEC,
    STEPS,
    WEIGHTS,
    Run,
    assert_whole,
    is_running,
    prepare,
    spawn,
    spec_with,
    wait_for,
)

pytestmark = [pytest.mark.timeout(600)]


def _pay(reward: Callable[[str, str | None], float]) -> None:
    from grpo_core import grading

    grading.scorers = lambda *how: {**scorers(*how), "correctness": reward}


def pay_nan() -> None:
    _pay(lambda text, gold: float("nan"))


def raise_in_reward() -> None:
    _pay(lambda text, gold: {}["no such key"])


def run_out_of_memory() -> None:
    from grpo_core.engines.trainer import RecordingTrainer

    def compute_loss(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    RecordingTrainer.compute_loss = compute_loss


def lose_a_private_name() -> None:
    from grpo_core.compat.trl import GRPOTrainer

    del GRPOTrainer._calculate_rewards


def run_out_of_memory_while_drawing() -> None:
    import torch

    from grpo_core.compat.trl import GRPOTrainer

    def generate(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes.")

    GRPOTrainer._generate = generate


def lose_a_setting() -> None:
    """As Unsloth does with what it does not know."""
    from grpo_core.engines import trl

    config = trl.GRPOConfig
    trl.GRPOConfig = lambda **settings: config(**{**settings, "temperature": 0.5})


def break_something() -> None:
    from grpo_core.engines import trl

    def as_dataset(_: Any) -> None:
        raise KeyError("surprise")

    trl.as_dataset = as_dataset


def spoil_the_saved_adapter() -> None:
    """Change one bit of what was written, as a disk might."""
    from grpo_core.engines import trl

    write_adapter = trl.write_adapter

    def write_and_spoil(folder: Path, *arguments: Any, **options: Any) -> None:
        write_adapter(folder, *arguments, **options)
        file = folder / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    trl.write_adapter = write_and_spoil


def save_another_scale() -> None:
    """Tensors as they are, and a config that makes another adapter of them."""
    from grpo_core.engines import trl

    write_adapter = trl.write_adapter

    def write_and_rescale(folder: Path, *arguments: Any, **options: Any) -> None:
        write_adapter(folder, *arguments, **options)
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 24}), encoding="utf-8")

    trl.write_adapter = write_and_rescale


def train_the_base() -> None:
    """As a merge that is not undone exactly would."""
    from grpo_core.engines.trl import TrlEngine

    train = TrlEngine.train

    def train_and_touch(self: Any, *given: Any) -> int:
        steps = train(self, *given)
        weight = next(p for name, p in self.model.named_parameters() if "norm" in name)
        weight.data[0] += 1e-6
        return steps

    TrlEngine.train = train_and_touch


def narrow_the_adapter() -> None:
    """As TRL does with an adapter on a 4-bit base."""
    from grpo_core.engines import trl

    initialise_adapter = trl.initialise_adapter

    def initialise_narrow(model: Any, seed: int) -> None:
        initialise_adapter(model, seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()

    trl.initialise_adapter = initialise_narrow


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> dict[str, str]:
    """The engine that a job asks for."""
    return {"engine": request.param}


@pytest.fixture(scope="module")
def done(engine: dict[str, str], finish: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The real command, to its end; of the second engine the same `main`, forked, which saves the imports."""
    root = tmp_path_factory.mktemp("done") / "run"
    if engine["engine"] != ENGINES[0]:
        run = finish(root, SPEC | engine, epoch=2, log="../run.log")
        assert run.exit_code == 0, root.with_name("run.log").read_text("utf-8")
        return run
    process = spawn(root, SPEC | engine)
    assert process.wait() == 0, root.with_name("run.log").read_text("utf-8")
    return Run(root, 0)


def test_a_run_leaves_every_file(done: Run) -> None:
    root = done.folder.root
    assert {path.name for path in root.iterdir()} == {
        *("spec.json", "events.jsonl", "metrics.jsonl", "report.json"),
        *("rollouts", "checkpoints", "adapter"),
    }
    assert {path.name for path in done.folder.adapter.iterdir()} >= {
        *("adapter_model.safetensors", "adapter_config.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert len(list(done.folder.rollouts.iterdir())) == STEPS


def test_no_result_names_a_path_of_the_machine(done: Run) -> None:
    files = [done.folder.report, *(path for path in done.folder.adapter.iterdir() if path.suffix != ".safetensors")]
    for file in files:
        text = file.read_text("utf-8")
        assert str(done.folder.root) not in text, file.name
        assert str(MODELS) not in text, file.name
    config = json.loads((done.folder.adapter / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "tiny-arithmetic"


def test_events_tell_the_run_in_order(done: Run) -> None:
    events = done.events
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {event["epoch"] for event in events} == {2}
    assert [event["data"]["phase"] for event in done.of_type("status")] == [
        *("preparing", "loading", "training", "evaluating"),
    ]
    assert [event["step"] for event in done.of_type("metric")] == [2, 4]
    assert [event["data"] for event in done.of_type("checkpoint")] == [
        {"path": f"checkpoints/step-{step:06d}", "step": step} for step in range(1, STEPS + 1)
    ]
    assert done.of_type("error") == []


def test_metrics_have_a_line_a_step(done: Run) -> None:
    assert [line["step"] for line in done.metrics] == list(range(1, STEPS + 1))
    assert [line["learning_rate"] for line in done.metrics][:2] == [0.0, 2e-3]
    for line in done.metrics:
        assert line["kl"] is not None
        assert line["seconds"]["total"] >= line["seconds"]["generation"] > 0
        assert line["gpu_memory_gb"] is None


def test_rollouts_agree_with_rewards_weights_and_metrics(done: Run) -> None:
    functions = get_rewards("fixed")
    for step, line in enumerate(done.metrics, start=1):
        rows = read_rollouts(done.folder.rollout(step))
        assert len(rows) == PROMPTS * GENERATIONS
        assert {(row["step"], row["epoch"], row["adapter_version"]) for row in rows} == {(step, 2, step - 1)}
        assert len({row["prompt_id"] for row in rows}) == PROMPTS
        for row in rows:
            raw = {name: functions[name]([row["completion"]], answer=[row["answer"]])[0] for name in REWARD_NAMES}
            assert {name: row[f"reward_{name}"] for name in REWARD_NAMES} == raw
            assert row["reward_total"] == pytest.approx(sum(WEIGHTS[name] * raw[name] for name in REWARD_NAMES))
            assert 0 < row["completion_tokens"] <= 40
            assert row["finish_reason"] == "stop" or row["completion_tokens"] == 40
        assert line["reward"] == pytest.approx(statistics.fmean(row["reward_total"] for row in rows))
        assert line["rewards"]["integer"] == pytest.approx(statistics.fmean(row["reward_integer"] for row in rows))


def test_advantages_are_relative_to_the_group(done: Run) -> None:
    for file in done.folder.rollouts.iterdir():
        rows = read_rollouts(file)
        for start in range(0, len(rows), GENERATIONS):
            group = rows[start : start + GENERATIONS]
            assert [row["sample"] for row in group] == list(range(GENERATIONS))
            assert len({row["prompt"] for row in group}) == 1
            totals = [row["reward_total"] for row in group]
            mean, deviation = statistics.fmean(totals), statistics.stdev(totals)
            for row in group:
                assert row["advantage"] == pytest.approx((row["reward_total"] - mean) / (deviation + 1e-4), abs=1e-4)


def test_questions_are_rows_of_the_data_set(done: Run) -> None:
    lines = ROWS.read_text("utf-8").splitlines()
    for row in read_rollouts(done.folder.rollouts):
        source = json.loads(lines[row["row"]])
        assert (row["prompt"], row["answer"]) == (source["question"], source["answer"])
        assert row["prompt_id"] == str(row["row"])


def test_old_checkpoints_go_and_kept_ones_are_whole(done: Run) -> None:
    # The last two, and every second one by save_steps.
    assert sorted(path.name for path in done.folder.checkpoints.iterdir()) == [
        "step-000002",
        "step-000003",
        "step-000004",
    ]
    for checkpoint in done.folder.checkpoints.iterdir():
        manifest = assert_whole(checkpoint)
        assert (manifest["epoch"], f"step-{manifest['step']:06d}") == (2, checkpoint.name)


def test_the_last_checkpoint_is_the_adapter(done: Run) -> None:
    last = done.folder.checkpoint(STEPS) / "adapter_model.safetensors"
    assert last.read_bytes() == (done.folder.adapter / "adapter_model.safetensors").read_bytes()


def test_the_last_step_has_a_checkpoint_also_where_none_is_due(finish: Callable[..., Run], tmp_path: Path) -> None:
    training = SPEC["training"] | {"steps": 2, "checkpoint_every": 100, "save_steps": 100}
    run = finish(tmp_path / "run", SPEC | {"training": training})
    assert [event["data"]["step"] for event in run.of_type("checkpoint")] == [2]
    assert_whole(run.folder.checkpoint(2))


def test_the_report_says_what_was_really_used(done: Run, engine: dict[str, str]) -> None:
    report = json.loads(done.folder.report.read_text("utf-8"))
    name, parts = ("native", 1) if engine["engine"] == "auto" else ("trl", 2)
    assert (report["engine"], report["steps"], report["device"], report["epoch"]) == (name, STEPS, "cpu", 2)
    assert report["precision"]["weights"] == "fp32"
    assert report["settings"]["beta"] == 0.04
    assert report["settings"]["per_device_train_batch_size"] == PROMPTS * GENERATIONS // parts
    assert report["prompts"]["kept"] == report["rows"] == 200
    assert report["prompts"]["example"].endswith("assistant\n")
    assert report["reward"]["end"] == pytest.approx(done.metrics[-1]["reward"])


def test_the_saved_adapter_was_tested(done: Run) -> None:
    found = json.loads(done.folder.report.read_text("utf-8"))["selftest"]
    assert (found["tensors"], found["probes"], found["served"]) == (42, 4, None)
    assert found["peft"]["mean"] <= found["peft"]["bound"] == 1e-4
    assert found["adapter_effect"]["mean"] > 1e-4
    assert done.of_type("evaluation")[-1]["data"] == {"stage": "selftest", **found}


@pytest.fixture(scope="module")
def evaluated(engine: dict[str, str], finish: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that holds the last 20 of 200 rows out."""
    run = finish(tmp_path_factory.mktemp("evaluated") / "run", spec_with(evaluation=EVALUATION) | engine)
    assert run.exit_code == 0
    return run


def test_held_out_rows_are_asked_and_never_trained_on(evaluated: Run) -> None:
    trained = {row["row"] for row in read_rollouts(evaluated.folder.rollouts)}
    assert trained
    assert max(trained) < 180
    records = read_rollouts(evaluated.folder.root / "evaluation.parquet")
    assert [record["row"] for record in records] == list(range(180, 200))
    lines = ROWS.read_text("utf-8").splitlines()
    for record in records:
        assert {name: record[name] for name in ("question", "answer")} == json.loads(lines[record["row"]])
        assert record["lenient_before"] == is_right_leniently(record["completion_before"], record["answer"])
        assert record["lenient_after"] == is_right_leniently(record["completion_after"], record["answer"])


def test_the_report_compares_both_models(evaluated: Run) -> None:
    report = json.loads(evaluated.folder.report.read_text("utf-8"))
    records = read_rollouts(evaluated.folder.root / "evaluation.parquet")
    found = report["evaluation"]
    assert (report["rows"], found["questions"], found["dropped"], found["held_out"]) == (180, 20, 0, "last rows")
    for name, column, share in (
        ("strict", "strict", "strict_accuracy"),
        ("lenient", "lenient", "lenient_accuracy"),
        ("format", "strict_format", "strict_format_share"),
    ):
        pairs = [(record[f"{column}_before"], record[f"{column}_after"]) for record in records]
        assert found["paired"][name]["counts"] == {
            "both": pairs.count((True, True)),
            "lost": pairs.count((True, False)),
            "gained": pairs.count((False, True)),
            "neither": pairs.count((False, False)),
        }
        assert found["before"][share] == found["paired"][name]["before"]
        assert found["after"][share] == found["paired"][name]["after"]
    assert [sample["row"] for sample in found["samples"]] == list(range(180, 200, 2))
    stages = [(event["data"]["stage"], event["data"].get("questions")) for event in evaluated.of_type("evaluation")]
    assert stages == [("before", 20), ("after", 20), ("selftest", None)]
    phases = [event["data"]["phase"] for event in evaluated.of_type("status")]
    assert phases == ["preparing", "loading", "evaluating", "training", "evaluating"]


def test_the_base_answers_as_the_base_and_the_adapter_as_itself(evaluated: Run) -> None:
    """Stock transformers and PEFT say the same when asked one by one."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-arithmetic")
    base = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-arithmetic")
    records = read_rollouts(evaluated.folder.root / "evaluation.parquet")[:5]
    rows = [Row(record["row"], record["question"], record["answer"]) for record in records]
    data, sampling = DataSection(system_prompt=""), Sampling(max_new_tokens=40, batch_size=1)
    before = evaluate(base, tokenizer, rows, data, sampling).items
    assert [item.completion for item in before] == [record["completion_before"] for record in records]
    trained = PeftModel.from_pretrained(base, evaluated.folder.adapter)
    after = evaluate(trained, tokenizer, rows, data, sampling).items
    assert [item.completion for item in after] == [record["completion_after"] for record in records]


def test_the_page_of_adapters_runs(evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/how-to/adapters.md as printed; the merged model answers as base and adapter do."""
    from transformers import AutoModelForCausalLM

    page = (MODELS.parents[1] / "docs" / "how-to" / "adapters.md").read_text("utf-8")
    block = re.search(r"<!-- tested: adapter -->\n```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    (tmp_path / "examples").symlink_to(MODELS.parent)
    (tmp_path / "out").symlink_to(evaluated.folder.root)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block[1], names)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = merged.generate(**names["prompt"], max_new_tokens=48, do_sample=False)
    assert again.tolist() == names["answer"].tolist()


def test_evaluation_leaves_training_as_it_is(
    engine: dict[str, str], evaluated: Run, finish: Callable[..., Run], tmp_path: Path
) -> None:
    without = finish(tmp_path / "run", spec_with(data={"max_rows": 180}) | engine)
    assert read_rollouts(without.folder.rollouts) == read_rollouts(evaluated.folder.rollouts)
    weights = "adapter_model.safetensors"
    assert (without.folder.adapter / weights).read_bytes() == (evaluated.folder.adapter / weights).read_bytes()


def test_an_adapter_that_fails_its_test_is_put_aside(finish: Callable[..., Run], tmp_path: Path) -> None:
    run = finish(tmp_path / "run", spec_with(training={"steps": 2}), fault=spoil_the_saved_adapter)
    assert (run.folder.root / "adapter.rejected" / "adapter_model.safetensors").exists()
    report = json.loads(run.folder.report.read_text())
    assert (report["steps"], report["selftest"]) == (2, None), "what was learnt is told all the same"


def test_a_run_that_changed_nothing_is_no_signal(finish: Callable[..., Run], tmp_path: Path) -> None:
    # The first step of warm-up has a learning rate of 0, and there is no second.
    run = finish(tmp_path / "run", spec_with(training={"steps": 1}))
    assert (run.exit_code, run.error["class"], run.error["code"]) == (14, "no_signal", "zero_update")
    assert not run.folder.adapter.exists()


def test_the_same_seed_gives_the_same_run(
    engine: dict[str, str], done: Run, finish: Callable[..., Run], tmp_path: Path
) -> None:
    again = finish(tmp_path / "again", SPEC | engine)
    assert again.exit_code == 0
    assert read_rollouts(again.folder.rollouts) == read_rollouts(done.folder.rollouts)
    weights = "adapter_model.safetensors"
    assert (again.folder.adapter / weights).read_bytes() == (done.folder.adapter / weights).read_bytes()


def test_a_run_from_a_checkpoint_starts_there_and_is_held_to_the_base(
    engine: dict[str, str], done: Run, finish: Callable[..., Run], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(done.folder.checkpoint(STEPS), root / "inputs" / "checkpoint")
    once = spec_with(training={"steps": 1}, optimizer={"warmup_ratio": 0.0}, evaluation=EVALUATION)
    run = finish(root, once | engine)
    assert run.exit_code == 0
    # The first step of a fresh adapter is the base model itself, and its KL is zero.
    assert done.metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert run.metrics[0]["kl"] > 1e-6
    found = json.loads(run.folder.report.read_text("utf-8"))["evaluation"]
    assert found["paired_start"]["strict"]["before"] == found["start"]["strict_accuracy"]
    assert [event["data"]["stage"] for event in run.of_type("evaluation")][:3] == ["before", "start", "after"]


def test_a_run_that_changed_nothing_of_the_adapter_it_started_from_is_no_signal(
    done: Run, finish: Callable[..., Run], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(done.folder.checkpoint(STEPS), root / "inputs" / "checkpoint")
    run = finish(root, spec_with(training={"steps": 1}))
    assert (run.exit_code, run.error["code"]) == (14, "zero_update")
    assert not run.folder.adapter.exists()


def test_a_checkpoint_of_another_adapter_is_refused(done: Run, finish: Callable[..., Run], tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(done.folder.checkpoint(STEPS), root / "inputs" / "checkpoint")
    run = finish(root, spec_with(lora={"rank": 4}))
    assert (run.exit_code, run.error["code"]) == (10, "checkpoint_does_not_fit")


def test_several_passes_over_the_same_completions(finish: Callable[..., Run], tmp_path: Path) -> None:
    run = finish(tmp_path / "run", spec_with(loss={"iterations": 2, "beta": 0.0}))
    assert run.exit_code == 0
    assert [file.name for file in sorted(run.folder.rollouts.iterdir())] == [
        "step-000001.parquet",
        "step-000003.parquet",
    ]
    assert [line["step"] for line in run.metrics] == list(range(1, STEPS + 1))
    assert run.metrics[0]["kl"] is None


def test_term_finishes_the_step_and_writes_a_checkpoint(
    engine: dict[str, str], forks: Callable[..., ForkServerProcess], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    process = forks(root, spec_with(training={"steps": 5000, "checkpoint_every": 5000, "save_steps": 5000}) | engine)
    wait_for(lambda: len(list(read_jsonl(root / "metrics.jsonl"))) >= 2, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(patience(30))
    run = Run(root, process.exitcode or 0)
    assert run.exit_code == 75
    last = run.metrics[-1]["step"]
    assert assert_whole(run.folder.checkpoint(last))["step"] == last
    assert run.events[-1]["type"] == "checkpoint"
    assert not run.folder.adapter.exists()
    assert not run.folder.report.exists()


def test_term_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    process = spawn(tmp_path / "run", SPEC)
    wait_for(
        lambda: "loading" in [e["data"].get("phase") for e in read_jsonl(tmp_path / "run" / "events.jsonl")], process
    )
    process.terminate()
    assert process.wait(patience(20)) == 75
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_run_dies_with_its_parent(tmp_path: Path) -> None:
    arguments = prepare(tmp_path / "run", SPEC)
    script = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-m', 'grpo_core', *sys.argv[1:]]).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GRPO_MODEL_DIR": str(MODELS)},
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for(lambda: (tmp_path / "run" / "events.jsonl").exists(), parent)
        parent.kill()
    wait_for(lambda: not is_running(child))


def test_no_variance_ends_the_run(finish: Callable[..., Run], tmp_path: Path) -> None:
    spec = spec_with(sampling={"temperature": 0.01}, guards={"no_signal_steps": 2})
    run = finish(tmp_path / "run", spec)
    assert (run.exit_code, run.error["class"]) == (14, "no_signal")
    assert len(run.metrics) >= 2


def test_a_model_whose_numbers_are_not_finite_has_diverged(finish: Callable[..., Run], tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(MODELS / "tiny-arithmetic", models / "tiny-arithmetic")
    spoil(models / "tiny-arithmetic" / "model.safetensors", "model.norm.weight")
    run = finish(tmp_path / "run", SPEC, models=models)
    assert (run.exit_code, run.error["class"]) == (15, "diverged")


@pytest.mark.parametrize(
    ("fault", "asked", "exit_code", "code"),
    [
        (pay_nan, "auto", 12, "reward_not_finite"),
        (raise_in_reward, "auto", 12, "reward_failed"),
        (run_out_of_memory, "auto", 13, "out_of_memory"),
        (run_out_of_memory_while_drawing, "auto", 13, "out_of_memory_in_rollout"),
        (lose_a_setting, "trl", 16, "settings_differ"),
        (lose_a_private_name, "auto", 16, "library_changed"),
        (spoil_the_saved_adapter, "auto", 16, "adapter_differs"),
        (save_another_scale, "auto", 16, "peft_disagrees"),
        (train_the_base, "auto", 16, "base_changed"),
        (narrow_the_adapter, "trl", 16, "adapter_not_fp32"),
        (break_something, "trl", 16, "unexpected"),
    ],
)
def test_each_failure_has_its_exit_and_its_event(
    finish: Callable[..., Run], tmp_path: Path, fault: Callable[[], None], asked: str, exit_code: int, code: str
) -> None:
    run = finish(tmp_path / "run", SPEC | {"engine": asked}, fault=fault)
    assert (run.exit_code, run.error["code"]) == (exit_code, code)
    assert run.error["hint"]
    assert not run.folder.adapter.exists()
    traceback_told = "Traceback" in (tmp_path / "run" / "stderr.log").read_text("utf-8")
    assert traceback_told == (code == "unexpected")


def test_long_prompts_are_dropped_and_reported(finish: Callable[..., Run], tmp_path: Path) -> None:
    # Questions of this data set take 16 to 18 tokens.
    spec = spec_with(sampling={"max_prompt_tokens": 16}, training={"steps": 1}, optimizer={"warmup_ratio": 0})
    run = finish(tmp_path / "run", spec)
    assert run.exit_code == 0
    assert [warning["data"]["code"] for warning in run.of_type("warning")] == ["format_not_asked", "prompts_dropped"]
    report = json.loads(run.folder.report.read_text("utf-8"))
    assert report["prompts"]["dropped"] > 0
    assert report["prompts"]["kept"] + report["prompts"]["dropped"] == 200


def test_no_prompt_left_is_a_fault_of_the_data(finish: Callable[..., Run], tmp_path: Path) -> None:
    run = finish(tmp_path / "run", spec_with(sampling={"max_prompt_tokens": 3}))
    assert (run.exit_code, run.error["class"], run.error["code"]) == (11, "dataset", "all_prompts_too_long")


def test_bad_rows_are_a_fault_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1=?"\n', encoding="utf-8")
    run = Run(
        tmp_path / "run", spawn(tmp_path / "run", spec_with(data={"dataset": str(tmp_path / "bad.jsonl")})).wait()
    )
    assert (run.exit_code, run.error["class"]) == (11, "dataset")


def test_an_unknown_model_is_a_fault_of_the_spec(tmp_path: Path) -> None:
    spec = spec_with(model={"name": "nobody/no-such-model"})
    run = Run(tmp_path / "run", spawn(tmp_path / "run", spec, HF_HUB_OFFLINE="1").wait())
    assert (run.exit_code, run.error["class"], run.error["code"]) == (10, "user_config", "hub_unreachable")
    assert "GRPO_MODEL_DIR" in run.error["hint"]


def test_a_bad_spec_is_answered_by_field(tmp_path: Path) -> None:
    process = spawn(tmp_path / "run", spec_with(sampling={"generations": 1, "top_q": 1}))
    assert process.wait() == 10
    said = (tmp_path / "run.log").read_text("utf-8")
    assert "/sampling/generations" in said
    assert "/sampling/top_q" in said
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_used_folder_is_refused(done: Run) -> None:
    before = done.folder.events.read_bytes()
    assert spawn(done.folder.root, SPEC).wait() == 10
    assert done.folder.events.read_bytes() == before


def spoil(file: Path, tensor: str) -> None:
    """Make the first number of a tensor NaN."""
    content = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    start, _ = json.loads(content[8 : 8 + size])[tensor]["data_offsets"]
    content[8 + size + start : 8 + size + start + 4] = struct.pack("<f", float("nan"))
    file.write_bytes(content)


def test_a_trial_leaves_the_model_as_it_is_and_says_what_it_found(finish: Callable[..., Run], tmp_path: Path) -> None:
    run = finish(tmp_path / "run", SPEC | {"kind": "try", "trial": {"rows": 7}})
    assert run.exit_code == 0
    report = json.loads(run.folder.report.read_text("utf-8"))
    assert (report["trial"]["prompts"], report["trial"]["completions"]) == (9, 9 * GENERATIONS)
    (told,) = [event["data"] for event in run.of_type("log") if event["data"].get("code") == "trial"]
    assert told["result"] == report["trial"]
    assert {line["learning_rate"] for line in run.metrics} == {0.0}
    assert len(list(run.folder.root.glob("rollouts/*.parquet"))) == 3
    assert not run.folder.adapter.exists()
    assert not list(run.folder.root.glob("checkpoints/*"))
