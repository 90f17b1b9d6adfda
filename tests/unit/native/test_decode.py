"""The decoder on a CPU: transformers' text where it is greedy, the softmax where it draws, and no row minds another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lazy import lazy
from tests.unit.native.families import FAMILIES, Twin, make_twin

torch = lazy("torch")
Decoder, Drawn, Request = lazy("grpo_core.engines.native.decode", "Decoder Drawn Request")
Group, lay_out = lazy("grpo_core.engines.native.layout", "Group lay_out")
Packed = lazy("grpo_core.engines.native.packed", "Packed")
Filters, draw = lazy("grpo_core.engines.native.sampling", "Filters draw")


LENGTHS = (1, 2, 9, 17)
TOKENS = 10


def prompts(vocabulary: int = 97) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocabulary, (length,), generator=g).tolist() for length in LENGTHS]


def decoder_of(twin: Twin, **options: Any) -> Decoder:
    decoder = Decoder(twin.weights, **{"buckets": (2, 8), **options})
    decoder.set_adapter(twin.adapter)
    return decoder


def stock_text(twin: Twin, prompt: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "pad_token_id": 0, **options}
    said: Any = twin.stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return said[0, len(prompt) :].tolist()


def greedy(decoder: Decoder, texts: list[list[int]], **options: Any) -> list[list[int]]:
    requests = [Request(text, 0) for text in texts]
    return [drawn.tokens for drawn in decoder.generate(requests, tokens=TOKENS, temperature=0, **options)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_transformers_token_for_token(family: str, tmp_path: Path) -> None:
    twin = make_twin(family, tmp_path)
    wanted = [stock_text(twin, prompt) for prompt in prompts()]
    decoder = decoder_of(twin)
    assert greedy(decoder, prompts()) == wanted
    decoder.set_adapter(None)
    with twin.stock.disable_adapter():
        base = [stock_text(twin, prompt) for prompt in prompts()]
    assert greedy(decoder, prompts()) == base != wanted

    # A stop token ends a text, also as its first.
    stops = {wanted[2][4], wanted[0][0]}
    decoder = decoder_of(twin, stops=sorted(stops))
    cut = [text[: next((at + 1 for at, t in enumerate(text) if t in stops), TOKENS)] for text in wanted]
    assert greedy(decoder, prompts()) == cut
    assert min(map(len, cut)) == 1 < max(map(len, cut))


def test_the_repetition_penalty_is_transformers(tmp_path: Path) -> None:
    twin = make_twin("qwen2", tmp_path)
    decoder = decoder_of(twin, penalises=True)
    wanted = [stock_text(twin, prompt, repetition_penalty=1.7) for prompt in prompts()]
    assert greedy(decoder, prompts(), penalty=1.7) == wanted
    assert greedy(decoder, prompts()) == [stock_text(twin, prompt) for prompt in prompts()] != wanted


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-9), ("float32", 3e-5)])
def test_its_logprobs_are_those_of_the_packed_mode(dtype: str, close: float, tmp_path: Path) -> None:
    twin = make_twin("qwen3", tmp_path, dtype=getattr(torch, dtype))
    requests = [Request(prompt, 100 * at + n) for at, prompt in enumerate(prompts()) for n in range(3)]
    drawn = decoder_of(twin).generate(requests, tokens=TOKENS, temperature=0.7)
    groups = [(prompt, [d.tokens for d in drawn[3 * at : 3 * at + 3]]) for at, prompt in enumerate(prompts())]
    layout = lay_out([Group(len(prompt), [len(text) for text in texts]) for prompt, texts in groups])
    tokens = torch.tensor([t for prompt, texts in groups for text in [prompt, *texts] for t in text])
    targets = torch.tensor([t for _, texts in groups for text in texts for t in text])
    scored = Packed(twin.weights).logprobs(layout, tokens, targets, twin.adapter, 0.7)[0]
    told = torch.tensor([value for d in drawn for value in d.logprobs], dtype=getattr(torch, dtype))
    torch.testing.assert_close(told, scored.detach(), rtol=close, atol=close)


def test_a_rows_text_depends_on_no_other_row_and_no_place(tmp_path: Path) -> None:
    twin = make_twin("llama3", tmp_path)
    requests = [Request(prompt, 7000 * at + n) for at, prompt in enumerate(prompts()) for n in range(4)]

    def drawn(decoder: Decoder, some: list[Request]) -> list[Drawn]:
        return decoder.generate(some, tokens=TOKENS)

    together = drawn(decoder_of(twin, buckets=(2, 8)), requests)  # 16 rows through 8 places
    texts = [d.tokens for d in together]
    assert len(set(map(tuple, texts))) > 12
    alone = decoder_of(twin, buckets=(1,))
    assert [drawn(alone, [request])[0].tokens for request in requests] == texts
    backwards = drawn(decoder_of(twin, buckets=(32,)), requests[::-1])
    assert [d.tokens for d in backwards[::-1]] == texts
    in_turns = drawn(decoder_of(twin, cache_tokens=60), requests)
    assert [d.tokens for d in in_turns] == texts
    # Rows that stop early leave the others what they are.
    stop = texts[0][2]
    cut = [text[: text.index(stop) + 1] if stop in text else text for text in texts]
    assert [d.tokens for d in drawn(decoder_of(twin, stops=(stop,)), requests)] == cut
    assert min(map(len, cut)) < TOKENS


def test_a_reused_decoder_draws_the_same_and_another_seed_another_text(tmp_path: Path) -> None:
    twin = make_twin("llama2", tmp_path)
    decoder = decoder_of(twin)
    few, more = [Request([3, 4], 1)], [Request([5] * 20, n) for n in range(9)]
    first = decoder.generate(few, tokens=TOKENS)
    decoder.generate(more, tokens=TOKENS + 9)  # the cache grows
    assert decoder.generate(few, tokens=TOKENS) == first
    assert decoder.generate([Request([3, 4], 2)], tokens=TOKENS) != first
    assert decoder.generate(few, tokens=3)[0].tokens == first[0].tokens[:3]
    assert decoder.generate([], tokens=3) == []


def test_too_many_stop_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 stop tokens; at most 8"):
        Decoder(make_twin("llama2", tmp_path).weights, stops=range(9))


def p_value(counts: torch.Tensor, likely: torch.Tensor) -> float:
    """That of a chi-square test; rare outcomes count as one."""
    expected = likely.double() * counts.sum()
    often = expected >= 5
    o, e = (torch.cat([x[often], x[~often].sum()[None]]).double() for x in (counts, expected))
    o, e = o[e > 0], e[e > 0]
    statistic = ((o - e) ** 2 / e).sum()
    return float(torch.special.gammaincc(torch.tensor((len(o) - 1) / 2).double(), statistic / 2))


def test_draws_follow_the_softmax_over_seeds_and_over_tokens() -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(2)) * 2
    rows, knobs = 20000, torch.tensor([1 / 1.3, 1.0, 1.0])
    zero = torch.zeros(rows, dtype=torch.long)
    for seeds, counts in (
        (torch.arange(rows), zero),
        (zero + 77, torch.arange(rows)),
        (torch.arange(rows) << 32, zero + 5),
    ):
        tokens, logprobs = draw(logits.expand(rows, -1), seeds, counts, knobs, Filters())
        assert p_value(torch.bincount(tokens, minlength=200), (logits[0] / 1.3).softmax(0)) > 1e-3
        torch.testing.assert_close(logprobs, (logits[0] / 1.3).log_softmax(0)[tokens])


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.7}])
def test_filters_leave_what_transformers_leaves(settings: dict[str, Any]) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    filters = Filters(**settings)

    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(4)) * 2
    rows, knobs = 6000, torch.tensor([1 / 0.9, 1.0, 1.0])
    tokens, logprobs = draw(
        logits.expand(rows, -1), torch.arange(rows), torch.zeros(rows, dtype=torch.long), knobs, filters
    )
    kept: Any = logits / 0.9
    if filters.top_k:
        kept = TopKLogitsWarper(filters.top_k)(None, kept)  # type: ignore[arg-type]
    if filters.top_p < 1:
        kept = TopPLogitsWarper(filters.top_p)(None, kept)  # type: ignore[arg-type]
    assert p_value(torch.bincount(tokens, minlength=60), kept[0].softmax(0)) > 1e-3
    assert set(tokens.tolist()) <= set(kept[0].isfinite().nonzero()[:, 0].tolist())
    # As the trainer has it: of the whole distribution.
    torch.testing.assert_close(logprobs, (logits[0] / 0.9).log_softmax(0)[tokens])


def test_the_penalty_is_in_the_draw_and_not_in_its_logprob() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.5]])
    seen = torch.tensor([[True, True, False, False]])
    rows = 8000
    tokens, logprobs = draw(
        logits.expand(rows, -1),
        torch.arange(rows),
        torch.zeros(rows, dtype=torch.long),
        torch.tensor([0.5, 1.0, 2.0]),
        Filters(),
        seen.expand(rows, -1),
    )
    wanted = (torch.tensor([1.0, -2.0, 0.5, 1.5]) / 2).softmax(0)
    assert p_value(torch.bincount(tokens, minlength=4), wanted) > 1e-3
    torch.testing.assert_close(logprobs, (logits[0] / 2).log_softmax(0)[tokens])


def test_the_decoder_draws_from_the_models_softmax(tmp_path: Path) -> None:
    twin = make_twin("qwen2", tmp_path, dtype=torch.float32, vocab_size=9)
    prompt, rows = [3, 5, 1], 2048
    decoder = decoder_of(twin, buckets=(rows,))
    drawn = decoder.generate([Request(prompt, 31 * n) for n in range(rows)], tokens=2, temperature=1.3)
    with torch.no_grad():
        first = torch.bincount(torch.tensor([d.tokens[0] for d in drawn]), minlength=9)
        likely = (twin.stock(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(0)
        assert p_value(first, likely) > 1e-3
        top = int(first.argmax())
        second = torch.bincount(torch.tensor([d.tokens[1] for d in drawn if d.tokens[0] == top]), minlength=9)
        likely = (twin.stock(torch.tensor([[*prompt, top]])).logits[0, -1] / 1.3).softmax(0)
        assert p_value(second, likely) > 1e-3
