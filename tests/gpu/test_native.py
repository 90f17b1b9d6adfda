"""The native engine's kernels against their plain twins, on one CUDA GPU; skipped without one.

Weights are random and in 16 bits; what rounding may cost is measured beside, against the same model in 32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64}),
    "qwen3": ("Qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}),
    "llama": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}),
}
RANK, TARGETS = 8, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CUDA = torch.device("cuda")


def make(family: str, *, eight_bits: bool = False) -> tuple[Any, Any]:
    """Weights with room for the adapter's rows, and an adapter that is not zero."""
    import transformers

    from grpo_core.engines.native.adapter import Adapter
    from grpo_core.engines.native.architecture import of_config
    from grpo_core.engines.native.fused import padded_rank
    from grpo_core.engines.native.weights import SCALES, empty_weights, fill

    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=896, intermediate_size=1792, num_hidden_layers=3, vocab_size=5000, **sizes
    )
    architecture = of_config(config)
    stock = getattr(transformers, f"{name}ForCausalLM")(config)
    weights = empty_weights(
        architecture,
        stock.state_dict().keys(),
        device=CUDA,
        dtype=torch.bfloat16,
        spare_rank=padded_rank(RANK),
        eight_bits=eight_bits,
    )
    generator, named = torch.Generator(CUDA).manual_seed(0), weights.named()
    for key, tensor in named.items():
        if "norm" in key:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif not key.endswith(SCALES):
            drawn = torch.empty(tensor.shape, device=CUDA, dtype=torch.bfloat16)
            fill(named, key, drawn.normal_(0, 0.05, generator=generator))
    adapter = Adapter(architecture, rank=RANK, scale=1.5, targets=TARGETS, device=CUDA)
    for layer in range(architecture.layers):
        for view in adapter.named(layer).values():
            view.normal_(0, 0.05, generator=generator)
    return weights, adapter


def requests(rows: int, length: int = 70) -> list[Any]:
    from grpo_core.engines.native.decode import Request

    generator = torch.Generator().manual_seed(rows)
    prompts = torch.randint(1, 5000, (rows, length), generator=generator).tolist()
    return [Request(prompt[: 3 + 7 * at % length], 11 * at) for at, prompt in enumerate(prompts)]


def in_32(weights: Any) -> Any:
    from grpo_core.engines.native.weights import empty_weights

    wide = empty_weights(weights.architecture, weights.named().keys(), device=CUDA, dtype=torch.float32)
    for name, tensor in wide.named().items():
        tensor.copy_(weights.named()[name])
    return wide


def scored(weights: Any, adapter: Any, asked: list[Any], drawn: list[Any]) -> torch.Tensor:
    from grpo_core.engines.native.layout import Group, lay_out
    from grpo_core.engines.native.packed import Packed

    layout = lay_out([Group(len(r.prompt), [len(d.tokens)]) for r, d in zip(asked, drawn, strict=True)]).to(CUDA)
    tokens = [t for r, d in zip(asked, drawn, strict=True) for t in (*r.prompt, *d.tokens)]
    targets = [t for d in drawn for t in d.tokens]
    ids = torch.tensor(tokens, device=CUDA), torch.tensor(targets, device=CUDA)
    return Packed(weights).logprobs(layout, *ids, adapter)[0]


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fused_step_is_as_near_to_32_bits_as_the_packed_mode(family: str, rows: int) -> None:
    from grpo_core.engines.native.decode import Decoder

    weights, adapter = make(family)
    decoder, asked = Decoder(weights, fused=True), requests(rows)
    decoder.set_adapter(adapter)
    drawn = decoder.generate(asked, tokens=40)
    told = torch.tensor([value for one in drawn for value in one.logprobs], device=CUDA)
    with torch.no_grad():
        packed, exact = scored(weights, adapter, asked, drawn), scored(in_32(weights), adapter, asked, drawn)
    rounding = float((packed - exact).abs().mean())
    assert 0 < float((told - exact).abs().mean()) < 1.3 * rounding + 1e-3
    assert float((told - packed).abs().mean()) < 1.5 * rounding + 1e-3
    assert decoder.generate(asked, tokens=40) == drawn  # to the bit
    decoder.set_adapter(None)
    base = decoder.generate(asked, tokens=40)
    told = torch.tensor([value for one in base for value in one.logprobs], device=CUDA)
    with torch.no_grad():
        assert float((told - scored(weights, None, asked, base)).abs().mean()) < 1.5 * rounding + 1e-3
    assert base != drawn


def test_the_plain_step_in_a_graph_agrees_too() -> None:
    from grpo_core.engines.native.decode import Decoder

    weights, adapter = make("qwen2")
    asked = requests(12)
    decoder = Decoder(weights, fused=False, stops=(7,))
    decoder.set_adapter(adapter)
    drawn = decoder.generate(asked, tokens=24)
    told = torch.tensor([value for one in drawn for value in one.logprobs], device=CUDA)
    with torch.no_grad():
        assert float((told - scored(weights, adapter, asked, drawn)).abs().mean()) < 0.05
    for leaf in adapter.leaves:  # the graphs read the new values
        leaf.data.mul_(0.5)
    decoder.set_adapter(adapter)
    drawn = decoder.generate(asked, tokens=24)
    told = torch.tensor([value for one in drawn for value in one.logprobs], device=CUDA)
    with torch.no_grad():
        assert float((told - scored(weights, adapter, asked, drawn)).abs().mean()) < 0.05


def test_the_sampling_kernel_draws_what_its_twin_draws() -> None:
    from grpo_core.engines.native.fused import FusedStep
    from grpo_core.engines.native.sampling import Filters, draw

    weights, _ = make("llama")
    step = FusedStep(weights)
    logits = torch.randn(64, 5000, device=CUDA) * 3
    squares = torch.rand(7, 64, device=CUDA) * 900
    state = torch.zeros(64, 8, dtype=torch.long, device=CUDA)
    state[:, 1], state[:, 6] = torch.arange(64), torch.arange(64) * 2**33 + 5
    for knobs in ([1 / 0.9, 1.0, 1.0], [1.0, 0.0, 1.0]):
        on = torch.tensor(knobs, device=CUDA)
        tokens, logprobs = step.draw(logits, squares, state, on)
        twin, told = draw(step.normed(logits, squares), state[:, 6], state[:, 1], on, Filters())
        assert torch.equal(tokens, twin)
        torch.testing.assert_close(logprobs, told, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(6, 4704, 3584), (16, 3616, 18944), (1, 37952, 3584)])
def test_the_stream_over_a_weight_is_its_product(rows: int, outputs: int, inputs: int) -> None:
    from grpo_core.engines.native.fused import plan_for, product

    assert plan_for(rows, outputs, inputs) is not None
    x = torch.randn(rows, inputs, device=CUDA).bfloat16()
    weight = torch.randn(outputs, inputs, device=CUDA).bfloat16()
    exact = x.float() @ weight.float().t()
    assert float((product(x, weight).float().sum(0) - exact).norm() / exact.norm()) < 5e-3


def test_attention_and_its_gradients_are_the_plain_ones_and_the_same_bits_twice() -> None:
    from grpo_core.engines.native.layout import Group, lay_out
    from grpo_core.engines.native.packed import Gathered, attention_for, plain_attention

    layout = lay_out([Group(150, [20, 300, 1]), Group(1, [70]), Group(64, [128, 128])]).to(CUDA)
    q = torch.randn(layout.tokens, 14, 64, device=CUDA).bfloat16().requires_grad_()
    kv = torch.randn(layout.tokens, 2, 2, 64, device=CUDA).bfloat16().requires_grad_()
    way = torch.randn(layout.tokens, 14, 64, device=CUDA)

    def run(attend: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        a, b = q.detach().to(dtype).requires_grad_(), kv.detach().to(dtype).requires_grad_()
        k, v = Gathered.apply(b, layout.keys).unbind(1)  # type: ignore[no-untyped-call]
        out = attend(a, k, v, layout)
        return out.detach(), *torch.autograd.grad(out, (a, b), way.to(dtype))

    fast = attention_for(CUDA, torch.bfloat16, 7)
    assert fast is not plain_attention
    exact, found = run(plain_attention, torch.float32), run(fast, torch.bfloat16)
    for one, other in zip(found, exact, strict=True):
        assert float((one.float() - other).norm() / other.norm()) < 1e-2
    assert all(torch.equal(one, other) for one, other in zip(found, run(fast, torch.bfloat16), strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradients_are_those_of_32_bits_compiled_or_not() -> None:
    from grpo_core.engines.native.layout import Group, lay_out
    from grpo_core.engines.native.packed import Packed

    weights, adapter = make("qwen3")
    groups = [Group(40, [30, 50, 9]), Group(11, [64])]
    layout = lay_out(groups).to(CUDA)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 5000, (layout.tokens,), generator=generator).to(CUDA)
    targets = torch.randint(1, 5000, (sum(sum(g.completions) for g in groups),), generator=generator).to(CUDA)
    gains = torch.randn(len(targets), device=CUDA)

    def gradient(packed: Packed, *, sparing: bool = False) -> torch.Tensor:
        for leaf in adapter.leaves:
            leaf.grad = None
        (packed.logprobs(layout, tokens, targets, adapter, sparing=sparing)[0] * gains).sum().backward()
        return torch.cat([leaf.grad for leaf in adapter.leaves if leaf.grad is not None])

    exact, plain = gradient(Packed(in_32(weights))), gradient(Packed(weights))
    error = float((plain - exact).norm() / exact.norm())
    assert error < 0.06
    assert torch.equal(gradient(Packed(weights), sparing=True), plain)
    compiled = gradient(Packed(weights, compiled=True))
    assert float((compiled - exact).norm() / exact.norm()) < 1.2 * error
    assert torch.equal(gradient(Packed(weights, compiled=True)), compiled)


def test_the_softmax_kernel_is_its_twin() -> None:
    from grpo_core.engines.native.fused import softmax
    from grpo_core.engines.native.packed import plain_softmax

    logits = (torch.randn(33, 15013, device=CUDA) * 4).bfloat16()
    wanted = torch.randint(0, 15013, (33,), device=CUDA)
    twin = plain_softmax(logits, wanted, 0.7)
    for found, expected in zip(softmax(logits.clone(), wanted, 0.7), twin, strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(softmax(logits.clone(), wanted, 0.7)[0], twin[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(softmax(logits.clone(), wanted, 0.7)[1], twin[1], rtol=1e-4, atol=1e-4)


def test_the_quantising_kernel_is_its_twin_with_and_without_the_norm() -> None:
    from grpo_core.eight_bits import quantise
    from grpo_core.engines.native.fused import FusedStep

    weights, _ = make("qwen2", eight_bits=True)
    step, norm = FusedStep(weights, RANK), weights.layers[0].input_norm
    x = (torch.randn(40, 896, device=CUDA) * 3).bfloat16()
    for given, expected in ((None, x), (norm, torch.nn.functional.rms_norm(x, (896,), norm, 1e-6))):
        normed, found = step.quantise(x, given)
        twin = quantise(expected)
        assert float((normed.float() - expected.float()).abs().max()) <= 0.02
        torch.testing.assert_close(found.scales, twin.scales, rtol=1e-2, atol=0)
        wide, exact = found.values.float() * found.scales, twin.values.float() * twin.scales
        assert float((wide - exact).norm() / exact.norm()) < 0.01


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit tensor cores"
)
@pytest.mark.parametrize("rows", [5, 40])
def test_in_8_bits_both_modes_compute_the_same_but_for_what_the_format_makes_of_rounding(rows: int) -> None:
    from grpo_core.engines.native.decode import Decoder

    weights, adapter = make("llama", eight_bits=True)
    decoder, asked = Decoder(weights, fused=True, rank=RANK), requests(rows)
    decoder.set_adapter(adapter)
    drawn = decoder.generate(asked, tokens=40)
    told = torch.tensor([value for one in drawn for value in one.logprobs], device=CUDA)
    with torch.no_grad():
        packed = scored(weights, adapter, asked, drawn)
    assert float((told - packed).abs().mean()) < 0.3 * float(packed.std())
    assert decoder.generate(asked, tokens=40) == drawn
