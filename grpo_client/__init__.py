"""The Python client of a grpo-jobs service, and its command line.

Owns what a user's program needs: `GrpoClient`, its errors, and downloads. Knows the service by HTTP alone and imports
none of its packages. Invariant: importing this package imports no dependency; each name loads its module when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_client.client import GrpoClient, RolloutFilters
    from grpo_client.errors import (
        ClientError,
        DownloadError,
        NotConfiguredError,
        ProblemError,
        UnreachableError,
        WaitTimeoutError,
    )
    from grpo_client.json_object import JsonObject
    from grpo_client.results import (
        ApiKey,
        ApiKeyList,
        ArtifactFile,
        ArtifactList,
        Checkpoint,
        Dataset,
        DatasetList,
        DryRun,
        Estimate,
        Event,
        FieldProblem,
        GpuHours,
        GpuHoursList,
        Job,
        JobDetail,
        JobError,
        JobList,
        OwnerUsageList,
        Reward,
        Rollout,
        RolloutList,
        RolloutStep,
        SpecWarning,
        StepMetrics,
        SubmittedJob,
        UsageReport,
    )

    __version__: str

__all__ = [
    "ApiKey",
    "ApiKeyList",
    "ArtifactFile",
    "ArtifactList",
    "Checkpoint",
    "ClientError",
    "Dataset",
    "DatasetList",
    "DownloadError",
    "DryRun",
    "Estimate",
    "Event",
    "FieldProblem",
    "GpuHours",
    "GpuHoursList",
    "GrpoClient",
    "Job",
    "JobDetail",
    "JobError",
    "JobList",
    "JsonObject",
    "NotConfiguredError",
    "OwnerUsageList",
    "ProblemError",
    "Reward",
    "Rollout",
    "RolloutFilters",
    "RolloutList",
    "RolloutStep",
    "SpecWarning",
    "StepMetrics",
    "SubmittedJob",
    "UnreachableError",
    "UsageReport",
    "WaitTimeoutError",
]

_MODULES = ("errors", "results", "client")
"""Where the names are, those that take least to import first."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("grpo-client")
    if name in __all__:
        for module in map(importlib.import_module, (f"{__name__}.{each}" for each in _MODULES)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
