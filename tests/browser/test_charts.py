"""The charts: smoothing, axes, zoom, hidden lines, several runs, lines on each other, pictures, and many steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.browser.conftest import Stack, Visitor

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

Visit = Callable[..., Visitor]
STEPS, FEWER = 60, 40
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def job(stack: Stack) -> str:
    return stack.ended("good", "recipe", STEPS)


@pytest.fixture
def alike(stack: Stack) -> str:
    return stack.ended("alike", "alike", STEPS)


def opened(visit: Visit, path: str, **window: Any) -> Visitor:
    visitor = visit(accept_downloads=True, **window)
    visitor.log_in(path)
    visitor.page.locator(".charts canvas").first.wait_for()
    return visitor


def chart(page: Any, title: str) -> Any:
    return page.locator("figure.chart").filter(has=page.get_by_role("heading", name=title, exact=True))


def drag(page: Any, figure: Any, start: float, end: float) -> None:
    over = figure.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] * start, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, box["y"] + 50, steps=5)
    page.mouse.up()


def first_step(page: Any, figure: Any) -> int:
    """The step at the left edge of a chart."""
    over = figure.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 50)
    return int(re.findall(r"step ([\d,]+)", figure.locator(".legend .at").inner_text())[0].replace(",", ""))


def saved(page: Any, figure: Any, kind: str) -> Path:
    with page.expect_download() as download:
        figure.get_by_role("button", name=f"Save as {kind}").click()
    assert download.value.suggested_filename.endswith(f".{kind.lower()}")
    return Path(download.value.path())


def picture(page: Any, figure: Any) -> ET.Element:
    return ET.fromstring(saved(page, figure, "SVG").read_text("utf-8"))


def texts(svg: ET.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def test_what_was_chosen_stays_over_a_reload(visit: Visit, job: str) -> None:
    visitor = opened(visit, f"/jobs/{job}")
    page = visitor.page
    rewards = chart(page, "Reward functions")
    assert rewards.locator(".legend .measured").first.inner_text() == ""
    page.locator("#smoothing").focus()
    for _ in range(60):
        page.keyboard.press("ArrowRight")
    visitor.wait(lambda: rewards.locator(".legend .measured").first.inner_text().startswith("("))
    page.locator("#axis").select_option("minutes")
    integer = rewards.get_by_role("button", name="integer")
    integer.focus()
    page.keyboard.press("Space")
    visitor.wait(lambda: integer.get_attribute("aria-pressed") == "false")
    assert page.evaluate("document.activeElement.textContent") == "integer", "the button keeps the keyboard"
    chart(page, "Learning rate").get_by_role("button", name="Log scale").click()
    page.reload()
    page.locator(".charts canvas").first.wait_for()
    assert page.locator("#smoothing").input_value() == "0.6"
    assert page.locator(".chart-bar .weight").inner_text() == "0.60"
    assert page.locator("#axis").input_value() == "minutes"
    assert "step 60 · " in rewards.locator(".legend .at").inner_text()
    assert integer.get_attribute("aria-pressed") == "false"
    svg = picture(page, rewards)
    assert not [text for text in texts(svg) if text.startswith("integer")], "a hidden line is in no picture"
    rate = chart(page, "Learning rate")
    assert rate.get_by_role("button", name="Log scale").get_attribute("aria-pressed") == "true"
    assert "1 value of 0 or less" in rate.locator(".chart-note").inner_text()
    integer.click()
    visitor.wait(lambda: integer.get_attribute("aria-pressed") == "true")


def test_zoom_is_found_and_undone(visit: Visit, job: str) -> None:
    visitor = opened(visit, f"/jobs/{job}")
    page = visitor.page
    figure = chart(page, "Reward")
    whole = figure.get_by_role("button", name="Show all")
    assert page.get_by_text("Drag sideways in a chart to zoom in").is_visible()
    assert page.get_by_role("button", name="Show all").count() == 0

    def zoom() -> None:
        drag(page, figure, 0.3, 0.6)
        whole.wait_for()
        assert 18 <= first_step(page, figure) <= 21
        assert 18 <= first_step(page, chart(page, "Entropy")) <= 21, "all charts show the same stretch"

    zoom()
    assert "/rollouts" not in page.url, "a drag is no click"
    whole.click()
    assert first_step(page, figure) == 1
    assert page.evaluate("document.activeElement.className") == "plot"
    zoom()
    page.keyboard.press("Escape")
    assert first_step(page, figure) == 1
    zoom()
    figure.locator(".u-over").dblclick(position={"x": 300, "y": 60})
    assert first_step(page, figure) == 1
    page.wait_for_timeout(500)
    assert "/rollouts" not in page.url, "a double click opens no step"
    figure.locator(".plot").focus()
    page.keyboard.press("End")
    page.keyboard.press("+")
    whole.wait_for()
    assert first_step(page, figure) > 30
    page.keyboard.press("-")
    page.keyboard.press("-")
    whole.wait_for(state="hidden")
    zoom()
    page.locator("#axis").select_option("clock")
    whole.wait_for(state="hidden")


def test_a_finger_zooms_too(visit: Visit, job: str) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    visitor = opened(visit, f"/jobs/{job}", **phone)
    page = visitor.page
    page.evaluate(
        """() => {
          const over = document.querySelector(".chart.big .u-over");
          const box = over.getBoundingClientRect();
          for (const [type, share] of [["pointerdown", 0.3], ["pointermove", 0.5], ["pointerup", 0.6]]) {
            const at = {clientX: box.left + box.width * share, clientY: box.top + 40};
            over.dispatchEvent(new PointerEvent(type, {...at, pointerType: "touch", bubbles: true}));
          }
        }"""
    )
    figure = chart(page, "Reward")
    figure.get_by_role("button", name="Show all").wait_for()
    assert page.evaluate("getComputedStyle(document.querySelector('.u-over')).touchAction") == "pan-y"
    assert visitor.too_wide() == []
    figure.get_by_role("button", name="Show all").tap()
    figure.get_by_role("button", name="Show all").wait_for(state="hidden")


def test_the_last_value_of_the_shorter_run_is_shown(visit: Visit, stack: Stack, job: str) -> None:
    other = stack.ended("good", "cooler", FEWER, sampling={"temperature": 0.7})
    visitor = opened(visit, f"/compare?a={job}&b={other}")
    page = visitor.page
    figure = chart(page, "Reward")
    with stack.http() as http:
        last = http.get(f"/jobs/{other}/metrics").json()["data"][-1]["reward"]
    entry = figure.locator(".legend li").nth(1)
    assert f"{last:.2f}" in entry.inner_text()
    assert "(step 40)" in entry.inner_text()
    assert f"{last:.2f}" in texts(picture(page, figure)), "beside the end of its line"
    figure.locator(".plot").focus()
    page.keyboard.press("End")
    assert f"{last:.2f} (step 40)" in figure.locator("[aria-live]").inner_text()
    page.locator("#axis").select_option("minutes")
    visitor.wait(lambda: "step" not in figure.locator(".legend .at").inner_text())
    page.locator("#smoothing").fill("0.5")
    visitor.wait(lambda: f"({last:.2f})" in entry.inner_text(), trouble="each run is smoothed on its own")
    page.locator("#smoothing").fill("0")
    figure.get_by_role("button", name="B · cooler").click()
    hidden = page.get_by_role("button", name="B · cooler")
    visitor.wait(lambda: hidden.nth(3).get_attribute("aria-pressed") == "false")
    for other_chart in (figure, chart(page, "Entropy")):
        named = [text for text in texts(picture(page, other_chart)) if "·" in text]
        assert [text.split("  ")[0] for text in named[1:]] == ["A · recipe"], "a run is hidden in all charts"
    figure.get_by_text("As a table").click()
    rows = figure.locator("tbody tr")
    rows.first.wait_for()
    assert rows.count() == STEPS
    assert rows.nth(FEWER).locator("td").nth(1).inner_text() == "–"


def test_lines_that_lie_on_each_other_are_told_apart(visit: Visit, alike: str) -> None:
    visitor = opened(visit, f"/jobs/{alike}")
    page = visitor.page
    figure = chart(page, "Reward functions")
    told = figure.locator(".legend").inner_text()
    assert re.search(r"soft_format\s+[\d.]+\s+same values as strict_format", told)
    assert re.search(r"xml_count\s+[\d.]+\s+lies on integer in 5\d% of the steps", told)
    marks = [line.get_attribute("stroke-dasharray") for line in figure.locator(".swatch-line line").all()]
    assert [bool(dash) for dash in marks] == [False, False, False, True, True]
    svg = picture(page, figure)
    assert len([path for path in svg.iter(f"{SVG}path") if path.get("stroke-dasharray")]) == 2
    assert any("same values as strict_format" in text for text in texts(svg))
    assert "soft_format: same values as strict_format" in figure.locator(".sr-only").first.inner_text()
    figure.get_by_role("button", name="strict_format").click()
    visitor.wait(lambda: "same values" not in figure.locator(".legend").inner_text())


def test_what_is_measured_at_few_steps_is_points_and_a_line(visit: Visit, alike: str) -> None:
    visitor = opened(visit, f"/jobs/{alike}")
    page = visitor.page
    figure = chart(page, "Rollout engine vs. trainer")
    svg = picture(page, figure)
    assert len(svg.findall(f".//{SVG}circle")) == STEPS // 10
    (line,) = [path.get("d") or "" for path in svg.iter(f"{SVG}path")]
    assert (line.count("M"), line.count("L")) == (1, STEPS // 10 - 1)
    figure.locator(".plot").focus()
    page.keyboard.press("End")
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    assert figure.locator("[aria-live]").inner_text() == "step 55: mean 0.015 (step 50)"
    assert "(step 50)" in figure.locator(".legend").inner_text()


def test_evaluations_are_a_curve_with_the_best_step(visit: Visit, alike: str, job: str) -> None:
    visitor = opened(visit, f"/jobs/{alike}")
    page = visitor.page
    figure = chart(page, "Held-out questions")
    assert "100 questions" in figure.locator("figcaption").inner_text()
    assert "Best at step 48" in figure.locator(".chart-note").inner_text()
    svg = picture(page, figure)
    assert len(svg.findall(f".//{SVG}circle")) == 2 * (1 + STEPS // 12)
    figure.get_by_text("As a table").click()
    figure.locator("tbody tr").first.wait_for()
    assert figure.locator("tbody th").all_inner_texts() == ["0", "12", "24", "36", "48", "60"]
    assert figure.locator("tbody tr").nth(4).locator("td").all_inner_texts() == ["52.0%", "64.0%"]
    page.locator("#axis").select_option("minutes")
    visitor.wait(lambda: "·" in figure.locator(".legend .at").inner_text())
    visitor.go(f"/jobs/{job}")
    chart(page, "Entropy").wait_for()
    assert chart(page, "Held-out questions").count() == 0, "its worker told of no curve"
    visitor.go(f"/compare?a={alike}&b={job}")
    chart(page, "Held-out questions: Lenient accuracy").wait_for()
    figure = chart(page, "Held-out questions: Strict accuracy")
    assert re.search(r"A · alike\s*50.0%", figure.locator(".legend").inner_text())


def test_a_picture_is_light_and_says_what_it_shows(visit: Visit, job: str) -> None:
    visitor = opened(visit, f"/jobs/{job}", color_scheme="dark")
    page = visitor.page
    figure = chart(page, "Reward functions")
    page.locator("#smoothing").fill("0.8")
    visitor.wait(lambda: figure.locator(".legend .measured").first.inner_text().startswith("("))
    svg = picture(page, figure)
    assert svg.find(f"{SVG}rect").get("fill") == "#ffffff"  # type: ignore[union-attr]
    told = texts(svg)
    assert told[0] == "Reward functions · recipe"
    for name in ("correctness", "integer", "strict_format", "soft_format", "xml_count"):
        assert [text for text in told if text.startswith(name)], name
    assert {"Step", "smoothed with weight 0.80"} <= set(told)
    paths = list(svg.iter(f"{SVG}path"))
    assert len(paths) == 10, "the measured lines behind the smoothed ones"
    png = saved(page, figure, "PNG").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20]) == 1920
    assert len(png) > 20_000


def test_ten_thousand_steps_are_smoothed_and_zoomed_without_lag(visit: Visit, stack: Stack) -> None:
    job_id = stack.ended("long", "long", 10_000, seconds=0, training={"steps": 10_000, "checkpoint_every": 5000})
    visitor = opened(visit, f"/jobs/{job_id}")
    page = visitor.page
    seconds = page.evaluate(
        """async () => {
          const slider = document.querySelector("#smoothing");
          const next = () => new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
          const times = [];
          for (let weight = 50; weight < 70; weight += 1) {
            slider.value = weight / 100;
            const began = performance.now();
            slider.dispatchEvent(new Event("input"));
            await next();
            await next();
            times.push(performance.now() - began);
          }
          return times.sort((a, b) => a - b)[10] / 1000;
        }"""
    )
    print(f"curves of 10,000 steps: a move of the slider takes {1000 * seconds:.0f} ms for all charts")
    assert seconds < 0.4
    figure = chart(page, "Reward")
    drag(page, figure, 0.3, 0.6)
    figure.get_by_role("button", name="Show all").wait_for()
    assert 2900 < first_step(page, figure) < 3100
    assert len(saved(page, figure, "SVG").read_bytes()) < 1_000_000
