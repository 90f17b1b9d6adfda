"""The rules by which a job ends hold in every interleaving, and each of them is needed: without it the model fails."""

from __future__ import annotations

import pytest

from tests.unit.protocol import Model, Rules, Violation


@pytest.mark.long
def test_the_rules_keep_every_promise() -> None:
    worlds = Model(Rules()).search()
    assert worlds > 10_000, "most of the protocol is not reached"


@pytest.mark.parametrize(
    ("without", "broken"),
    [
        ("settles_only_what_stands", "was shown cancelled, and it is succeeded"),
        ("reads_orders", "an order that was answered is not obeyed"),
        ("reconciles", "an accepted job is lost"),
        ("jumps", "an event number is used twice"),
    ],
)
def test_each_rule_is_needed(without: str, broken: str) -> None:
    with pytest.raises(Violation, match=broken):
        Model(Rules(**{without: False})).search()
