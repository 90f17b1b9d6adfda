"""One run of one job, from claim to outcome: prepare the folder, watch the child, conclude.

Owns the order of those steps and what a run's early end means; `conclusion` owns what is written of it. Invariant: when
`execute` returns, however it returns, no child, no shipper and no heartbeat of this run is left.
"""

from __future__ import annotations

import os
from pathlib import Path

from grpo_core.datasets import DatasetError
from grpo_core.errors import FailureReport
from grpo_core.spec import JobSpec, parse_spec
from jobs.child import Child, clean_environment
from jobs.conclusion import Conclusion
from jobs.ending import STOPPED, Lapse
from jobs.errors import Damaged, NotFound
from jobs.ledger import JobEvent
from jobs.lineage import Base
from jobs.patience import Interrupted
from jobs.preparation import Preparation
from jobs.record import JobRecord
from jobs.tenure import Tenure, Toolbox
from jobs.verdict import Ended, broken_machine
from jobs.watch import Watch


class JobRun:
    """The run of a job this worker has claimed. `execute` returns when the job has ended or was handed back."""

    def __init__(self, tools: Toolbox, record: JobRecord, epoch: int, folder: Path) -> None:
        self._tools = tools
        self._spec: JobSpec = parse_spec(record.spec)
        self._folder = folder
        self._tenure = Tenure(tools, record, epoch, folder)

    def execute(self) -> None:
        """Train, ship and write the outcome; raises `Fenced` when the job is no longer ours."""
        tenure = self._tenure
        tenure.begin()
        try:
            ended = self._train()
            tenure.log.info("run_ended", status=ended.status, lapse=ended.lapse.report and ended.lapse.report.code)
            Conclusion(tenure).write(ended)
        finally:
            tenure.end()

    def _train(self) -> Ended:
        try:
            base = self._prepare()
        except Interrupted as order:
            return Ended(status="cancelled") if order.order == "cancel" else Ended(status=None, lapse=self._asked())
        except NotFound as error:
            return _failed("input_gone", str(error))
        except Damaged as error:
            return _failed("input_damaged", f"An object that the job needs is not what it was: {error}.")
        except DatasetError as error:
            return _failed(error.code, str(error))
        except OSError as error:
            return broken_machine(error, self._folder.parent, log=self._tenure.log)
        environment = clean_environment(os.environ, trackers=self._spec.training.report_to)
        try:
            child = Child(self._argv(base), self._folder, environment)
            self._tenure.log.info("child_started", resumed=base.resumed and base.resumed.step)
            return self._watch(child, base)
        except OSError as error:
            return broken_machine(error, self._folder.parent, log=self._tenure.log)

    def _prepare(self) -> Base:
        tools, tenure = self._tools, self._tenure
        start = Preparation(tools.store, tools.datasets, tenure.patience, self._folder).prepare(
            tenure.record, self._spec, tenure.epoch
        )
        tenure.base = start.base
        if start.warnings:
            self._tell(*start.warnings)
        tenure.ship_from(start.base)
        return start.base

    def _argv(self, base: Base) -> tuple[str, ...]:
        parts = base.gradient_accumulation
        split = ("--gradient-accumulation", str(parts)) if parts else ()
        return (*self._tools.launcher, "spec.json", "--out", ".", "--epoch", str(self._tenure.epoch), *split)

    def _watch(self, child: Child, base: Base) -> Ended:
        return Watch(
            child,
            self._tenure.relay,
            self._tenure.lease,
            self._tools.stop,
            folder=self._folder,
            spec=self._spec,
            base=base,
            limits=self._tools.stall_limits,
        ).run()

    def _asked(self) -> Lapse:
        """Of a run that was asked to end before its child began."""
        return STOPPED if self._tools.stop.asked else Lapse(counts=False)

    def _tell(self, *events: JobEvent) -> None:
        """Tell the owner something that the child did not."""
        tenure, ledger = self._tenure, self._tools.ledger
        tenure.patience(
            lambda: ledger.change(tenure.job_id, epoch=tenure.epoch, events=events), ("cancel", "pause", "stop")
        )


def _failed(code: str, message: str) -> Ended:
    """Of a run whose data cannot be had."""
    return Ended(status="failed", error=FailureReport(failure_class="dataset", code=code, message=message))
