"""The training process, started by a guardian that forwards signals and kills everything it leaves behind.

Owns the process, not what it writes; `isolation` decides its rights. Invariants: its environment has no key of Valkey
or object storage, and none of its descendants survives `kill`, in any session, folder or process group.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from grpo_core import processes
from grpo_core.egress import CLOSED_VARIABLE, Host, is_loopback
from grpo_core.errors import FailureReport
from grpo_core.monitoring.trackers import ENVIRONMENT as TRACKER_VARIABLES
from grpo_core.rewards.graders.operator import environment_for
from grpo_core.spec import JobSpec
from jobs.read.hub_access import TOKEN_VARIABLES, hub_environment
from jobs.worker import isolation, run_dirs

log = structlog.get_logger()

GUARDIAN_SECONDS = 10.0
"""Time for the guardian to kill everything before the worker kills it and does the rest."""
UNKILLABLE_SECONDS = 60.0
"""Time for a killed process to disappear."""
EXIT_UNKILLABLE = 70
_NEW_LOG = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_PASSED_ON = frozenset(
    "PATH HOME USER LOGNAME LANG LANGUAGE TZ TMPDIR SHELL LD_LIBRARY_PATH LIBRARY_PATH CC CXX VIRTUAL_ENV "
    "GRPO_MODEL_DIR GRPO_DATASET_DIR GRPO_EGRESS_HOSTS GRPO_GRADER_PYTHON GRPO_GRADERS_UNCONFINED "
    "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE "
    "HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy".split()
)
_PASSED_ON_PREFIXES = (
    *("LC_", "PYTHON", "XDG_", "SSL_CERT_", "CUDA_", "NVIDIA_", "NCCL_", "OMP_", "MKL_", "OPENBLAS_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "PYTORCH_", "TRITON_", "VLLM_", "UNSLOTH_"),
)


_SECRET = re.compile(r"_(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)$", re.IGNORECASE)
"""Names of secrets, such as `NVIDIA_API_KEY`, which were set for other programs."""


class TrainerProcess:
    """A running training process. `plan` is the result of `Isolation.plan`."""

    def __init__(
        self,
        plan: Mapping[str, Any],
        folder: Path,
        environment: Mapping[str, str],
        hand_over: Callable[[], None] = lambda: None,
        *,
        descriptors: Collection[int] = (),
    ) -> None:
        """`hand_over` gives the folder to the training user; files in it are opened by name only before that.

        `descriptors` are open in the process too, with the same numbers.
        """
        program: str = plan["argv"][0]
        if shutil.which(program, path=environment.get("PATH")) is None:
            raise FileNotFoundError(errno.ENOENT, f"there is no program {program}")
        with os.fdopen(os.open(folder / "stderr.log", _NEW_LOG, 0o600), "ab") as output:
            self._log = os.fdopen(os.dup(output.fileno()), "ab")
            hand_over()
            self._process = subprocess.Popen(  # noqa: S603 - the operator's launcher and our own paths, no shell
                isolation.guardian_argv(plan),
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.PIPE,  # never written to; it closes when this process ends
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=descriptors,
            )

    @property
    def failure(self) -> FailureReport | None:
        """Return what is known of its end beside what it has written: nothing."""
        return None

    def note(self, text: str) -> None:
        """Add to its output."""
        with contextlib.suppress(OSError, ValueError):  # a full disk; it was killed
            self._log.write(text.encode() + b"\n")
            self._log.flush()

    @property
    def exit_code(self) -> int | None:
        """Return its exit status; None while it runs, negative after a signal."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to finish its step, checkpoint and exit."""
        if self._process.poll() is None:
            self._process.terminate()

    def dump_stacks(self) -> None:
        """Ask it to write the stack of each thread to its output; a stopped or just started process may not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)

    def wait(self, seconds: float) -> None:
        """Wait for its end, for `seconds` at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        """Kill it and all its descendants.

        A process that hangs in a driver survives even this and keeps its GPU. Then the worker ends at once, so that the
        job's lease expires and another machine takes the job.
        """
        assert self._process.stdin is not None  # it is PIPE
        self._process.stdin.close()
        self._log.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GUARDIAN_SECONDS)
        if self._process.poll() is None:  # it is stopped, or waits for a process that cannot be killed
            self._process.kill()
        try:
            code = self._process.wait(UNKILLABLE_SECONDS)
        except subprocess.TimeoutExpired:
            self._give_up()
        else:
            # This process adopts the remaining descendants of a killed guardian.
            if code < 0 and processes.adopts() and not processes.end_children(seconds=UNKILLABLE_SECONDS):
                self._give_up()

    def _give_up(self) -> None:
        log.critical("child_outlives_kill", pid=self._process.pid)
        os._exit(EXIT_UNKILLABLE)


class Training(Protocol):
    """What a supervisor needs of the training processes of a run."""

    @property
    def failure(self) -> FailureReport | None: ...
    @property
    def exit_code(self) -> int | None: ...
    def terminate(self) -> None: ...
    def dump_stacks(self) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def kill(self) -> None: ...


def start_training(
    folder: Path,
    arguments: Sequence[str],
    *,
    spec: JobSpec,
    owner: str,
    isolation: isolation.Isolation,
    launcher: Sequence[str],
    cards: str | None = None,
    more: Mapping[str, str] | None = None,
    descriptors: Collection[int] = (),
) -> TrainerProcess:
    """Start the training command in a prepared run folder. `cards` are those it may use, if not all of the host; `more`
    are variables, and `descriptors` open files, that it is given besides."""
    temporary = run_dirs.temporary(folder)
    cache = isolation.cache_of(owner)
    user = isolation.user_of(cache)
    environment = clean_environment(os.environ, spec, owner)
    if cards is not None:
        environment["CUDA_VISIBLE_DEVICES"] = cards
    environment = {**isolation.environment(environment, cache, temporary), **(more or {})}
    writable = [folder, temporary, *([cache] if cache else [])]
    plan = isolation.plan(launcher, arguments, environment, user=user, writable=writable, scratch=folder)
    return TrainerProcess(plan, folder, environment, lambda: run_dirs.hand_over(folder, user), descriptors=descriptors)


def clean_environment(
    parent: Mapping[str, str], spec: JobSpec, owner: str, *, cores: int | None = None
) -> dict[str, str]:
    """Return the training process's part of the worker's environment; one core is left to the worker.

    Two torch threads on two busy cores are several times slower than one. The keys of a tracker are given only to runs
    that report to it, the hub's token only to runs that may use it.
    """
    prefixes = (
        *_PASSED_ON_PREFIXES,
        *(prefix for name in spec.training.report_to for prefix in TRACKER_VARIABLES[name]),
    )
    trackers = prefixes[len(_PASSED_ON_PREFIXES) :]
    kept = {
        key: value
        for key, value in parent.items()
        if key in _PASSED_ON or (key.startswith(prefixes) and (key.startswith(trackers) or not _SECRET.search(key)))
    }
    threads = max(1, (cores or os.cpu_count() or 1) - 1)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **{key: value for key, value in kept.items() if key not in TOKEN_VARIABLES},
        **hub_environment(parent, spec, owner),
        **environment_for(spec.rewards.graders, parent),
        CLOSED_VARIABLE: ",".join(map(str, sorted(_own_ports(parent)))),
    }


def _own_ports(parent: Mapping[str, str]) -> set[int]:
    """Return the ports of the worker's servers on this machine, to which training must not connect."""
    named = (Host.of_url(parent.get(variable, "")) for variable in ("S3_ENDPOINT", "S3_PUBLIC_ENDPOINT", "REDIS_URL"))
    return {
        host.port for host in named if host and host.port and (host.pattern == "localhost" or is_loopback(host.pattern))
    }
