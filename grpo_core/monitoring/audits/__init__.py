"""Audits: rules that read a run's metrics and warn when it learns nothing, or something other than intended.

Owns which warnings are issued and how often; each rule's threshold and reason are in `rules`. Never a verdict: an audit
names the steps and the rollouts to look at. Torch-free and pure. Invariant: whether and when a warning is issued
depends only on the spec and the lines of `metrics.jsonl`, so a resumed run that reads them again behaves as if it had
never stopped.
"""

from __future__ import annotations

from grpo_core.monitoring.audits.auditor import OVER_CODE, Auditor, Ending, Finding
from grpo_core.monitoring.audits.rules import RULES, Audit, Rule

__all__ = ["OVER_CODE", "RULES", "Audit", "Auditor", "Ending", "Finding", "Rule"]
