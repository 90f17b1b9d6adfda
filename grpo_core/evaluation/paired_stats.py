"""Whether a model answers better than before: the same questions, answered twice and compared in pairs.

Owns the statistics (exact McNemar test, Wilson and Newcombe intervals) and the sentence that interprets them. Knows
only counts: no model, no text, no torch. Invariant: a change is reported only if the exact test is significant.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

SIGNIFICANCE: Final = 0.05
_Z: Final = 1.959963984540054
"""Two-sided 95 % of a normal distribution."""

_FEWEST: Final = 2

Interval = tuple[float, float]


MAX_STEPS: Final = 10
"""Steps of an end, at most a fifth of all."""

Value = TypeVar("Value")


def ends_of(values: Sequence[Value]) -> tuple[Sequence[Value], Sequence[Value]]:
    """The first and the last of a run's values, in order of steps; none where there are none."""
    window = max(1, min(MAX_STEPS, len(values) // 5))
    return values[:window], values[-window:]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedCounts:
    """How many questions were right before and after."""

    both: int
    lost: int
    """Right before, wrong after."""
    gained: int
    """Wrong before, right after."""
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.lost + self.gained + self.neither


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One reading of the answers, before against after."""

    counts: PairedCounts
    before: float
    """Share right."""
    after: float
    difference: float
    """After minus before."""
    interval: Interval
    """95 % interval of the difference."""
    p_value: float
    """Exact McNemar test, two-sided."""
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueComparison:
    """A number of each question, before against after."""

    questions: int
    """Those that have it both times."""
    before: float
    after: float
    difference: float
    """Mean of after minus before."""
    interval: Interval
    """95 % interval of the difference, by the normal distribution."""
    p_value: float
    """Two-sided paired z-test; 1 where nothing changed."""
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def compare_values(
    name: str, before: Sequence[float | None], after: Sequence[float | None], *, when: str = "before"
) -> ValueComparison | None:
    """Compare a number of the same questions in the same order; None where fewer than two have it both times.

    `when` is what the verdict calls the first of the two.
    """
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    if len(pairs) < _FEWEST:
        return None
    changes = [a - b for b, a in pairs]
    mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
    p_value = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    first, last = statistics.fmean(b for b, _ in pairs), statistics.fmean(a for _, a in pairs)
    interval = (mean - _Z * error, mean + _Z * error)
    change = (
        f"{mean:+.3g}, 95 % interval {interval[0]:+.3g} to {interval[1]:+.3g}, p {_probability(p_value)}, "
        f"{len(pairs)} questions"
    )
    values = f"{first:.3g} {when}, {last:.3g} after"
    verdict = f"The mean of {name} {'rose' if mean > 0 else 'fell'}: {values} ({change})."
    if p_value >= SIGNIFICANCE:
        verdict = f"No significant change in the mean of {name}: {values} ({change})."
    return ValueComparison(
        questions=len(pairs),
        before=first,
        after=last,
        difference=mean,
        interval=interval,
        p_value=p_value,
        verdict=verdict,
    )


def compare(name: str, before: Sequence[bool], after: Sequence[bool], *, when: str = "before") -> Comparison:
    """Compare right answers to the same questions in the same order.

    `name` is what the verdict calls them, and `when` what it calls the first of the two.
    """
    pairs = list(zip(before, after, strict=True))
    counts = PairedCounts(
        both=pairs.count((True, True)),
        lost=pairs.count((True, False)),
        gained=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )
    share_before, share_after = sum(before) / counts.total, sum(after) / counts.total
    shares = f"{share_before:.1%} {when}, {share_after:.1%} after"
    interval, p_value = paired_interval(counts), mcnemar(counts)
    return Comparison(
        counts=counts,
        before=share_before,
        after=share_after,
        difference=share_after - share_before,
        interval=interval,
        p_value=p_value,
        verdict=_verdict(name, shares, share_after - share_before, interval, p_value, counts.total),
    )


def mcnemar(counts: PairedCounts) -> float:
    """The two-sided exact p-value of McNemar's test (1947), by the binomial distribution.

    Were nothing changed, a question whose answer flips would be as often gained as lost.
    """
    flipped = counts.lost + counts.gained
    ways = tail = 1
    for taken in range(min(counts.lost, counts.gained)):
        ways = ways * (flipped - taken) // (taken + 1)
        tail += ways
    # Whole numbers up to here: at ten thousand flips the two powers are far beyond what a float holds.
    return min(1.0, 2 * tail / 2**flipped)


def wilson_interval(right: int, total: int) -> Interval:
    """The 95 % score interval of one share (Wilson, JASA 22:209, 1927)."""
    share = right / total
    centre = share + _Z**2 / (2 * total)
    half = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    scale = 1 + _Z**2 / total
    # At either end the formula gives the end itself, but for rounding.
    low = (centre - half) / scale if right else 0.0
    return low, (centre + half) / scale if right < total else 1.0


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of a mean, by the normal distribution; None where fewer than two values are known."""
    if len(values) < _FEWEST:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return mean - _Z * error, mean + _Z * error


def paired_interval(counts: PairedCounts) -> Interval:
    """The 95 % interval of after minus before (Newcombe, Statistics in Medicine 17:2635, 1998, method 10).

    Joins the two shares' Wilson intervals by how strongly the answers go together. Unlike Wald's interval it stays
    within -1 and 1 and has a width also where no answer flipped.
    """
    total = counts.total
    right_after, right_before = counts.both + counts.gained, counts.both + counts.lost
    after, before = right_after / total, right_before / total
    after_low, after_high = wilson_interval(right_after, total)
    before_low, before_high = wilson_interval(right_before, total)
    phi, difference = _correlation(counts), after - before
    down = _joined(after - after_low, before_high - before, phi)
    up = _joined(after_high - after, before - before_low, phi)
    return max(-1.0, difference - down), min(1.0, difference + up)


def _joined(one: float, other: float, phi: float) -> float:
    # Rounding may leave a difference of squares a hair below zero.
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _correlation(counts: PairedCounts) -> float:
    """Newcombe's phi of the fourfold table: a positive association is lessened by a continuity correction."""
    right_before, right_after = counts.both + counts.lost, counts.both + counts.gained
    margins = right_before * (counts.total - right_before) * right_after * (counts.total - right_after)
    if not margins:
        return 0.0
    association = counts.both * counts.neither - counts.lost * counts.gained
    if association > 0:
        association = max(0.0, association - counts.total / 2)
    return association / math.sqrt(margins)


def _verdict(name: str, shares: str, difference: float, interval: Interval, p_value: float, total: int) -> str:
    change = (
        f"{difference * 100:+.1f} points, 95 % interval {interval[0] * 100:+.1f} to {interval[1] * 100:+.1f}, "
        f"exact McNemar p {_probability(p_value)}, {total} questions"
    )
    if p_value >= SIGNIFICANCE:
        return f"No significant change in {name}: {shares} ({change})."
    return f"{name[:1].upper()}{name[1:]} {'rose' if difference > 0 else 'fell'}: {shares} ({change})."


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
