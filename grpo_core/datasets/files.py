"""The files of each split of a data set: by the card's patterns, otherwise by the usual names.

Owns the file formats that are read and the words that name a split. Looks at names, not at contents. Invariant: every
file that it returns is in the repository's list.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from grpo_core.datasets.card import Subset, is_inside

Kind = Literal["parquet", "json", "csv", "tsv"]

_KINDS: Mapping[str, Kind] = {
    "parquet": "parquet",
    "jsonl": "json",
    "ndjson": "json",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
}
COMPRESSIONS: Final = ("gz", "bz2", "xz", "zst")

_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BETWEEN = "[-._ 0-9]"
_SHARD = re.compile(r"data/(?P<split>\w+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NOT_DATA = frozenset(("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))


@dataclass(frozen=True, slots=True)
class DataFile:
    """One data file, with its format and compression."""

    path: str
    kind: Kind
    compression: str | None = None


def splits_of(paths: Iterable[str], subset: Subset) -> dict[str, list[DataFile]]:
    """Return the files of each split, in the order of their rows. Only files of the most frequent format count."""
    files = [file for file in map(_data_file, sorted(paths)) if file is not None]
    if subset.folder:
        files = [file for file in files if file.path.startswith(f"{subset.folder}/")]
    if subset.patterns is None:
        splits = _by_usual_names(files, subset.folder)
    else:
        prefix = f"{subset.folder}/" if subset.folder else ""
        splits = {
            split: _matching(files, [prefix + pattern for pattern in patterns])
            for split, patterns in subset.patterns.items()
        }
    kinds = Counter(file.kind for found in splits.values() for file in found)
    usual = next((kind for kind, _ in kinds.most_common(1)), None)
    chosen = {split: [file for file in found if file.kind == usual] for split, found in splits.items()}
    return {split: found for split, found in chosen.items() if found}


def _data_file(path: str) -> DataFile | None:
    """Return None for hidden files, files without data, and formats that are not read, such as archives."""
    parts = path.split("/")
    if not is_inside(path) or parts[-1] in _NOT_DATA or any(part.startswith((".", "__")) for part in parts):
        return None
    extensions = parts[-1].lower().split(".")[1:]
    compression = extensions.pop() if extensions and extensions[-1] in COMPRESSIONS else None
    kind = _KINDS.get(extensions[-1]) if extensions else None
    return DataFile(path, kind, compression) if kind else None


def _by_usual_names(files: Sequence[DataFile], folder: str) -> dict[str, list[DataFile]]:
    def below(file: DataFile) -> str:
        return file.path.removeprefix(f"{folder}/") if folder else file.path

    shards: dict[str, list[DataFile]] = {}
    for file in files:
        match = _SHARD.fullmatch(below(file))
        if match:
            shards.setdefault(match["split"], []).append(file)
    if shards:
        return shards
    for named in (_folder_is_named, _file_is_named):
        splits = {split: [file for file in files if named(below(file), words)] for split, words in _WORDS.items()}
        if any(splits.values()):
            return splits
    return {"train": list(files)}


def _folder_is_named(path: str, words: Sequence[str]) -> bool:
    either = "|".join(words)
    return any(re.search(rf"(?:^|{_BETWEEN})(?:{either})(?:$|{_BETWEEN})", part) for part in path.split("/")[:-1])


def _file_is_named(path: str, words: Sequence[str]) -> bool:
    either = "|".join(words)
    return bool(re.search(rf"(?:^|{_BETWEEN})(?:{either}){_BETWEEN}", path.rpartition("/")[2]))


def _matching(files: Sequence[DataFile], patterns: Sequence[str]) -> list[DataFile]:
    found = (file for pattern in patterns for file in files if matches(file.path, pattern))
    return list(dict.fromkeys(found))


def matches(path: str, pattern: str) -> bool:
    """Whether a path matches a pattern, in which `*` stays in one folder and `**` does not.

    Each part of the pattern is compared once with each part of the path, so that no pattern takes long.
    """
    parts = path.split("/")
    reached = [True] + [False] * len(parts)
    for wanted in pattern.split("/"):
        if wanted == "**":
            first = next((index for index, here in enumerate(reached) if here), len(reached))
            reached = [index >= first for index in range(len(reached))]
        else:
            steps = zip(reached, parts, strict=False)
            reached = [False, *(here and fnmatch.fnmatchcase(part, wanted) for here, part in steps)]
    return reached[-1]
