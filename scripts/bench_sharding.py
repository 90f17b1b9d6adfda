"""Whether two GPUs train a model that is larger than either, and what that costs: Qwen2.5-32B's shape, random weights.

    PYTHONPATH=. python scripts/bench_sharding.py [--share 0.40] [--shapes 8x8] [--seconds 560] [--out DIR]
    PYTHONPATH=. python scripts/bench_sharding.py --cpu          # a tiny shape on two CPU ranks, to try the script
    PYTHONPATH=. python scripts/bench_sharding.py --table        # the plan of memory for 32B and 70B, without a GPU

Each process may use `--share` of its GPU: too little for all weights, enough for half of them. Random weights are made
on the GPUs. Every line of sharding.jsonl in DIR (default $OUT or .) is one finding, written as soon as it is there, and
the last one, `summary`, has the figures that matter. Parts, in this order, each with its limit of seconds:

- plan: bytes that the memory plan counts with, whole and shared out, and whether it refuses the whole model
- same: 4 layers, drawn and trained with whole and with shared weights: texts, log-probabilities and adapter bit by bit
- whole: what happens when one process makes all weights
- train: 64 layers shared out: seconds of gathering, drawing, updating; peak memory beside the plan

A part that hangs prints where each thread is (30 s before its limit), and is ended.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.bench_sitting import ENVIRONMENT

BEGAN = time.time()
PARTS = {"plan": 60, "same": 180, "whole": 60, "train": 300}
"""Each with its limit in seconds."""
ON_ALL_RANKS = ("same", "train")


def note(options: argparse.Namespace, **values: Any) -> None:
    line = json.dumps({"at_s": round(time.time() - BEGAN, 1), **values})
    print(line, flush=True)
    with (options.out / "sharding.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class Rank:
    """What a part works with: its GPU, the other ranks, and how it tells."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from grpo_core.engines.team import Team
        from grpo_core.ranks import ALONE
        from grpo_core.ranks import Rank as Number

        self.options, self.torch = options, torch
        self.device = torch.device("cpu") if options.cpu else torch.device("cuda", 0)
        self.dtype = torch.float32 if options.cpu else torch.bfloat16
        self.memory = 7 * 10**9
        if not options.cpu:
            torch.cuda.set_per_process_memory_fraction(options.share)
            self.memory = int(options.share * torch.cuda.get_device_properties(0).total_memory)
        number = ALONE
        if options.part in ON_ALL_RANKS:
            number = Number(options.rank, options.ranks, f"file://{options.out.absolute()}/meeting-{options.stamp}")
        self.team = Team(number, self.device)

    def architecture(self, layers: int) -> Any:
        from scripts.bench_native import LARGE, shape

        return shape(layers, self.options.cpu, LARGE)

    def weights(self, layers: int, *, shared: bool) -> Any:
        from scripts.bench_native import make_weights

        self.team.in_step = shared
        peers = self.team if shared else None
        return make_weights(self.architecture(layers), self.device, self.dtype, peers=peers)

    def say(self, **values: Any) -> None:
        if self.team.is_lead:
            note(self.options, part=self.options.part, **values)

    def peak(self) -> float:
        return 0.0 if self.options.cpu else round(self.torch.cuda.max_memory_allocated() / 1e9, 2)

    def held(self, layers: int, ranks: int) -> int:
        from grpo_core.engines.native.weights import matrix_bytes
        from scripts.bench_native import RANK

        return matrix_bytes(self.architecture(layers), ranks=ranks, dtype=self.dtype, spare_rank=RANK)


def spec_of(prompts: int) -> Any:
    from grpo_core.spec import parse_spec

    sampling = {"prompts_per_step": prompts, "generations": 8, "max_prompt_tokens": 160}
    return parse_spec({"engine": "native", "sampling": sampling})


def plan(rank: Rank) -> None:
    from grpo_core.engines.native.memory import require_room
    from grpo_core.errors import JobFailure

    for ranks in (1, rank.options.ranks):
        held, refused = rank.held(rank.options.layers, ranks), None
        try:
            architecture = rank.architecture(rank.options.layers)
            require_room(spec_of(8), architecture, memory=rank.memory, held=held, ranks=ranks)
        except JobFailure as failure:
            refused = failure.report.message
        rank.say(ranks=ranks, memory_gb=round(rank.memory / 1e9, 1), held_gb=round(held / 1e9, 2), refused=refused)


def step_on(rank: Rank, weights: Any, prompts: int, **plan: Any) -> Any:
    from scripts.bench_native import make_adapter
    from scripts.bench_sitting import Step

    adapter = make_adapter(weights.architecture, rank.device)
    return Step(weights, adapter, rank.team, prompts, rank.options, **plan)


def same(rank: Rank) -> None:
    """Two steps with whole and with shared weights, from the same adapter."""
    layers, torch = min(4, rank.options.layers), rank.torch
    found: list[Any] = []
    for shared in (False, True):
        weights = rank.weights(layers, shared=shared)
        step = step_on(rank, weights, 4)
        texts: list[Any] = []
        for _ in range(2):
            step.draw()
            texts.append([(one.tokens, one.logprobs) for one in step.drawn])
            step.update()
        found.append((texts, [leaf.detach().cpu() for leaf in step.adapter.leaves]))
        rank.say(shared=shared, peak_gb=rank.peak())
        del weights, step
    (texts, leaves), (others, learnt) = found
    rank.say(
        same_texts=[[t for t, _ in a] == [t for t, _ in b] for a, b in zip(texts, others, strict=True)],
        same_logprobs=texts == others,
        same_adapter=all(torch.equal(one, other) for one, other in zip(leaves, learnt, strict=True)),
        apart=max(float((one - other).abs().max()) for one, other in zip(leaves, learnt, strict=True)),
    )


def whole(rank: Rank) -> None:
    try:
        rank.weights(rank.options.layers, shared=False)
    except rank.torch.OutOfMemoryError as error:
        rank.say(whole="out of memory", message=str(error).splitlines()[0][:200])
    else:
        rank.say(whole="fits", peak_gb=rank.peak())


def train(rank: Rank) -> None:
    from grpo_core.engines.native.memory import plan_memory
    from scripts.bench_native import now

    options, torch = rank.options, rank.torch
    began = now()
    weights = rank.weights(options.layers, shared=True)
    rank.say(ready_s=round(now() - began, 1), held_gb=round(weights.nbytes / 1e9, 2), peak_gb=rank.peak())
    shards, gathering = weights.shards, []
    for _ in range(3):
        began = now()
        shards.accompany(1)
        gathering.append(now() - began)
    if options.eager:
        from grpo_core.engines.native.decode import Decoder

        Decoder._step_of = lambda self, bucket: lambda: self._step(bucket)  # noqa: SLF001
    received = rank.held(options.layers, 1) * (options.ranks - 1) / options.ranks
    rank.say(gather_s=round(min(gathering), 4), gather_gb_per_s=round(received / min(gathering) / 1e9, 1))
    figures: dict[str, Any] = {"gather_s": round(min(gathering), 4)}
    for name in options.shapes.split(","):
        prompts, _ = map(int, name.split("x"))
        cache, budget = plan_memory(
            spec_of(prompts),
            weights.architecture,
            memory=rank.memory,
            held=weights.nbytes,
            size=weights.dtype.itemsize,
            sparing=True,
        )
        step = step_on(rank, weights, prompts, cache_tokens=cache, budget=budget, sparing=True)
        planned = round(0.88 * rank.memory / 1e9, 1)
        rank.say(shape=name, cache_tokens=cache, budget_tokens=budget, planned_gb=planned)
        for number in range(options.steps + 1):
            times = [now()]
            for what in (step.draw, step.update):
                what()
                times.append(now())
            drawing, updating = times[1] - times[0], times[2] - times[1]
            figures[name] = {
                "draw_s": round(drawing, 3),
                "update_s": round(updating, 3),
                "completions_per_s": round(len(step.requests) / (drawing + updating), 2),
            }
            rank.say(shape=name, step=number, **figures[name], peak_gb=rank.peak(), planned_gb=planned)
        del step
    reserved = 0.0 if options.cpu else round(torch.cuda.max_memory_reserved() / 1e9, 2)
    cap = round(rank.memory / 1e9, 1)
    sizes = {"layers": options.layers, "ranks": options.ranks}
    rank.say(summary={**figures, "peak_gb": rank.peak(), "reserved_gb": reserved, "cap_gb": cap, **sizes})


def table() -> int:
    """Print what the plan of memory says of large models on several GPUs, for 32 x 8 completions of 200 tokens."""
    import torch
    from transformers import LlamaConfig

    from grpo_core.cost import GIB
    from grpo_core.engines.native.architecture import of_config
    from grpo_core.engines.native.memory import plan_memory, require_room
    from grpo_core.engines.native.weights import matrix_bytes
    from grpo_core.errors import JobFailure
    from scripts.bench_native import LARGE, RANK, shape

    seventy = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    print("| model | GPUs | weights on each | room beside them | completions at a time |\n|---|---|---|---|---|")
    for name, model in (("32B", shape(64, False, LARGE)), ("70B", of_config(seventy))):
        for gigabytes in (80, 141):
            for ranks in (1, 2, 4, 8):
                memory, spec = gigabytes * GIB, spec_of(32)
                held = matrix_bytes(model, ranks=ranks, dtype=torch.bfloat16, spare_rank=RANK)
                cells = [name, f"{ranks} × {gigabytes} GB", f"{held / 1e9:.1f} GB"]
                try:
                    require_room(spec, model, memory=memory, held=held, ranks=ranks)
                    cache, _ = plan_memory(spec, model, memory=memory, held=held, size=2, sparing=ranks > 1)
                    cells += [f"{(0.88 * memory - held) / 1e9:.0f} GB", str(min(256, ranks * (cache // 361)))]
                except JobFailure:
                    cells += ["none", "refused"]
                print("| " + " | ".join(cells) + " |")
    return 0


def run_part(options: argparse.Namespace) -> int:
    if not options.cpu:
        faulthandler.dump_traceback_later(PARTS[options.part] - 30, exit=False)
    try:
        rank = Rank(options)
        {"plan": plan, "same": same, "whole": whole, "train": train}[options.part](rank)
        rank.team.leave()
    except Exception as error:  # noqa: BLE001 - the next part is to be measured all the same
        traceback.print_exc()
        note(options, part=options.part, rank=options.rank, error=f"{type(error).__name__}: {error}"[:600])
        return 1
    return 0


def start(part: str, options: argparse.Namespace) -> int:
    """Run a part in as many processes as it has ranks, for as long as it may take."""
    left = options.seconds - (time.time() - BEGAN)
    limit = left if options.cpu else min(PARTS[part], left)
    if limit < 20:
        note(options, part=part, skipped=f"{left:.0f} s are left")
        return 0
    given = [f"--{name}={getattr(options, name)}" for name in ("ranks", "share", "layers", "shapes", "steps", "out")]
    given += [f"--part={part}", f"--stamp={os.getpid()}-{part}", f"--began={BEGAN}"]
    given += [flag for flag, on in (("--cpu", options.cpu), ("--eager", options.eager)) if on]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *given, f"--rank={rank}"],
            env={**ENVIRONMENT, **os.environ, **({} if options.cpu else {"CUDA_VISIBLE_DEVICES": str(rank)})},
        )
        for rank in range(options.ranks if part in ON_ALL_RANKS else 1)
    ]
    until = time.time() + limit
    while time.time() < until and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            until = min(until, time.time() + 5)
        time.sleep(0.2)
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    if any(code != 0 for code in codes):
        note(options, part=part, ended=codes, limit_s=round(limit))
    return sum(code != 0 for code in codes)


def main() -> int:
    global BEGAN  # parts count from the sitting's begin
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=560, help="no part begins or goes on after that")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.40, help="of a GPU's memory, for each process")
    parser.add_argument("--layers", type=int, default=0, help="64, or 5 with --cpu")
    parser.add_argument("--shapes", default="8x8", help="prompts x completions of a step")
    parser.add_argument("--steps", type=int, default=2, help="after a first one that compiles and captures")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the plan for large models, and end")
    parser.add_argument("--eager", action="store_true", help="decode without CUDA graphs")
    for name in ("part", "stamp"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=BEGAN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    BEGAN = options.began
    options.layers = options.layers or (5 if options.cpu else 64)
    if options.table:
        return table()
    options.out.mkdir(parents=True, exist_ok=True)  # the ranks meet there
    if options.part:
        return run_part(options)
    return sum(start(part, options) for part in options.parts.split(","))


if __name__ == "__main__":
    sys.exit(main())
