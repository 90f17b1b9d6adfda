"""The environment variables that vLLM and its compilers read, for an engine inside this process: it trains or serves.

Owns the defaults; `unsloth_env` adds those of Unsloth. What the operator has set is kept. Invariant: compiled files are
stored below the cache folders, so that the next job on this host finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

_DEFAULTS: Final = {
    # FlashInfer compiles its sampler at run time, which needs nvcc, ninja and minutes; vLLM's sampler is as fast here.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # No usage statistics are sent.
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    # The adapter's kernels run beside the base model's instead of after them: 5% of a small rollout on an H100.
    "VLLM_LORA_ENABLE_DUAL_STREAM": "1",
}
_IN_PROCESS: Final = {
    # The engine shares this process with the trainer, or with the loop that serves, and is alone on its host.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
}
_ALONE: Final = {
    # The process group of one rank listens to nobody but this host. Ranks of a job may be on several.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def prepare(environment: MutableMapping[str, str]) -> None:
    """Add what an engine in this process needs. TRL imports vLLM where it is installed, so this is done before."""
    environment.update({**environment_defaults(environment), **_IN_PROCESS})
    # TRL would set it to ERROR; vLLM reports how long each part of its start takes at INFO.
    environment.setdefault("VLLM_LOGGING_LEVEL", "INFO")


def prepare_to_serve(environment: MutableMapping[str, str]) -> None:
    """Add what an engine needs that has no other ranks beside it."""
    prepare(environment)
    environment.update(_ALONE)


def environment_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to an environment that lacks them."""
    cache = cache_folder(environment)
    folders = {
        # torch's default is below /tmp, which is lost with a container.
        "TORCHINDUCTOR_CACHE_DIR": cache / "inductor",
        "TRITON_CACHE_DIR": cache / "triton",
        "VLLM_CACHE_ROOT": cache / "vllm",
    }
    wanted = {**_DEFAULTS, **{name: str(folder) for name, folder in folders.items()}}
    return {name: value for name, value in wanted.items() if name not in environment}


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder of caches that outlive a job."""
    return Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME") or "~").expanduser() / ".cache")
