"""Weights in 8 bits: one arithmetic for drawing, for training and for the stock model of the self-test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lazy import lazy
from tests.unit.native.families import ALL, ALPHA, RANK, Twin, make_twin, stock_logprobs

torch = lazy("torch")
transformers = lazy("transformers")
peft = lazy("peft")
linear, product, quantise = lazy("grpo_core.eight_bits", "linear product quantise")
Adapter = lazy("grpo_core.engines.native.adapter", "Adapter")
read_architecture = lazy("grpo_core.engines.native.architecture", "read_architecture")
Decoder, Request = lazy("grpo_core.engines.native.decode", "Decoder Request")
Group, lay_out = lazy("grpo_core.engines.native.layout", "Group lay_out")
Packed = lazy("grpo_core.engines.native.packed", "Packed")
Weights, load_weights = lazy("grpo_core.engines.native.weights", "Weights load_weights")
multiply_in_eight_bits = lazy("grpo_core.selftest.peft_reference", "multiply_in_eight_bits")


PROMPT = [5, 17, 3, 60, 44]


def eight(twin: Twin) -> tuple[Weights, Adapter]:
    architecture = read_architecture(twin.folder)
    weights = load_weights(architecture, twin.folder, device=torch.device("cpu"), dtype=torch.float32, eight_bits=True)
    adapter = Adapter(architecture, rank=RANK, scale=ALPHA / RANK, targets=ALL, device=torch.device("cpu"))
    for one, other in zip(adapter.leaves, twin.adapter.leaves, strict=True):
        one.data.copy_(other.data)
    return weights, adapter


def score(weights: Weights, adapter: Adapter | None, completion: list[int]) -> torch.Tensor:
    ids = torch.tensor(PROMPT + completion)
    layout = lay_out([Group(len(PROMPT), [len(completion)])])
    return Packed(weights).logprobs(layout, ids, torch.tensor(completion), adapter)[0]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-biased"])
def test_both_modes_and_the_stock_model_compute_the_same(family: str, tmp_path: Path) -> None:
    twin = make_twin(family, tmp_path, dtype=torch.float32)
    weights, adapter = eight(twin)
    decoder = Decoder(weights)
    decoder.set_adapter(adapter)
    (drawn,) = decoder.generate([Request(PROMPT, 3)], tokens=20)
    found = score(weights, adapter, drawn.tokens)
    torch.testing.assert_close(found.detach(), torch.tensor(drawn.logprobs), rtol=1e-4, atol=1e-4)
    sixteen = stock_logprobs(twin, PROMPT, drawn.tokens)
    multiply_in_eight_bits(twin.stock)
    stock = stock_logprobs(twin, PROMPT, drawn.tokens)
    torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-3)
    assert (sixteen - stock).abs().mean() > 10 * (found - stock).abs().mean()
    with twin.stock.disable_adapter():
        base = stock_logprobs(twin, PROMPT, drawn.tokens)
    torch.testing.assert_close(score(weights, None, drawn.tokens), base, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_numbers_it_computes_with(tmp_path: Path) -> None:
    """Of the adapter, against the same weights held in 32 bits: what is left is the rounding of activations."""
    twin = make_twin("qwen2", tmp_path, dtype=torch.float32)
    weights, adapter = eight(twin)
    completion = [9, 8, 70, 31, 2, 55]

    def gradient(of: Weights) -> torch.Tensor:
        for leaf in adapter.leaves:
            leaf.grad = None
        score(of, adapter, completion).sum().backward()
        return torch.cat([leaf.grad for leaf in adapter.leaves if leaf.grad is not None])

    wide = load_weights(weights.architecture, twin.folder, device=torch.device("cpu"), dtype=torch.float32)
    for layer, exact in zip(weights.layers, wide.layers, strict=True):
        for kind, held in layer.linears.items():
            assert held.scales is not None
            exact.linears[kind].stored.copy_(held.weight.float() * held.scales)
    found, expected = gradient(weights), gradient(wide)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.2


def test_a_product_in_8_bits_is_near_and_passes_zeros_and_large_numbers() -> None:
    x, w = torch.randn(7, 64), torch.randn(48, 64)
    x[2] = 0
    x[3] *= 1e6
    held = quantise(w)
    found = product(quantise(x), held.values, held.scales, torch.float32)
    exact = x @ w.t()
    assert not found[2].any()
    assert float((found[3] - exact[3]).norm() / exact[3].norm()) < 0.1
    assert float((found[:2] - exact[:2]).norm() / exact[:2].norm()) < 0.1
    assert torch.equal(linear(x, held.values, held.scales), found)
    assert torch.equal(quantise(x[:1] * 4).values.view(torch.uint8), quantise(x[:1]).values.view(torch.uint8))


def test_a_model_in_8_bits_holds_nothing_in_16_but_embedding_head_and_norms(tmp_path: Path) -> None:
    twin = make_twin("qwen2", tmp_path, dtype=torch.float32)
    weights, _ = eight(twin)
    wide = [name for name, tensor in weights.named().items() if tensor.dtype == torch.float32 and tensor.ndim == 2]
    assert [name for name in wide if not name.endswith("weight_scales")] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(twin.folder, dtype=torch.float32)
    assert not isinstance(base, peft.PeftModel)
    multiply_in_eight_bits(base)
    logits = base(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    wanted = torch.tensor(PROMPT[1:])
    ids = torch.tensor(PROMPT)
    (found, _) = Packed(weights).logprobs(lay_out([Group(1, [4])]), ids, wanted, None)
    torch.testing.assert_close(found, logits.gather(1, wanted[:, None])[:, 0], rtol=1e-3, atol=1e-3)
