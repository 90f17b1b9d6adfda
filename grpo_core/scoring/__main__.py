"""`python -m grpo_core.scoring`: scores the rows that standard input names, and answers on standard output.

It takes its own rights away before it reads a row: it can open no file but those of Python and its packages, connect to
nothing but the judges and endpoints of the request, and hold little memory. `python` and `math` graders run in further
processes, confined more narrowly. Owns the form of the answer. Invariants: a process serves one request; a grader that
cannot run here is named with a remedy, and all others score.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from grpo_core import egress
from grpo_core.confinement import landlock, rights
from grpo_core.grading import Graded, Grading, Payment
from grpo_core.reasons import FailureCode
from grpo_core.rewards.graders.models import (
    AnyGrader,
    Endpoint,
    GraderLimits,
    LabelModel,
    Math,
    Python,
    ScoreModel,
    members_of,
)
from grpo_core.rewards.graders.operator import BadRegistration, hosts_for, judges, may_call
from grpo_core.rewards.graders.packages import PYTHON
from grpo_core.rewards.graders.protocol import Grader, GraderContext
from grpo_core.rewards.graders.registry import GraderUnavailable, make_grader
from grpo_core.scoring.process import CALLS
from grpo_core.spec import JobSpec, parse_spec

MEMORY_BYTES: Final = 4 * 1024**3
"""Of address space, most of which libraries only reserve."""
OPEN_FILES: Final = 256
MAX_PROCESSES: Final = 4
"""Graders of one request that have a separate process."""
GRADERS_MEMORY_MB: Final = 1024
"""For those together."""
ROW_SECONDS: Final = 5.0
STEP_SECONDS: Final = 10.0
START_SECONDS: Final = 10.0
CALLS_SECONDS: Final = 20.0
"""For all requests to one judge or endpoint."""
BUDGET_TOKENS: Final = 50_000
"""Of one judge, for one request."""
_NICE: Final = 10
_PACKAGE: Final = Path(__file__).resolve().parents[1]


def main() -> int:
    """Score one request."""
    rights.bind_to(os.getppid())
    os.nice(_NICE)
    _be_ended_first()
    calls = sys.stdin.buffer.readline() == CALLS
    _confine(connects=calls)
    # A library of text_similarity asks for this folder when it is imported, and no folder can be written to.
    tempfile.tempdir = "/"
    order = json.loads(sys.stdin.buffer.read())
    os.environ.update(order["environment"])
    spec = parse_spec(order["spec"])
    if calls:
        egress.install(hosts_for(spec.rewards.graders, os.environ))
    began = time.perf_counter()
    with closing(Grading(spec, os.environ, make=_makes(spec, order["not_confined"]), lenient=True)) as grading:
        loaded = time.perf_counter()
        rows = [Graded(text=row["text"], answer=row["answer"], item=row["item"]) for row in order["rows"]]
        payments = grading.grade(rows) if rows else []
        answer = {
            "rows": [_scored(payment, grading) for payment in payments],
            "unavailable": [
                {"grader": name, "code": error.code, "message": str(error), "remedy": error.remedy}
                for name, error in grading.unavailable.items()
            ],
            "seconds": {name: round(seconds, 6) for name, seconds in grading.seconds.items()},
            "load_seconds": round(loaded - began, 6),
            "execution_time": round(time.perf_counter() - loaded, 6),
            "printed": grading.printed,
        }
        sys.stdout.write(json.dumps(answer))
        sys.stdout.flush()
    return 0


def _scored(payment: Payment, grading: Grading) -> dict[str, Any]:
    is_whole = not grading.unavailable and not grading.is_unscored(payment)
    return {
        "rewards": payment.rewards,
        "total": payment.total if is_whole else None,
        "errors": {name: error.as_dict() for name, error in payment.errors.items()},
        "details": {name: dict(details) for name, details in payment.details.items()},
    }


def _makes(spec: JobSpec, not_confined: str) -> Callable[[AnyGrader, GraderContext], Grader]:
    """How graders are made here; `not_confined` says why those that need a separate process are refused."""
    graders = [leaf for name, model in spec.rewards.graders.items() for leaf in members_of(name, model).values()]
    count = sum(isinstance(leaf, Python | Math) for leaf in graders)
    memory_mb = GRADERS_MEMORY_MB // max(1, min(count, MAX_PROCESSES))
    started = 0

    def make(model: AnyGrader, context: GraderContext) -> Grader:
        nonlocal started
        if isinstance(model, ScoreModel | LabelModel | Endpoint):
            _require_server(model, context)
        if isinstance(model, Python | Math):
            started += 1
            _require_process(context.name, started, not_confined)
        return make_grader(
            model, replace(context, limits=_capped(model, context.limits, memory_mb), start_seconds=START_SECONDS)
        )

    return make


def _require_server(model: ScoreModel | LabelModel | Endpoint, context: GraderContext) -> None:
    """The operator may let the service ask judges and endpoints, by the settings that workers have."""
    try:
        if isinstance(model, Endpoint):
            what, is_known = "calls your server", may_call(model.url, context.environment)
            setting = "GRPO_GRADER_ENDPOINT_HOSTS with its host"
        else:
            registered = judges(context.environment).get(model.model)
            what, setting = f"asks the judge {model.model!r}", "GRPO_JUDGES with this judge"
            is_known = registered is not None
            if registered is not None and registered.key and not context.environment.get(registered.key):
                is_known, setting = False, f"{registered.key}, the judge's key"
    except BadRegistration as error:
        raise GraderUnavailable(FailureCode.BAD_REGISTRATION, str(error), "Ask the operator to correct it.") from error
    if not is_known:
        raise GraderUnavailable(
            FailureCode.RUNS_ON_WORKERS,
            f"The grader {context.name} {what}, which only workers may do: the service itself is not set up for it.",
            "Try it with grpo try, which runs the graders on a worker, or leave it out here. To have the service call "
            f"it, the operator sets {setting} for the API.",
        )


def _require_process(name: str, started: int, not_confined: str) -> None:
    if not_confined:
        raise GraderUnavailable(
            FailureCode.GRADERS_NOT_CONFINED,
            f"The grader {name} needs a confined process, and on this machine {not_confined}.",
            "Try it with grpo try, which runs the graders on a worker; or the operator moves the API to a machine with "
            "Linux 5.19 or newer and Landlock.",
        )
    if started > MAX_PROCESSES:
        raise GraderUnavailable(
            FailureCode.TOO_MANY_GRADERS,
            f"The grader {name} is one of more than {MAX_PROCESSES} that need a separate process.",
            "Try fewer python and math graders at once.",
        )


def _capped(model: AnyGrader, limits: GraderLimits, memory_mb: int) -> GraderLimits:
    """A grader's limits, at most those of this process."""
    seconds = CALLS_SECONDS if isinstance(model, ScoreModel | LabelModel | Endpoint) else STEP_SECONDS
    return limits.model_copy(
        update={
            "row_seconds": min(limits.row_seconds, ROW_SECONDS),
            "step_seconds": min(limits.step_seconds or seconds, seconds),
            "budget_tokens": min(limits.budget_tokens or BUDGET_TOKENS, BUDGET_TOKENS),
            "memory_mb": min(limits.memory_mb, memory_mb),
        }
    )


def _be_ended_first() -> None:
    """Where memory runs out, the kernel ends this process and its graders instead of the API."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _confine(*, connects: bool) -> None:
    """Give up what no grader needs; with `connects`, keep the network and what finding a server needs.

    Without Landlock, files and the network stay open to our own code alone.
    """
    rights.limit(memory_bytes=MEMORY_BYTES, open_files=OPEN_FILES)
    rights.hide_memory()
    if os.geteuid() == 0:
        rights.bound_capabilities()
    rights.drop_capabilities()
    rights.forbid_new_privileges()
    if landlock.version() < landlock.OLDEST:
        return
    rules = landlock.RuleSet(connects=connects)
    rules.allow((*_readable(os.environ), *(_FOR_CONNECTING if connects else ())), rights=landlock.READ)
    rules.allow((str(_PACKAGE.parent),), rights=landlock.LIST)
    rules.allow(("/dev/null",), rights=landlock.USE)
    rules.enforce()


_FOR_CONNECTING: Final = (
    *(
        "/etc/resolv.conf",
        "/etc/hosts",
        "/etc/nsswitch.conf",
        "/etc/gai.conf",
        "/etc/host.conf",
        "/run/systemd/resolve",
    ),
    *("/etc/ssl", "/etc/pki", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates"),
)
"""Names of hosts, and the certificates of the system."""


def _readable(environment: Mapping[str, str]) -> Sequence[str]:
    named = environment.get(PYTHON)
    of_graders = [str(path.parent.parent) for path in (Path(named), Path(named).resolve())] if named else []
    system = ("/lib", "/lib64", "/usr/lib", "/etc/ld.so.cache", "/dev/urandom", "/usr/share/zoneinfo")
    return (*system, sys.prefix, sys.base_prefix, str(_PACKAGE), *of_graders)


if __name__ == "__main__":
    sys.exit(main())
