from __future__ import annotations

import io
import os
import pty
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from rich.console import Console

from grpo_client.cli.live import Seen, draw, duration, plot
from grpo_client.cli.progress import describe, show_bytes, show_progress
from grpo_client.cli.text import BLOCKS
from grpo_client.results import Event, Job

JOB = Job({"id": "job-1", "name": "night \x1b[2J", "status": "queued", "phase": None, "total_steps": 40})


def event(kind: str, step: int | None = None, **data: Any) -> Event:
    return Event({"type": kind, "step": step, "data": data})


def metric(step: int, reward: float) -> Event:
    fields = {"completion_tokens_mean": 20.0, "truncated_share": 0.25, "kl": None, "seconds": {"total": 3.0}}
    return event("metric", step, reward=reward, rewards={"correctness": reward / 2}, **fields)


def seen_after(*events: Event) -> Seen:
    seen = Seen(JOB)
    for one in events:
        seen.take(one)
    return seen


def drawn(seen: Seen, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(draw(seen, width))
    return stream.getvalue()


def test_the_picture_has_the_essentials() -> None:
    seen = seen_after(
        event("status", status="running"),
        event("status", phase="training"),
        *(metric(step, step / 10) for step in range(1, 21)),
        event("warning", 20, code="truncation", message="25% were \x1b[31mcut off"),
        event("evaluation", paired={"strict": {"verdict": "It rose."}}),
    )
    text = drawn(seen)
    for part in (
        "running (training)",
        "step 20/40",
        "about 60 s left",
        "reward correctness",
        "tokens",
        "25%",
        "It rose.",
    ):
        assert part in text, part
    assert "step 20: truncation: 25% were" in text
    assert "KL" not in text, "nothing is shown of a number that the run does not have"
    assert "\x1b[2J" not in text
    assert "\x1b[31mcut" not in text


def test_a_warning_that_is_over_gives_way_to_the_past() -> None:
    seen = seen_after(
        event("warning", 29, code="no_variance", message="nothing was learnt"),
        event("warning", 30, code="truncation", message="cut off"),
        event(
            "log", 31, code="audit_over", audit="no_variance", message="Between steps 10 and 30 no group had a signal"
        ),
    )
    assert [kind for kind, _ in seen.notes] == ["warning", "over"]
    text = drawn(seen)
    assert "Between steps 10 and 30 no group had a signal" in text
    assert "nothing was learnt" not in text


@pytest.mark.parametrize("width", [30, 60, 200])
def test_it_fits_any_width(width: int) -> None:
    lines = drawn(seen_after(*(metric(step, step / 10) for step in range(1, 300))), width).splitlines()
    assert {len(line) for line in lines} == {width}


def test_a_step_that_is_told_again_replaces_what_came_of_it_before() -> None:
    """A job that went on from its checkpoint of step 2."""
    seen = seen_after(*(metric(step, step) for step in (1, 2, 3, 4)), metric(3, 30), metric(4, 40))
    assert seen.series["reward"] == [1, 2, 30, 40]
    sparse = seen_after(*(metric(step, step) for step in (5, 10, 15)), metric(15, 7))
    assert sparse.series["reward"] == [5, 10, 7]


def test_before_the_first_step_there_is_no_curve_and_no_guess() -> None:
    seen = seen_after(event("status", phase="loading"))
    assert seen.seconds_left is None
    assert "loading" in drawn(seen)


def test_plot() -> None:
    lines = plot([0.0, 1.0, 2.0, 3.0], width=10, height=3)
    assert [line.split("│")[0].strip() for line in lines] == ["3.000", "", "0.000"]
    columns = ["".join(column) for column in zip(*(line.split("│")[1] for line in lines), strict=True)]
    assert columns[0] == f"  {BLOCKS[0]}"
    assert columns[-1] == BLOCKS[-1] * 3
    assert plot([2.0, 2.0], width=5) != []


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89.6, "90 s"), (600, "10 min"), (7300, "2 h 02 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (metric(3, 0.5), "step 3/40  reward 0.500  tokens 20"),
        (event("status", phase="training"), "training"),
        (event("warning", 1, code="a", message="b\x1b"), "warning a: b "),
        (event("evaluation", stage="before"), ""),
        (event("evaluation", paired={"strict": {"verdict": "It rose."}}), "It rose."),
        (
            event(
                "evaluation", paired_start={"strict": {"verdict": "Not since."}}, paired={"strict": {"verdict": "Up."}}
            ),
            "Not since. Up.",
        ),
        (event("log", code="audit_over", audit="no_variance", message="Between."), "over no_variance: Between."),
        (event("evaluation", paired={"strict": {"verdict": "No."}, "metric": {"verdict": "Mean rose."}}), "Mean rose."),
        (event("sample", 1), ""),
    ],
)
def test_lines(given: Event, line: str) -> None:
    assert describe(given, 40) == line


def read_terminal(write: Callable[[Any], None]) -> str:
    """What reaches a real terminal."""
    ours, theirs = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # which is how Linux says that the other end is closed
            while piece := os.read(ours, 4096):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as stream:
        write(stream)
    reader.join()
    os.close(ours)
    return b"".join(pieces).decode()


def test_a_terminal_gets_the_picture() -> None:
    def watch(stream: Any) -> None:
        with show_progress(JOB, stream) as on_event:
            for step in range(1, 5):
                on_event(metric(step, float(step)))

    text = read_terminal(watch)
    assert "step 4/40" in text
    assert "╭" in text


def test_a_terminal_gets_bars_for_bytes_and_a_line_for_what_is_done() -> None:
    def fetch(stream: Any) -> None:
        with show_bytes(stream) as on_bytes:
            on_bytes("adapter.bin", 500, 1000)
            on_bytes("adapter.bin", 1000, 1000)
            on_bytes("small.json", 2, 2)

    text = read_terminal(fetch)
    assert "adapter.bin  1,000 bytes" in text
    assert "small.json  2 bytes" in text


def test_elsewhere_bytes_are_lines_or_nothing() -> None:
    for lines, expected in ((True, "  a  2 bytes\n"), (False, "")):
        stream = io.StringIO()
        with show_bytes(stream, lines=lines) as on_bytes:
            on_bytes("a", 1, 2)
            on_bytes("a", 2, 2)
        assert stream.getvalue() == expected
