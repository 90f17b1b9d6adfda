"""The `trl` engine: TRL's GRPOTrainer with a PEFT adapter, on a CPU or on GPUs, rollouts by vLLM or transformers.

Owns loading the model and building the trainer; TRL owns the loop, `trl_trainer` the hooks, and `team` the exchange
between ranks. Invariant: the KL reference is always the base model, also for a run that starts or resumes from a
checkpoint.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import GenerationConfig
from transformers.trainer_callback import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig

from grpo_core import strict_json
from grpo_core.checkpoints.manifest import SavedRun, unreadable
from grpo_core.checkpoints.writer import (
    continue_adapter,
    load_adapter,
    random_states,
    read_state,
    set_random_states,
    write_adapter,
)
from grpo_core.compat.trl import check as check_libraries
from grpo_core.datasets import Question, Row
from grpo_core.datasets.prompts import Prompt, PromptSet, build_prompts, messages_for
from grpo_core.datasets.templates import encode, render
from grpo_core.engines import logprobs
from grpo_core.engines.completions import Request, ServingSampler
from grpo_core.engines.gradient_checkpointing import GradientCheckpointing, choose_gradient_checkpointing
from grpo_core.engines.native.sampling import Filters
from grpo_core.engines.pretrained import load_tokenizer, model_unreadable
from grpo_core.engines.protocol import EngineContext, EngineName
from grpo_core.engines.settings import Settings, adapter_settings, require_same, sequences_at_once, trainer_settings
from grpo_core.engines.team import Team
from grpo_core.engines.trainer import RecordingTrainer, StepCallback
from grpo_core.engines.transformers_sampler import TransformersSampler
from grpo_core.engines.trl_trainer import TrlTrainer
from grpo_core.engines.vllm_server import NotServed, VllmServer, why_not
from grpo_core.errors import JobFailure
from grpo_core.evaluation.generate import Answer
from grpo_core.evaluation.held_out import HeldOutEvaluation
from grpo_core.hardware.models import Hardware, ModelFiles, Precision, choose_precision
from grpo_core.monitoring import trackers
from grpo_core.monitoring.slow_rank import SlowRank
from grpo_core.reasons import FailureCode, FinishReason, WarningCode
from grpo_core.selftest.logprob_probes import LogprobProbe, LogProbs, token_logprobs
from grpo_core.selftest.peft_reference import load_base
from grpo_core.selftest.selftest import base_checksums
from grpo_core.spec import JobSpec

ADAPTER = "default"
"""PEFT's name for the trained adapter."""
QUESTIONS_AT_ONCE: Final = 64


class TrlEngine:
    """One run. `Engine` has the order of calls."""

    name: EngineName = "trl"
    patches_libraries = False
    shares_base = False
    ended_early = False

    _team: Team
    _sampler: ServingSampler
    _server: VllmServer | None = None
    """vLLM's engine, if that generates."""
    files: ModelFiles
    precision: Precision
    checkpointing: GradientCheckpointing
    tokenizer: Any

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._spec = context.spec
        self._steps_done = 0
        self._began = 0.0
        self._seconds_before = 0.0
        self._seconds = 0.0
        self._seconds_evaluating = 0.0
        self._held_out: HeldOutEvaluation | None = None
        self._slow_rank = SlowRank()
        self._state: dict[str, Any] | None = None

    def load(self, files: ModelFiles, rows: Sequence[Row]) -> None:
        check_libraries()
        # The libraries' advice is for people who call them directly.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|torch)\b")
        self.files = files
        self._hardware = hardware = find_hardware(self._spec)
        self.precision = choose_precision(
            self._spec.model, self.files.parameters, hardware, has_4bit=self.name != "native"
        )
        self._context.events.log(
            f"{self.files.name}: {self.files.parameters / 1e6:.1f} M parameters, weights in "
            f"{self.precision.weights} ({self.precision.reason})"
        )
        self._choose_checkpointing(hardware)
        self._device = torch.device("cpu") if self.precision.weights == "fp32" else torch.device("cuda", 0)
        self._team = Team(self._context.rank, self._device)
        self.tokenizer = load_tokenizer(self.files)
        self._prompts = build_prompts(rows, self._spec, self.tokenizer)
        self._warn_of_dropped_prompts()
        self._trainer = self._build_trainer()
        if self._context.saved is not None:
            self._go_on_from(self._context.saved)

    @property
    def model(self) -> Any:
        # TRL's annotation also allows models without an adapter.
        return self._trainer.model

    def answer(self, questions: Sequence[Question], *, adapter: bool, max_new_tokens: int) -> Generator[Answer]:
        stops, at_once = self._stops, self._questions_at_once()
        for start in range(0, len(questions), at_once):
            asked = [messages_for(question, self._spec.data) for question in questions[start:][:at_once]]
            requests = [Request(ids, 0) for ids in encode(self.tokenizer, asked)]
            with self._sampler.serving(adapter=adapter):
                drawn = self._team.draw(self._sampler, requests, tokens=max_new_tokens, temperature=0)
            texts = self.tokenizer.batch_decode([one.tokens for one in drawn], skip_special_tokens=True)
            for text, one in zip(texts, drawn, strict=True):
                yield Answer(text, len(one.tokens), FinishReason.of(one.tokens[-1] in stops))

    def train(self, held_out: HeldOutEvaluation | None = None) -> int:
        self._held_out = held_out
        self._began = time.perf_counter()
        # By an evaluation of an earlier run, which was lost while it answered the last questions.
        self.ended_early = held_out is not None and held_out.stopped
        if held_out is not None and self._agree(held_out.is_missed(self._steps_done)):
            self._evaluate(held_out, self._steps_done)
        if self.ended_early:
            pass
        elif self._state is None:
            self._trainer.train()
        elif self._steps_done < self._spec.training.steps:  # else transformers would do one step more
            self._train_on(self._state)
        self._seconds = self._seconds_so_far()
        self._state = None
        self._end_training()
        return self._steps_done

    def save_checkpoint(self) -> None:
        if not self._team.is_lead:
            return
        step, saved = self._steps_done, self._context.saved
        if step == (saved.step if saved else 0) or self._context.checkpoints.has(step):
            return
        self._context.checkpoints.write(step, self.model, self._training_state())

    def save_adapter(self) -> None:
        write_adapter(
            self._context.folder.adapter,
            self.model,
            self.tokenizer,
            self._spec,
            steps=self._steps_done,
            rewards=self._context.recorder.reward_summary(),
        )

    def base_checksums(self) -> dict[str, int]:
        return base_checksums(self.model)

    def part(self) -> None: ...

    def report(self) -> dict[str, Any]:
        on_gpu = self._trainer.args.device.type == "cuda"
        settings = trainer_settings(self._spec, self.precision, Path(), self.name)
        return {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "ranks": self._context.rank.count,
            "model": {
                "name": self.files.name,
                "revision": self.files.revision,
                "source": self.files.source,
                "parameters": self.files.parameters,
                "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            },
            "precision": self.precision.as_dict(),
            "gradient_checkpointing": asdict(self.checkpointing),
            "prompts": {
                "kept": len(self._prompts.prompts),
                "dropped": self._prompts.dropped,
                "longest_tokens": self._prompts.longest_kept,
                "example": self._templated(self._prompts.prompts[0]),
            },
            "training_seconds": round(self._seconds, 3),
            "gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
            "settings": {name: value for name, value in settings.items() if name != "output_dir"},
            **({} if self._server is None else self._server.report()),
        }

    def logprobs(self, probes: Sequence[LogprobProbe]) -> LogProbs:
        return token_logprobs(self.model, probes, self.precision)

    def served_logprobs(self, probes: Sequence[LogprobProbe], adapter: Path | None) -> LogProbs | None:
        return None if self._server is None else self._server.logprobs(probes, adapter)

    def release(self) -> None:
        trainer: Any = self._trainer
        trainer.forget()
        # The libraries keep references to both, so the memory of the tensors is released instead.
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        if trainer.optimizer is not None:
            trainer.optimizer.state.clear()
        del self._trainer
        if self._server is not None:
            self._server.release(self._context.events.log)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _choose_checkpointing(self, hardware: Hardware) -> None:
        self.checkpointing = choose_gradient_checkpointing(self._spec, self.files, self.precision, hardware, self.name)
        self._context.events.log(f"gradient checkpointing: {self.checkpointing.way} ({self.checkpointing.reason})")
        lora = self._spec.lora.model_copy(update={"gradient_checkpointing": self.checkpointing.way})
        self._at_once = self._spec.micro_batch
        # Ranks split a step themselves, so for TRL it is one part, unless its loss depends on the parts.
        one_part = self._context.rank.count > 1 and self._spec.loss.type != "bnpo"
        parts = 1 if one_part else self._spec.sampling.gradient_accumulation
        sampling = self._spec.sampling.model_copy(update={"gradient_accumulation": parts})
        self._spec = self._spec.model_copy(update={"lora": lora, "sampling": sampling})

    def _build_trainer(self) -> RecordingTrainer:
        spec = self._spec
        settings = trainer_settings(spec, self.precision, self._context.folder.root, self.name)
        trainer = self._make_trainer(settings)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(StepCallback(self._context.recorder, trainer, self._after_step))
        trackers.attach(
            trainer,
            spec,
            folder=self._context.folder.root,
            events=self._context.events,
            latest=self._context.recorder.latest_metrics,
        )
        with_adapter: Any = trainer.model
        initialise_adapter(with_adapter, spec.lora.seed)
        if self._context.saved is not None:
            continue_adapter(self._context.saved, with_adapter, spec)
        elif self._context.folder.start_checkpoint.is_dir():
            load_adapter(self._context.folder.start_checkpoint, with_adapter, spec)
        require_same(settings, vars(trainer.args), "The trainer's arguments")
        require_same(_asked_of_trainer(spec, settings), _held_by_trainer(trainer), "The trainer")
        require_same(adapter_settings(spec), _held_by_adapter(with_adapter), "The adapter")
        return trainer

    def _make_trainer(self, settings: Settings) -> RecordingTrainer:
        """Load the model and build a trainer with an adapter on it."""
        model = load_base_model(self.files, self.precision, self.tokenizer)
        require_context_length(model, self._spec)
        if settings["use_cpu"]:
            logprobs.install()
        try:
            trainer = TrlTrainer(
                **self._record_options(),
                model=model,
                args=GRPOConfig(**settings),
                train_dataset=as_dataset(self._prompts),
                processing_class=self.tokenizer,
                # Passed here, because TRL would copy an adapter that wraps the model as the KL reference.
                peft_config=LoraConfig(**adapter_settings(self._spec)),
            )
        except ValueError as error:
            raise_if_module_missing(error, self.files)
            raise
        self._sampler = self._make_sampler(trainer.model)
        trainer.share(self._team, self._sampler)
        trainer.at_once = self._at_once
        return trainer

    def _end_training(self) -> None:
        self._team.leave()

    def _make_sampler(self, model: Any) -> ServingSampler:
        sampling = self._spec.sampling
        ends: Any = model.generation_config.eos_token_id
        stops = [ends] if isinstance(ends, int) else list(ends)
        if self._has_vllm() and (server := self._start_server(model, stops)) is not None:
            self._server = server
            return server
        return TransformersSampler(
            model,
            stops=stops,
            padding=self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            filters=Filters(sampling.top_k, sampling.top_p),
        )

    def _has_vllm(self) -> bool:
        if self._device.type == "cpu":
            return False
        if reason := why_not(self.precision):
            self._say_why_slow(reason)
        return not reason

    def _start_server(self, model: Any, stops: Sequence[int]) -> VllmServer | None:
        """Return vLLM's engine, on all ranks or on none."""
        server, reason = None, "vLLM does not serve this model on another rank"
        try:
            server = VllmServer(
                self._spec,
                self.files,
                self.precision,
                rank=self._context.rank,
                hardware=self._hardware,
                context_length=getattr(model.config, "max_position_embeddings", None),
                stops=stops,
            )
        except NotServed as error:
            traceback.print_exc(file=sys.stderr)
            reason = str(error)
        refused = torch.tensor([server is None], dtype=torch.int64)
        self._team.sum(refused)
        if server is not None and not refused.any():
            server.serve(model)
            self._context.events.log(f"start-up: vllm {server.seconds['vllm']:.1f} s")
            return server
        self._say_why_slow(reason)
        if server is not None:
            server.release(self._context.events.log)
        return None

    def _say_why_slow(self, reason: str) -> None:
        self._context.events.log(f"Completions are generated by transformers, which is slower: {reason}.")

    def _record_options(self) -> dict[str, Any]:
        """Return the arguments of `RecordingTrainer` beside those of TRL's trainer."""
        return {"recorder": self._context.recorder, "grading": self._context.grading}

    def _after_step(self, step: int) -> bool:
        self._steps_done = step
        stops, held_out = self._agree(self._context.stop.is_set()), self._held_out
        self._warn_of_a_slow_rank()
        is_best = False
        if held_out is not None and self._agree(self._is_evaluation_due(held_out, step)):
            stops |= self._evaluate(held_out, step)
            is_best = held_out.curve.best_step == step
        if is_best or self._context.checkpoints.is_due(step) or self._agree(self._is_checkpoint_overdue()):
            self.save_checkpoint()
        return stops

    def _warn_of_a_slow_rank(self) -> None:
        slow = self._slow_rank.note(self._team.worked) if self._team.size > 1 else None
        if slow is not None:
            self._context.events.warning(
                WarningCode.SLOW_RANK,
                f"The others wait for rank {slow.rank} of {self._team.size}: it computes {slow.seconds:.3g} s a step, "
                f"and half of the ranks at most {slow.usual:.3g} s. Look at its GPU's clock, temperature and other "
                "processes.",
            )

    def _is_checkpoint_overdue(self) -> bool:
        return self._context.rank.is_lead and self._context.checkpoints.is_overdue()

    def _agree(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank. All ranks stop or none: if one stopped alone, the others would
        wait for it."""
        return self._team.agree(flag, self._leaves())

    def _leaves(self) -> list[torch.Tensor]:
        """Return the trained tensors, which must be equal on all ranks."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def _stops(self) -> set[int]:
        ends: Any = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends)

    def _questions_at_once(self) -> int:
        """Return the number of questions between two checks for a request to stop."""
        # vLLM refills a batch while it generates.
        return QUESTIONS_AT_ONCE if self._server is None else 2 * sequences_at_once(self._spec)

    def _is_evaluation_due(self, held_out: HeldOutEvaluation, step: int) -> bool:
        latest = self._context.recorder.latest_metrics()
        # Only rank 0 decides, because the ranks' clocks differ.
        return self._context.rank.is_lead and latest is not None and held_out.is_due(step, latest.seconds.total)

    def _evaluate(self, held_out: HeldOutEvaluation, step: int) -> bool:
        """Evaluate the adapter in training, and return whether training ends. What follows computes the same without
        it."""
        began, states = time.perf_counter(), random_states()
        # Of several ranks none may leave the questions that all of them answer together.
        stop = self._context.stop if self._context.rank.count == 1 else threading.Event()
        held_out.ask_during(self, step, stop)
        set_random_states(states)
        self._seconds_evaluating += time.perf_counter() - began
        self.ended_early = self._agree(self._context.rank.is_lead and held_out.stopped)
        return self.ended_early

    def _go_on_from(self, saved: SavedRun) -> None:
        self._state = read_state(saved)
        self._steps_done = saved.step
        try:
            self._seconds = self._seconds_before = float(self._state["seconds"])
            same = self._state["prompts"] == digest_of(self._prompts)
        except (KeyError, TypeError, ValueError) as error:
            raise unreadable(f"The state in {saved.folder.name} is incomplete: {error}.") from error
        if not same:
            self._context.events.warning(
                WarningCode.DATA_CHANGED,
                "The questions differ from those of the checkpoint, because the data set has changed, here or on the "
                "hub. Some may be used twice, and some not at all.",
            )

    def _train_on(self, state: dict[str, Any]) -> None:
        self._trainer.train_on(self._steps_done, state["trainer"], lambda: set_random_states(state["rng"]))

    def _training_state(self) -> dict[str, Any]:
        return {
            "trainer": self._trainer.remember(),
            "prompts": digest_of(self._prompts),
            "seconds": self._seconds_so_far(),
        }

    def _seconds_so_far(self) -> float:
        return self._seconds_before + time.perf_counter() - self._began - self._seconds_evaluating

    def _templated(self, prompt: Prompt) -> str:
        return render(self.tokenizer, [prompt.messages])[0]

    def _warn_of_dropped_prompts(self) -> None:
        if self._prompts.dropped:
            self._context.events.warning(
                WarningCode.PROMPTS_DROPPED,
                f"{self._prompts.dropped} prompts have more than {self._spec.sampling.max_prompt_tokens} tokens "
                f"(up to {self._prompts.longest_dropped}) and were dropped; {len(self._prompts.prompts)} are left.",
            )


def find_hardware(spec: JobSpec) -> Hardware:
    """Return the GPU that a job may use; none if the job requests none."""
    if spec.resources.gpus == 0:
        return Hardware()
    free, memory = torch.cuda.mem_get_info(0)
    return Hardware(gpus=1, gpu_memory_bytes=memory, bf16=torch.cuda.is_bf16_supported(), gpu_free_bytes=free)


def load_base_model(files: ModelFiles, precision: Precision, tokenizer: Any) -> Any:
    """Load the frozen base model, without its own sampling defaults."""
    try:
        model = load_base(files.path, precision)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise model_unreadable(files, "weights", error) from error
    ends = model.generation_config.eos_token_id
    # Its defaults would replace settings that are not set (for Qwen2.5, top-p 0.8 and a repetition penalty).
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def raise_if_module_missing(error: ValueError, files: ModelFiles) -> None:
    """Raise a `user_config` failure if PEFT's error says that the model lacks a projection."""
    if "target modules" in str(error).lower():
        raise JobFailure(
            FailureCode.NO_SUCH_MODULE,
            f"{files.name} lacks some of the projections in lora.target_modules.",
            hint="Name projections that the model's architecture has.",
        ) from error


def require_context_length(model: Any, spec: JobSpec) -> None:
    """Raise a `user_config` failure if the job's sequences are longer than the model's context window.

    Answers to held-out questions are shortened to it instead.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    needed = spec.sampling.max_prompt_tokens + spec.sampling.max_completion_tokens
    if limit is not None and needed > limit:
        raise JobFailure(
            FailureCode.SEQUENCE_TOO_LONG,
            f"Prompt and completion may take {needed} tokens, and {spec.model.name} can read at most {limit}.",
            hint="Lower sampling.max_prompt_tokens or sampling.max_completion_tokens.",
        )


def as_dataset(prompts: PromptSet) -> Dataset:
    """Make a data set with the columns that TRL and the rewards read."""
    return Dataset.from_list(
        [
            {
                "prompt": p.messages,
                "prompt_id": p.prompt_id,
                "row": p.row,
                "question": p.question,
                "answer": p.answer,
                "item": p.item,
            }
            for p in prompts.prompts
        ]
    )


def digest_of(prompts: PromptSet) -> str:
    """Return the SHA-256 of questions and answers in order: if it is equal, so is the order of training."""
    digest = hashlib.sha256()
    for prompt in prompts.prompts:
        digest.update(strict_json.canonical([prompt.prompt_id, prompt.question, prompt.answer]).encode())
    return digest.hexdigest()


def initialise_adapter(model: Any, seed: int) -> None:
    """Initialise the adapter's weights from their own seed, and keep them in 32 bits.

    TRL casts them to bf16 with a 4-bit base model; most of the recipe's updates are smaller than a rounding step of
    that.
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters(ADAPTER, True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _asked_of_trainer(spec: JobSpec, settings: Settings) -> dict[str, Any]:
    """Return the settings that a trainer copies from its arguments, and may change."""
    return {
        "completions_per_step": spec.completions_per_step,
        "num_generations": spec.sampling.generations,
        "max_completion_length": spec.sampling.max_completion_tokens,
        "temperature": spec.sampling.temperature,
        "top_p": spec.sampling.top_p,
        "top_k": settings["top_k"],
        "repetition_penalty": spec.sampling.repetition_penalty,
        "beta": spec.loss.beta,
        "loss_type": spec.loss.type,
        "epsilon_low": spec.loss.epsilon,
        "epsilon_high": spec.loss.epsilon,
        "scale_rewards": spec.loss.scale_by,
        "num_iterations": spec.loss.iterations,
        "use_vllm": settings["use_vllm"],
        "ref_model": None,
    }


def _held_by_trainer(trainer: RecordingTrainer) -> dict[str, Any]:
    args = trainer.args
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**vars(trainer), "completions_per_step": completions}


def _held_by_adapter(model: Any) -> dict[str, Any]:
    held = vars(model.peft_config[ADAPTER])
    return {**held, "target_modules": sorted(held["target_modules"])}
