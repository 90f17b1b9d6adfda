"""The job spec: its sections, its rules, and the one way in (`parse_spec`).

Imports no torch and touches no file, so that an API, a laptop and a worker all read a job the same way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from grpo_core.section import SPEC_FORMAT
from grpo_core.spec.problems import Problem, SpecError, parse_spec
from grpo_core.spec.sections import (
    DATASET_ID,
    JOB_ID,
    S3_URL,
    SCHEMA_VERSION,
    SYSTEM_PROMPT,
    DataSection,
    JobSpec,
    WorkedExample,
)
from grpo_core.strict_json import pointer_of

__all__ = [
    "DATASET_ID",
    "JOB_ID",
    "S3_URL",
    "SCHEMA_VERSION",
    "SPEC_FORMAT",
    "SYSTEM_PROMPT",
    "DataSection",
    "JobSpec",
    "Problem",
    "SpecError",
    "WorkedExample",
    "json_schema",
    "parse_spec",
    "pointer_of",
]


@cache
def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a job spec."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "GRPO job spec"}
