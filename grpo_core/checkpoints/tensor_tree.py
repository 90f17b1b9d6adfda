"""Trees of tensors and plain values, such as an optimizer's state, as JSON and a table of tensors; and back.

Owns the encoding. Invariant: the decoded value equals the original, with the same types: tuples stay tuples, keys
that are numbers stay numbers, tensors keep data type and shape. Nothing but JSON types and tensors is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"
_PLAIN = (bool, int, float, str, type(None))


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """`value` as JSON; each tensor in it is put into `tensors`, on the CPU, and named in its place."""
    if isinstance(value, torch.Tensor):
        # A copy: safetensors refuses tensors that share memory, and paged ones must leave their pages.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, tensors, f"{path}/{key}") for key, item in value.items()}
        # By number, not by key: 1 and "1" are two keys.
        return {
            _ITEMS: [[key, pack(item, tensors, f"{path}/{index}")] for index, (key, item) in enumerate(value.items())]
        }
    if isinstance(value, list | tuple):
        packed = [pack(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
        return {_TUPLE: packed} if isinstance(value, tuple) else packed
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"{path or 'the tree'} holds a {type(value).__name__}, which is neither a tensor nor JSON")


def unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that was packed; raises KeyError if a tensor is missing."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        # A copy: what is read from a file lies where the file has it, and not as an allocator would place it.
        return tensors[value[_TENSOR]].clone()
    if _TUPLE in value:
        return tuple(unpack(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: unpack(item, tensors) for key, item in value[_ITEMS]}
    return {key: unpack(item, tensors) for key, item in value.items()}
