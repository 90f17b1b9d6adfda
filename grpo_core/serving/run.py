"""The serving process: loads the base and its adapters, then answers what the worker sends until it orders an end.

Owns the choice of engine and the loop; the worker decides when a session is over, and why. Invariant: only the names in
`inputs/adapters/adapters.json` and `base` are served, whatever a request says.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from grpo_core import hub
from grpo_core.adapters import LocalAdapter, read_index
from grpo_core.datasets.prompts import conversation_for
from grpo_core.engines import choose_engine, vllm_env
from grpo_core.errors import EXIT_CHECKPOINTED, EXIT_DONE, JobFailure
from grpo_core.hardware.gpus import Gpu, find_gpus, show_gpus
from grpo_core.hardware.models import Hardware, ModelFiles, choose_precision, find_model
from grpo_core.reasons import EventType, FailureCode, Phase
from grpo_core.run_dir.kind_run import KindRun
from grpo_core.serving.asked import Desk
from grpo_core.serving.batch import Batch
from grpo_core.serving.channel import Channel
from grpo_core.serving.guide import Guides
from grpo_core.serving.model import Model
from grpo_core.serving.wire import BASE, WAITING_PER_ROW, ChatRequest, Piece, error
from grpo_core.spec import JobSpec

LONGER_ANSWERS: Final = 2
"""Default limit of an answer, as a multiple of that of a completion in training; an evaluation's is the same."""
IDLE_SECONDS: Final = 1.0
"""Longest time between two signs of life."""


class Answering(Protocol):
    """The requests of one session, which is used from one thread."""

    engine: str
    context: int

    @property
    def accepts(self) -> Sequence[str]:
        """Parameters of requests that not every session serves."""
        ...

    @property
    def is_idle(self) -> bool: ...

    def add(self, request: ChatRequest) -> list[Piece]: ...

    def cancel(self, request_id: str) -> None: ...

    def fail(self, fault: dict[str, Any]) -> list[Piece]: ...

    def step(self) -> list[Piece]: ...


def run(job: KindRun) -> int:
    """Serve a job's adapters; returns an exit code."""
    channel = Channel.inherited()
    job.events.phase(Phase.LOADING)
    began = time.perf_counter()
    files = find_model(job.spec.model, job.events.warning)
    hub.turn_off()
    adapters = read_index(job.folder.adapters)
    batch = load(job.spec, files, adapters, job.folder.root)
    job.stop.finish_steps()
    names = [*(adapter.name for adapter in adapters), BASE]
    seconds = time.perf_counter() - began
    job.events.log(f"Serves {', '.join(names)} by {batch.engine}, loaded in {seconds:.1f} s", code="serving")
    job.events.phase(Phase.SERVING)
    steps = {adapter.name: adapter.step for adapter in adapters}
    ready = {"engine": batch.engine, "context": batch.context, "accepts": batch.accepts}
    channel.send({"ready": {"models": names, "steps": steps, **ready}})
    return _Loop(job, channel, batch).run()


def load(spec: JobSpec, files: ModelFiles, adapters: Sequence[LocalAdapter], folder: Path) -> Answering:
    """Load the base model and the adapters; vLLM may write into `folder`."""
    gpus = find_gpus()
    show_gpus(min(1, spec.resources.gpus), first=0)
    engine = choose_serving_engine(spec, gpus, files)
    if engine == "vllm":
        # Before anything imports vLLM or opens a socket.
        vllm_env.prepare_to_serve(os.environ)
    import torch
    import transformers

    from grpo_core.engines.pretrained import load_tokenizer, stop_tokens

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(files)
    ends = stop_tokens(files, tokenizer)
    stops = [ends] if isinstance(ends, int) else list(ends)
    precision = choose_precision(spec.model, files.parameters, _hardware(spec))
    if engine == "vllm":
        from grpo_core.serving.vllm_batch import VllmBatch
        from grpo_core.serving.vllm_engine import VllmEngine

        server = VllmEngine.start(spec, files, precision, adapters, folder)
        desk = desk_for(spec, tokenizer, stops, server.context, server.rows, adapters)
        return VllmBatch(server, desk)
    if engine == "native":
        from grpo_core.engines.native.requirements import require_known
        from grpo_core.engines.native.weights import load_weights
        from grpo_core.serving.native_model import NativeModel

        weights = load_weights(
            require_known(_for_any_engine(spec), files.path),
            files.path,
            device=torch.device("cuda", 0) if spec.resources.gpus else torch.device("cpu"),
            dtype=getattr(torch, precision.dtype),
            eight_bits=precision.weights == "8bit",
        )
        model: Model = NativeModel(spec, weights, adapters, tokenizer, stops)
    else:
        from grpo_core.engines.trl import load_base_model
        from grpo_core.serving.transformers_model import TransformersModel

        model = TransformersModel(spec, load_base_model(files, precision, tokenizer), adapters, tokenizer, stops)
    desk = desk_for(spec, tokenizer, stops, model.context, model.rows, adapters)
    return Batch(model, replace(desk, cache_tokens=model.cache_tokens, guides=Guides(tokenizer, stops)))


def choose_serving_engine(spec: JobSpec, gpus: Sequence[Gpu], files: ModelFiles) -> str:
    """What answers: the engine that was asked for, or the fastest that can. Raises a `user_config` failure if the one
    that was asked for cannot."""
    asked = spec.serving.engine
    choice = choose_engine(_for_any_engine(spec), gpus, model=files.path, parameters=files.parameters)
    lacks = "" if importlib.util.find_spec("vllm") else "vLLM is not installed on this worker."
    if asked == "auto":
        if choice.name == "native" or not spec.resources.gpus or lacks:
            return "native" if choice.name == "native" else "transformers"
        return "vllm" if _vllm_knows(files.path) else "transformers"
    reason = {"native": choice.reason if choice.name != "native" else "", "vllm": lacks}.get(asked, "")
    if reason:
        raise JobFailure(
            FailureCode.ENGINE_NOT_AVAILABLE,
            f"The engine {asked} cannot serve this job: {reason}",
            hint="Set serving.engine to auto.",
        )
    return asked


def _vllm_knows(folder: Path) -> bool:
    from grpo_core.serving.vllm_engine import architectures_in, known_architectures

    return bool(architectures_in(folder) & known_architectures())


def desk_for(
    spec: JobSpec, tokenizer: Any, stops: Sequence[int], context: int, rows: int, adapters: Sequence[LocalAdapter]
) -> Desk:
    """What the session's requests are checked against."""
    return Desk(
        tokenizer=tokenizer,
        stops=frozenset(stops),
        context=context,
        adapters=[adapter.name for adapter in adapters],
        default_tokens=LONGER_ANSWERS * spec.sampling.max_completion_tokens,
        prompt=lambda request: conversation_for(request.messages, spec.data),
        waiting=WAITING_PER_ROW * rows,
    )


class _Loop:
    """Answers until the session ends."""

    def __init__(self, job: KindRun, channel: Channel, batch: Answering) -> None:
        self._job, self._channel, self._batch = job, channel, batch
        self._ends: dict[str, Any] | None = None
        """The worker's order to end, with `reason`, `message` and the `seconds` for what is under way."""
        self._until = 0.0
        self._gone = False

    def run(self) -> int:
        told = 0.0
        while True:
            for order in self._channel.orders(IDLE_SECONDS if self._batch.is_idle and self._ends is None else 0):
                self._obey(order)
            if self._job.stop.event.is_set() or self._gone:
                self._send(self._batch.fail(error("session_ended", "The session ends. Send it again shortly.")))
                return EXIT_CHECKPOINTED
            if self._ends is not None and (self._batch.is_idle or time.monotonic() > self._until):
                return self._end(self._ends)
            if not self._batch.is_idle:
                self._send(self._batch.step())
            if time.monotonic() - told > IDLE_SECONDS / 2:
                told = time.monotonic()
                self._channel.send({"alive": True})

    def _obey(self, order: dict[str, Any] | None) -> None:
        if order is None:
            self._gone = True
        elif "ask" in order:
            self._send(self._batch.add(ChatRequest.read(order["ask"])))
        elif "cancel" in order:
            self._batch.cancel(order["cancel"])
        elif "end" in order and self._ends is None:
            self._ends = order["end"]
            self._until = time.monotonic() + order["end"]["seconds"]

    def _end(self, ends: dict[str, Any]) -> int:
        self._send(self._batch.fail(error("session_ended", ends["message"])))
        data = {"code": "serving_ended", "reason": ends["reason"], "message": ends["message"]}
        self._job.events.emit(EventType.LOG, data)
        return EXIT_DONE

    def _send(self, pieces: Sequence[Piece]) -> None:
        if pieces:
            self._channel.send({"pieces": pieces})


def _for_any_engine(spec: JobSpec) -> JobSpec:
    """The spec with which the engine is chosen: adapters of every engine have one format."""
    return spec.model_copy(update={"engine": "auto", "lora": spec.lora.model_copy(update={"dropout": 0.0})})


def _hardware(spec: JobSpec) -> Hardware:
    import torch

    if spec.resources.gpus == 0:
        return Hardware()
    free, memory = torch.cuda.mem_get_info(0)
    return Hardware(gpus=1, gpu_memory_bytes=memory, bf16=torch.cuda.is_bf16_supported(), gpu_free_bytes=free)
