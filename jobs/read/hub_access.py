"""The hub repositories for which a job's training process may use the worker's token.

Owns the operator's list, `GRPO_HF_TOKEN_REPOS`. Invariant: a job without such a repository runs without the token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_core.hub import TOKEN_REPOS_VARIABLE, may_use_token
from grpo_core.spec import JobSpec

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")


def hub_environment(parent: Mapping[str, str], spec: JobSpec, owner: str) -> dict[str, str]:
    """Return the variables with the allowed repositories, and the token only if the job names one of them."""
    allowed = {TOKEN_REPOS_VARIABLE: ",".join(patterns_for(owner, parent.get(TOKEN_REPOS_VARIABLE, "")))}
    named = [spec.model.name, *(_datasets(spec) if spec.data.source == "hub" else [])]
    if not any(may_use_token(name, allowed) for name in named):
        return allowed
    return allowed | {name: parent[name] for name in TOKEN_VARIABLES if name in parent}


def _datasets(spec: JobSpec) -> list[str]:
    named = (spec.data.dataset, spec.evaluation.dataset)
    return [name for name in named if name is not None]


def patterns_for(owner: str, listed: str) -> Sequence[str]:
    """Return an owner's patterns from entries `PATTERN` and `OWNER:PATTERN`, separated by commas."""
    entries = [entry.strip().rpartition(":") for entry in listed.split(",")]
    return [pattern for named, _, pattern in entries if pattern and named in ("", owner)]
