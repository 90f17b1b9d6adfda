"""What an optimizer keeps comes back from a checkpoint equal and of the same types, also from an 8-bit one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from grpo_core import strict_json
from tests.lazy import lazy

torch = lazy("torch")
load_file, save_file = lazy("safetensors.torch", "load_file save_file")
tensor_tree = lazy("grpo_core.checkpoints.tensor_tree")
random_states, set_random_states = lazy("grpo_core.checkpoints.writer", "random_states set_random_states")


def through_files(tree: Any, folder: Path) -> Any:
    tensors: dict[str, Any] = {}
    text = strict_json.dumps(tensor_tree.pack(tree, tensors))
    save_file(tensors, folder / "state.safetensors")
    return tensor_tree.unpack(strict_json.loads(text), load_file(folder / "state.safetensors"))


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    tree = {
        "state": {0: {"exp_avg": torch.randn(3, 2), "step": torch.tensor(7.0)}, 1: {}},
        "param_groups": [{"betas": (0.9, 0.99), "lr": 0.1 + 0.2, "params": [0, 1], "foreach": None, "fused": False}],
        "mixed": {1: "a number", "1": "a text"},
        "$tensor": "a name of ours",
        "nothing": {},
        "nested": [(1, (2.5, [None])), torch.arange(3)],
        "types": [torch.zeros(2, dtype=d) for d in (torch.bfloat16, torch.bool, torch.uint8, torch.int64)],
    }
    assert_equal(through_files(tree, tmp_path), tree)


def test_tensors_that_share_memory_come_back_whole(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tree = {"rows": [whole[0], whole[1]], "across": whole.T, "all": whole}
    assert_equal(through_files(tree, tmp_path), tree)


def test_what_is_neither_tensor_nor_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="/a/0 holds a set"):
        through_files({"a": [{1, 2}]}, tmp_path)


def test_an_adam_goes_on_from_its_copy(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: Any, optimizer: Any) -> None:
        model(torch.ones(5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    step(model, optimizer)
    copy, copied = make()
    copy.load_state_dict(model.state_dict())
    copied.load_state_dict(through_files(optimizer.state_dict(), tmp_path))
    for one in ((model, optimizer), (copy, copied)):
        step(*one)
        step(*one)
    assert torch.equal(model.weight, copy.weight)


def test_the_state_of_an_8_bit_optimizer_comes_back_as_it_was(tmp_path: Path) -> None:
    """In the form of bitsandbytes: quantized moments with their scales, and tables that all parameters share."""
    table = torch.linspace(-1, 1, 256)
    tree = {
        "state": {
            number: {
                "step": 3,
                "__bnb_optimizer_quant_state__": {
                    "state1": torch.randint(0, 255, (64, 8), dtype=torch.uint8),
                    "state2": torch.randint(0, 255, (64, 8), dtype=torch.uint8),
                    "qmap1": table,
                    "qmap2": table,
                    "absmax1": torch.rand(2),
                    "absmax2": torch.rand(2),
                },
            }
            for number in range(2)
        },
        "param_groups": [{"lr": 5e-6, "betas": (0.9, 0.99), "alpha": 0.0, "t_alpha": None, "params": [0, 1]}],
    }
    assert_equal(through_files(tree, tmp_path), tree)


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    import numpy as np

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.normal()), torch.randn(1).item()]

    draw()
    states = through_files(random_states(), tmp_path)
    expected = [draw(), draw()]
    set_random_states(states)
    assert [draw(), draw()] == expected
