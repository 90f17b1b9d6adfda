"""Sets the environment variables that Unsloth and vLLM read when they are imported, and imports Unsloth.

Unsloth patches TRL, transformers and PEFT when it is imported, so it must be imported before them; this module imports
none of them. Variables that the operator has set are kept. Invariant: compiled files are stored below the cache
folders, so that the next job on this host finds them.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from grpo_core.engines import vllm_env

PATCHED: Final = ("trl", "transformers", "peft")
"""Packages that must be imported after Unsloth."""

_DEFAULTS: Final = {
    # UNSLOTH_VLLM_NO_FLASHINFER stays unset: it hides the whole package, and vLLM 0.25 imports parts of it.
    # No usage statistics are sent.
    "UNSLOTH_DISABLE_STATISTICS": "1",
    # Merging the adapter into 16-bit weights would lose most of the recipe's small updates, so it is served unmerged.
    "UNSLOTH_VLLM_MERGED_ROLLOUT": "0",
    # Sleep mode overrides model.gpu_memory_share.
    "UNSLOTH_VLLM_STANDBY": "0",
}


def environment_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to an environment that lacks them."""
    cache = vllm_env.cache_folder(environment)
    folders = {
        # Unsloth's default is the working directory: the run folder, new for each job.
        "UNSLOTH_COMPILE_LOCATION": cache / "unsloth" / "unsloth_compiled_cache",
        "UNSLOTH_MEGA_CACHE_DIR": cache / "unsloth" / "mega_cache",
    }
    wanted = {**_DEFAULTS, **{name: str(folder) for name, folder in folders.items()}}
    missing = {name: value for name, value in wanted.items() if name not in environment}
    return {**vllm_env.environment_defaults(environment), **missing}


_took: list[float] = []


def start() -> None:
    """Set the environment and import Unsloth."""
    too_early = [name for name in PATCHED if name in sys.modules]
    if too_early:
        raise RuntimeError(f"unsloth must be imported before {', '.join(too_early)}")
    os.environ.update(environment_defaults(os.environ))
    began = time.perf_counter()
    importlib.import_module("unsloth")
    _took.append(time.perf_counter() - began)


def import_seconds() -> float:
    """Return the seconds that importing Unsloth took; 0 if another module imported it."""
    return sum(_took)


def seconds_since_start() -> float:
    """Return the age of this process in seconds."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
