"""The `unsloth` engine: Unsloth's GRPO trainer on one CUDA GPU, rollouts by vLLM in the same process.

Owns what is Unsloth's and vLLM's own: one copy of the base weights for both, the adapter served as it is (never
merged), a seed for each completion, and where start-up time goes. Unsloth itself must have been imported before this
module is (`unsloth_start`): it patches TRL, transformers and PEFT, and the classes here are built on theirs.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import logging
import re
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from trl.trainer.grpo_config import GRPOConfig

from grpo_core.datasets import Row
from grpo_core.engines import EngineName, RunContext, unsloth_start
from grpo_core.engines.room import no_room, require_room
from grpo_core.engines.settings import (
    Settings,
    require_same,
    sequences_at_once,
    unsloth_adapter_settings,
    unsloth_arguments,
    unsloth_model_settings,
)
from grpo_core.engines.trainer import RecordingTrainer
from grpo_core.engines.trl import TrlEngine, as_dataset, raise_if_module_missing, require_context_length
from grpo_core.evaluation import Answer
from grpo_core.models import ModelFiles
from grpo_core.probes import LogProbs, Probe
from grpo_core.prompts import messages_for

ANSWERS_AT_ONCE = 2
"""Batches of questions given to vLLM together: a caller who stops asking waits for one call at most."""

_TIMED = re.compile(
    r"(?P<what>Loading weights|torch\.compile|Initial profiling|Graph capturing|init engine).*?"
    r"(?P<seconds>\d+(?:\.\d+)?) (?:s|secs|seconds)\b"
)
_VLLM_PHASES = {
    "Loading weights": "vllm_weights",
    "torch.compile": "vllm_compile",
    "Initial profiling": "vllm_profiling",
    "Graph capturing": "vllm_graphs",
    "init engine": "vllm_engine",
}


class StartUp:
    """Where the time before the first update goes, as events while it passes and in the report."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.seconds: dict[str, float] = {}

    def note(self, phase: str, seconds: float) -> None:
        """Write down what a phase took."""
        self.seconds[phase] = round(seconds, 2)
        self._say(f"start-up: {phase} {seconds:.1f} s")

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Time what is done in it."""
        began = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - began)


class VllmTimes(logging.Handler):
    """Reads from vLLM's own log what its parts took: it tells nobody else."""

    def __init__(self, start_up: StartUp) -> None:
        super().__init__(logging.INFO)
        self._start_up = start_up

    def emit(self, record: logging.LogRecord) -> None:
        found = _TIMED.search(record.getMessage())
        if found:
            self._start_up.note(_VLLM_PHASES[found["what"]], float(found["seconds"]))


class SeededGeneration:
    """Stands in for `LLM.generate` and gives each request of a rollout the seed it was told to.

    And asks for no text: the trainer reads token ids, and vLLM would decode each of them twice, between its steps.
    """

    def __init__(self, generate: Callable[..., Any]) -> None:
        self._generate = generate
        self._seeds: list[int] = []

    def expect(self, seeds: Sequence[int]) -> None:
        """The seeds of the next call's requests."""
        self._seeds = list(seeds)

    def __call__(self, prompts: Any, sampling_params: Any = None, **options: Any) -> Any:
        seeds, self._seeds = self._seeds, []
        if seeds and not isinstance(sampling_params, list) and len(seeds) == len(prompts):
            sampling_params = [_for_rollout(sampling_params, seed) for seed in seeds]
        return self._generate(prompts, sampling_params, **options)


class UnslothEngine(TrlEngine):
    """One run; see `Engine` for the order of calls. What it does not say is as in `TrlEngine`."""

    name: EngineName = "unsloth"
    patches_libraries = True

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self._start_up = StartUp(context.events.log)
        self._start_up.note("import", unsloth_start.import_seconds())
        self._llm: Any = None
        self._training_began = 0.0

    def load(self, files: ModelFiles, rows: Sequence[Row]) -> None:
        with self._start_up.phase("load"):
            super().load(files, rows)

    def train(self) -> int:
        self._training_began = time.perf_counter()
        return super().train()

    def answer(self, questions: Sequence[str], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        params = import_module("vllm").SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        request = self.model.load_lora("evaluation", load_tensors=True) if adapter else None
        conversations = [messages_for(question, self._spec.data) for question in questions]
        encoded = self.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        prompts = [{"prompt_token_ids": list(ids)} for ids in encoded["input_ids"]]
        at_once = ANSWERS_AT_ONCE * sequences_at_once(self._spec)
        for start in range(0, len(prompts), at_once):
            batch = prompts[start : start + at_once]
            for told in self._llm.generate(batch, params, use_tqdm=False, lora_request=request):
                yield self._read(told.outputs[0])

    def served_logprobs(self, probes: Sequence[Probe], adapter: Path | None) -> LogProbs | None:
        params = import_module("vllm").SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0)
        # From the folder, as any vLLM would load the result.
        request = self.model.load_lora(str(adapter.absolute())) if adapter else None
        prompts = [{"prompt_token_ids": probe.prompt + probe.completion} for probe in probes]
        told = self._llm.generate(prompts, params, use_tqdm=False, lora_request=request)
        return [
            [
                _logprob(position, token)
                for position, token in zip(output.prompt_logprobs[-len(ids) :], ids, strict=True)
            ]
            for output, ids in ((output, probe.completion) for output, probe in zip(told, probes, strict=True))
        ]

    def release(self) -> None:
        llm, self._llm = self._llm, None
        super().release()
        with suppress(Exception):  # what is not let go of here ends with the process
            empty(tensors_of_server(llm))
        with suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        self._context.events.log(f"released the model: {(total - free) / 1e9:.1f} GB of the GPU are in use")

    def report(self) -> dict[str, Any]:
        free, total = torch.cuda.mem_get_info()
        return {
            **super().report(),
            "start_up_seconds": self._start_up.seconds,
            "device_memory_gb": {"used": round((total - free) / 1e9, 2), "total": round(total / 1e9, 2)},
            "rollout_server": _held_by_server(self._llm),
            "libraries": {name: importlib.metadata.version(name) for name in ("unsloth", "unsloth_zoo", "vllm")},
        }

    def _make_trainer(self, settings: Settings) -> RecordingTrainer:
        fast: Any = import_module("unsloth").FastLanguageModel
        with self._start_up.phase("model"):
            model, tokenizer = self._load_model(fast)
        require_context_length(model, self._spec)
        self._llm = model.vllm_engine
        self._require_server(model)
        score_in_equal_parts()
        with self._start_up.phase("trainer"):
            trainer = RecordingTrainer(
                **self._record_options(),
                # Wrapped beforehand, and the KL reference still the base: Unsloth takes out that TRL copies it.
                model=self._add_adapter(fast, model),
                args=GRPOConfig(**unsloth_arguments(settings)),
                train_dataset=as_dataset(self._prompts),
                processing_class=tokenizer,
            )
        with_adapter: Any = trainer.model
        require_same(
            {"adapters": ["default"], "gradient_checkpointing": settings["gradient_checkpointing"]},
            {
                "adapters": [*with_adapter.peft_config],
                # What Unsloth goes by when it trains; it takes "unsloth" for True where sequences are short.
                "gradient_checkpointing": bool(getattr(with_adapter, "_unsloth_gradient_checkpointing", None)),
            },
            "The model",
        )
        if self._llm.llm_engine.vllm_config.use_v2_model_runner:
            # The older model runner draws seeded requests one by one; there one seed a step has to do.
            self._llm.generate = seeded = SeededGeneration(self._llm.generate)
            trainer.give_seeds = seeded.expect
        return trainer

    def _load_model(self, fast: Any) -> tuple[Any, Any]:
        free, _ = torch.cuda.mem_get_info()
        require_room(self._spec.model.gpu_memory_share, free, self.files.parameters, self.precision.weights)
        times = VllmTimes(self._start_up)
        import_module("vllm.logger")  # sets up the logger, and would drop a handler it has
        logging.getLogger("vllm").addHandler(times)
        try:
            model, tokenizer = fast.from_pretrained(
                str(self.files.path),
                dtype=getattr(torch, self.precision.dtype),
                **unsloth_model_settings(self._spec, self.precision),
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            said = str(error).lower()
            if "memory" not in said or "illegal memory access" in said:
                raise
            raise no_room(error, self.precision.weights) from error
        finally:
            logging.getLogger("vllm").removeHandler(times)
        ends = getattr(model.generation_config, "eos_token_id", None)
        if (self.files.path / "generation_config.json").is_file():
            ends = GenerationConfig.from_pretrained(self.files.path).eos_token_id
        # As in TrlEngine: nothing is sampled by defaults that came with the model, but every end mark counts.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        return model, tokenizer

    def _add_adapter(self, fast: Any, model: Any) -> Any:
        try:
            return fast.get_peft_model(model, **unsloth_adapter_settings(self._spec))
        except ValueError as error:
            raise_if_module_missing(error, self.files)
            raise

    def _require_server(self, model: Any) -> None:
        """Fail the job unless vLLM and the model are what was asked for: Unsloth falls back to less with a print."""
        spec, held = self._spec, _held_by_server(self._llm)
        four_bit = any(type(module).__name__ == "Linear4bit" for module in model.modules())
        require_same(
            {"shared_weights": True, "logprobs": "processed_logprobs", "four_bit": self.precision.weights == "4bit"},
            {**held, "four_bit": four_bit},
            "The rollout server",
        )
        longest = spec.sampling.max_prompt_tokens + max(
            spec.sampling.max_completion_tokens,
            spec.evaluation.max_completion_tokens if spec.evaluation.questions else 0,
        )
        if held["max_sequence"] < longest:
            fits = f"{held['max_sequence']} tokens fit of the {longest} a sequence may have"
            raise no_room(fits, self.precision.weights)

    def _after_step(self, step: int) -> bool:
        if "first_step" not in self._start_up.seconds:
            self._start_up.note("first_step", time.perf_counter() - self._training_began)
            self._start_up.note("process_start_to_first_update", unsloth_start.seconds_since_start())
        return super()._after_step(step)

    def _read(self, told: Any) -> Answer:
        text = self.tokenizer.decode(told.token_ids, skip_special_tokens=True)
        return Answer(text, len(told.token_ids), "stop" if told.finish_reason == "stop" else "length")


def score_in_equal_parts() -> None:
    """Have Unsloth compute log-probabilities by one compiled part, run in a loop.

    Its usual function is compiled with the loop unrolled, a part or more for each completion: a graph that grows with
    the batch, and took over two minutes to compile for 64 completions. The variant it keeps for saving memory computes
    a part's logits again in the backward pass, which costs one matrix product of the output head more.
    """
    scoring: Any = import_module("unsloth_zoo.rl_replacements")
    scoring.chunked_hidden_states_selective_log_softmax = scoring.chunked_hidden_states_selective_log_softmax_recompute


def tensors_of_server(llm: Any) -> list[torch.Tensor]:
    """The weights and the cache of keys and values of a vLLM that runs in this process."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner
    return [*runner.model.parameters(), *runner.model.buffers(), *runner.kv_caches]


def empty(tensors: Sequence[torch.Tensor]) -> None:
    """Give back the memory of tensors, whoever else has them or parts of them.

    Shutting vLLM down does not: its adapter manager keeps the model, whose layers have the cache, and the model in
    training keeps vLLM. On a card that is just large enough the self-test's copy of the base would find no room.
    """
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)


def _held_by_server(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    return {
        "shared_weights": getattr(llm, "shared_weights", False),
        "logprobs": str(getattr(config.model_config.logprobs_mode, "value", config.model_config.logprobs_mode)),
        "max_sequence": config.model_config.max_model_len,
        "sequences_at_once": config.scheduler_config.max_num_seqs,
        "graphs": list(config.compilation_config.cudagraph_capture_sizes or []),
        "eager": config.model_config.enforce_eager,
        "model_runner": "v2" if config.use_v2_model_runner else "v1",
    }


def _for_rollout(params: Any, seed: int) -> Any:
    own = copy.copy(params)
    own.seed, own.detokenize = seed, False
    return own


def _logprob(position: Any, token: int) -> float:
    return float(position[token].logprob)
