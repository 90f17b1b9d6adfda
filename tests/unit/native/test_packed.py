"""The packed mode against transformers and PEFT, in 64 bits: every family, groups of unequal size and length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo_core.errors import JobFailure
from tests.lazy import lazy
from tests.unit.native.families import FAMILIES, Twin, make_twin, save_base, stock_logprobs

torch = lazy("torch")
peft = lazy("peft")
load_file, save_file = lazy("safetensors.torch", "load_file save_file")
AutoModelForCausalLM = lazy("transformers", "AutoModelForCausalLM")
Adapter = lazy("grpo_core.engines.native.adapter", "Adapter")
of_config, read_architecture, require_window = lazy(
    "grpo_core.engines.native.architecture", "of_config read_architecture require_window"
)
Group, lay_out, parts_within, rows_within = lazy(
    "grpo_core.engines.native.layout", "Group lay_out parts_within rows_within"
)
Packed = lazy("grpo_core.engines.native.packed", "Packed")
load_weights, require_tensors = lazy("grpo_core.engines.native.weights", "load_weights require_tensors")


# transformers takes its norms and angles in 32 bits, also where all else has 64.
CLOSE = 3e-6
TEMPERATURE = 0.8


def ragged(vocabulary: int) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of 1 to 11 tokens with 1 to 4 completions of 1 to 9."""
    g = torch.Generator().manual_seed(3)

    def draw(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (1,), generator=g))
        return torch.randint(1, vocabulary, (length,), generator=g).tolist()

    return [(draw(11), [draw(9) for _ in range(size)]) for size in (3, 1, 4, 2)]


def flat(groups: list[tuple[list[int], list[list[int]]]]) -> tuple[list[Group], torch.Tensor, torch.Tensor]:
    lengths = [Group(len(prompt), [len(c) for c in completions]) for prompt, completions in groups]
    tokens = [t for prompt, completions in groups for text in [prompt, *completions] for t in text]
    targets = [t for _, completions in groups for text in completions for t in text]
    return lengths, torch.tensor(tokens), torch.tensor(targets)


def packed_of(twin: Twin, groups: list[tuple[list[int], list[list[int]]]], adapter: Adapter | None) -> torch.Tensor:
    lengths, tokens, targets = flat(groups)
    return Packed(twin.weights).logprobs(lay_out(lengths), tokens, targets, adapter, TEMPERATURE)[0]


def stock_of(twin: Twin, groups: list[tuple[list[int], list[list[int]]]]) -> torch.Tensor:
    return torch.cat([stock_logprobs(twin, p, c, TEMPERATURE) for p, completions in groups for c in completions])


def weighted(logprobs: torch.Tensor) -> torch.Tensor:
    """A loss that tells every token apart."""
    return (logprobs * torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_transformers_and_peft(family: str, tmp_path: Path) -> None:
    twin = make_twin(family, tmp_path)
    groups = ragged(twin.weights.architecture.vocabulary)
    ours, theirs = packed_of(twin, groups, twin.adapter), stock_of(twin, groups)
    torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)

    weighted(ours).backward()
    weighted(theirs).backward()
    for layer, leaf in enumerate(twin.adapter.leaves):
        assert leaf.grad is not None
        values, gradients = twin.adapter.named(layer), Adapter.named(_like(twin.adapter, leaf.grad, layer), layer)
        assert values.keys() == gradients.keys()
        for name, found in gradients.items():
            wanted = twin.stock.get_parameter(name.replace(".weight", ".default.weight")).grad
            assert wanted is not None
            assert wanted.norm() > 0
            assert (found - wanted).norm() <= 10 * CLOSE * wanted.norm(), name

    with torch.no_grad(), twin.stock.disable_adapter():
        torch.testing.assert_close(packed_of(twin, groups, None), stock_of(twin, groups), rtol=CLOSE, atol=CLOSE)
    assert not torch.allclose(packed_of(twin, groups, None), ours, atol=1e-3)


def _like(adapter: Adapter, leaf: torch.Tensor, layer: int) -> Adapter:
    """The adapter with another leaf in place of a layer's."""
    import copy

    other = copy.copy(adapter)
    other.leaves = [leaf if number == layer else mine for number, mine in enumerate(adapter.leaves)]
    return other


def test_an_adapter_on_some_projections_trains_those(tmp_path: Path) -> None:
    twin = make_twin("qwen2", tmp_path, targets=("v_proj", "q_proj", "up_proj"))
    groups = ragged(97)
    ours, theirs = packed_of(twin, groups, twin.adapter), stock_of(twin, groups)
    torch.testing.assert_close(ours, theirs, rtol=CLOSE, atol=CLOSE)
    weighted(ours).backward()
    weighted(theirs).backward()
    names = [name for name, p in twin.stock.named_parameters() if p.requires_grad]
    assert sum(leaf.numel() for leaf in twin.adapter.leaves) == sum(
        twin.stock.get_parameter(name).numel() for name in names
    )
    total = torch.stack([twin.stock.get_parameter(name).grad.norm() for name in names]).norm()  # type: ignore[union-attr]
    mine = torch.stack([leaf.grad.norm() for leaf in twin.adapter.leaves if leaf.grad is not None]).norm()
    torch.testing.assert_close(mine, total, rtol=10 * CLOSE, atol=0)


def test_entropy_is_that_of_the_softmax(tmp_path: Path) -> None:
    twin = make_twin("llama2", tmp_path)
    lengths, tokens, targets = flat([([5, 6, 7], [[8, 9], [3]])])
    entropy = Packed(twin.weights).logprobs(lay_out(lengths), tokens, targets, twin.adapter, TEMPERATURE)[1]
    logits = twin.stock(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:4] / TEMPERATURE
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy[:2], wanted, rtol=CLOSE, atol=CLOSE)
    assert not entropy.requires_grad


def test_a_step_in_parts_is_the_step_in_one(tmp_path: Path) -> None:
    twin = make_twin("llama3", tmp_path)
    groups = ragged(97)
    whole = packed_of(twin, groups, twin.adapter)
    weighted(whole).backward()
    wanted = [leaf.grad.clone() for leaf in twin.adapter.leaves if leaf.grad is not None]
    for leaf in twin.adapter.leaves:
        leaf.grad = None
    lengths = flat(groups)[0]
    parts = parts_within(lengths, 25)
    assert len(parts) > 1
    assert [at for part in parts for at in part] == list(range(len(groups)))
    assert all(len(part) == 1 or sum(lengths[at].tokens for at in part) <= 25 for part in parts)
    slopes, begin = torch.linspace(-1, 2, len(whole), dtype=whole.dtype), 0
    for part in parts:
        found = packed_of(twin, [groups[at] for at in part], twin.adapter)
        torch.testing.assert_close(found, whole[begin : begin + len(found)])
        (found * slopes[begin : begin + len(found)]).sum().backward()
        begin += len(found)
    for leaf, gradient in zip(twin.adapter.leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


def test_the_adopted_adapter_is_pefts_at_every_save(tmp_path: Path) -> None:
    """What is trained in the leaf is saved by PEFT, loaded by stock PEFT, and computes the same."""
    twin = make_twin("qwen3", tmp_path / "base", dtype=torch.float32)
    twin.adapter.adopt(twin.stock)
    groups = ragged(97)
    optimizer = torch.optim.SGD([p for p in twin.stock.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        twin.adapter.begin()
        weighted(packed_of(twin, groups, twin.adapter)).backward()
        leaf = twin.adapter.leaves[0]
        assert leaf.grad is not None
        assert sum(p.grad.numel() for p in twin.stock.parameters() if p.grad is not None) == 2 * leaf.numel()
        optimizer.step()
    twin.stock.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    twin.stock = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = packed_of(twin, groups, twin.adapter)
    torch.testing.assert_close(ours, stock_of(twin, groups), rtol=1e-5, atol=1e-5)


def test_gradients_of_cleared_parameters_are_gone_and_others_add_up(tmp_path: Path) -> None:
    twin = make_twin("llama2", tmp_path, dtype=torch.float32)
    twin.adapter.adopt(twin.stock)
    parameter = next(p for p in twin.stock.parameters() if p.requires_grad)
    groups = ragged(97)

    def gradient() -> torch.Tensor:
        twin.adapter.begin()
        weighted(packed_of(twin, groups, twin.adapter)).backward()
        assert parameter.grad is not None
        return parameter.grad.clone()

    once, twice = gradient(), gradient()
    torch.testing.assert_close(twice, 2 * once)
    twin.stock.zero_grad()
    torch.testing.assert_close(gradient(), once)
    assert twin.adapter.enabled
    with twin.stock.disable_adapter():
        assert not twin.adapter.enabled


def test_weights_come_from_one_file_or_many(tmp_path: Path) -> None:
    save_base("qwen2", tmp_path / "one")
    save_base("qwen2", tmp_path / "many", shards="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (
        load_weights(read_architecture(folder), folder, device=torch.device("cpu"), dtype=torch.float32, spare_rank=16)
        for folder in (tmp_path / "one", tmp_path / "many")
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32).state_dict()
    assert one.named().keys() == many.named().keys() == stock.keys()
    for name, tensor in one.named().items():
        assert torch.equal(tensor, stock[name])
        assert torch.equal(tensor, many.named()[name])
    assert one.layers[0].linears["qkv"].stored.shape[0] == one.layers[0].linears["qkv"].outputs + 3 * 16


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    save_base("llama2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lack 20 tensors, lm_head"):
        require_tensors(read_architecture(tmp_path), tmp_path)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_base("llama2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(40)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has the shape \(40,\), not \(48,\)"):
        require_tensors(read_architecture(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("llama2", {"model_type": "gpt_neox"}, "family 'gpt_neox'"),
        ("llama2", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("llama2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    family: str, changes: dict[str, object], why: str, tmp_path: Path
) -> None:
    save_base(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(JobFailure, match=why) as raised:
        read_architecture(tmp_path)
    assert raised.value.report.code == "engine_not_available"
    assert "trl" in raised.value.report.hint


def test_a_sliding_window_is_refused_only_where_it_would_slide(tmp_path: Path) -> None:
    save_base("mistral", tmp_path, sliding_window=32)
    architecture = read_architecture(tmp_path)
    assert architecture.window == 32
    require_window(architecture, 32)
    with pytest.raises(JobFailure, match="window is 32 tokens"):
        require_window(architecture, 33)
    assert of_config(make_twin("qwen2", tmp_path / "other").stock.config).window is None


def test_the_layout_holds_each_prompt_once() -> None:
    layout = lay_out([Group(4, [2, 3]), Group(1, [1])])
    assert layout.tokens == 4 + 2 + 3 + 1 + 1
    assert layout.predictors.rows.tolist() == [3, 4, 3, 6, 7, 9]
    assert layout.predictors.shared.tolist() == [3, 9]
    assert layout.predictors.places.tolist() == [[0, 2, -1], [5, -1, -1]]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1]
    assert layout.keys.rows.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 9, 10]
    assert layout.keys.places[-1].tolist() == [17, 18, -1]


def test_groups_stay_whole_unless_they_are_too_large() -> None:
    groups = [Group(4, [3, 3]), Group(4, [2, 2]), Group(5, [9, 9, 9]), Group(1, [1])]
    assert rows_within(groups, 100) == [range(8)]
    assert rows_within(groups, 18) == [range(4), range(4, 5), range(5, 6), range(6, 8)]
    assert rows_within(groups, 1) == [range(at, at + 1) for at in range(8)]


def test_recomputing_a_layer_changes_no_gradient(tmp_path: Path) -> None:
    twin = make_twin("qwen3", tmp_path)
    lengths, tokens, targets = flat(ragged(97))
    found: list[list[torch.Tensor]] = []
    for sparing in (False, True):
        packed = Packed(twin.weights)
        logprobs, _ = packed.logprobs(lay_out(lengths), tokens, targets, twin.adapter, sparing=sparing)
        weighted(logprobs).backward()
        found.append([leaf.grad.clone() for leaf in twin.adapter.leaves if leaf.grad is not None])
        for leaf in twin.adapter.leaves:
            leaf.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
)
@pytest.mark.parametrize("head", [None, 48])
def test_the_rotary_frequencies_are_those_of_transformers(scaling: dict[str, Any], head: int | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from grpo_core.engines.native.architecture import rotary_frequencies

    given: Any = {"hidden_size": 256, "num_attention_heads": 4, **({"head_dim": head} if head else {})}
    config = LlamaConfig(**given, rope_parameters={"rope_theta": 500_000.0, **scaling})
    expected: Any = LlamaRotaryEmbedding(config)
    frequencies, scale = rotary_frequencies(config)
    assert torch.equal(frequencies, expected.inv_freq)
    assert scale == expected.attention_scaling
