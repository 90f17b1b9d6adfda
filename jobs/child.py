"""The training process: started in its own session with a clean environment, signalled and killed as a group.

Owns the process and nothing it writes. Invariant: its environment holds no key of Valkey or object storage, and no
process of its group outlives `kill`. Start it from the main thread: the child asks to die with the thread that started
it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from grpo_core.trackers import ENVIRONMENT as TRACKER_VARIABLES

log = structlog.get_logger()

UNKILLABLE_SECONDS = 60.0
"""How long a killed process may take to be gone."""
EXIT_UNKILLABLE = 70

_PASSED_ON = frozenset(
    "PATH HOME USER LOGNAME LANG LANGUAGE TZ TMPDIR SHELL LD_LIBRARY_PATH LIBRARY_PATH CC CXX VIRTUAL_ENV "
    "GRPO_MODEL_DIR GRPO_DATASET_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE "
    "HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy".split()
)
_PASSED_ON_PREFIXES = (
    *("LC_", "PYTHON", "XDG_", "SSL_CERT_", "CUDA_", "NVIDIA_", "NCCL_", "OMP_", "MKL_", "OPENBLAS_"),
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH", "PYTORCH_", "TRITON_", "VLLM_", "UNSLOTH_"),
)


class Child:
    """A running training process."""

    def __init__(self, argv: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        with (folder / "stderr.log").open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - the operator's launcher and our own paths, no shell
                list(argv),
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative where a signal ended it."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to finish its step, checkpoint and leave."""
        if self._process.poll() is None:
            self._process.terminate()

    def dump_stacks(self) -> None:
        """Ask it to write where each of its threads is to its output; a stopped or early one may not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)

    def wait(self, seconds: float) -> None:
        """Wait for its end, but no longer than that."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        """End the whole group now.

        A process in a driver that hangs outlives even this, and holds its GPU: then the worker ends too, without a
        word to anyone, so that the job's lease runs out and another machine takes it.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(UNKILLABLE_SECONDS)
        except subprocess.TimeoutExpired:
            log.critical("child_outlives_kill", pid=self._process.pid)
            os._exit(EXIT_UNKILLABLE)


def clean_environment(
    parent: Mapping[str, str], cores: int | None = None, *, trackers: Sequence[str] = ()
) -> dict[str, str]:
    """What a training process may know of its parent's environment; one core is left to the worker.

    Two torch threads on two busy cores are several times slower than one. The keys of a tracker are given only to runs
    that report to it.
    """
    prefixes = (*_PASSED_ON_PREFIXES, *(prefix for name in trackers for prefix in TRACKER_VARIABLES[name]))
    kept = {key: value for key, value in parent.items() if key in _PASSED_ON or key.startswith(prefixes)}
    threads = max(1, (cores or os.cpu_count() or 1) - 1)
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **kept}
