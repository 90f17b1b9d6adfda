"""Made-up runs, step by step, for the audits: healthy ones with the noise of real sampling, and sick ones.

Each completion is drawn by itself (in the format or not, right or not), so that a step of 1 × 6 is as noisy as it is
in the recipe. Invariant: a trace is a function of its seed.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from grpo_core.spec import JobSpec, parse_spec

Course = Callable[[float], float]
"""A value by the share of the run that is done, from 0 to 1."""


def flat(value: float) -> Course:
    return lambda _: value


def slope(start: float, end: float) -> Course:
    return lambda done: start + (end - start) * done


def learnt(start: float, end: float, when: float) -> Course:
    """An S from `start` to `end` with its middle at `when`."""
    return lambda done: start + (end - start) / (1 + math.exp(-12 * (done - when)))


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How a model behaves over a run."""

    in_format: Course
    right: Course
    """Share of right answers among those in the format."""
    tokens: Course
    cut: Course
    repeated: Course
    entropy: Course
    kl: Course

    def but(self, **changes: Any) -> Behaviour:
        return replace(self, **changes)


STILL = Behaviour(
    in_format=flat(0.5),
    right=flat(0.4),
    tokens=flat(120.0),
    cut=flat(0.05),
    repeated=flat(0.1),
    entropy=flat(0.3),
    kl=slope(0.0, 0.1),
)
"""Learns nothing, and has nothing wrong with it."""
LEARNING = STILL.but(
    in_format=learnt(0.2, 0.95, 0.2),
    right=learnt(0.3, 0.8, 0.35),
    tokens=slope(150.0, 90.0),
    cut=slope(0.15, 0.02),
    entropy=slope(0.3, 0.1),
    kl=slope(0.0, 0.25),
)
POLISHING = STILL.but(in_format=flat(0.97), right=slope(0.7, 0.85), entropy=slope(0.2, 0.08), repeated=flat(0.2))
LONGER = LEARNING.but(tokens=slope(100.0, 260.0), cut=slope(0.02, 0.15))

FORM_FIRST = LEARNING.but(in_format=learnt(0.2, 0.95, 0.15), right=learnt(0.15, 0.7, 0.5))

HEALTHY = {"still": STILL, "learning": LEARNING, "polishing": POLISHING, "longer": LONGER, "form first": FORM_FIRST}


def spec_of(prompts: int, generations: int, *, steps: int = 250, **sections: Any) -> JobSpec:
    sampling = {"prompts_per_step": prompts, "generations": generations}
    return parse_spec({"training": {"steps": steps}, "sampling": sampling, **sections})


def trace(spec: JobSpec, behaviour: Behaviour, seed: int) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl` of a run that behaves so."""
    chance = random.Random(seed)
    for step in range(1, spec.training.steps + 1):
        yield _step(spec, behaviour, step, chance)


def _step(spec: JobSpec, behaviour: Behaviour, step: int, chance: random.Random) -> dict[str, Any]:
    done = step / spec.training.steps
    weights = spec.rewards.weights.model_dump()
    groups: list[list[dict[str, float]]] = []
    for _ in range(spec.sampling.prompts_per_step):
        # Questions differ: some are nearly always answered, some hardly ever.
        easier = chance.gauss(0, 1.5)
        right = _shifted(behaviour.right(done), easier)
        groups.append([_completion(behaviour.in_format(done), right, chance) for _ in range(spec.sampling.generations)])
    totals = [[sum(weights[name] * value for name, value in c.items()) for c in group] for group in groups]
    everything = [completion for group in groups for completion in group]
    drawn = len(everything)
    return {
        "step": step,
        "reward": statistics.fmean(total for group in totals for total in group),
        "rewards": {name: statistics.fmean(c[name] for c in everything) for name in everything[0]},
        "zero_variance_share": statistics.fmean(max(group) - min(group) < 1e-9 for group in totals),
        "completion_tokens_mean": statistics.fmean(
            behaviour.tokens(done) * math.exp(chance.gauss(0, 0.4) - 0.08) for _ in range(drawn)
        ),
        "truncated_share": statistics.fmean(chance.random() < behaviour.cut(done) for _ in range(drawn)),
        "duplicate_share": statistics.fmean(chance.random() < behaviour.repeated(done) for _ in range(drawn)),
        "entropy": behaviour.entropy(done) * math.exp(chance.gauss(0, 0.3)),
        # The estimate has rare, large spikes.
        "kl": behaviour.kl(done) * math.exp(chance.gauss(0, 0.8)),
    }


def _completion(in_format: float, right: float, chance: random.Random) -> dict[str, float]:
    formed = chance.random() < in_format
    correct = formed and chance.random() < right
    number = formed and (correct or chance.random() < 0.9)
    marks = 0.5 if formed else chance.choice([0.0, 0.125, 0.25])
    form = 0.5 * formed
    return {
        "correctness": 2.0 * correct,
        "integer": 0.5 * number,
        "strict_format": form,
        "soft_format": form,
        "xml_count": marks,
    }


def _shifted(share: float, by: float) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    return 1 / (1 + math.exp(-(math.log(share / (1 - share)) + by)))
