"""The `unsloth` engine: Unsloth's GRPO trainer on one CUDA GPU, rollouts by vLLM in the same process.

Owns what is specific to Unsloth and vLLM: one copy of the base weights for both, an adapter that is served unmerged, a
seed for each completion, and the measurement of start-up times. Unsloth must be imported before this module
(`unsloth_env`): it patches TRL, transformers and PEFT, from which the classes here inherit.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from trl.trainer.grpo_config import GRPOConfig

from grpo_core.compat import unsloth, vllm
from grpo_core.datasets import Question, Row
from grpo_core.datasets.prompts import messages_for
from grpo_core.datasets.templates import encode
from grpo_core.engines import unsloth_env
from grpo_core.engines.protocol import EngineContext, EngineName
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
from grpo_core.engines.vllm_memory import is_short_of_memory, no_room, require_room
from grpo_core.engines.vllm_server import prompt_logprobs, release
from grpo_core.evaluation.generate import Answer
from grpo_core.evaluation.held_out import HeldOutEvaluation
from grpo_core.hardware.models import ModelFiles
from grpo_core.reasons import FinishReason
from grpo_core.selftest.logprob_probes import LogprobProbe, LogProbs

ANSWERS_AT_ONCE = 2
"""Batches of questions per call of vLLM: a caller who closes the generator waits for one call at most."""


class StartUp:
    """Measures the phases before the first update, for events and for the report."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.seconds: dict[str, float] = {}

    def note(self, phase: str, seconds: float) -> None:
        """Record the duration of a phase."""
        self.seconds[phase] = round(seconds, 2)
        self._say(f"start-up: {phase} {seconds:.1f} s")

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Measure the time of the block."""
        began = time.perf_counter()
        yield
        self.note(name, time.perf_counter() - began)


class UnslothEngine(TrlEngine):
    """One run. `Engine` has the order of calls; methods that are not here are those of `TrlEngine`."""

    name: EngineName = "unsloth"
    patches_libraries = True

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self._start_up = StartUp(context.events.log)
        self._start_up.note("import", unsloth_env.import_seconds())
        self._llm: Any = None
        self._training_began = 0.0

    def load(self, files: ModelFiles, rows: Sequence[Row]) -> None:
        unsloth.check()
        with self._start_up.phase("load"):
            super().load(files, rows)

    def train(self, held_out: HeldOutEvaluation | None = None) -> int:
        self._training_began = time.perf_counter()
        return super().train(held_out)

    def answer(self, questions: Sequence[Question], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        params = import_module("vllm").SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        request = self.model.load_lora("evaluation", load_tensors=True) if adapter else None
        conversations = [messages_for(question, self._spec.data) for question in questions]
        prompts = [{"prompt_token_ids": ids} for ids in encode(self.tokenizer, conversations)]
        at_once = ANSWERS_AT_ONCE * sequences_at_once(self._spec)
        for start in range(0, len(prompts), at_once):
            batch = prompts[start : start + at_once]
            for told in self._llm.generate(batch, params, use_tqdm=False, lora_request=request):
                yield self._read(told.outputs[0])

    def served_logprobs(self, probes: Sequence[LogprobProbe], adapter: Path | None) -> LogProbs | None:
        # From the folder, as any vLLM server would load the result.
        request = self.model.load_lora(str(adapter.absolute())) if adapter else None
        return prompt_logprobs(self._llm, probes, request)

    def release(self) -> None:
        llm, self._llm = self._llm, None
        super().release()
        release(llm, self._context.events.log)
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
        self._llm = unsloth.rollout_server(model)
        self._require_server(model)
        unsloth.score_in_equal_parts()
        with self._start_up.phase("trainer"):
            trainer = RecordingTrainer(
                **self._record_options(),
                # Already wrapped; the KL reference is still the base model, because Unsloth removes TRL's copy of it.
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
                "gradient_checkpointing": unsloth.checkpoints_gradients(with_adapter),
            },
            "The model",
        )
        trainer.give_seeds = vllm.seed_rollouts(self._llm)
        return trainer

    def _load_model(self, fast: Any) -> tuple[Any, Any]:
        free, _ = torch.cuda.mem_get_info()
        require_room(self._spec.model.gpu_memory_share, free, self.files.parameters, self.precision.weights)
        times = vllm.StartUpTimes(self._start_up.note)
        import_module("vllm.logger")  # configures the logger, and would remove an earlier handler
        logging.getLogger("vllm").addHandler(times)
        try:
            model, tokenizer = fast.from_pretrained(
                str(self.files.path),
                dtype=getattr(torch, self.precision.dtype),
                **unsloth_model_settings(self._spec, self.precision),
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            if not is_short_of_memory(error):
                raise
            raise no_room(error, self.precision.weights) from error
        finally:
            logging.getLogger("vllm").removeHandler(times)
        ends = getattr(model.generation_config, "eos_token_id", None)
        if (self.files.path / "generation_config.json").is_file():
            ends = GenerationConfig.from_pretrained(self.files.path).eos_token_id
        # As in TrlEngine, without the model's sampling defaults, but with all its end tokens.
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
        """Fail the job unless vLLM and the model are as requested, because Unsloth falls back with only a print."""
        spec, held = self._spec, _held_by_server(self._llm)
        require_same(
            {"shared_weights": True, "logprobs": "processed_logprobs", "four_bit": self.precision.weights == "4bit"},
            {**held, "four_bit": unsloth.in_four_bits(model)},
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
            self._start_up.note("process_start_to_first_update", unsloth_env.seconds_since_start())
        return super()._after_step(step)

    def _read(self, told: Any) -> Answer:
        text = self.tokenizer.decode(told.token_ids, skip_special_tokens=True)
        return Answer(
            text,
            len(told.token_ids),
            FinishReason.of(told.finish_reason == "stop"),
        )


def _held_by_server(llm: Any) -> dict[str, Any]:
    return {"shared_weights": unsloth.shares_weights(llm), **vllm.settings(llm)}
