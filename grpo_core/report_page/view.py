"""What the report page shows, as plain values for its template: verdict, curves, audits, completions, settings.

Owns the sentences about a run and how much of each text is shown. Invariant: nothing here is markup but the SVG of
`charts`, which holds no text of a model or a data set.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import import_module
from typing import Any, Final

import grpo_core
from grpo_core.comparison import SIGNIFICANCE
from grpo_core.ends import ends_of
from grpo_core.report_page.charts import Curve, number, svg
from grpo_core.report_page.run_files import Json, RunFiles
from grpo_core.spec import parse_spec

MAX_TEXT: Final = 4_000
"""Characters of a completion that are shown."""
MAX_SPEC: Final = 60_000
SHOWN_WITH_FINDING: Final = 3
TABLE_ROWS: Final = 25
CLEAR_ERRORS: Final = 3.0
"""Standard errors beyond which the reward is said to have changed."""

_HEADLINES: Final = {
    (1, 1): ("good", "It learnt: more unseen questions are answered right, in the asked format"),
    (1, 0): ("good", "More unseen questions are answered right in the asked format, not clearly by their last number"),
    (1, -1): ("open", "More answers are right in the asked format, and fewer by their last number"),
    (0, 1): ("open", "More answers are right by their last number, and not more in the asked format"),
    (0, 0): ("open", "No change that could not be chance"),
    (0, -1): ("bad", "It got worse: fewer unseen questions are answered right"),
    (-1, 1): ("bad", "Fewer answers are right in the asked format, and more by their last number"),
    (-1, 0): ("bad", "It got worse: fewer unseen questions are answered right in the asked format"),
    (-1, -1): ("bad", "It got worse: fewer unseen questions are answered right, in the asked format"),
}
"""Tone and words for where strict and lenient accuracy went."""
_FORMAT_HEADLINES: Final = {
    (1, 1): ("good", "It learnt the format, and more answers are right by their last number"),
    (1, 0): ("good", "It learnt the format; how many answers are right did not clearly change"),
    (1, -1): ("open", "It learnt the format, and fewer unseen questions are answered right"),
    (-1, 1): ("bad", "It lost the format, and more answers are right by their last number"),
    (-1, 0): ("bad", "It lost the format; how many answers are right did not clearly change"),
    (-1, -1): ("bad", "It lost the format, and fewer unseen questions are answered right"),
}
"""The same for where the format and lenient accuracy went: the form is paid for too, and is not the goal."""

Series = list[float | None]


def page_of(run: RunFiles) -> Json:
    """Everything the template reads."""
    findings = run.findings
    best, worst = run.extremes()
    return {
        "title": plain(run.spec.get("name") or run.spec.get("model", {}).get("name") or "A run"),
        "status": run.status,
        "facts": _facts(run),
        "verdict": verdict(run),
        "charts": _charts(run, findings),
        "table": _table(run),
        "findings": [_finding(run, data) for data in findings],
        "runs": _runs(run),
        "warnings": [plain(f"{data.get('code', '')}: {data.get('message', '')}") for data in run.warnings],
        "extremes": _span(run.last_steps),
        "best": [_completion(row) for row in best],
        "worst": [_completion(row) for row in worst],
        "samples": _samples(run),
        "settings": _changed_settings(run),
        "spec": plain(json.dumps(run.spec, ensure_ascii=False, indent=2), MAX_SPEC),
        "spec_digest": plain(str(run.report.get("spec_digest", "")), 64),
        "versions": {plain(str(k), 60): plain(str(v), 60) for k, v in run.report.get("versions", {}).items()},
        "effective": plain(json.dumps(run.report.get("settings", {}), ensure_ascii=False, indent=2), MAX_SPEC),
        "adapter": run.adapter_files,
        "version": grpo_core.__version__,
    }


def verdict(run: RunFiles) -> Json:
    """How it ended, in a few words and a sentence or two; `tone` is good, bad or open."""
    done, wanted = _last_step(run), run.spec.get("training", {}).get("steps", 0)
    if run.status == "failed":
        error = run.error or {}
        words = [plain(str(error.get("message", "It gave no reason."))), plain(str(error.get("hint") or ""))]
        return _said("bad", f"It failed ({error.get('class', 'internal')})", [*words, f"{done} of {wanted} steps."])
    if run.status == "cancelled":
        return _said("open", "It was cancelled", [f"{done} of {wanted} steps were done.", _reward_sentence(run)])
    evaluation = run.report.get("evaluation")
    if run.status != "succeeded":
        return _said("open", "It has not finished", [f"{done} of {wanted} steps.", _reward_sentence(run)])
    if not evaluation:
        unknown = (
            "No held-out questions were asked (evaluation.questions is 0): whether it answers unseen ones better was "
            "not measured."
        )
        return _said("open", _reward_headline(run), [_reward_sentence(run), unknown])
    return _compared(evaluation)


def _compared(evaluation: Json) -> Json:
    """What asking before and after has shown."""
    paired, strict = evaluation["paired"], evaluation["paired"]["strict"]
    low, high = strict["interval"]
    direction = _direction(strict)
    tone, headline = _headline(_direction(paired["format"]), direction, _direction(paired["lenient"]))
    counts = strict["counts"]
    sentences = [
        strict["verdict"],
        f"Of {evaluation['questions']} questions that were not trained on, {counts['gained']} were wrong before and "
        f"right after, {counts['lost']} right before and wrong after. The change is between {low * 100:+.1f} and "
        f"{high * 100:+.1f} points with 95 % confidence"
        + ("; chance alone would hardly ever give as much." if direction else "; chance alone may give as much."),
        f"Taking the last number anywhere in the text as the answer: {paired['lenient']['verdict']}",
        f"Right or wrong: {paired['format']['verdict']}",
    ]
    return {**_said(tone, headline, sentences), "bars": _bars(evaluation)}


def _headline(form: int, strict: int, lenient: int) -> tuple[str, str]:
    """Tone and words for where the format and both accuracies went (-1, 0 or 1 each).

    Where both readings say the same, the answers are the news; else the format is, if it moved and strict accuracy
    did not go against it.
    """
    agree = strict == lenient != 0
    if agree or not form or strict == -form:
        return _HEADLINES[strict, lenient]
    return _FORMAT_HEADLINES[form, lenient]


def _direction(comparison: Json) -> int:
    """1 for a rise, -1 for a fall, 0 for what may be chance."""
    rise: float = comparison["difference"]
    return (rise > 0) - (rise < 0) if comparison["p_value"] < SIGNIFICANCE else 0


def _bars(evaluation: Json) -> list[Json]:
    """Shares right with their intervals, as widths of bars."""
    rows: list[Json] = []
    for reading, words in (("strict", "Right, in the format"), ("lenient", "Right, last number")):
        for stage in ("before", "after"):
            summary = evaluation[stage]
            low, high = summary[f"{reading}_interval"]
            share = summary[f"{reading}_accuracy"]
            rows.append(
                {
                    "label": f"{words}, {stage}",
                    "stage": stage,
                    "share": round(share * 100, 1),
                    "low": round(low * 100, 1),
                    "high": round(high * 100, 1),
                }
            )
    return rows


def _said(tone: str, headline: str, sentences: Sequence[str]) -> Json:
    return {"tone": tone, "headline": headline, "sentences": [text for text in sentences if text], "bars": []}


def _reward_ends(run: RunFiles) -> tuple[Sequence[float], Sequence[float]] | None:
    """The rewards of the first and of the last steps."""
    rewards: list[float] = [m["reward"] for m in run.metrics if m.get("reward") is not None]
    return ends_of(rewards) if rewards else None


def _reward_headline(run: RunFiles) -> str:
    ends = _reward_ends(run)
    if ends is None:
        return "It ended without a step"
    start, end = ends
    if len(start) < 2:
        return "Too few steps to say whether the reward rose"
    error = math.sqrt((statistics.variance(start) + statistics.variance(end)) / len(start))
    by = statistics.fmean(end) - statistics.fmean(start)
    if abs(by) <= CLEAR_ERRORS * error:
        return "The reward did not clearly change"
    return "The reward rose" if by > 0 else "The reward fell"


def _reward_sentence(run: RunFiles) -> str:
    ends = _reward_ends(run)
    if ends is None:
        return ""
    (start, end), window = map(statistics.fmean, ends), len(ends[0])
    steps = f"{window} steps" if window > 1 else "step"
    return f"The mean reward was {start:.3g} over the first {steps} and {end:.3g} over the last {steps}."


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    spec, report = run.spec, run.report
    times, runs = run.times, len(run.runs)
    sampling = spec.get("sampling", {})
    facts = [
        ("Model", spec.get("model", {}).get("name", "")),
        ("Data", spec.get("data", {}).get("dataset", "") if spec.get("data", {}).get("source") != "file" else "a file"),
        ("Steps", f"{_last_step(run)} of {spec.get('training', {}).get('steps', '?')}"),
        ("A step", f"{sampling.get('prompts_per_step')} prompts × {sampling.get('generations')} completions"),
        ("Rewards", spec.get("rewards", {}).get("mode", "")),
        ("Device", report.get("device", "")),
        ("Engine", report.get("engine", "")),
        ("Began", _minute(times[0]) if times else ""),
        # Of a job that was interrupted, from its beginning to its end: the waits between runs are in it.
        ("Took", _duration(report.get("seconds") or _between(times)) if runs < 2 else _duration(_between(times))),
        ("Runs", str(runs) if runs > 1 else ""),
    ]
    return [(name, plain(str(value))) for name, value in facts if value]


def _runs(run: RunFiles) -> list[Json]:
    """Each run of a job that had more than one."""
    runs = run.runs
    return [
        {
            "epoch": str(one["epoch"]),
            "began": _minute(one["began"]),
            "steps": _span(one["steps"]) if one["steps"] else "–",
            "end": run.status if one is runs[-1] else plain(one["end"] or "–", 600),
        }
        for one in (runs if len(runs) > 1 else [])
    ]


def _span(steps: Sequence[int]) -> str:
    return "" if not steps else f"{steps[0]}" if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"


def _minute(time: str) -> str:
    return f"{time[:16].replace('T', ' ')} UTC"


def _between(times: Sequence[str]) -> float | None:
    if len(times) < 2:
        return None
    first, last = (datetime.fromisoformat(time.replace("Z", "+00:00")) for time in (times[0], times[-1]))
    return (last - first).total_seconds()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _last_step(run: RunFiles) -> int:
    return run.metrics[-1]["step"] if run.metrics else 0


def _charts(run: RunFiles, findings: Sequence[Json]) -> list[Json]:
    if not run.metrics:
        return []
    marks = sorted({finding["steps"][1] for finding in findings if finding.get("steps")})
    shown: list[Json] = []
    for curve in _curves(run.metrics, marks):
        if drawing := svg(curve):
            # The first is drawn for both widths: one that is shrunk to a phone cannot be read.
            wide = "" if shown else _markup(svg(curve, width=940, height=240))
            shown.append({"title": curve.title, "note": curve.note, "svg": _markup(drawing), "wide": wide})
    return shown


def _curves(metrics: Sequence[Json], marks: Sequence[int]) -> list[Curve]:
    steps = [float(m["step"]) for m in metrics]

    def curve(title: str, *path: str, **options: Any) -> Curve:
        return Curve(title=title, steps=steps, values=_series(metrics, *path), marks=marks, **options)

    reward, spread = _series(metrics, "reward"), _series(metrics, "reward_std")
    shortest, longest = _series(metrics, "completion_tokens_min"), _series(metrics, "completion_tokens_max")
    names = dict.fromkeys(name for m in metrics for name in m.get("rewards") or {})
    return [
        Curve(
            title="Reward",
            steps=steps,
            values=reward,
            band=[
                (r - s, r + s) if r is not None and s is not None else None for r, s in zip(reward, spread, strict=True)
            ],
            marks=marks,
            note="mean weighted total; band: one standard deviation within a prompt's group",
        ),
        *(curve(f"Reward: {plain(name, 60)}", "rewards", name, note="mean, before its weight") for name in names),
        curve(
            "Length",
            "completion_tokens_mean",
            band=[(a, b) if a is not None and b is not None else None for a, b in zip(shortest, longest, strict=True)],
            least=0.0,
            note="tokens of a completion; band: shortest to longest",
        ),
        curve("Cut off", "truncated_share", least=0.0, most=1.0, note="share of completions at the token limit"),
        curve(
            "No variance",
            "zero_variance_share",
            least=0.0,
            most=1.0,
            note="share of groups that were paid alike",
        ),
        curve(
            "Repeated", "duplicate_share", least=0.0, most=1.0, note="share of completions found again in their group"
        ),
        curve("KL from the base", "kl", note="nats a token"),
        curve("Entropy", "entropy", least=0.0, note="nats, of the next token"),
        curve("Loss", "loss"),
        curve("Gradient norm", "grad_norm", least=0.0, note="before clipping"),
        curve("Learning rate", "learning_rate", least=0.0),
        curve(
            "Seconds a step",
            "seconds",
            "total",
            other=_series(metrics, "seconds", "generation"),
            least=0.0,
            note="grey: of it drawing completions",
        ),
        curve("Completions a second", "completions_per_s", least=0.0),
        curve("GPU memory", "gpu_memory_gb", least=0.0, note="GB, peak so far"),
        curve(
            "Rollout engine against trainer",
            "logprob_diff_mean",
            least=0.0,
            note="mean difference of log-probabilities, looked at every few steps",
        ),
    ]


def _series(metrics: Sequence[Json], *path: str) -> Series:
    return [_number_at(line, path) for line in metrics]


def _number_at(value: Any, path: Sequence[str]) -> float | None:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _table(run: RunFiles) -> list[list[str]]:
    """Some steps as numbers, for those who would rather read."""
    metrics = run.metrics
    count = min(TABLE_ROWS, len(metrics))
    chosen = [metrics[place * (len(metrics) - 1) // max(1, count - 1)] for place in range(count)]
    columns = (
        "reward",
        "reward_std",
        "completion_tokens_mean",
        "truncated_share",
        "zero_variance_share",
        "kl",
        "entropy",
    )
    return [[str(m["step"]), *(_cell(m.get(name)) for name in columns)] for m in chosen]


def _cell(value: Any) -> str:
    return number(float(value)) if isinstance(value, int | float) else "–"


def _finding(run: RunFiles, data: Json) -> Json:
    query = data.get("rollouts") or {}
    rows = run.completions(query, SHOWN_WITH_FINDING)
    first, last = data.get("steps") or (0, 0)
    return {
        "name": plain(str(data["audit"]).replace("_", " "), 80),
        "message": plain(str(data.get("message", ""))),
        "steps": f"steps {first} to {last}",
        "values": [(plain(str(k).replace("_", " "), 60), _cell(v)) for k, v in (data.get("values") or {}).items()],
        "query": plain("&".join(f"{key}={value}" for key, value in query.items()), 300),
        "completions": [_completion(row, MAX_TEXT // 2) for row in rows],
    }


def _completion(row: Json, limit: int = MAX_TEXT) -> Json:
    rewards = {name.removeprefix("reward_"): row[name] for name in row if name.startswith("reward_")}
    total = rewards.pop("total", None)
    return {
        "step": row["step"],
        "prompt_id": plain(row["prompt_id"], 80),
        "prompt": plain(row["prompt"], limit // 2),
        "answer": plain(row["answer"], 200),
        "text": plain(row["completion"], limit),
        "total": _cell(total),
        "rewards": [(plain(name, 60), _cell(value)) for name, value in rewards.items()],
        "advantage": _cell(row["advantage"]),
        "tokens": row["completion_tokens"],
        "finish": "cut off" if row["finish_reason"] == "length" else "ended",
    }


def _samples(run: RunFiles) -> list[Json]:
    samples = (run.report.get("evaluation") or {}).get("samples", [])
    return [
        {name: plain(str(sample[name]), MAX_TEXT) for name in ("question", "answer", "before", "after")}
        for sample in samples[:10]
    ]


def _changed_settings(run: RunFiles) -> list[tuple[str, str, str]]:
    """Fields that are not the recipe's: field, value, the recipe's value."""
    return [
        (field, plain(json.dumps(value, ensure_ascii=False), 200), plain(json.dumps(usual, ensure_ascii=False), 200))
        for field, value, usual in _differences(run.spec, parse_spec({}).as_dict())
        if field not in ("name", "metadata", "schema_version")
    ]


def _differences(given: Any, usual: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(given, dict) and isinstance(usual, dict):
        found: list[tuple[str, Any, Any]] = []
        for name in (*usual, *(name for name in given if name not in usual)):
            here = f"{path}.{name}" if path else str(name)
            found += _differences(given.get(name), usual.get(name), here)
        return found
    return [] if given == usual else [(path, given, usual)]


def plain(text: str, limit: int = MAX_TEXT) -> str:
    """Text as it may stand in a page: cut, and without characters that are no text or turn its direction."""
    shown = "".join(c if c in "\n\t" or (c.isprintable() or c == "\u3000") else _shown(c) for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}… ({len(text) - limit:,} more characters)"


def _shown(character: str) -> str:
    return " " if character.isspace() else f"\\u{ord(character):04x}"


def _markup(drawing: str) -> Any:
    """Our own SVG, which the template must not escape."""
    return import_module("markupsafe").Markup(drawing)
