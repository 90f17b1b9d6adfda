"""What one short sitting on one or two GPUs measures of the native engine, most wanted first: Qwen2.5-7B's shape.

    PYTHONPATH=. python scripts/bench_sitting.py [--seconds 280] [--ranks 2] [--out DIR]
    PYTHONPATH=. python scripts/bench_sitting.py --cpu --ranks 2          # a tiny shape, to try the script to its end

Random weights are made on the GPU. Each line of results.jsonl in DIR (default $OUT or .) is one measurement, written as
soon as it is there; a part that fails writes its error and the next one begins. Parts run in separate processes:

- agreement: mean and largest difference of log-probabilities between the modes, in 16 and in 8 bits, and of gradients
- one: seconds a step and completions a second at 32 x 8 in 16 bits, on one GPU
- several: the same at 32 x 8 and, on N ranks, at 32 N x 8: drawing shared, gradients summed; how long each rank worked
- eight: 32 x 8 in 8 bits, with the peak of memory
- warm: seconds to import, to capture the first graph and to the first update, compiled before
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

BEGAN = time.time()
PARTS = ("one", "eight", "several", "warm")
LIMITS = {"one": 130, "eight": 130, "several": 130, "warm": 60}
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "OMP_NUM_THREADS": "4",
    "TOKENIZERS_PARALLELISM": "false",
}
COMPLETION = 200


def note(options: argparse.Namespace, **values: Any) -> None:
    line = json.dumps({"at_s": round(time.time() - BEGAN, 1), **values})
    print(line, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def make(options: argparse.Namespace, *, eight_bits: bool) -> tuple[Any, Any]:
    """Random weights and an adapter that is not zero."""
    import torch

    from scripts.bench_native import make_adapter, make_weights, shape

    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    architecture = shape(2 if options.cpu else 28, options.cpu)
    dtype = torch.float32 if options.cpu else torch.bfloat16
    return make_weights(architecture, device, dtype, eight_bits=eight_bits), make_adapter(architecture, device)


class Step:
    """A step at a shape as the engine's loop makes it: draw, share out, forward, backward, sum, clip, AdamW."""

    def __init__(
        self,
        weights: Any,
        adapter: Any,
        team: Any,
        prompts: int,
        options: argparse.Namespace,
        *,
        cache_tokens: int | None = None,
        budget: int | None = None,
        sparing: bool = False,
    ) -> None:
        """`budget`: the tokens of a pass; None: as many as fit for a model of 7B on a large GPU."""
        import torch

        from grpo_core.engines.completions import Request
        from grpo_core.engines.native.decode import Decoder
        from grpo_core.engines.native.packed import Packed
        from scripts.bench_native import BUDGET, PROMPT, RANK, texts

        self.weights, self.adapter, self.team = weights, adapter, team
        self.tokens = 8 if options.cpu else COMPLETION
        self.prompts = texts(prompts, 12 if options.cpu else PROMPT, weights.architecture.vocabulary, 7)
        self.requests = [Request(p, 1000 * at + n) for at, p in enumerate(self.prompts) for n in range(8)]
        self.decoder = Decoder(weights, rank=RANK, cache_tokens=cache_tokens)
        self.budget, self.sparing = budget or BUDGET, sparing
        self.packed = Packed(weights, compiled=not options.cpu)
        self.optimizer = torch.optim.AdamW(adapter.leaves, lr=1e-6, fused=not options.cpu)
        self.drawn: list[Any] = []

    def draw(self) -> None:
        self.decoder.set_adapter(self.adapter)
        self.drawn = self.team.draw(self.decoder, self.requests, tokens=self.tokens)

    def update(self) -> None:
        import torch

        from scripts.bench_native import parts_of

        groups = [sum(len(one.tokens) for one in self.drawn[at * 8 :][:8]) for at in range(len(self.prompts))]
        own = self.team.share(groups)
        mine = [self.prompts[at] for at in own]
        drawn = [one for at in own for one in self.drawn[at * 8 :][:8]]
        parts = parts_of(mine, drawn, self.weights.device, self.budget)
        self.weights.keep_step(len(parts), back=True)
        with self.team.working():
            for layout, tokens, targets, gains in parts:
                logprobs, _ = self.packed.logprobs(layout, tokens, targets, self.adapter, sparing=self.sparing)
                (-((logprobs - logprobs.detach()).exp() * gains).sum() / len(self.requests)).backward()
        gradients = [leaf.grad for leaf in self.adapter.leaves if leaf.grad is not None]
        self.team.sum(*gradients)
        torch.nn.utils.clip_grad_norm_(self.adapter.leaves, 0.1, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.team.agree(False, self.adapter.leaves)


def measure(step: Step, repeats: int) -> dict[str, Any]:
    import statistics

    import torch

    from scripts.bench_native import now

    seconds: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        began = now()
        step.draw()
        between = now()
        step.update()
        seconds.append((between - began, now() - between))
    draw, update = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    return {
        "draw_s": round(draw, 3),
        "update_s": round(update, 3),
        "step_s": round(draw + update, 3),
        "completions_per_s": round(len(step.requests) / (draw + update), 1),
        "worked_s": [round(value, 3) for value in step.team.worked],
        "first_s": [round(value, 1) for value in seconds[0]],
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if torch.cuda.is_available() else None,
    }


def agreement(weights: Any, adapter: Any, team: Any, options: argparse.Namespace) -> dict[str, Any]:
    """How far the decoder's log-probabilities are from the packed mode's on the same tokens."""
    import torch

    from scripts.bench_native import parts_of

    step = Step(weights, adapter, team, 2, options)
    step.draw()
    told = torch.tensor([value for one in step.drawn for value in one.logprobs])
    ((layout, tokens, targets, _),) = parts_of(step.prompts, step.drawn, weights.device)
    with torch.no_grad():
        scored = step.packed.logprobs(layout, tokens, targets, adapter)[0].float().cpu()
    apart = (told - scored).abs()
    return {
        "mean": round(float(apart.mean()), 4),
        "max": round(float(apart.max()), 3),
        "spread": round(float(scored.std()), 2),
    }


def run_part(options: argparse.Namespace) -> None:
    from grpo_core.ranks import ALONE, Rank

    rank = ALONE
    if options.part == "several":
        rank = Rank(options.rank, options.ranks, f"file://{options.out.absolute()}/meeting-{options.stamp}")
    began = time.time()
    import torch

    from grpo_core.engines.team import Team

    imported = time.time() - began
    device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
    team = Team(rank, device)
    say = (lambda **values: note(options, part=options.part, **values)) if team.is_lead else (lambda **_: None)
    repeats = 1 if options.cpu else 3
    if options.part == "warm":
        weights, adapter = make(options, eight_bits=False)
        step = Step(weights, adapter, team, 1 if not options.cpu else 2, options)
        made = time.time() - began
        step.draw()
        drawn = time.time() - began
        step.update()
        say(
            import_s=round(imported, 1),
            weights_s=round(made, 1),
            drawn_s=round(drawn, 1),
            updated_s=round(time.time() - began, 1),
        )
        return
    eight = options.part == "eight"
    weights, adapter = make(options, eight_bits=eight)
    say(ready_s=round(time.time() - began, 1), import_s=round(imported, 1))
    if options.part != "several":
        say(agreement=agreement(weights, adapter, team, options), bits=8 if eight else 16)
    packed = None
    for prompts in (32, 32 * rank.count) if options.part == "several" else (32,):
        step = Step(weights, adapter, team, 4 if options.cpu else prompts, options)
        packed = step.packed = packed or step.packed
        say(shape=f"{prompts}x8", ranks=rank.count, bits=8 if eight else 16, **measure(step, repeats))
    team.leave()


def start(parts: list[str], options: argparse.Namespace) -> int:
    """Run parts side by side, each on a separate GPU or on all, for as long as the longest may take."""
    left = options.seconds - (time.time() - BEGAN)
    limit = left if options.cpu else min(max(LIMITS[part] for part in parts), left)
    if limit < 15:
        note(options, parts=parts, skipped=f"{left:.0f} s are left")
        return 0
    common = [sys.executable, __file__, "--ranks", str(options.ranks), "--out", str(options.out)]
    common += ["--stamp", str(os.getpid()), "--began", str(BEGAN), *(["--cpu"] if options.cpu else [])]
    seats = (
        [(parts[0], rank) for rank in range(options.ranks)] if parts == ["several"] else [(part, 0) for part in parts]
    )
    processes = [
        subprocess.Popen(
            [*common, "--part", part, "--rank", str(rank)],
            env={**ENVIRONMENT, **os.environ, **({} if options.cpu else {"CUDA_VISIBLE_DEVICES": str(card)})},
        )
        for card, (part, rank) in enumerate(seats)
    ]
    until = time.time() + limit
    while time.time() < until and any(process.poll() is None for process in processes):
        if parts == ["several"] and any(process.poll() for process in processes):
            time.sleep(3)
            break
        time.sleep(0.2)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    if any(codes) or None in codes:
        note(options, parts=parts, ended=codes, limit_s=round(limit))
    return sum(code != 0 for code in codes)


def main() -> int:
    global BEGAN  # parts count from the sitting's begin
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=280, help="no part begins or goes on after that")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--cpu", action="store_true")
    for name in ("part", "stamp"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=BEGAN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    BEGAN = options.began
    options.out.mkdir(parents=True, exist_ok=True)  # the ranks meet there
    if options.part:
        try:
            run_part(options)
        except Exception as error:  # noqa: BLE001 - the next part is to be measured all the same
            traceback.print_exc()
            note(options, part=options.part, rank=options.rank, error=f"{type(error).__name__}: {error}"[:600])
            return 1
        return 0
    asked = options.parts.split(",")
    rounds = [["one"], ["eight"], ["warm"]] if options.ranks == 1 else [["one", "eight"], ["several"], ["warm"]]
    wanted = [[part for part in parts if part in asked] for parts in rounds]
    return sum(start(parts, options) for parts in wanted if parts)


if __name__ == "__main__":
    sys.exit(main())
