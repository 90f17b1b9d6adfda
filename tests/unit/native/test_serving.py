"""The serving process without its worker: text from tokens, turns of requests, and both models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_core.adapters import LocalAdapter
from grpo_core.errors import JobFailure
from grpo_core.hardware.models import ModelFiles, Precision
from grpo_core.serving.wire import CPU_ROWS, WAITING_PER_ROW, ChatRequest, Piece
from grpo_core.spec import JobSpec, parse_spec
from tests.lazy import lazy

torch = lazy("torch")
Batch = lazy("grpo_core.serving.batch", "Batch")
Desk = lazy("grpo_core.serving.asked", "Desk")
Sampling = lazy("grpo_core.serving.model", "Sampling")
sample = lazy("grpo_core.serving.model", "sample")
Text = lazy("grpo_core.serving.completion", "Text")
NativeModel = lazy("grpo_core.serving.native_model", "NativeModel")
TransformersModel = lazy("grpo_core.serving.transformers_model", "TransformersModel")

WAITING = WAITING_PER_ROW * CPU_ROWS
FOLDER = Path("examples/models/tiny-arithmetic").resolve()
FILES = ModelFiles("tiny-arithmetic", None, "folder", FOLDER, 0)
SPEC = parse_spec(
    {
        "model": {"name": "tiny-arithmetic", "max_sequence": 256},
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"name": "adamw_torch"},
        "sampling": {"max_prompt_tokens": 64, "max_completion_tokens": 40},
        "resources": {"gpus": 0},
    }
)


NAMES = ("base", "step-5", "step-9")


class Bytes:
    """A tokenizer whose tokens are bytes; 0 is a special token."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token for token in tokens if token or not skip_special_tokens).decode("utf-8", "replace")


def pieces_of(text: Any, tokens: Sequence[int]) -> list[str]:
    return [*(text.add(token) for token in tokens), text.end()]


def test_no_piece_ends_within_a_character() -> None:
    said = "答案：42 🎉é"
    pieces = pieces_of(Text(Bytes()), said.encode())
    assert "".join(pieces) == said
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_bytes_that_are_no_character_come_at_the_end_as_the_tokenizer_decodes_them() -> None:
    tokens = [*b"a", 0xE7, 0xAD]
    assert "".join(pieces_of(Text(Bytes()), tokens)) == Bytes().decode(tokens)


@pytest.mark.parametrize("stop", ["结束", "</answer>", "42"])
def test_a_stop_text_across_tokens_is_never_shown(stop: str) -> None:
    said = f"答案 <{stop}> 更多 {stop}"
    text = Text(Bytes(), [stop, "not in it"])
    shown = ""
    for token in said.encode():
        shown += text.add(token)
        if text.stopped:
            break
    assert text.stopped
    assert shown == said[: said.index(stop)]


def test_text_that_only_begins_like_a_stop_is_shown() -> None:
    assert "".join(pieces_of(Text(Bytes(), ["abcd"]), b"xabcabc")) == "xabcabc"


def tokenizer_and_stops() -> tuple[Any, list[int]]:
    from grpo_core.engines.pretrained import load_tokenizer, stop_tokens

    tokenizer = load_tokenizer(FILES)
    ends = stop_tokens(FILES, tokenizer)
    return tokenizer, [ends] if isinstance(ends, int) else ends


def adapters_in(folder: Path, spec: JobSpec = SPEC) -> list[LocalAdapter]:
    """Two adapters with random values, as PEFT stores them."""
    from safetensors.torch import save_file

    from grpo_core.engines.native.adapter import Adapter
    from grpo_core.engines.native.architecture import read_architecture

    architecture = read_architecture(FOLDER)
    device = torch.device("cpu")
    made = Adapter(architecture, rank=spec.lora.rank, scale=2.0, targets=spec.lora.target_modules, device=device)
    named = {name: view for layer in range(architecture.layers) for name, view in made.named(layer).items()}
    generator, adapters = torch.Generator().manual_seed(1), list[LocalAdapter]()
    for step in (5, 9):
        adapter = LocalAdapter(name=f"step-{step}", step=step, folder=folder / f"step-{step}")
        adapter.folder.mkdir(parents=True)
        save_file({n: 0.3 * torch.randn(v.shape, generator=generator) for n, v in named.items()}, adapter.weights)
        adapters.append(adapter)
    return adapters


@pytest.fixture
def native(tmp_path: Path) -> Any:
    return make_native(adapters_in(tmp_path))


def make_native(adapters: list[LocalAdapter], spec: JobSpec = SPEC) -> Any:
    from grpo_core.engines.native.architecture import read_architecture
    from grpo_core.engines.native.weights import load_weights

    weights = load_weights(read_architecture(FOLDER), FOLDER, device=torch.device("cpu"), dtype=torch.float32)
    return NativeModel(spec, weights, adapters, *tokenizer_and_stops())


def read(model: Any, adapter: str, ids: Sequence[int], more: int) -> tuple[Any, Any]:
    """A cache that has read a prompt, with room for `more` tokens, and the logits after it."""
    cache = model.reserve(len(ids) + more)
    return cache, model.prefill([(adapter, ids, cache)])[0]


def test_both_models_compute_the_same(tmp_path: Path) -> None:
    from grpo_core.engines.trl import load_base_model

    adapters = adapters_in(tmp_path)
    native, (tokenizer, stops) = make_native(adapters), tokenizer_and_stops()
    base = load_base_model(FILES, Precision("auto", "fp32", "float32", ""), tokenizer)
    other = TransformersModel(SPEC, base, adapters, tokenizer, stops)
    for adapter in ("base", "step-5", "step-9", "base"):
        (one, first), (two, second) = (read(model, adapter, [5, 6, 7], 4) for model in (native, other))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
        copies = native.reserve(7), other.reserve(7)
        native.copy(one, copies[0])
        other.copy(two, copies[1])
        for _ in range(2):
            torch.testing.assert_close(
                native.step([(adapter, 9, one)]), other.step([(adapter, 9, two)]), rtol=1e-3, atol=1e-3
            )
        torch.testing.assert_close(
            native.step([(adapter, 3, copies[0])]), other.step([(adapter, 3, copies[1])]), rtol=1e-3, atol=1e-3
        )


def test_an_adapter_of_other_settings_is_refused(tmp_path: Path) -> None:
    adapters = adapters_in(tmp_path)
    other = SPEC.model_copy(update={"lora": SPEC.lora.model_copy(update={"rank": 8})})
    with pytest.raises(JobFailure):
        make_native(adapters, other)


def desk_of(model: Any) -> Any:
    def prompt(request: ChatRequest) -> list[dict[str, str]]:
        return [dict(message) for message in request.messages]

    return Desk(
        tokenizer=model.tokenizer,
        stops=model.stops,
        context=model.context,
        adapters=["step-5", "step-9"],
        default_tokens=20,
        prompt=prompt,
        waiting=WAITING,
        cache_tokens=model.cache_tokens,
    )


def batch_of(model: Any) -> Any:
    return Batch(model, desk_of(model))


def ask(number: int, **options: Any) -> ChatRequest:
    messages = ({"role": "user", "content": f"{number}+1="},)
    given: dict[str, Any] = {"adapter": "base", "messages": messages, "temperature": 0.0, **options}
    return ChatRequest(id=f"r{number}", **given)


def answers(batch: Any) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    while not batch.is_idle:
        for piece in batch.step():
            found.setdefault(piece.get("id", ""), []).append(piece)
    return found


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.get("text", "") for piece in pieces)


def test_requests_together_get_what_each_gets_alone(native: Any) -> None:
    requests = [ask(n, adapter=NAMES[n % 3], seed=n, temperature=n % 4) for n in range(12)]
    batch = batch_of(native)
    alone = {}
    for request in requests:
        assert batch.add(request) == []
        alone |= answers(batch)
    for request in requests:
        batch.add(request)
    assert answers(batch) == alone
    for pieces in alone.values():
        assert [piece.get("k") for piece in pieces] == list(range(1, len(pieces) + 1))
        assert "done" in pieces[-1]


def test_more_requests_than_may_wait_are_refused_and_the_others_are_answered(native: Any) -> None:
    batch = batch_of(native)
    refused = [batch.add(ask(n, max_tokens=1)) for n in range(WAITING + 2)]
    assert [(piece["error"]["code"]) for pieces in refused for piece in pieces] == ["overloaded"] * 2
    assert len(answers(batch)) == WAITING


def test_rows_beyond_the_limit_wait(native: Any) -> None:
    batch = batch_of(native)
    for number in range(CPU_ROWS // 16 + 1):
        batch.add(ask(number, n=16, temperature=1.0))
    assert len(answers(batch)) == CPU_ROWS // 16 + 1


def test_a_cancelled_request_says_no_more_and_an_end_ends_all(native: Any) -> None:
    batch = batch_of(native)
    batch.add(ask(1))
    batch.add(ask(2))
    batch.step()
    batch.cancel("r1")
    assert [piece["id"] for piece in batch.fail({"code": "x", "message": "", "param": None})] == ["r2"]
    assert batch.is_idle


def test_what_does_not_fit_names_the_parameter(native: Any) -> None:
    batch = batch_of(native)
    (piece,) = batch.add(ask(1, max_tokens=native.context))
    assert piece.get("error", {})["param"] == "max_tokens"
    (piece,) = batch.add(ask(2, messages=({"role": "user", "content": "1+" * native.context},)))
    assert piece.get("error", {})["param"] == "messages"


def test_a_name_that_was_not_prepared_is_refused(native: Any) -> None:
    ((piece,),) = [batch_of(native).add(ask(1, adapter="step-7"))]
    assert piece["error"]["code"] == "not_serving"
    with pytest.raises(ValueError, match="names no adapter"):
        ChatRequest.read({**ask(1).as_dict(), "adapter": "../../etc"})


@pytest.fixture
def pooled(native: Any) -> Any:
    """The model as on a GPU: one pool, steps of a bucket of rows, prompts read together."""
    from grpo_core.serving.pool import Pool

    native._use(Pool(native._weights, 400))
    return native


def test_rows_of_all_adapters_in_one_pool_get_what_each_gets_alone(tmp_path: Path, pooled: Any) -> None:
    plain = [make_native([adapter]) for adapter in adapters_in(tmp_path / "again")]
    of = dict(zip(NAMES, [plain[0], *plain], strict=True))
    prompts = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8]]
    caches = [pooled.reserve(len(ids) + 4) for ids in prompts]
    alone = [read(of[name], name, ids, 4) for name, ids in zip(NAMES, prompts, strict=True)]
    together = pooled.prefill(list(zip(NAMES, prompts, caches, strict=True)))
    torch.testing.assert_close(together, torch.stack([logits for _, logits in alone]), rtol=1e-4, atol=1e-4)
    for tokens in ([4, 5, 6], [7, 8, 9]):
        found = pooled.step(list(zip(NAMES, tokens, caches, strict=True)))
        expected = [
            of[name].step([(name, token, cache)])[0]
            for name, token, (cache, _) in zip(NAMES, tokens, alone, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_base_without_adapters_is_served(native: Any) -> None:
    alone = make_native([])
    for more in ([4, 5, 6], [7]):
        torch.testing.assert_close(read(alone, "base", more, 1)[1], read(native, "base", more, 1)[1])


def test_requests_that_share_a_pool_get_what_each_gets_alone_and_leave_it_empty(pooled: Any) -> None:
    requests = [ask(n, adapter=NAMES[n % 3], n=1 + n % 3, max_tokens=9, seed=n) for n in range(40)]
    alone = {}
    batch = batch_of(pooled)
    for request in requests:
        assert batch.add(request) == []
        alone |= answers(batch)
    for request in requests:
        assert batch.add(request) == []
    found = answers(batch)
    assert {name: text_of(pieces) for name, pieces in found.items()} == {n: text_of(p) for n, p in alone.items()}
    assert pooled._pool.take(400) == 0


def test_cancelled_and_failed_requests_give_their_room_back(pooled: Any) -> None:
    batch = batch_of(pooled)
    batch.add(ask(1, n=4))
    batch.add(ask(2, n=4))
    batch.step()
    batch.cancel("r1")
    batch.fail({"code": "x", "message": "", "param": None})
    assert pooled._pool.take(400) == 0


def test_a_request_that_the_whole_pool_cannot_hold_is_refused(pooled: Any) -> None:
    (piece,) = batch_of(pooled).add(ask(1, n=16, max_tokens=100))
    assert piece["error"]["param"] == "n"


def test_a_gap_in_the_pool_is_used_again(pooled: Any) -> None:
    pool = pooled._pool
    assert [pool.take(100) for _ in range(5)] == [0, 100, 200, 300, None]
    pool.give(100)
    assert (pool.take(101), pool.take(60), pool.take(40), pool.take(1)) == (None, 100, 160, None)
