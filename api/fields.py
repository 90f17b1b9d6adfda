"""The parameter `fields`: which fields of an answer a client wants, as `id,status,spec.model.name`.

Owns the names that there are, from the types of the answers and of the job spec, and the narrowing. Invariant: a field
is sent as it would be without the parameter; a name that cannot exist is refused, and one that is absent is left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Union, cast, get_args, get_origin, get_type_hints

from litestar.params import QueryParameter
from msgspec import UNSET, Struct, UnsetType, structs
from pydantic import BaseModel

from api.problems import ApiError
from api.schemas import FieldProblem
from grpo_core.shown import shown_fields
from grpo_core.spec import JobSpec
from jobs.store.job import JobState

Fields = Annotated[
    str | None,
    QueryParameter(
        min_length=1, max_length=2000, description="Only these fields, such as `id,spec.model.name`; default: all"
    ),
]

Tree = dict[str, "Tree | None"]
"""The fields to send below a field; None: all of them."""

_ANY: Final = None
"""In place of a type: an object whose names are not known."""
_SPECS: Final = frozenset({"spec", "requested_spec"})
"""Fields of a job that hold a job spec as plain JSON."""


def wanted(fields: str | None, kind: Any) -> Tree | None:
    """What `fields` names in an answer of this type; None without it. Raises `ApiError` for names that it lacks."""
    if fields is None:
        return None
    tree: Tree = {}
    problems = [found for name in fields.split(",") if (found := _add(tree, name.strip(), kind))]
    if problems:
        names = ", ".join(problem.detail.partition(":")[0] for problem in problems)
        raise ApiError("unknown_field", f"Not a field here: {names}. `errors` lists what there is.", errors=problems)
    return tree


def narrowed(value: Any, tree: Tree | None) -> Any:
    """The value with the wanted fields alone; of a list, of each entry."""
    if tree is None or value is None:
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [narrowed(one, tree) for one in cast("Sequence[Any]", value)]
    if isinstance(value, Mapping):
        found = cast("Mapping[str, Any]", value)
        return {name: narrowed(found[name], below) for name, below in tree.items() if name in found}
    names = _attributes(type(value))
    values = ((name, getattr(value, names[name]), below) for name, below in tree.items())
    return {name: narrowed(one, below) for name, one, below in values if one is not UNSET}


def _add(tree: Tree, path: str, kind: Any) -> FieldProblem | None:
    """Add one path to the fields to send, or return what is wrong with it."""
    *above, last = path.split(".")
    here: Tree | None = tree
    for depth, name in enumerate([*above, last]):
        names = names_in(kind)
        if names is not None and name not in names:
            return _problem(path, ".".join(path.split(".")[:depth]), name, list(names))
        kind = _ANY if names is None else names[name]
        if here is None:  # all of what is above is wanted already
            continue
        if depth == len(above):
            here[name] = None
        else:
            below = here.setdefault(name, {})
            here = below
    return None


def _problem(path: str, where: str, name: str, names: list[str]) -> FieldProblem:
    place = f"of {where}" if where else "here"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {'.'.join(filter(None, (where, close[0])))}? " if close else ""
    listed = f"The fields {place} are {', '.join(names)}" if names else f"{where} has no fields"
    return FieldProblem(
        pointer="",
        parameter="fields",
        code="unknown_field",
        detail=f"{path[:200]}: is not a field",
        remedy=f"{hint}{listed}.",
    )


@cache
def names_in(kind: Any) -> Mapping[str, Any] | None:
    """The fields of a type by name, each with its type; None: any names."""
    kind = _plain(kind)
    if kind is _ANY or kind is Any or get_origin(kind) is Union or isinstance(kind, UnionType):
        return None
    origin = get_origin(kind) or kind
    if not isinstance(origin, type):
        return {}
    if issubclass(origin, Mapping):
        return None
    if issubclass(origin, Sequence) and not issubclass(origin, str):
        return names_in(next(iter(get_args(kind)), Any))
    return dict(_fields(origin))


def _plain(kind: Any) -> Any:
    """A type without its marks, and without None."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Union or isinstance(kind, UnionType):
        options = [one for one in get_args(kind) if one not in (NoneType, UnsetType)]
        return _plain(options[0]) if len(options) == 1 else kind
    return kind


def _fields(kind: type) -> Iterator[tuple[str, Any]]:
    if issubclass(kind, Struct):
        yield from ((field.encode_name, field.type) for field in structs.fields(kind))
    elif issubclass(kind, BaseModel):
        yield from ((field.alias or name, field.annotation) for name, field in kind.model_fields.items())
    elif is_dataclass(kind):
        hints = get_type_hints(kind)
        is_job = issubclass(kind, JobState)
        for name in _attributes(kind):
            yield name, JobSpec if is_job and name in _SPECS else hints[name]


@cache
def _attributes(kind: type) -> Mapping[str, str]:
    """The attribute of each field by its name in JSON."""
    if issubclass(kind, Struct):
        return {field.encode_name: field.name for field in structs.fields(kind)}
    shown = shown_fields(kind)
    return {name: name for name in shown or (field.name for field in fields_of(cast("Any", kind)))}
