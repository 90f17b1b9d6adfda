"""`grpo compare`: two jobs side by side, and whether they can be compared; any other number as a table.

Owns what makes two results comparable, and the test of their difference. Invariant: it shows no difference in accuracy
for jobs with different questions.
"""

from __future__ import annotations

import math
import statistics
from json import dumps
from typing import Any

from grpo_client.cli.groups import say_table
from grpo_client.cli.output import EXIT_REFUSED, AsJson, CommandError, connected, print_json, say
from grpo_client.cli.text import count, printable, sparkline

Json = dict[str, Any]

MAX_STEPS = 10
"""Logged steps in a first or last window, at most a fifth of all; as in the service's own reports."""
_NO_SETTINGS = ("name", "metadata", "schema_version")
_SAME_QUESTIONS = ("source", "dataset", "subset", "revision", "question_column", "answer_column")
_SAME_ASKING = ("system_prompt", "examples")


def compare(*job_ids: str, group: str | None = None, json: AsJson = False) -> None:
    """Compare jobs.

    Two: settings that differ, rewards side by side, final results with intervals, and whether they can be compared at
    all. More, or a group: a table of their settings, with mean and spread over jobs that differ by the seed only.

    Parameters
    ----------
    group
        Compare the jobs of this group.
    """
    if bool(job_ids) == bool(group) or len(job_ids) == 1:
        raise CommandError("Name two jobs or more, or --group and a group.", EXIT_REFUSED)
    if group or len(job_ids) > 2:
        with connected() as client:
            table = client.group(group) if group else client.compare(job_ids)
        if json:
            print_json(table)
        else:
            say_table(table)
        return
    a, b = list(job_ids)
    with connected() as client:
        jobs = [client.get(job_id).raw for job_id in (a, b)]
        metrics = [[step.raw for step in client.metrics(job_id)] for job_id in (a, b)]
        events = [[event.raw for event in client.events(job_id, types=["evaluation"])] for job_id in (a, b)]
    found = comparison(jobs, metrics, [_evaluation(each) for each in events])
    if json:
        print_json(found)
        return
    _say_jobs(jobs)
    _say_differences(found["differences"])
    for caution in found["cautions"]:
        say(f"Careful: {caution}")
    _say_rewards(metrics)
    _say_results(found)


def comparison(jobs: list[Json], metrics: list[list[Json]], evaluations: list[Json | None]) -> Json:
    """The whole comparison of two jobs."""
    specs = [job["spec"] for job in jobs]
    reasons = _why_not(specs, evaluations)
    return {
        "jobs": [{"id": job["id"], "name": job["name"], "status": job["status"], "step": job["step"]} for job in jobs],
        "differences": [
            {"field": field, "a": a, "b": b} for field, a, b in differences(*specs) if field not in _NO_SETTINGS
        ],
        "cautions": _cautions(jobs),
        "rewards": [_ends(steps) for steps in metrics],
        "comparable": not reasons,
        "reasons": reasons,
        "evaluations": evaluations,
        "difference": None if reasons else _difference(evaluations),
    }


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The fields that differ, each with both values."""
    if isinstance(a, dict) and isinstance(b, dict) and path not in _NO_SETTINGS:
        names = dict.fromkeys((*a, *b))
        found = (differences(a.get(name), b.get(name), f"{path}.{name}" if path else str(name)) for name in names)
        return [item for part in found for item in part]
    return [] if a == b else [(path, a, b)]


def _evaluation(events: list[Json]) -> Json | None:
    """The summaries before and after training, if the job has both."""
    stages = {event["data"].get("stage"): event["data"] for event in events}
    if "before" not in stages or "paired" not in stages.get("after", {}):
        return None
    return {"before": stages["before"], "after": stages["after"], "change": stages["after"]["paired"]["strict"]}


def _why_not(specs: list[Json], evaluations: list[Json | None]) -> list[str]:
    """Why the results on held-out questions cannot be compared; empty if they can."""
    if any(found is None for found in evaluations):
        missing = [side for side, found in zip("AB", evaluations, strict=True) if found is None]
        who = f"{missing[0]} has" if len(missing) == 1 else "A and B have"
        return [f"{who} no answers to held-out questions, before and after (evaluation.questions)."]
    a, b = specs
    reasons = [f"data.{name} differs." for name in _SAME_QUESTIONS if a["data"][name] != b["data"][name]]
    if a["evaluation"]["questions"] != b["evaluation"]["questions"] or _held_out(a) != _held_out(b):
        reasons.append(
            "Other questions were held out (evaluation.questions, evaluation.split or data.max_rows differs)."
        )
    counts = [found["after"]["questions"] for found in evaluations if found is not None]
    if not reasons and counts[0] != counts[1]:
        reasons.append(
            f"A was asked {count(counts[0], 'question')} and B {counts[1]}: the data set or the tokenizer differs."
        )
    return reasons


def _held_out(spec: Json) -> tuple[Any, ...]:
    """The settings that decide which questions are held out."""
    data, evaluation = spec["data"], spec["evaluation"]
    apart = data["source"] == "hub" and evaluation["split"] != data["split"]
    return ("split", evaluation["split"]) if apart else ("last rows", data["split"], data["max_rows"])


def _cautions(jobs: list[Json]) -> list[str]:
    """What to know before comparing the curves."""
    a, b = (job["spec"] for job in jobs)
    found = [f"{job['id']} is {job['status']}." for job in jobs if job["status"] != "succeeded"]
    if a["rewards"] != b["rewards"]:
        found.append("The rewards differ, so totals are on different scales: compare the functions one by one.")
    if a["model"]["name"] != b["model"]["name"] or a["model"]["revision"] != b["model"]["revision"]:
        found.append("The base models differ: read each change from its own base.")
    if any(a["data"][name] != b["data"][name] for name in _SAME_ASKING):
        found.append("The prompts differ (data.system_prompt or data.examples).")
    if a["evaluation"]["max_completion_tokens"] != b["evaluation"]["max_completion_tokens"]:
        found.append("The length limits of answers differ (evaluation.max_completion_tokens).")
    if a["training"]["seed"] == b["training"]["seed"] and not found and not _differ(a, b):
        found.append("They are the same job twice: what differs is chance, or the machine.")
    return found


def _differ(a: Json, b: Json) -> bool:
    return any(field not in _NO_SETTINGS for field, _, _ in differences(a, b))


def _difference(evaluations: list[Json | None]) -> Json:
    """B minus A of strict accuracy after training, with the 95 % interval as of two independent samples.

    Newcombe's method 10 from the two Wilson intervals. The questions are the same, and this does not use the pairs of
    answers, so the interval is wider than necessary.
    """
    a, b = (found["after"] for found in evaluations if found is not None)
    share_a, share_b = a["strict_accuracy"], b["strict_accuracy"]
    (low_a, high_a), (low_b, high_b) = a["strict_interval"], b["strict_interval"]
    by = share_b - share_a
    low = by - math.hypot(share_b - low_b, high_a - share_a)
    high = by + math.hypot(high_b - share_b, share_a - low_a)
    return {"by": by, "interval": [low, high], "clear": low > 0 or high < 0}


def _ends(metrics: list[Json]) -> Json:
    """Mean rewards over the first and the last steps, by name."""
    return {name: [_mean(values, first=True), _mean(values)] for name, values in _series(metrics).items()}


def _series(metrics: list[Json]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for step in metrics:
        for name, value in {"total": step.get("reward"), **(step.get("rewards") or {})}.items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(float(value))
    return found


def _mean(values: list[float], *, first: bool = False) -> float:
    window = max(1, min(MAX_STEPS, len(values) // 5))
    return statistics.fmean(values[:window] if first else values[-window:])


def _say_jobs(jobs: list[Json]) -> None:
    for side, job in zip("AB", jobs, strict=True):
        say(f"{side}  {job['id']}  {job['status']}  {job['step']}/{job['total_steps']}  {job['name'] or ''}".rstrip())


def _say_differences(found: list[Json]) -> None:
    if not found:
        say("\nNo setting differs.")
        return
    width = max(len(item["field"]) for item in found)
    say(f"\n{'setting':<{width}}  {'A':<24}  B")
    for item in found:
        say(f"{item['field']:<{width}}  {_short(item['a']):<24}  {_short(item['b'])}")


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = printable(value if isinstance(value, str) else dumps(value, ensure_ascii=False))
    return text if len(text) <= 48 else text[:47] + "…"


def _say_rewards(metrics: list[list[Json]]) -> None:
    a, b = (_series(steps) for steps in metrics)
    names = dict.fromkeys((*a, *b))
    if not names:
        return
    width = max(len(printable(name)) for name in ("reward", *names))
    say(f"\n{'reward':<{width}}  {'':1} {'first':>8} {'last':>8}  all steps")
    for name in names:
        for side, series in (("A", a), ("B", b)):
            say(f"{printable(name) if side == 'A' else '':<{width}}  {side} {_reward_row(series.get(name, []))}")
    say(f"first, last: the mean over the first and the last fifth of the logged steps, 1 to {MAX_STEPS} of them.")


def _reward_row(values: list[float]) -> str:
    if not values:
        return f"{'-':>8} {'-':>8}"
    return f"{_mean(values, first=True):8.3f} {_mean(values):8.3f}  {sparkline(values, 48)}"


def _say_results(found: Json) -> None:
    say("\nUnseen questions, strictly right after training")
    for side, evaluation in zip("AB", found["evaluations"], strict=True):
        if evaluation is None:
            say(f"{side}  not measured")
            continue
        after, change = evaluation["after"], evaluation["change"]
        low, high = after["strict_interval"]
        say(
            f"{side}  {after['strict_accuracy']:.1%} ({low:.1%} to {high:.1%}) of {after['questions']}; "
            f"{change['difference'] * 100:+.1f} points from its base, p {change['p_value']:.3g}"
        )
    if not found["comparable"]:
        say("Not comparable: " + " ".join(found["reasons"]))
        return
    by, (low, high) = found["difference"]["by"], found["difference"]["interval"]
    words = "clearly different" if found["difference"]["clear"] else "no difference that could not be chance"
    say(f"B minus A: {by * 100:+.1f} points, 95 % interval {low * 100:+.1f} to {high * 100:+.1f}: {words}.")
