"""Audits: rules that read a run's own numbers and say when it is learning nothing, or something else than was meant.

Owns what is told and how often; each rule's threshold and reason are in `rules`. Never a verdict: an audit names the
steps and the rollouts to look at. Torch-free and pure. Invariant: whether and when something is told depends on the
spec and the lines of `metrics.jsonl` alone, so a resumed run that reads them again goes on as if it had never stopped.
"""

from __future__ import annotations

from grpo_core.audits.auditor import Auditor, Finding
from grpo_core.audits.rules import RULES, Rule

__all__ = ["RULES", "Auditor", "Finding", "Rule"]
