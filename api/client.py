"""The client's former place, kept for compatibility: `from grpo_client import GrpoClient` is the same."""

from __future__ import annotations

from grpo_client import ClientError, DownloadError, GrpoClient, NotConfiguredError, ProblemError, UnreachableError

__all__ = ["ClientError", "DownloadError", "GrpoClient", "NotConfiguredError", "ProblemError", "UnreachableError"]
