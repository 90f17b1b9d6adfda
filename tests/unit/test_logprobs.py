"""The CPU's log-probabilities equal the plain formula, in value and in gradient, whole and in parts."""

from __future__ import annotations

import pytest

from tests.lazy import lazy

torch = lazy("torch")
logprobs = lazy("grpo_core.engines.logprobs")


ROWS, WIDTH, VOCABULARY = 11, 8, 37


def inputs(*, bias: bool):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float32).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    offset = torch.randn(VOCABULARY, generator=generator).requires_grad_() if bias else None
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, offset, targets


def reference(hidden, weight, bias, targets, temperature, softcap, scale):
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    chosen = probabilities[torch.arange(len(targets)), targets].log()
    return chosen, torch.distributions.Categorical(probs=probabilities).entropy()


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "bias"),
    [(1.0, None, 1.0, False), (0.7, None, 1.0, True), (1.3, 3.0, 0.5, False)],
)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    in_parts: bool,
    temperature: float,
    softcap: float | None,
    scale: float,
    bias: bool,
) -> None:
    if in_parts:
        monkeypatch.setattr("grpo_core.engines.logprobs.MAX_LOGITS", VOCABULARY * 4)
    hidden, weight, offset, targets = inputs(bias=bias)
    chosen, entropy, *rest = logprobs.token_logprobs(
        hidden, weight, offset, targets, temperature, 1024, softcap, scale, ("log_probs", "entropy")
    )
    assert rest == [None, None, None]
    assert entropy is not None
    wanted_chosen, wanted_entropy = reference(hidden, weight, offset, targets, temperature, softcap, scale)
    torch.testing.assert_close(chosen.double(), wanted_chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), wanted_entropy, atol=1e-5, rtol=1e-5)

    learnt = [hidden, weight] + ([offset] if offset is not None else [])
    mix = torch.linspace(-1, 1, ROWS)
    found = torch.autograd.grad((chosen * mix - 0.3 * entropy).sum(), learnt)
    wanted = torch.autograd.grad((wanted_chosen * mix - 0.3 * wanted_entropy).sum(), learnt)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_entropy_is_left_out_unless_asked_for() -> None:
    hidden, weight, offset, targets = inputs(bias=False)
    chosen, entropy, *_ = logprobs.token_logprobs(hidden, weight, offset, targets, 1.0, 1024)
    assert entropy is None
    assert chosen.shape == (ROWS,)


def test_no_token_at_all_still_has_a_gradient() -> None:
    hidden, weight, _, targets = inputs(bias=False)
    chosen, _, *_ = logprobs.token_logprobs(hidden[:0], weight, None, targets[:0], 1.0, 1024)
    chosen.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
