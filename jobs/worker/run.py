"""One run of one job, from claim to outcome: prepare the folder, supervise the child, finalize.

Owns the order of these steps and what an early end means; `finalize` owns what is written. Invariant: when `execute`
returns or raises, no child, uploader or heartbeat of this run is left.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from grpo_core.datasets import DatasetError
from grpo_core.errors import FailureReport
from grpo_core.reasons import FailureClass, FailureCode
from grpo_core.spec import JobSpec, parse_spec
from jobs.errors import Damaged, NotFound
from jobs.lifecycle.outcomes import STOPPED, HandBack
from jobs.lifecycle.time_limit import over_time
from jobs.store.commits import ResumeBase
from jobs.store.job import JobRecord
from jobs.store.job_store import JobEvent
from jobs.store.retired import Retired
from jobs.worker import run_dirs
from jobs.worker.exit_status import RunResult, broken_machine
from jobs.worker.finalize import Finalizer
from jobs.worker.gang import GangProcess, Reservation
from jobs.worker.interruptible_retry import Interrupted
from jobs.worker.prepare import Preparation
from jobs.worker.run_context import RunContext, WorkerDeps
from jobs.worker.serving import ServingSession
from jobs.worker.supervise import Supervisor
from jobs.worker.trainer_process import Training, start_training


class JobRun:
    """The run of a job this worker has claimed. `execute` returns when the job has ended or was handed back."""

    def __init__(
        self, deps: WorkerDeps, record: JobRecord, epoch: int, folder: Path, cards: Reservation | None = None
    ) -> None:
        """`cards` are those that Ray has given to the run, on this host and on others."""
        self._deps = deps
        self._cards = cards
        self._spec: JobSpec = parse_spec(record.spec)
        self._folder = folder
        self._context = RunContext(deps, record, epoch, folder)
        limit = deps.max_job_seconds
        self._until = None if limit is None else time.monotonic() + limit - record.run_ms / 1000
        self._too_long = over_time(limit or 0)

    def execute(self) -> None:
        """Train, upload and write the outcome. Raises `Fenced` if another run holds the job."""
        context = self._context
        context.begin()
        try:
            result = self._train()
            context.log.info(
                "run_ended", status=result.status, cause=result.handback.report and result.handback.report.code
            )
            Finalizer(context).write(result)
        finally:
            context.end()

    def _train(self) -> RunResult:
        if self._until is not None and time.monotonic() > self._until:
            return RunResult(status="failed", error=self._too_long)
        try:
            return self._supervise(self._prepare())
        except Interrupted as interrupt:
            if interrupt.kind == "cancel":
                return RunResult(status="cancelled")
            return RunResult(status=None, handback=STOPPED if self._deps.stop.leaves else HandBack(counts=False))
        except NotFound as error:
            return _failed(FailureCode.INPUT_GONE, str(error))
        except Damaged as error:
            return _failed(FailureCode.INPUT_DAMAGED, f"An object that the job needs has changed: {error}.")
        except DatasetError as error:
            return _failed(error.code, str(error))
        except OSError as error:
            self._context.log.error("machine_failed", error=repr(error))  # noqa: TRY400 - the error says it all
            return broken_machine(error, self._folder.parent)

    def _start(self, base: ResumeBase, serving: ServingSession | None) -> Training:
        context, deps, cards = self._context, self._deps, self._cards
        arguments = self._arguments(base)
        hosts = len(cards.hosts) if cards is not None else 1
        if cards is not None and hosts > 1:
            arguments += ("--hosts", str(hosts), "--meet", cards.meeting)
            owner = context.record.owner
            cards.start(job=context.job_id, epoch=context.epoch, owner=owner, folder=self._folder, arguments=arguments)
        lead = start_training(
            self._folder,
            arguments,
            spec=self._spec,
            owner=context.record.owner,
            isolation=deps.isolation,
            launcher=deps.launcher,
            cards=cards and cards.cards,
            more={} if serving is None else serving.environment(),
            descriptors=() if serving is None else (serving.descriptor,),
        )
        return lead if cards is None else GangProcess(lead, cards)

    def _prepare(self) -> ResumeBase:
        deps, context = self._deps, self._context
        retired = Retired(deps.write_once)
        preparation = Preparation(
            *(deps.store, deps.datasets, context.retry, self._folder),
            find=lambda job_id: deps.job_store.get(job_id) or retired.find(job_id),
        )
        start = preparation.prepare(context.record, self._spec, context.epoch)
        context.base = start.base
        if start.warnings:
            self._publish(*start.warnings)
        context.upload_from(start.base)
        return start.base

    def _arguments(self, base: ResumeBase) -> tuple[str, ...]:
        parts = base.gradient_accumulation
        split = ("--gradient-accumulation", str(parts)) if parts else ()
        return ("spec.json", "--out", ".", "--epoch", str(self._context.epoch), *split)

    def _supervise(self, base: ResumeBase) -> RunResult:
        context = self._context
        with contextlib.ExitStack() as stack:
            serving = self._serving()
            if serving is not None:
                stack.callback(serving.close)
            child = self._start(base, serving)
            context.log.info(
                "child_started", resumed=base.resumed and base.resumed.step, hosts=self._cards and self._cards.hosts
            )
            if serving is not None:
                serving.start()
            supervisor = Supervisor(
                *(context, child, base),
                spec=self._spec,
                until=self._until,
                too_long=self._too_long,
                serving=serving,
            )
            try:
                return supervisor.run()
            finally:
                run_dirs.take_back(self._folder)

    def _serving(self) -> ServingSession | None:
        if self._spec.kind != "serving":
            return None
        context, deps = self._context, self._deps
        return ServingSession(deps.job_store, context.record, context.epoch, self._spec, deps.queues)

    def _publish(self, *events: JobEvent) -> None:
        """Add events of the worker to the job's events."""
        context, job_store = self._context, self._deps.job_store
        context.retry(
            lambda: job_store.change(context.job_id, epoch=context.epoch, events=events), ("cancel", "pause", "stop")
        )


def _failed(code: str, message: str) -> RunResult:
    """The failure of a run whose input data could not be fetched."""
    return RunResult(status="failed", error=FailureReport.of(code, message, failure_class=FailureClass.DATASET))
