"""The content of the report page, as plain values for its template: verdict, curves, audits, completions, settings.

Owns the sentences about a run and how much of each text is shown. Invariant: no value is markup, except the SVG of
`charts`, which contains no text of a model or data set.
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
from grpo_core.estimates import GpuEstimate, estimate
from grpo_core.evaluation.paired_stats import SIGNIFICANCE, ends_of
from grpo_core.monitoring.audits import Ending
from grpo_core.reasons import FetchFailure
from grpo_core.report_page.charts import Curve, number, svg
from grpo_core.report_page.run_files import Json, RunFiles
from grpo_core.run_dir.metrics import Chart, Described, charts, short_names, watched
from grpo_core.spec import SpecError, parse_spec

MAX_TEXT: Final = 4_000
"""Characters of a completion that are shown."""
MAX_SPEC: Final = 60_000
SHOWN_WITH_FINDING: Final = 3
TABLE_ROWS: Final = 25
WARMING_UP: Final = 3
"""Steps at the start that compile and allocate; the median leaves them out."""
CLEAR_ERRORS: Final = 3.0
"""Standard errors beyond which a change of the reward is reported."""

_HEADLINES: Final = {
    (1, 1): ("good", "It learnt: more unseen questions are answered correctly, in the required format"),
    (1, 0): (
        "good",
        "More unseen questions are answered correctly in the required format, not clearly by their last number",
    ),
    (1, -1): ("open", "More answers are correct in the required format, and fewer by their last number"),
    (0, 1): ("open", "More answers are correct by their last number, but not in the required format"),
    (0, 0): ("open", "No significant change"),
    (0, -1): ("bad", "It got worse: fewer unseen questions are answered correctly"),
    (-1, 1): ("bad", "Fewer answers are correct in the required format, and more by their last number"),
    (-1, 0): ("bad", "It got worse: fewer unseen questions are answered correctly in the required format"),
    (-1, -1): ("bad", "It got worse: fewer unseen questions are answered correctly, in the required format"),
}
"""Tone and headline for the changes of strict and lenient accuracy."""
_FORMAT_HEADLINES: Final = {
    (1, 1): ("good", "It learnt the format, and more answers are right by their last number"),
    (1, 0): ("good", "It learnt the format; how many answers are right did not clearly change"),
    (1, -1): ("open", "It learnt the format, and fewer unseen questions are answered correctly"),
    (-1, 1): ("bad", "It lost the format, and more answers are right by their last number"),
    (-1, 0): ("bad", "It lost the format; how many answers are right did not clearly change"),
    (-1, -1): ("bad", "It lost the format, and fewer unseen questions are answered correctly"),
}
"""The same for format and lenient accuracy: the format is rewarded too, but is not the goal."""

_STAGES: Final = {"before": "for the base model", "start": "at the checkpoint", "after": "after"}
"""When each answer was given, of a job that starts from a checkpoint."""

Series = list[float | None]


def page_of(run: RunFiles) -> Json:
    """Everything the template reads."""
    findings, endings = run.findings, run.endings
    best, worst = run.extremes()
    return {
        "title": plain(run.spec.get("name") or run.spec.get("model", {}).get("name") or "A run"),
        "status": run.status,
        "facts": _facts(run),
        "verdict": verdict(run),
        "charts": _charts(run, findings),
        "table": _table(run),
        "columns": [short.english for _, short in watched()],
        "findings": [_finding(run, data, endings) for data in findings],
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
    """How the job ended: a headline and one or two sentences; `tone` is good, bad or open."""
    done, wanted = _last_step(run), run.spec.get("training", {}).get("steps", 0)
    if run.status == "failed":
        error = run.error or {}
        words = [plain(str(error.get("message", "It gave no reason."))), plain(str(error.get("hint") or ""))]
        headline = FetchFailure.sentence_of(error.get("code")) or f"It failed ({error.get('class', 'internal')})"
        return _said("bad", headline, [*words, f"{done} of {wanted} steps."])
    if run.status == "cancelled":
        return _said("open", "It was cancelled", [f"{done} of {wanted} steps were done.", _reward_sentence(run)])
    evaluation = run.report.get("evaluation")
    if run.status != "succeeded":
        return _said("open", "It has not finished", [f"{done} of {wanted} steps.", _reward_sentence(run)])
    trial = run.report.get("trial")
    if trial:
        return _tried(trial)
    if not evaluation:
        unknown = (
            "There were no held-out questions (evaluation.questions is 0): whether it answers unseen questions better "
            "was not measured."
        )
        return _said("open", _reward_headline(run), [_reward_sentence(run), unknown])
    return _compared(run, evaluation)


def _tried(trial: Json) -> Json:
    """The result of a trial, which trained nothing."""
    headlines = {
        "yes": ("good", "A trial: training would have something to learn from"),
        "slowly": ("open", "A trial: training would learn slowly"),
        "no": ("bad", "A trial: training would learn nothing"),
    }
    tone, headline = headlines.get(str(trial.get("will_learn")), ("open", "A trial"))
    return _said(tone, headline, [plain(str(trial.get("sentence", "")), 600), "The model was not changed."])


def _compared(run: RunFiles, evaluation: Json) -> Json:
    """The result of the evaluation: against the base model and, of a job from a checkpoint, first against that."""
    with_base = _compared_with(evaluation, "before")
    if "paired_start" not in evaluation:
        return {**with_base, "sentences": [*with_base["sentences"], *_best(evaluation)]}
    with_start, start = _compared_with(evaluation, "start"), run.spec.get("from_checkpoint") or {}
    return {
        **with_start,
        "headline": f"Compared with its checkpoint: {_small(with_start['headline'])}",
        "sentences": [
            f"It started from step {start.get('step')} of {plain(str(start.get('job')), 60)}.",
            *with_start["sentences"],
            f"Compared with the base model: {_small(with_base['headline'])}.",
            *with_base["sentences"],
            *_best(evaluation),
        ],
    }


def _small(headline: str) -> str:
    """A headline in the middle of a sentence."""
    return headline[:1].lower() + headline[1:]


def _compared_with(evaluation: Json, stage: str) -> Json:
    """The result against the answers of one stage."""
    paired = evaluation["paired_start" if stage == "start" else "paired"]
    if "metric" in paired:
        return _compared_by_metric(evaluation, paired["metric"], stage)
    strict = paired["strict"]
    low, high = strict["interval"]
    direction = _direction(strict)
    tone, headline = _headline(_direction(paired["format"]), direction, _direction(paired["lenient"]))
    counts = strict["counts"]
    sentences = [
        strict["verdict"],
        f"Of {evaluation['questions']} questions that were not trained on, {counts['gained']} were wrong before and "
        f"right after, {counts['lost']} right before and wrong after. The change is between {low * 100:+.1f} and "
        f"{high * 100:+.1f} points with 95 % confidence"
        + ("; this is unlikely to be chance." if direction else "; this may be chance."),
        f"With the last number anywhere in the text as the answer: {paired['lenient']['verdict']}",
        f"Right or wrong: {paired['format']['verdict']}",
    ]
    return {**_said(tone, headline, sentences), "bars": _bars(evaluation)}


def _best(evaluation: Json) -> list[str]:
    """What evaluations during training add to the verdict, which is of the last step."""
    points, best = evaluation.get("curve") or [], evaluation.get("best_step")
    stopped = evaluation.get("stopped") or {}
    sentences = [plain(str(stopped["message"]), 300)] if stopped else []
    found = next((point for point in points if point["step"] == best), None)
    if found is not None and best != points[-1]["step"]:
        sentences.append(
            f"The best of {len(points) - 1} evaluations was that of step {best}, {plain(str(found['metric']), 60)} "
            f"{found['value']:.3g}. It was chosen because it is the largest, so part of it is chance; its checkpoint "
            "is kept."
        )
    return sentences


def _compared_by_metric(evaluation: Json, own: Json, stage: str) -> Json:
    """The same for a job with graders, by the reward that decides."""
    name = plain(str(evaluation["metric"]), 60)
    tone, what = {1: ("good", "rose"), 0: ("open", "did not change clearly"), -1: ("bad", "fell")}[_direction(own)]
    before, after = evaluation[stage], evaluation["after"]
    when = _STAGES[stage] if "start" in evaluation else "before"
    means = [
        f"{plain(reward, 60)}: {value:.3g} {when}, {after['rewards'][reward]:.3g} after."
        for reward, value in before["rewards"].items()
        if reward in after["rewards"] and (value or after["rewards"][reward])
    ]
    return _said(tone, f"On unseen questions, {name} {what}", [plain(own["verdict"], 400), *means])


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
    """1 for a rise, -1 for a fall, 0 for a change that may be chance."""
    rise: float = comparison["difference"]
    return (rise > 0) - (rise < 0) if comparison["p_value"] < SIGNIFICANCE else 0


def _bars(evaluation: Json) -> list[Json]:
    """Shares right with their intervals, as widths of bars."""
    rows: list[Json] = []
    for reading, words in (("strict", "Right, in the format"), ("lenient", "Right, last number")):
        for stage in (stage for stage in ("before", "start", "after") if stage in evaluation):
            summary = evaluation[stage]
            low, high = summary[f"{reading}_interval"]
            share = summary[f"{reading}_accuracy"]
            rows.append(
                {
                    "label": f"{words}, {_STAGES[stage] if 'start' in evaluation else stage}",
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
        return "It ended before its first step"
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
        ("Median step", _step_time(run)),
        ("Peak GPU memory", _peak_memory(run)),
        ("Runs", str(runs) if runs > 1 else ""),
    ]
    return [(name, plain(str(value))) for name, value in facts if value]


def _step_time(run: RunFiles) -> str:
    seconds = [value for value in _series(run.metrics, "seconds", "total") if value is not None]
    if not seconds:
        return ""
    on = _estimate(run)
    return _against(f"{statistics.median(seconds[WARMING_UP:] or seconds):.3g} s", on, on and on.step_seconds)


def _peak_memory(run: RunFiles) -> str:
    peaks = [value for value in _series(run.metrics, "gpu_memory_gb") if value is not None]
    if not peaks:
        return ""
    on = _estimate(run)
    peak = None if on is None or on.peak_memory_bytes is None else on.peak_memory_bytes / 1e9
    return _against(f"{max(peaks):.1f} GB", on, peak)


def _against(measured: str, on: GpuEstimate | None, value: float | None) -> str:
    """A figure beside the one that was estimated before the job ran."""
    return measured if on is None or value is None else f"{measured} (estimate for one {on.gpu}: {value:.3g})"


def _estimate(run: RunFiles) -> GpuEstimate | None:
    """The estimate for the GPU that the job ran on; for the GPU of the dry run if that GPU is not known."""
    try:
        size = estimate(parse_spec(run.spec), devices=[run.report.get("device") or ""]) if run.spec else None
    except SpecError:
        return None  # of a newer release
    if size is None:
        return None
    on = [gpu for gpu in size.gpus if gpu.has_worker] or [gpu for gpu in size.gpus if gpu.gpu == size.gpu]
    return on[0] if on else None


def _runs(run: RunFiles) -> list[Json]:
    """The runs of a job that had more than one."""
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
    first, *others = _curves(run.metrics, marks)
    for curve in (first, *_evaluations(run), *others):
        if drawing := svg(curve):
            # The first is drawn in two widths, because a shrunk one cannot be read on a phone.
            wide = "" if shown else _markup(svg(curve, width=940, height=240))
            shown.append({"title": curve.title, "note": curve.note, "svg": _markup(drawing), "wide": wide})
    return shown


def _evaluations(run: RunFiles) -> list[Curve]:
    """The evaluations of the run with the best step marked; none where there are fewer than two."""
    evaluation = run.report.get("evaluation") or {}
    points, best = evaluation.get("curve") or [], evaluation.get("best_step")
    if len(points) < 2:
        return []
    what = {"strict_accuracy": "right and in the required format"}.get(points[0]["metric"], points[0]["metric"])
    marked = f"; dashed: the best step, {best}" if best is not None else ""
    return [
        Curve(
            title="Held-out questions",
            steps=[float(point["step"]) for point in points],
            values=[point["value"] for point in points],
            band=[tuple(point["interval"]) if point["interval"] else None for point in points],
            marks=[] if best is None else [best],
            note=f"{plain(str(what), 60)}, {points[0]['questions']} questions at each point; step 0 is the base model; "
            f"band: 95 % interval{marked}",
        )
    ]


def _curves(metrics: Sequence[Json], marks: Sequence[int]) -> list[Curve]:
    steps = [float(m["step"]) for m in metrics]
    curves: list[Curve] = []
    for one, chart, lines in charts():
        paths = {"": lines[0].path}
        if one.is_by_name:
            paths = {f": {plain(name, 60)}": (one.name, name) for m in metrics for name in m.get(one.name) or {}}
        curves += [
            Curve(
                title=f"{chart.english}{ending}",
                steps=steps,
                values=_series(metrics, *path),
                band=_band(metrics, one, chart),
                other=_series(metrics, *lines[-1].path) if len(lines) > 1 else (),
                least=one.metric.least,
                most=one.metric.most,
                marks=marks,
                note=_note(one, chart, lines),
            )
            for ending, path in paths.items()
        ]
    return curves


def _note(one: Described, chart: Chart, lines: Sequence[Described]) -> str:
    short = short_names()
    band = f"band: {' to '.join(short[edge].english for edge in chart.band)}" if chart.band else ""
    grey = f"grey: {short[lines[-1].name].english}" if len(lines) > 1 else ""
    return "; ".join(filter(None, (one.metric.sentence(), band, grey)))


def _band(metrics: Sequence[Json], one: Described, chart: Chart) -> list[tuple[float, float] | None]:
    """The edges of a chart's band; empty for one without."""
    edges = [_series(metrics, edge) for edge in chart.band]
    if len(edges) == 1:
        pairs = list(zip(_series(metrics, *one.path), edges[0], strict=True))
        return [None if m is None or w is None else (m - w, m + w) for m, w in pairs]
    return [None if a is None or b is None else (a, b) for a, b in zip(*edges, strict=True)]


def _series(metrics: Sequence[Json], *path: str) -> Series:
    return [_number_at(line, path) for line in metrics]


def _number_at(value: Any, path: Sequence[str]) -> float | None:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _table(run: RunFiles) -> list[list[str]]:
    """Some steps as a table."""
    metrics = run.metrics
    count = min(TABLE_ROWS, len(metrics))
    chosen = [metrics[place * (len(metrics) - 1) // max(1, count - 1)] for place in range(count)]
    return [[str(m["step"]), *(_cell(_number_at(m, one.path)) for one, _ in watched())] for m in chosen]


def _cell(value: Any) -> str:
    return number(float(value)) if isinstance(value, int | float) else "–"


def _finding(run: RunFiles, data: Json, endings: Sequence[Ending]) -> Json:
    query = data.get("rollouts") or {}
    rows = run.completions(query, SHOWN_WITH_FINDING)
    first, last = data.get("steps") or (0, 0)
    over = next((e for e in endings if e.audit == data["audit"] and e.steps[0] <= last <= e.steps[1]), None)
    if over is not None:
        first, last = over.steps
    return {
        "name": plain(str(data["audit"]).replace("_", " "), 80),
        "message": plain(over.message if over else str(data.get("message", ""))),
        "steps": f"steps {first} to {last}" + (", over" if over else ""),
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
    """Fields that differ from the recipe: field, value, the recipe's value."""
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
