"""The checks a result must pass: on a tiny model with a trained adapter, whole and broken in one place each."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_core.errors import JobFailure
from grpo_core.hardware.models import ModelFiles, Precision
from grpo_core.spec import JobSpec, parse_spec
from tests.lazy import lazy

torch = lazy("torch")
LoraConfig, get_peft_model = lazy("peft", "LoraConfig get_peft_model")
load_file, save_file = lazy("safetensors.torch", "load_file save_file")
AutoTokenizer = lazy("transformers", "AutoTokenizer")
writer = lazy("grpo_core.checkpoints.writer")
peft_reference = lazy("grpo_core.selftest.peft_reference")
selftest = lazy("grpo_core.selftest.selftest")
logprob_probes = lazy("grpo_core.selftest.logprob_probes")
Difference, LogprobProbe, LogProbs, make_probes, token_logprobs = lazy(
    "grpo_core.selftest.logprob_probes", "Difference LogprobProbe LogProbs make_probes token_logprobs"
)


REWARDS = {"start": 0.0, "end": 1.0, "steps_averaged": 1}
MODEL = Path("examples/models/tiny-arithmetic").resolve()
FP32 = Precision("auto", "fp32", "float32", "a CPU trains in 32-bit")
BF16 = Precision("16bit", "16bit", "bfloat16", "as requested")
TEXTS = [("1+1=?", "答案是2。"), ("1+1=?", "2"), ("小明有3个苹果，又买了4个，一共几个？", "答案是7。")]
SPEC: JobSpec = parse_spec(
    {"model": {"name": "tiny-arithmetic"}, "lora": {"rank": 4, "alpha": 4}, "data": {"system_prompt": ""}}
)


class Trained:
    """What an engine is asked for, with an adapter of random weights in place of a trained one."""

    patches_libraries = False
    shares_base = False
    precision = FP32
    files = ModelFiles("tiny-arithmetic", None, "folder", MODEL, 0)

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(1)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
        self.model: Any = get_peft_model(
            peft_reference.load_base(MODEL, FP32),
            LoraConfig(r=4, lora_alpha=4, target_modules=list(SPEC.lora.target_modules), task_type="CAUSAL_LM"),
        )
        for name, parameter in self.model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
        self.adapter = folder / "adapter"
        self.served: dict[bool, LogProbs] | None = None
        self.released = False

    def save(self) -> None:
        writer.write_adapter(self.adapter, self.model, self.tokenizer, SPEC, steps=1, rewards=REWARDS)

    def logprobs(self, probes: Sequence[LogprobProbe]) -> LogProbs:
        return token_logprobs(self.model, probes, self.precision)

    def served_logprobs(self, probes: Sequence[LogprobProbe], adapter: Path | None) -> LogProbs | None:
        return None if self.served is None else self.served[adapter is not None]

    def release(self) -> None:
        self.released = True

    def test(self) -> dict[str, Any]:
        return selftest.run_selftest(self, TEXTS, SPEC.data, self.adapter)

    def failure(self) -> str:
        with pytest.raises(JobFailure) as caught:
            self.test()
        assert caught.value.report.failure_class == "internal"
        assert caught.value.report.hint
        return caught.value.report.code


def in_16_bits(path: Path, precision: Precision, *, spread: bool = False) -> Any:
    """What `load_base` does on a GPU, on a CPU."""
    assert not spread
    return peft_reference.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, precision.dtype))


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    engine = Trained(tmp_path)
    engine.save()
    return engine


def test_a_whole_result_passes(trained: Trained) -> None:
    found = trained.test()
    assert trained.released
    assert (found["tensors"], found["probes"], found["served"]) == (42, 3, None)
    assert found["tokens"] > 5
    assert found["peft"]["mean"] <= 1e-5
    assert found["peft"]["bound"] == 1e-4
    assert found["adapter_effect"]["mean"] > 0.01
    json.dumps(found, allow_nan=False)


def test_in_16_bits_stock_peft_is_asked_in_the_arithmetic_of_training(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_core.selftest.peft_reference.load_base", in_16_bits)
    trained.precision = BF16
    for parameter in trained.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    probes = make_probes(TEXTS, SPEC.data, trained.tokenizer)
    adapter_in_32_bits = token_logprobs(trained.model, probes, FP32)
    assert selftest.difference(trained.logprobs(probes), adapter_in_32_bits).mean > 1e-3, "it does make a difference"
    found = trained.test()
    assert found["peft"]["mean"] == 0.0
    assert found["peft"]["bound"] == 0.02


def test_one_flipped_bit_in_the_saved_file_fails(trained: Trained) -> None:
    file = trained.adapter / writer.WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert trained.failure() == "adapter_differs"


@pytest.mark.parametrize("missing", [True, False])
def test_other_tensors_than_the_trainers_fail(trained: Trained, missing: bool) -> None:
    weights = load_file(trained.adapter / writer.WEIGHTS_NAME)
    name = sorted(weights)[0]
    weights = {key: value for key, value in weights.items() if key != name} if missing else weights
    if not missing:
        weights[name] = weights[name].to(torch.bfloat16)
    save_file(weights, trained.adapter / writer.WEIGHTS_NAME)
    assert trained.failure() == "adapter_differs"


def test_a_config_that_means_another_adapter_fails(trained: Trained) -> None:
    config = json.loads((trained.adapter / writer.CONFIG_NAME).read_text("utf-8"))
    (trained.adapter / writer.CONFIG_NAME).write_text(json.dumps(config | {"lora_alpha": 5}), encoding="utf-8")
    assert trained.failure() == "peft_disagrees"


def test_numbers_that_are_no_numbers_do_not_agree() -> None:
    with pytest.raises(JobFailure):
        selftest.require_agreement("peft_disagrees", "Someone", [[math.nan]], [[0.0]], 1.0, Difference(0.0, 0.0))


@pytest.mark.parametrize(
    ("apart", "on_base", "accepted"),
    [(0.02, 0.0, True), (0.021, 0.0, False), (0.06, 0.05, True), (0.065, 0.05, False), (0.13, 5.0, False)],
)
def test_what_a_model_makes_of_rounding_is_allowed_for(apart: float, on_base: float, accepted: bool) -> None:
    def compare() -> dict[str, float]:
        base = Difference(on_base, on_base)
        return selftest.require_agreement("peft_disagrees", "Someone", [[apart]], [[0.0]], 0.02, base)

    if accepted:
        assert compare()["on_base"] == on_base
    else:
        with pytest.raises(JobFailure):
            compare()


@pytest.mark.parametrize(
    ("offset", "base_offset", "code"),
    [(0.04, 0.0, None), (0.06, 0.0, "server_disagrees"), (0.2, 1.0, "server_disagrees")],
)
def test_the_rollout_server_serves_this_adapter(
    trained: Trained, offset: float, base_offset: float, code: str | None
) -> None:
    probes = make_probes(TEXTS, SPEC.data, trained.tokenizer)
    exact = trained.logprobs(probes)
    with trained.model.disable_adapter():
        base = trained.logprobs(probes)
    trained.served = {True: _moved(exact, offset), False: _moved(base, base_offset)}
    if code is None:
        found = trained.test()["served"]
        assert found["mean"] == pytest.approx(0.04, abs=1e-4)
        assert found["adapter_effect"] > 0
    else:
        assert trained.failure() == code


def test_a_server_that_leaves_the_adapter_out_is_found(trained: Trained) -> None:
    exact = trained.logprobs(make_probes(TEXTS, SPEC.data, trained.tokenizer))
    trained.served = {True: exact, False: exact}
    assert trained.failure() == "adapter_not_served"


def _moved(logprobs: LogProbs, by: float) -> LogProbs:
    return [[value + by for value in values] for values in logprobs]


def test_a_base_that_ranks_shared_out_is_loaded_where_it_has_room(trained: Trained) -> None:
    """On this host without a GPU, in 16 bits on the CPU."""
    wide = Precision("16bit", "16bit", "bfloat16", "")
    base = peft_reference.load_base(MODEL, wide, spread=True)
    assert (base.device.type, base.dtype) == ("cpu", torch.bfloat16)
    probes = make_probes(TEXTS, SPEC.data, trained.tokenizer)
    request = peft_reference.ReferenceRequest(
        base=MODEL, adapter=trained.adapter, precision=wide, probes=probes, spread=True
    )
    exact = trained.logprobs(probes)
    assert logprob_probes.difference(peft_reference.ask_reference(request).adapter, exact).mean < 0.1


@pytest.mark.long
def test_stock_peft_in_a_process_of_its_own_says_the_same(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = make_probes(TEXTS, SPEC.data, trained.tokenizer)
    request = peft_reference.ReferenceRequest(base=MODEL, adapter=trained.adapter, precision=FP32, probes=probes)
    assert peft_reference.ask_reference_apart(request) == peft_reference.ask_reference(request)
    monkeypatch.setattr(peft_reference.sys, "executable", shutil.which("false"))
    with pytest.raises(JobFailure) as caught:
        peft_reference.ask_reference_apart(request)
    assert caught.value.report.code == "peft_cannot_load"


def test_log_probabilities_are_those_of_the_formula(trained: Trained) -> None:
    (probe, *_) = make_probes(TEXTS, SPEC.data, trained.tokenizer)
    ids = torch.tensor([probe.prompt + probe.completion])
    with torch.no_grad():
        loss = trained.model(input_ids=ids, labels=torch.tensor([[-100] * len(probe.prompt) + probe.completion])).loss
    (found,) = trained.logprobs([probe])
    assert len(found) == len(probe.completion)
    assert -sum(found) / len(found) == pytest.approx(loss.item(), abs=1e-5)


def test_probes_prefer_different_questions_and_skip_empty_answers(trained: Trained) -> None:
    texts = [("a", "1"), ("a", "2"), ("b", ""), ("b", "3"), ("c", "4" * 500)]
    probes = make_probes(texts, SPEC.data, trained.tokenizer)
    first = trained.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert len(probes) == 4
    assert probes[0].prompt == list(first["input_ids"])
    assert [trained.tokenizer.decode(probe.completion)[:2] for probe in probes] == ["1", "3", "44", "2"]
    assert max(len(probe.completion) for probe in probes) == logprob_probes.PROBE_TOKENS


def test_an_adapter_that_was_never_updated_is_no_signal(trained: Trained) -> None:
    start = selftest.adapter_checksums(trained.model)
    outer = [parameter for name, parameter in trained.model.named_parameters() if ".lora_B." in name]
    assert len(start) == len(outer)
    # Whatever it started from: only what has changed was trained.
    with pytest.raises(JobFailure) as unchanged:
        selftest.require_update(trained.model, start)
    assert (unchanged.value.exit_code, unchanged.value.report.code) == (14, "zero_update")
    for parameter in outer[1:]:
        parameter.data[0, 0] += 1e-6
    with pytest.raises(JobFailure) as partly:
        selftest.require_update(trained.model, start)
    assert (partly.value.report.failure_class, partly.value.report.code) == ("internal", "untrained_module")
    outer[0].data[0, 0] += 1e-6
    selftest.require_update(trained.model, start)


def test_a_fresh_adapter_starts_from_nothing(trained: Trained) -> None:
    for name, parameter in trained.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    start = selftest.adapter_checksums(trained.model)
    assert set(start.values()) == {0}
    with pytest.raises(JobFailure) as caught:
        selftest.require_update(trained.model, start)
    assert (caught.value.exit_code, caught.value.report.code) == (14, "zero_update")


def test_a_change_of_one_bit_in_the_base_is_seen(trained: Trained) -> None:
    before = selftest.base_checksums(trained.model)
    assert len(before) > 20
    assert not any("lora_" in name for name in before)
    outer = next(parameter for name, parameter in trained.model.named_parameters() if ".lora_B." in name)
    outer.data += 1
    selftest.require_base_unchanged(before, selftest.base_checksums(trained.model))
    frozen = next(parameter for name, parameter in trained.model.named_parameters() if "down_proj.base" in name)
    frozen.data.view(torch.int32)[3, 5] ^= 1
    with pytest.raises(JobFailure) as caught:
        selftest.require_base_unchanged(before, selftest.base_checksums(trained.model))
    assert caught.value.report.code == "base_changed"
    assert "down_proj" in caught.value.report.message


@pytest.mark.parametrize("dtype", ["bfloat16", "uint8", "float32"])
def test_checksums_of_any_type_and_size(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_core.selftest.selftest.CHUNK", 4)
    model = torch.nn.Module()
    values = torch.arange(15).reshape(3, 5).to(getattr(torch, dtype))
    model.register_parameter("odd", torch.nn.Parameter(values[1:, 1:].T, requires_grad=False))
    before = selftest.base_checksums(model)
    assert before["odd"] != 0
    monkeypatch.setattr("grpo_core.selftest.selftest.CHUNK", 2**20)
    assert selftest.base_checksums(model) == before
    values[2, 2] += 1
    assert selftest.base_checksums(model) != before


def test_an_adapter_in_16_bits_is_refused(trained: Trained) -> None:
    selftest.require_adapter_precision(trained.model)
    next(p for p in trained.model.parameters() if p.requires_grad).data = torch.zeros(4, 4, dtype=torch.bfloat16)
    with pytest.raises(JobFailure) as caught:
        selftest.require_adapter_precision(trained.model)
    assert caught.value.report.code == "adapter_not_fp32"
