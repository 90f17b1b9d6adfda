"""How often and on how many questions a job is evaluated, and which evaluation a job gets that says nothing of it.

Owns the limits of the cost of evaluations; `evaluation.curve` carries the schedule out, with measured times, and
`estimates` tells of it beforehand. Invariant: a fixed interval depends only on the spec.
"""

from __future__ import annotations

from typing import Any, Final, cast

from grpo_core.rewards.graders.models import calls_out
from grpo_core.spec import JobSpec

COST_SHARE: Final = 0.05
"""Largest share of training that all evaluations of a job without `evaluation.every` take, those at its ends too."""
KNOWN_SPLITS: Final = {("swulling/gsm8k_chinese", "test")}
"""Splits that are known to have enough questions: that of the recipe's data set."""
QUESTIONS: Final = 128
"""Largest number of held-out questions, if the job does not say."""
SAMPLE: Final = 64
"""Largest number of those during training, if the job does not say: what the native engine answers at once."""
MOST: Final = 10
"""Largest number of evaluations during training, if the job does not say."""
LEAST_STEPS: Final = 20
"""Jobs with fewer steps get evaluations during training only on request."""
MEASURED_STEPS: Final = 3
"""Steps after which the duration of a step is known; the first one, which compiles and warms up, is left out."""
AUTOMATIC_SHARE: Final = 10
"""With `evaluation.automatic`, at most one row of this number is held out of training."""
LEAST_AUTOMATIC: Final = 10
"""Smallest number of questions with `evaluation.automatic`: fewer show nothing, and none gets an answer."""
LONGER_ANSWERS: Final = 2
"""Limit of such a job's answers, as a multiple of that of its completions, and at most `evaluation`'s default."""


def sample_size(spec: JobSpec, questions: int) -> int:
    """Number of questions of an evaluation during training."""
    return min(questions, spec.evaluation.sample or SAMPLE)


def fixed_interval(spec: JobSpec) -> int | None:
    """Steps between two evaluations, 0 for none; None if it depends on what they cost."""
    every, steps = spec.evaluation.every, spec.training.steps
    if every is not None:
        return every
    if spec.evaluation.stop_when.is_set:
        return max(1, steps // MOST)
    return None if steps >= LEAST_STEPS and not calls_out(spec.rewards.graders) else 0


def spaced(steps: int, *, step_seconds: float, one: float, ends: float) -> int:
    """Steps between two evaluations that take `one` second each, within `COST_SHARE`; 0 where not one fits.

    `ends` is what the evaluations before and after training take together.
    """
    room = COST_SHARE * steps * step_seconds - ends
    count = min(MOST, steps - 1, int(room / one) if one > 0 else MOST)
    return -(-steps // (count + 1)) if count > 0 else 0


def automatic_questions(rows: int, wanted: int = QUESTIONS) -> int:
    """How many of a data set's rows are held out if the job leaves it open; 0 where there are too few."""
    count = min(wanted, rows // AUTOMATIC_SHARE)
    return count if count >= LEAST_AUTOMATIC else 0


def last_held_out(spec: JobSpec, rows: int) -> int:
    """How many of the last of its data set's `rows` a job holds out; 0 where its questions are from elsewhere."""
    wanted = spec.held_out_rows
    return automatic_questions(rows, wanted) if wanted and spec.evaluation.automatic else wanted


def with_evaluation(spec: JobSpec, rows: int | None) -> JobSpec:
    """The job with held-out questions, unless it says how many or has too few rows; `rows` is None if not known.

    Jobs with graders that call a model or an address stay as they are: each answer could cost money.
    """
    given = spec.requested.get("evaluation", {})
    if spec.kind != "training" or spec.evaluation.questions or calls_out(spec.rewards.graders):
        return spec
    if not isinstance(given, dict) or "questions" in cast("dict[str, Any]", given):
        return spec
    most = min((count for count in (rows, spec.data.max_rows) if count is not None), default=None)
    apart = spec.data.source == "hub" and spec.evaluation.split != spec.data.split
    questions = QUESTIONS if apart or most is None else automatic_questions(most)
    if not questions or (not apart and most is not None and most - questions < spec.sampling.prompts_per_step):
        return spec
    evaluation: dict[str, Any] = {**spec.as_dict()["evaluation"], "questions": questions}
    is_known = (spec.data.dataset, spec.evaluation.split) in KNOWN_SPLITS if apart else rows is not None
    if not is_known:  # otherwise older workers can run the job too
        evaluation["automatic"] = True
    if "max_completion_tokens" not in given:
        room = spec.model.max_sequence - spec.sampling.max_prompt_tokens
        longest = min(evaluation["max_completion_tokens"], LONGER_ANSWERS * spec.sampling.max_completion_tokens)
        evaluation["max_completion_tokens"] = min(longest, room)
    resolved = JobSpec.model_validate({**spec.as_dict(), "evaluation": evaluation})
    vars(resolved)["requested"] = spec.requested
    return resolved
