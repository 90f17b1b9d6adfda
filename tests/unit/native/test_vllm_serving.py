"""Serving by vLLM, without it: a stand-in with the signatures of vLLM 0.25.1 answers with this project's own model.

It checks what it is given as the engine would: names of arguments, adapters that were loaded, ids that are in use.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from grpo_core.adapters import LocalAdapter
from grpo_core.compat import LibraryChanged
from grpo_core.compat import vllm as compat
from grpo_core.engines import vllm_env
from grpo_core.errors import JobFailure
from grpo_core.hardware.models import Precision
from grpo_core.spec import parse_spec
from tests.lazy import lazy
from tests.unit.native import test_serving as ours

engine_module = lazy("grpo_core.serving.vllm_engine")
VllmBatch = lazy("grpo_core.serving.vllm_batch", "VllmBatch")
FP32 = Precision("auto", "16bit", "float32", "")


@dataclass
class EngineArgs:
    """The fields of vLLM's that are used."""

    model: str
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int = 0
    max_num_seqs: int | None = None
    max_logprobs: int = 20
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool | None = None
    distributed_executor_backend: str | None = None
    generation_config: str = "auto"
    compilation_config: Any = None
    disable_log_stats: bool = False
    trust_remote_code: bool = False
    quantization: str | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_cpu_loras: int | None = None
    max_lora_rank: int = 16


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    output_kind: str = "cumulative"

    def __post_init__(self) -> None:
        assert self.n == 1
        assert self.temperature >= 0
        assert 0 < self.top_p <= 1
        assert self.seed is not None
        assert -(2**63) <= self.seed < 2**63
        assert self.output_kind == "delta"
        assert not self.detokenize


@dataclass(kw_only=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None


@dataclass
class _Running:
    params: SamplingParams
    adapter: str
    prompt: list[int]
    cache: Any = None
    next: int = 0
    tokens: list[int] = field(default_factory=list)


class LLMEngine:
    """Answers with our native model, at most `max_num_seqs` at once."""

    last: Any = None
    model: Any = None
    gives_up = ""
    """The id of a request that it ends for a reason of its own."""

    def __init__(self, arguments: EngineArgs) -> None:
        LLMEngine.last = self
        self.arguments, self.loras = arguments, dict[str, LoRARequest]()
        self.model_config = SimpleNamespace(max_model_len=arguments.max_model_len)
        self.waiting, self.running = dict[str, _Running](), dict[str, _Running]()

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        usage_context: Any = None,
        stat_loggers: Any = None,
        enable_multiprocessing: bool = False,
    ) -> LLMEngine:
        assert not enable_multiprocessing
        return cls(engine_args)

    def add_lora(self, lora_request: LoRARequest) -> bool:
        config = json.loads((Path(lora_request.lora_path) / "adapter_config.json").read_text())
        assert {"r", "lora_alpha", "target_modules"} <= config.keys()
        assert config["r"] <= self.arguments.max_lora_rank
        assert (Path(lora_request.lora_path) / "adapter_model.safetensors").is_file()
        assert lora_request.lora_int_id > 0
        self.loras[lora_request.lora_name] = lora_request
        assert len(self.loras) <= self.arguments.max_loras
        return True

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Any = None,
        priority: int = 0,
        prompt_text: str | None = None,
    ) -> str:
        assert prompt["type"] == "token"
        assert request_id not in self.waiting.keys() | self.running.keys()
        assert lora_request is None or self.loras[lora_request.lora_name] is lora_request
        adapter = "base" if lora_request is None else lora_request.lora_name
        self.waiting[request_id] = _Running(params, adapter, prompt["prompt_token_ids"])
        return f"{request_id}-internal"

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        for name in request_ids:
            self.waiting.pop(name, None)
            self.running.pop(name, None)

    def step(self) -> list[Any]:
        while self.waiting and len(self.running) < (self.arguments.max_num_seqs or 0):
            name = next(iter(self.waiting))
            self.running[name] = self.waiting.pop(name)
        return [self._advance(name, one) for name, one in list(self.running.items())]

    def _advance(self, name: str, one: _Running) -> Any:
        if one.cache is None:
            one.cache = self.model.reserve(len(one.prompt) + (one.params.max_tokens or 0))
            logits = self.model.prefill([(one.adapter, one.prompt, one.cache)])
        else:
            logits = self.model.step([(one.adapter, one.next, one.cache)])
        sampling = ours.Sampling(one.params.temperature, one.params.top_p, one.params.seed)
        (token,) = ours.sample(logits, [sampling], [len(one.tokens)], [one.params.logprobs])
        one.next = token.id
        one.tokens.append(token.id)
        is_last = token.id in (one.params.stop_token_ids or ()) or len(one.tokens) == one.params.max_tokens
        is_last = is_last or name == self.gives_up
        if is_last:
            del self.running[name]
        told = None
        if one.params.logprobs is not None:
            chosen = {token.id: SimpleNamespace(logprob=token.logprob)}
            told = [{**{at: SimpleNamespace(logprob=value) for at, value in token.top}, **chosen}]
        tokens = [] if name == self.gives_up else [token.id]
        part = SimpleNamespace(index=0, token_ids=tokens, logprobs=told, finish_reason="stop" if is_last else None)
        return SimpleNamespace(request_id=name, outputs=[part], finished=is_last)


def fake_modules() -> dict[str, Any]:
    top, sampling, lora, inputs = (
        ModuleType(name) for name in ("vllm", "vllm.sampling_params", "vllm.lora.request", "vllm.inputs.engine")
    )
    vars(top).update(EngineArgs=EngineArgs, LLMEngine=LLMEngine, SamplingParams=SamplingParams)
    vars(top).update(ModelRegistry=SimpleNamespace(get_supported_archs=lambda: ["PhiForCausalLM"]))
    vars(sampling).update(RequestOutputKind=SimpleNamespace(DELTA="delta"))
    vars(lora).update(LoRARequest=LoRARequest)

    def tokens_input(prompt_token_ids: list[int], *, prompt: Any = None, cache_salt: Any = None) -> Any:
        return {"type": "token", "prompt_token_ids": prompt_token_ids}

    vars(inputs).update(tokens_input=tokens_input)
    names = {module.__name__: module for module in (top, sampling, lora, inputs)}
    return names | {"vllm.lora": ModuleType("vllm.lora"), "vllm.inputs": ModuleType("vllm.inputs")}


def nothing(*_: object) -> None:
    """Does nothing."""


def memory(_: object) -> tuple[int, int]:
    return 60 * 2**30, 80 * 2**30


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, module in fake_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    compat.serving_parts.cache_clear()
    monkeypatch.setattr("grpo_core.serving.vllm_engine._join_alone", nothing)
    monkeypatch.setattr("torch.cuda.mem_get_info", memory)
    monkeypatch.setattr(LLMEngine, "gives_up", "")
    yield
    compat.serving_parts.cache_clear()


def start(tmp_path: Path, adapters: list[LocalAdapter], spec: Any = ours.SPEC) -> Any:
    return engine_module.VllmEngine.start(spec, ours.FILES, FP32, adapters, tmp_path / "run")


@pytest.fixture
def batch(vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "a").mkdir()
    adapters = ours.adapters_in(tmp_path / "a")
    native = ours.make_native(adapters)
    monkeypatch.setattr(LLMEngine, "model", native)
    engine = start(tmp_path, adapters)
    return VllmBatch(engine, ours.desk_of(native))


def test_its_answers_are_those_of_the_other_engines(batch: Any) -> None:
    other = ours.batch_of(LLMEngine.model)
    for number in range(6):
        request = ours.ask(
            number, adapter=("base", "step-5")[number % 2], n=1 + number % 3, seed=number, temperature=number % 2,
            logprobs=(None, 0, 2)[number % 3], stop=("1",) if number == 4 else (),
        )  # fmt: skip
        assert batch.add(request) == []
        assert other.add(request) == []
    found, expected = ours.answers(batch), ours.answers(other)
    assert found.keys() == expected.keys()
    for name, pieces in found.items():
        assert [piece["k"] for piece in pieces] == list(range(1, len(pieces) + 1))
        for index in range(3):
            (said, numbers), (wanted, approx) = of(pieces, index), of(expected[name], index)
            assert said == wanted
            assert numbers.expected == approx
        assert pieces[-1]["done"] == expected[name][-1]["done"]
    assert not LLMEngine.last.running
    assert not LLMEngine.last.waiting


def of(pieces: list[Any], index: int) -> Any:
    """The text, the finish and the tokens of a choice; the log-probabilities, which rounding may move."""
    own = [piece for piece in pieces if piece.get("index") == index]
    told = [one for piece in own for one in piece.get("logprobs", ())]
    tokens = [(one["token"], [top["token"] for top in one["top_logprobs"]]) for one in told]
    numbers = [part["logprob"] for one in told for part in (one, *one["top_logprobs"])]
    said = "".join(piece["text"] for piece in own), [piece["finish"] for piece in own if "finish" in piece], tokens
    return said, pytest.approx(numbers, abs=1e-3)


def test_the_engine_is_told_to_stay_alone_and_to_compile_nothing(batch: Any) -> None:
    given = LLMEngine.last.arguments
    assert (given.distributed_executor_backend, given.trust_remote_code, given.generation_config) == (
        "uni", False, "vllm",
    )  # fmt: skip
    assert given.compilation_config["mode"] == 0
    assert given.gpu_memory_utilization == pytest.approx(0.9 * 60 / 80)
    assert (given.enable_lora, given.max_loras, given.max_lora_rank) == (True, 2, 8)
    assert given.max_model_len == batch.context <= 8192


def test_its_environment_keeps_it_in_this_process_and_on_this_host() -> None:
    environment = {"HOME": "/root", "VLLM_LORA_ENABLE_DUAL_STREAM": "0"}
    vllm_env.prepare_to_serve(environment)
    assert environment["VLLM_LORA_ENABLE_DUAL_STREAM"] == "0", "the operator's choice stands"
    assert environment["VLLM_CACHE_ROOT"] == "/root/.cache/vllm"
    assert not [name for name in environment if name.startswith("UNSLOTH")], "only vLLM runs"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_a_cancelled_and_a_failed_request_end_in_the_engine_too(batch: Any) -> None:
    batch.add(ours.ask(1, n=3))
    batch.add(ours.ask(2))
    batch.step()
    batch.cancel("r1")
    assert list(LLMEngine.last.running) == ["r2/0"]
    assert [piece["id"] for piece in batch.fail({"code": "x", "message": "", "param": None})] == ["r2"]
    assert not LLMEngine.last.running
    assert batch.is_idle


def test_an_answer_that_the_engine_gives_up_ends_with_an_error(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLMEngine, "gives_up", "r1/1")
    batch.add(ours.ask(1, n=3))
    pieces = ours.answers(batch)["r1"]
    assert pieces[-1]["error"]["code"] == "session_ended"
    assert not LLMEngine.last.running


def test_requests_beyond_those_that_may_wait_are_refused(batch: Any) -> None:
    rows = batch._engine.rows
    refused = [piece for n in range(rows + ours.WAITING + 2) for piece in batch.add(ours.ask(n, max_tokens=1))]
    assert [piece["error"]["code"] for piece in refused] == ["overloaded"] * 2
    assert len(ours.answers(batch)) == rows + ours.WAITING


def test_an_unknown_adapter_and_a_long_prompt_never_reach_the_engine(batch: Any) -> None:
    (piece,) = batch.add(ours.ask(1, adapter="step-7"))
    assert piece["error"]["code"] == "not_serving"
    (piece,) = batch.add(ours.ask(2, max_tokens=100_000))
    assert piece["error"]["param"] == "max_tokens"
    assert not LLMEngine.last.waiting


@pytest.mark.parametrize("change", [{"rank": 8}, {"target_modules": ["q_proj"]}])
def test_an_adapter_of_other_settings_is_refused(vllm: None, tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "a").mkdir()
    adapters = ours.adapters_in(tmp_path / "a")
    other = ours.SPEC.model_copy(update={"lora": ours.SPEC.lora.model_copy(update=change)})
    with pytest.raises(JobFailure) as failure:
        start(tmp_path, adapters, other)
    assert failure.value.report.code == "adapter_unreadable"


def test_the_configuration_of_an_adapter_is_the_jobs_and_not_the_files(vllm: None, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    adapter, _ = ours.adapters_in(tmp_path / "a")
    (adapter.folder / "adapter_config.json").write_text('{"r": 512, "base_model_name_or_path": "/etc"}')
    start(tmp_path, [adapter])
    written = json.loads((tmp_path / "run" / "vllm" / "step-5" / "adapter_config.json").read_text())
    assert written["r"] == 4
    assert "base_model_name_or_path" not in written


def test_a_changed_vllm_is_told_before_it_is_started(vllm: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delattr(LLMEngine, "abort_request")
    with pytest.raises(LibraryChanged, match=r"LLMEngine\.abort_request"):
        start(tmp_path, [])


@pytest.mark.parametrize(
    ("asked", "family", "gpus", "installed", "engine"),
    [
        ("auto", "LlamaForCausalLM", 0, True, "native"),
        ("auto", "LlamaForCausalLM", 1, True, "native"),
        ("auto", "PhiForCausalLM", 1, True, "vllm"),
        ("auto", "PhiForCausalLM", 1, False, "transformers"),
        ("auto", "PhiForCausalLM", 0, True, "transformers"),
        ("auto", "UnheardOfForCausalLM", 1, True, "transformers"),
        ("vllm", "LlamaForCausalLM", 1, True, "vllm"),
        ("transformers", "LlamaForCausalLM", 1, True, "transformers"),
        ("vllm", "LlamaForCausalLM", 1, False, None),
        ("native", "PhiForCausalLM", 1, True, None),
    ],
)
def test_the_engine_is_the_one_that_was_asked_for_or_the_fastest(
    vllm: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    family: str,
    gpus: int,
    installed: bool,
    engine: str | None,
) -> None:
    from grpo_core.hardware.gpus import Gpu
    from grpo_core.hardware.models import ModelFiles
    from grpo_core.serving import run

    config = json.loads((ours.FOLDER / "config.json").read_text()) | {"architectures": [family]}
    if family != "LlamaForCausalLM":
        config["model_type"] = "phi"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(ours.FOLDER / "model.safetensors")
    files = ModelFiles("x", None, "folder", tmp_path, 1000)
    monkeypatch.setattr(run.importlib.util, "find_spec", {"vllm": object() if installed else None}.get)
    monkeypatch.setattr("grpo_core.engines.vllm_env.prepare_to_serve", nothing)
    cards = [Gpu("x", 80 * 2**30, (9, 0))] * gpus
    given = {"kind": "serving", "serving": {"engine": asked}, "model": {"name": "x"}, "resources": {"gpus": gpus}}
    spec = parse_spec(given)
    if engine is None:
        with pytest.raises(JobFailure, match=f"The engine {asked} cannot serve this job"):
            run.choose_serving_engine(spec, cards, files)
    else:
        assert run.choose_serving_engine(spec, cards, files) == engine


def test_vllm_without_a_gpu_is_refused_when_it_is_submitted() -> None:
    from grpo_core.spec import SpecError

    with pytest.raises(SpecError, match="/serving/engine needs a GPU"):
        parse_spec({"kind": "serving", "serving": {"engine": "vllm"}, "resources": {"gpus": 0}})
