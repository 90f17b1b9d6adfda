"""How fast the native engine's two modes are on this GPU, and how far apart: Qwen2.5-7B's shape, random weights.

    PYTHONPATH=. python scripts/bench_native.py [--shapes 1x6,32x8] [--layers 28] [--no-compile] [--cpu]

Prompts of 160 tokens, completions of 200, an adapter of rank 32 that is not zero. One JSON line a measurement; a step
is drawing plus update, which is forward, backward and AdamW, and for one prompt also the base's pass for the KL term.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from grpo_core.engines.native.adapter import Adapter
from grpo_core.engines.native.architecture import Architecture
from grpo_core.engines.native.decode import Decoder, Drawn, Request
from grpo_core.engines.native.layout import Group, lay_out, parts_within
from grpo_core.engines.native.packed import Packed
from grpo_core.engines.native.weights import Weights, empty_weights
from scripts.random_run import biases, fill, shape_of

PROMPT, COMPLETION, RANK = 160, 200, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BUDGET = 14400


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def make_weights(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> Weights:
    spare = RANK if device.type == "cuda" else 0
    weights = empty_weights(architecture, biases(architecture), device=device, dtype=dtype, spare_rank=spare)
    fill(weights)
    return weights


def make_adapter(architecture: Architecture, device: torch.device) -> Adapter:
    adapter = Adapter(architecture, rank=RANK, scale=1.0, targets=TARGETS, device=device)
    generator = torch.Generator(device).manual_seed(1)
    for layer in range(architecture.layers):
        for name, view in adapter.named(layer).items():
            view.normal_(0, 0.01 if "lora_B" in name else view.shape[1] ** -0.5, generator=generator)
    return adapter


def texts(count: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocabulary, (count, length), generator=generator).tolist()


Part = tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]


def parts_of(prompts: list[list[int]], drawn: list[Drawn], device: torch.device) -> list[Part]:
    size = len(drawn) // len(prompts)
    by_prompt = [[one.tokens for one in drawn[at * size :][:size]] for at in range(len(prompts))]
    groups = [Group(len(p), [len(c) for c in cs]) for p, cs in zip(prompts, by_prompt, strict=True)]
    generator = torch.Generator().manual_seed(3)
    parts: list[Part] = []
    for run in parts_within(groups, BUDGET):
        tokens = [t for at in run for text in (prompts[at], *by_prompt[at]) for t in text]
        targets = [t for at in run for text in by_prompt[at] for t in text]
        gains = torch.randn(len(targets), generator=generator)
        ids = (torch.tensor(tokens, device=device), torch.tensor(targets, device=device), gains.to(device))
        parts.append((lay_out([groups[at] for at in run]).to(device), *ids))
    return parts


def timed(what: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """The first time and the median of the others."""
    seconds: list[float] = []
    for _ in range(repeats + 1):
        began = now()
        what()
        seconds.append(now() - began)
    return seconds[0], statistics.median(seconds[1:])


def measure(prompts: int, size: int, weights: Weights, adapter: Adapter, compiled: bool, repeats: int) -> None:
    device, architecture = weights.device, weights.architecture
    asked = texts(prompts, PROMPT, architecture.vocabulary, 7)
    requests = [Request(p, 1000 * at + n) for at, p in enumerate(asked) for n in range(size)]
    decoder = Decoder(weights)
    drawn: list[Drawn] = []

    def draw() -> None:
        decoder.set_adapter(adapter)
        drawn[:] = decoder.generate(requests, tokens=COMPLETION)

    first_draw, drawing = timed(draw, repeats)
    again = [one.tokens for one in drawn]
    draw()
    parts, same = parts_of(asked, drawn, device), [one.tokens for one in drawn] == again
    optimizer = torch.optim.AdamW(adapter.leaves, lr=1e-6, fused=device.type == "cuda")
    kl = prompts == 1
    row: dict[str, Any] = {
        "shape": f"{prompts}x{size}",
        "draw_s": round(drawing, 3),
        "first_draw_s": round(first_draw, 2),
    }
    for way in (False, True) if compiled else (False,):
        packed = Packed(weights, compiled=way)

        def update(packed: Packed = packed) -> None:
            for layout, tokens, targets, gains in parts:
                if kl:
                    with torch.no_grad():
                        packed.logprobs(layout, tokens, targets, None)
                logprobs, _ = packed.logprobs(layout, tokens, targets, adapter)
                (-((logprobs - logprobs.detach()).exp() * gains).sum() / len(requests)).backward()
            torch.nn.utils.clip_grad_norm_(adapter.leaves, 0.1, foreach=True)
            optimizer.step()
            optimizer.zero_grad()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, seconds = timed(update, repeats)
        row["compiled" if way else "eager"] = {
            "update_s": round(seconds, 3),
            "first_update_s": round(first, 2),
            "completions_per_s": round(len(requests) / (drawing + seconds), 1),
            "step_s": round(drawing + seconds, 3),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None,
        }
    say(**row, same_text_again=same, parts=len(parts))


def agree(architecture: Architecture, device: torch.device) -> None:
    """Mean and largest difference of log-probabilities between the modes in 16 bits, beside what 16 bits cost."""
    half = make_weights(architecture, device, torch.bfloat16)
    adapter = make_adapter(architecture, device)
    decoder = Decoder(half)
    decoder.set_adapter(adapter)
    asked = texts(2, PROMPT, architecture.vocabulary, 9)
    drawn = decoder.generate([Request(p, n) for p in asked for n in range(4)], tokens=COMPLETION)
    told = torch.tensor([value for one in drawn for value in one.logprobs], device=device)
    exact = make_weights(architecture, device, torch.bfloat16)
    for name in ("embedding", "head", "norm"):
        setattr(exact, name, getattr(exact, name).float())
    for layer in exact.layers:
        layer.input_norm, layer.output_norm = layer.input_norm.float(), layer.output_norm.float()
        for linear in layer.linears.values():
            linear.stored = linear.stored.float()
            linear.bias = None if linear.bias is None else linear.bias.float()
    scores: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for weights in (half, half, exact):
        ((layout, tokens, targets, gains),) = parts_of(asked, drawn, device)
        logprobs, _ = Packed(weights).logprobs(layout, tokens, targets, adapter)
        (logprobs * gains).sum().backward()
        scores.append(logprobs.detach())
        gradients.append(torch.cat([leaf.grad for leaf in adapter.leaves if leaf.grad is not None]))
        for leaf in adapter.leaves:
            leaf.grad = None
    one, again, wide = scores
    gap = lambda a, b: [round(float(f((a - b).abs())), 4) for f in (torch.mean, torch.max)]  # noqa: E731
    say(
        agreement={"decode_packed": gap(told, one), "packed_exact": gap(one, wide), "decode_exact": gap(told, wide)},
        gradient_relative_to_exact=round(float((gradients[0] - gradients[2]).norm() / gradients[2].norm()), 4),
        same_bits_twice=bool(torch.equal(one, again) and torch.equal(gradients[0], gradients[1])),
        layers=architecture.layers,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="1x6,32x8")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-agreement", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="a tiny shape, to try the script")
    options = parser.parse_args()
    began = time.perf_counter()
    device, name = torch.device("cpu" if options.cpu else "cuda"), "tiny" if options.cpu else "qwen7b"
    say(torch=torch.__version__, card="cpu" if options.cpu else torch.cuda.get_device_name())
    if not options.no_agreement:
        agree(shape_of(name, num_hidden_layers=min(4, options.layers)), device)
    architecture = shape_of(name, num_hidden_layers=options.layers)
    weights = make_weights(architecture, device, torch.float32 if options.cpu else torch.bfloat16)
    adapter = make_adapter(architecture, device)
    say(ready_s=round(now() - began, 1))
    for pair in options.shapes.split(","):
        prompts, size = map(int, pair.split("x"))
        measure(prompts, size, weights, adapter, not options.no_compile and not options.cpu, options.repeats)


if __name__ == "__main__":
    main()
