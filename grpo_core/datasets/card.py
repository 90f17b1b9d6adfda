"""A data set's card: its subsets, the files of each split, and the types of columns.

Owns the parsing of the YAML at the top of `README.md` and the check of every name in it. Opens no other file.
Invariant: every pattern that this module returns is a relative path inside the repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from grpo_core.datasets.rows import DatasetError, error

MAX_CARD_BYTES: Final = 1024**2
MAX_YAML_CHARACTERS: Final = 256 * 1024
MAX_PATTERN: Final = 512
DEFAULT: Final = "default"

_PLAIN = frozenset(
    "null bool string large_string int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 float32 float64 half float double".split()
)
_NESTED = ("list", "sequence", "struct", "feature", "class_label", "dtype")
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Subset:
    """A subset that the card names, with patterns of its files."""

    name: str = DEFAULT
    patterns: Mapping[str, list[str]] | None = None
    """Patterns of each split's files; None if the names of the files decide."""
    folder: str = ""
    separator: str | None = None
    """Character between the columns of its CSV files."""


@dataclass(frozen=True, slots=True)
class Card:
    """The parsed card."""

    subsets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Subsets by name, as they are written in the card. A subset is checked when it is chosen."""
    features: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """Declared types by subset and column."""

    def subset(self, name: str | None, dataset: str) -> Subset:
        """Return the subset of this name, or without a name the only or default one. Raises `DatasetError`."""
        names = list(self.subsets) or [DEFAULT]
        chosen = name or self._default()
        if chosen is None or chosen not in names:
            detail = f"{dataset} has no subset {name!r}" if name else f"{dataset} has several subsets"
            remedy = f"Set data.subset to one of these: {', '.join(map(str, names[:40]))}."
            raise error("no_such_subset", detail, remedy, "/data/subset")
        return _judged(chosen, self.subsets.get(chosen, {}), dataset)

    def require_plain(self, subset: str, columns: Mapping[str, str]) -> None:
        """Raise `DatasetError` if one of these columns is declared as anything but text or numbers.

        `columns` maps their names to pointers in the spec.
        """
        declared = self.features.get(subset, {})
        require_plain({name: declared[name] for name in columns if name in declared}, columns)

    def _default(self) -> str | None:
        if len(self.subsets) < 2:
            return next(iter(self.subsets), DEFAULT)
        marked = [name for name, body in self.subsets.items() if body.get("default") is True]
        return next(iter(marked), DEFAULT if DEFAULT in self.subsets else None)


def read_card(raw: bytes, dataset: str) -> Card:
    """Parse the card of a data set. Raises `DatasetError` if it is invalid."""
    described = _front_matter(raw, dataset)
    subsets = {str(body.get("config_name", DEFAULT)): body for body in _mappings(described.get("configs"))}
    infos = {str(body.get("config_name", DEFAULT)): body for body in _mappings(described.get("dataset_info"))}
    features = {name: _columns(body.get("features")) for name, body in infos.items()}
    return Card(subsets, features)


def require_plain(declared: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Raise `DatasetError` for the first declared column that is not text, numbers, booleans or composed of these."""
    for name, feature in declared.items():
        if not is_plain_feature(feature):
            raise not_plain(name, columns[name])


def not_plain(column: str, pointer: str) -> DatasetError:
    """Return the error for a column of another type."""
    detail = f"the column {column!r} holds something other than text, numbers or booleans"
    return error(
        "unsupported_column", detail, "Name a column of text or numbers; images and audio are not read.", pointer
    )


def foreign_files(dataset: str) -> DatasetError:
    """Return the error for a card that names files outside its data set; it does not show their names."""
    detail = f"the card of {dataset} names data files outside the data set"
    return error("foreign_files", detail, "Use a data set that holds its own files.", "/data/dataset")


def _front_matter(raw: bytes, dataset: str) -> Mapping[str, Any]:
    lines = raw[:MAX_CARD_BYTES].decode("utf-8-sig", errors="replace").split("\n")
    if lines[0].strip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}
    text = "\n".join(lines[1:end])
    if len(text) > MAX_YAML_CHARACTERS:
        raise _unreadable(dataset, f"is longer than {MAX_YAML_CHARACTERS} characters")
    import yaml

    try:
        # Not the faster loader in C, because deep nesting crashes the process in it.
        found = yaml.load(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        raise _unreadable(dataset, "is not valid YAML") from reason
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _unreadable(dataset: str, why: str) -> DatasetError:
    remedy = "Try another revision, or upload the rows as JSONL."
    return error("unreadable", f"the description at the top of {dataset}'s README.md {why}", remedy, "/data/dataset")


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    return [cast("Mapping[str, Any]", one) for one in values if isinstance(one, dict)]


def _columns(features: Any) -> Mapping[str, Any]:
    return {str(one["name"]): one for one in _mappings(features) if "name" in one}


def is_plain_feature(feature: Any, depth: int = 0) -> bool:
    """Whether a declared type is text, numbers, booleans or composed of these.

    Reads both the notation of a card (`dtype: string`, `list: ...`) and that of a Parquet file's metadata (`_type`).
    """
    if depth > _MAX_DEPTH:
        return False
    if isinstance(feature, str):
        return feature in _PLAIN or feature.startswith(("decimal128(", "decimal256("))
    if isinstance(feature, list):
        return all(is_plain_feature(one, depth + 1) for one in cast("list[Any]", feature))
    if not isinstance(feature, dict):
        return False
    declared = cast("dict[str, Any]", feature)
    if "_type" in declared or "class_label" in declared:
        return _is_plain_type(declared, depth)
    said = [declared[key] for key in _NESTED if key in declared]
    return bool(said) and all(is_plain_feature(one, depth + 1) for one in said)


def _is_plain_type(declared: dict[str, Any], depth: int) -> bool:
    match declared.get("_type", "ClassLabel"):
        case "ClassLabel":
            return True
        case "Value":
            return is_plain_feature(declared.get("dtype"), depth + 1)
        case "Sequence" | "List" | "LargeList":
            return is_plain_feature(declared.get("feature"), depth + 1)
        case _:
            return False


def _judged(name: str, body: Mapping[str, Any], dataset: str) -> Subset:
    folder = body.get("data_dir")
    separator = body.get("sep", body.get("delimiter"))
    return Subset(
        name,
        _patterns(body["data_files"], dataset) if body.get("data_files") else None,
        _inside(folder, dataset) if folder else "",
        separator if isinstance(separator, str) and len(separator) == 1 else None,
    )


def _patterns(given: Any, dataset: str) -> dict[str, list[str]]:
    """Read `data_files` of a card: a pattern, a list of patterns, or patterns by split.

    Raises `DatasetError` if a pattern leads outside the repository.
    """
    entries = cast("list[Any]", given) if isinstance(given, list) else [given]
    found: dict[str, list[str]] = {}
    for entry in entries:
        if isinstance(entry, dict):
            named = cast("dict[str, Any]", entry)
            by_split = {named["split"]: named.get("path")} if "split" in named else named
        else:
            by_split = {"train": entry}
        for split, paths in by_split.items():
            listed = cast("list[Any]", paths) if isinstance(paths, list) else [paths]
            found.setdefault(str(split), []).extend(_inside(path, dataset) for path in listed)
    return found


def _inside(path: Any, dataset: str) -> str:
    """Return a pattern in plain form. Raises `DatasetError` unless it is a relative path inside the repository."""
    if not isinstance(path, str) or not is_inside(path):
        raise foreign_files(dataset)
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def is_inside(path: str) -> bool:
    """Whether a path or pattern is relative and stays in its folder. Looks at the text, not at the disk."""
    parts = path.split("/")
    return (
        0 < len(path) <= MAX_PATTERN
        and path.isprintable()
        and not path.startswith(("/", "~"))
        and ".." not in parts
        and ":" not in path
        and "\\" not in path
    )
