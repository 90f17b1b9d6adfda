"""What graders cost a step, on this machine: `math` on answers of each form and on hostile ones, and `python` graders.

    python scripts/bench_graders.py [--prompts 32]          # 256: a step of eight GPUs

Prints a JSON line for each kind of step: seconds on the clock, and processor seconds of this process and the graders'
together, each of the quickest of a few steps. `tests/integration/test_grading_speed.py` states the limits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_core.grading import Graded, Grading, Payment
from grpo_core.spec import parse_spec

PROMPTS, GROUP = 32, 8
ROWS = PROMPTS * GROUP
STEPS = 4
HOSTILE_SECONDS = 3.0
"""`limits.step_seconds` of the hostile steps."""

Pair = tuple[str, str]
"""A completion and its reference."""


@dataclass(frozen=True)
class Cost:
    """What a step of one kind costs."""

    kind: str
    seconds: float
    cpu_seconds: float
    right: int
    """Completions of the last step that scored 1."""
    failed: int
    """Completions of the last step with an error."""


ORDINARY: dict[str, Callable[[int, int, int], Pair]] = {
    "numbers": lambda step, n, k: (f"<answer>{8 * n + k + step}个</answer>", str(8 * n + step)),
    "surds": lambda step, n, k: (
        f"\\boxed{{\\frac{{{2 * n + 2}}}{{{2 * (n + step) + 6 + 2 * k}}}\\sqrt{{3}}}}",
        f"\\frac{{{n + 1}\\sqrt{{3}}}}{{{n + step + 3}}}",
    ),
    "polynomials": lambda step, n, k: (f"\\boxed{{(x+{n + k})(x+{step})}}", f"x^2+{n + step}x+{n * step}"),
    "equations": lambda step, n, k: (f"\\boxed{{y={n + k + 2}x+{step}}}", f"y={n + 2}x+{step}"),
    "tuples": lambda step, n, k: (
        f"\\boxed{{({n + k},\\frac{{{step}}}{{{n + 2}}})}}",
        f"({n},\\frac{{{step}}}{{{n + 2}}})",
    ),
    "functions": lambda step, n, k: (
        f"\\boxed{{\\sin({n + k + 2}x)+\\log({step + 2})}}",
        f"\\log({step + 2})+\\sin({n + 2}x)",
    ),
    "prose": lambda step, n, k: (
        f"We add {n} and {k}, so the total comes to {n + k + step} in the end, as was said.\nThat is all.",
        str(n + step),
    ),
}
"""Each needs the step, the prompt and the number in its group; the first of a group is right."""

_HANGS = (
    *("{n}^{{9^{{9^9}}}}", "10^{{10^{{1{n}}}}}", "1000000{n}!", "\\sum_{{k=1}}^{{1000000{n}}} k", "2^{{2^{{4{n}}}}}"),
    *("{n}((((((((((((((((((((((((((((((", "\\binom{{10000000{n}}}{{5000000}}", "\\sqrt{{\\sqrt{{{n}^{{99999999}}}}}}"),
    *("\\prod_{{k=1}}^{{100000{n}}} (x+k)", "(x+y+z+{n})^{{1000}}", "\\int_0^{n} e^{{\\sin(x^x)}} dx"),
    "\\frac{{\\frac{{\\frac{{\\frac{{{n}",
)


def hostile(step: int, n: int, k: int) -> Pair:
    """A completion that keeps a verifier busy; the last of each group is an ordinary one that is right."""
    if k == GROUP - 1:
        return "\\boxed{\\sin(x)}", "\\sin(x)"
    number = GROUP * n + k
    return f"\\boxed{{{_HANGS[number % len(_HANGS)].format(n=10 * number + step)}}}", "\\sin(x)"


def math_costs(kinds: Sequence[str] = tuple(ORDINARY)) -> Iterator[Cost]:
    """Steps of ordinary completions, graded by one `math` grader, no answer of which was seen before."""
    grader = {"type": "math", "input": "{{sample.output_text}}", "reference": "{{item.gold}}"}
    with closing(_grading({"math": grader}, {})) as grading:
        for kind in kinds:
            yield _cost(kind, grading, [_pairs(ORDINARY[kind], step) for step in range(1, STEPS + 1)])


def hostile_cost() -> Cost:
    """One step of completions that hang."""
    grader = {"type": "math", "input": "{{sample.output_text}}", "reference": "{{item.gold}}"}
    limits = {"math": {"step_seconds": HOSTILE_SECONDS, "row_seconds": 2.0}}
    with closing(_grading({"math": grader}, limits)) as grading:
        return _cost("hostile", grading, [_pairs(hostile, 0)])


def python_cost(graders: int = 3) -> Cost:
    """Steps of completions of 800 characters, graded by this number of `python` graders."""
    source = "def grade(sample, item):\n    return float(len(sample['output_text']) > 700 and item['gold'] != '{n}')"
    models = {f"g{n}": {"type": "python", "source": source.replace("{n}", f"a{n}")} for n in range(graders)}
    letters = random.Random(0)  # noqa: S311 - the texts of a measurement

    def pair(_step: int, n: int, k: int) -> Pair:
        return "".join(letters.choices("abcdefghij 01\n", k=800)), f"{n}/{k}"

    with closing(_grading(models, {})) as grading:
        return _cost(f"{graders} python graders", grading, [_pairs(pair, step) for step in range(3 * STEPS)])


def _grading(graders: dict[str, Any], limits: dict[str, Any]) -> Grading:
    spec = {
        "rewards": {"graders": graders, "limits": limits, "on_error": {"max_share": 1.0}},
        "sampling": {"prompts_per_step": PROMPTS, "generations": GROUP},
    }
    return Grading(parse_spec(spec), {})


def _pairs(make: Callable[[int, int, int], Pair], step: int) -> list[Pair]:
    return [make(step, n, k) for n in range(PROMPTS) for k in range(GROUP)]


def _cost(kind: str, grading: Grading, steps: Sequence[Sequence[Pair]]) -> Cost:
    seconds: list[float] = []
    cpu: list[float] = []
    payments: list[Payment] = []
    for number, pairs in enumerate(steps):
        rows = [
            Graded(text=text, answer=gold, item={"gold": gold}, prompt_id=str(at // GROUP), number=at % GROUP)
            for at, (text, gold) in enumerate(pairs)
        ]
        of_graders, own_cpu, began = _cpu_seconds_below(), time.process_time(), time.perf_counter()
        payments = grading.pay(rows, step=number)
        seconds.append(time.perf_counter() - began)
        own_cpu = time.process_time() - own_cpu
        cpu.append(own_cpu + _cpu_seconds_below() - of_graders)
    grader = next(name for name in grading.names if name in ("math", "g0"))
    return Cost(
        kind=kind,
        seconds=round(min(seconds), 4),
        cpu_seconds=round(min(cpu), 4),
        right=sum(payment.rewards[grader] == 1.0 for payment in payments),
        failed=sum(bool(payment.errors) for payment in payments),
    )


def _cpu_seconds_below() -> float:
    """Of all processes below this one that are alive: those that were killed for a hostile answer are left out."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            spent[int(folder.name)] = int((folder / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue
    total = 0.0
    for process, seconds in spent.items():
        at = parents[process]
        while at in parents and at != os.getpid():
            at = parents[at]
        total += seconds if at == os.getpid() else 0.0
    return total


def main() -> None:
    """Print every cost."""
    global PROMPTS  # steps are made from it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help=f"of a step, each with {GROUP} completions")
    PROMPTS = parser.parse_args().prompts
    for cost in (*math_costs(), hostile_cost(), python_cost()):
        print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
