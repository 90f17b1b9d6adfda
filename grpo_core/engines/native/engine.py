"""The `native` engine of a run: loads the model once for both modes, and trains it with TRL's trainer.

Owns the parts that a run consists of, and whether ranks share the base out; `memory` divides a GPU's memory, and
`requirements` has the reasons to refuse a job. The transformers model that other modules use has views of the same
weights, and PEFT's adapter views of the same leaves. Invariant: a run that resumes on another GPU of the same type
computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig
from trl.trainer.grpo_config import GRPOConfig

from grpo_core.cost import QUESTIONS_AT_ONCE
from grpo_core.datasets.templates import encode
from grpo_core.engines.completions import Request
from grpo_core.engines.gradient_checkpointing import GradientCheckpointing
from grpo_core.engines.native.adapter import Adapter
from grpo_core.engines.native.architecture import Architecture
from grpo_core.engines.native.decode import Decoder
from grpo_core.engines.native.layout import Group, lay_out
from grpo_core.engines.native.loop import Modes, NativeTrainer
from grpo_core.engines.native.memory import memory_to_plan, plan_memory, require_room, spares_activations
from grpo_core.engines.native.packed import Packed
from grpo_core.engines.native.requirements import require_known, require_precision
from grpo_core.engines.native.sampling import Filters
from grpo_core.engines.native.weights import Weights, load_weights, matrix_bytes
from grpo_core.engines.pretrained import stop_tokens
from grpo_core.engines.protocol import EngineName
from grpo_core.engines.settings import Settings, adapter_settings
from grpo_core.engines.team import Order
from grpo_core.engines.trainer import RecordingTrainer
from grpo_core.engines.trl import TrlEngine, as_dataset, raise_if_module_missing, require_context_length
from grpo_core.errors import JobFailure, fault
from grpo_core.hardware.models import Hardware, ModelFiles
from grpo_core.reasons import FailureCode
from grpo_core.selftest.logprob_probes import LogprobProbe, LogProbs
from grpo_core.selftest.selftest import bytes_of, checksum
from grpo_core.spec import JobSpec

CPU_TOKENS: Final = 8192
"""Number of tokens of a forward pass on a CPU."""
AGREEMENT: Final = 0.1
"""Largest mean difference of log-probabilities between the modes that rounding in 16 bits explains, for any weights."""
AGREEMENT_8BIT: Final = 0.8
"""The same in 8 bits, which amplify differences: 0.5 with random weights. With trained weights, `guards` is
stricter."""


class NativeEngine(TrlEngine):
    """One run. `Engine` has the order of calls."""

    name: EngineName = "native"

    _weights: Weights
    _modes: Modes
    _sparing: bool
    """Whether the job requests gradient checkpointing."""
    _may_spare: bool
    """Whether it allows it."""
    _least_parts: int
    """Smallest number of parts of a step."""

    def load(self, files: ModelFiles, rows: Sequence[Any]) -> None:
        super().load(files, rows)
        if self._weights.device.type == "cuda":
            self._require_agreement()

    def logprobs(self, probes: Sequence[LogprobProbe]) -> LogProbs:
        with torch.no_grad():
            return [self._logprobs_of(probe) for probe in probes]

    def part(self) -> None:
        team = self._team
        if not team.directed:
            return
        team.direct(Order.PART)
        if not team.is_lead:
            self._follow()
            self._let_go()
        team.exchange(0)  # the self-test needs the memory of all ranks
        team.directed = False
        team.leave()

    def base_checksums(self) -> dict[str, int]:
        shards = self._weights.shards
        if shards is None:
            return super().base_checksums()
        places = self._weights.places()
        sums: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                place = places[name.removeprefix("base_model.model.").replace(".base_layer.", ".")]
                raw = bytes_of(place.tensor) if place.unit is None else shards.read(place.unit, place.tensor)
                is_mine = place.unit is not None or self._team.is_lead
                sums[name] = checksum(raw, place.tensor.nbytes) if is_mine else 0
        total = torch.tensor(list(sums.values()))
        self._team.sum(total)
        return dict(zip(sums, total.tolist(), strict=True))

    def report(self) -> dict[str, Any]:
        return {**super().report(), **({} if self._weights.shards is None else {"sharding": "full"})}

    def release(self) -> None:
        self.part()
        self._let_go()

    def _end_training(self) -> None:
        # Shared out, the base still needs all ranks for what rank 0 does with it.
        self._team.directed = self._weights.shards is not None
        if not self._team.directed:
            super()._end_training()

    def _let_go(self) -> None:
        del self._modes, self._weights, self._sampler
        super().release()

    def _follow(self) -> None:
        """Give rank 0 what it needs, until it parts."""
        decoder, shards = self._modes.decoder, self._weights.shards
        assert shards is not None
        while order := self._team.exchange(0)[0][0]:
            if order == Order.SCORE:
                shards.accompany(1)
            else:
                decoder.set_adapter(self._modes.adapter if order == Order.DRAW_ADAPTER else None)
                decoder.generate([], tokens=1, temperature=0)

    def _choose_checkpointing(self, hardware: Hardware) -> None:  # noqa: ARG002 - memory is planned for the card
        asked = self._spec.lora.gradient_checkpointing
        self._sparing, self._may_spare = asked in ("standard", "unsloth"), asked != "off"
        reason = "as requested" if self._sparing else "a step is split so that its activations fit"
        self.checkpointing = GradientCheckpointing("standard" if self._sparing else "off", reason)
        self._context.events.log(f"gradient checkpointing: {self.checkpointing.way} ({reason})")
        # The engine splits steps itself, so for TRL a step is one part, unless its loss depends on the parts.
        parts = self._spec.sampling.gradient_accumulation if self._spec.loss.type == "bnpo" else 1
        self._least_parts = self._spec.sampling.gradient_accumulation // parts
        lora = self._spec.lora.model_copy(update={"gradient_checkpointing": "off"})
        sampling = self._spec.sampling.model_copy(update={"gradient_accumulation": parts})
        self._spec = self._spec.model_copy(update={"lora": lora, "sampling": sampling})

    def _leaves(self) -> list[torch.Tensor]:
        return list(self._modes.adapter.leaves)

    def _questions_at_once(self) -> int:
        return super()._questions_at_once() if self._device.type == "cpu" else QUESTIONS_AT_ONCE

    def _build_trainer(self) -> RecordingTrainer:
        trainer: Any = super()._build_trainer()
        self._modes.adapter.adopt(trainer.model)  # PEFT has initialised its values
        trainer.use(self._modes)
        self._sampler = trainer.sampler
        return trainer

    def _make_trainer(self, settings: Settings) -> RecordingTrainer:
        spec = self._spec
        require_precision(self.precision)
        architecture = require_known(spec, self.files.path)
        device = self._device
        self.shares_base = self._team.in_step = self._is_sharded(architecture, device)
        self._weights = load_weights(
            architecture,
            self.files.path,
            device=device,
            dtype=getattr(torch, self.precision.dtype),
            spare_rank=_spare_rank(spec, device),
            eight_bits=self.precision.weights == "8bit",
            peers=self._team if self._team.in_step else None,
        )
        shell = _shell(self._weights)
        ends = stop_tokens(self.files, self.tokenizer)
        shell.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=self.tokenizer.pad_token_id
        )
        require_context_length(shell, spec)
        try:
            trainer = NativeTrainer(
                **self._record_options(),
                model=shell,
                args=GRPOConfig(**settings),
                train_dataset=as_dataset(self._prompts),
                processing_class=self.tokenizer,
                peft_config=LoraConfig(**adapter_settings(spec)),
            )
        except ValueError as error:
            raise_if_module_missing(error, self.files)
            raise
        self._modes = self._make_modes(ends)
        return trainer

    def _is_sharded(self, architecture: Architecture, device: torch.device) -> bool:
        """Whether ranks share the base out; with `auto`, if any of them has no room for all of it."""
        asked, team = self._spec.model.sharding, self._team
        if team.size == 1 or asked == "off":
            return False
        if asked == "auto":
            fits = device.type == "cpu" or self._has_room(architecture, device, ranks=1)
            if all(room for (room,) in team.exchange(int(fits))):
                return False
        if device.type == "cuda":
            self._has_room(architecture, device, ranks=team.size, required=True)
        why = "as requested" if asked == "full" else "the base and the room to train do not fit a GPU"
        told = f"sharding: full ({why}); each of {team.size} ranks holds a part of every layer"
        self._context.events.log(told, code="sharding")
        return True

    def _has_room(
        self, architecture: Architecture, device: torch.device, *, ranks: int, required: bool = False
    ) -> bool:
        """Whether this GPU has room for its part of the base and to train beside it; fails the job if it must."""
        free, total = torch.cuda.mem_get_info(device)
        held = matrix_bytes(
            architecture,
            ranks=ranks,
            dtype=getattr(torch, self.precision.dtype),
            spare_rank=_spare_rank(self._spec, device),
            eight_bits=self.precision.weights == "8bit",
        )
        try:
            require_room(self._spec, architecture, memory=memory_to_plan(total, free), held=held, ranks=ranks)
        except JobFailure:
            if required:
                raise
            return False
        return True

    def _make_modes(self, ends: int | list[int]) -> Modes:
        spec, weights = self._spec, self._weights
        device = weights.device
        adapter = Adapter(
            weights.architecture,
            rank=spec.lora.rank,
            scale=spec.lora.alpha / spec.lora.rank,
            targets=spec.lora.target_modules,
            device=device,
        )
        each = -(-_step_tokens(spec) // self._least_parts)
        cache, budget = _plan(spec, weights)
        shared = weights.shards is not None
        if (shared or self._may_spare) and spares_activations(budget, each // self._team.size, shared=shared):
            cache, budget = _plan(spec, weights, sparing=True)
            self._sparing = True
            why = "fewer passes gather the layers of the base" if shared else "a step takes fewer and larger passes"
            self.checkpointing = GradientCheckpointing("standard", why)
            self._context.events.log(f"gradient checkpointing: standard ({why})")
        decoder = Decoder(
            weights,
            stops=[ends] if isinstance(ends, int) else ends,
            filters=Filters(spec.sampling.top_k, spec.sampling.top_p),
            penalises=spec.sampling.repetition_penalty != 1.0,
            cache_tokens=cache,
            rank=spec.lora.rank,
        )
        packed = Packed(weights, compiled=device.type == "cuda")
        return Modes(packed, decoder, adapter, self._team, max(1, min(budget, each)), self._sparing)

    def _logprobs_of(self, probe: LogprobProbe) -> list[float]:
        self._team.direct(Order.SCORE)
        modes, device = self._modes, self._weights.device
        ids = torch.tensor([*probe.prompt, *probe.completion], device=device)
        layout = lay_out([Group(len(probe.prompt), [len(probe.completion)])]).to(device)
        adapter = modes.adapter if modes.adapter.enabled else None
        return modes.packed.logprobs(layout, ids, ids[len(probe.prompt) :], adapter)[0].tolist()

    def _require_agreement(self) -> None:
        """Fail the job if this GPU's kernels compute different values in the two modes."""
        modes = self._modes
        modes.decoder.set_adapter(modes.adapter)
        (prompt,) = encode(self.tokenizer, [self._prompts.prompts[0].messages])
        drawn = modes.decoder.generate([Request(prompt, seed) for seed in range(4)], tokens=16)
        apart = [
            abs(told - scored)
            for one in drawn
            for told, scored in zip(one.logprobs, self.logprobs([LogprobProbe(prompt, one.tokens)])[0], strict=True)
        ]
        mean = sum(apart) / len(apart)
        accepted = AGREEMENT_8BIT if self.precision.weights == "8bit" else AGREEMENT
        if not mean <= accepted:  # so that NaN fails too
            raise fault(
                FailureCode.SERVER_DISAGREES,
                f"The decoder's log-probabilities differ from the trainer's by {mean:.3g} on average before the first "
                f"step; at most {accepted} is accepted.",
            )


def _shell(weights: Weights) -> Any:
    """Make the transformers model, whose tensors are views of the engine's weights."""
    config = weights.architecture.config
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=weights.dtype)
    shards = weights.shards
    named = {
        # Of a matrix that is shared out it has the shape alone.
        name: place.tensor
        if shards is None or place.unit is None
        else place.tensor.new_zeros(()).expand_as(place.tensor)
        for name, place in weights.places().items()
    }
    model.load_state_dict(named, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(weights.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _spare_rank(spec: JobSpec, device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    from grpo_core.engines.native.fused import padded_rank

    return padded_rank(spec.lora.rank)


def _step_tokens(spec: JobSpec) -> int:
    """Return the largest number of tokens of a step, with each prompt counted once."""
    s = spec.sampling
    return s.prompts_per_step * (s.max_prompt_tokens + s.generations * s.max_completion_tokens)


def _plan(spec: JobSpec, weights: Weights, *, sparing: bool = False) -> tuple[int | None, int]:
    """Return the tokens of the decoder's cache, and the tokens of a forward pass with kept activations."""
    if weights.device.type == "cpu":
        return None, CPU_TOKENS
    free, total = torch.cuda.mem_get_info(weights.device)
    memory = memory_to_plan(total, free + torch.cuda.memory_reserved(weights.device))
    size = weights.embedding.element_size()
    return plan_memory(spec, weights.architecture, memory=memory, held=weights.nbytes, size=size, sparing=sparing)
