"""A job's rollouts in the bucket, read back: filtered, ordered, a page at a time.

Reads the Parquet objects it is given (`jobs.lineage` says which are valid) with polars, straight from storage. A query
has two halves: the *index* of each object, the few narrow columns that filters and orders need, which is kept in memory
because an object never changes; then the wide columns of the page's own rows. Invariant: what is held between
requests is at most `CACHE_BYTES`, and what a query reads wide is its page.

Polars, because of the readers tried on the same objects it was two to six times as fast as pyarrow.dataset and grew the
process by 60 MB less, for the same size on disk (docs/benchmarks.md). Only the API imports this module.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog

os.environ.setdefault("POLARS_MAX_THREADS", "4")  # before the import: each thread keeps memory of its own

import polars as pl

from jobs.errors import Unavailable
from jobs.lineage import RolloutFile
from jobs.rollout_query import Position, RolloutQuery
from jobs.settings import StorageSettings

log = structlog.get_logger()

CACHE_BYTES = 32 * 1024**2
"""Of all indexes together: about 20 bytes a completion."""
FILES_AT_ONCE = 64
"""Objects whose index is read in one go."""
FIRST_FILES = 4
"""The same at first where steps are read in order, since few may be enough; then twice as many each time."""

_INDEX = ("step", "epoch", "prompt_id", "reward_total", "advantage", "completion_tokens", "finish_reason")

Files = Callable[[], Sequence[RolloutFile]]
"""The valid objects, asked for anew where one of them has gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion with everything that was decided about it; numbers that are not finite are None."""

    step: int
    epoch: int
    prompt_id: str
    row: int
    sample: int
    seed: int
    prompt: str
    answer: str
    completion: str
    rewards: dict[str, float | None]
    """Raw, before weights."""
    reward_total: float | None
    advantage: float | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    adapter_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRollouts:
    """What there is of one step."""

    step: int
    epoch: int
    completions: int
    prompts: list[str]
    """Their ids, in the order of the step."""
    reward_mean: float | None
    reward_min: float | None
    reward_max: float | None


class RolloutStore:
    """The rollouts of all jobs in one bucket. Thread-safe; raises `Unavailable` when storage does not answer."""

    def __init__(self, settings: StorageSettings, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._bucket = settings.bucket
        self._access = _access(settings)
        self._indexes = _IndexCache(cache_bytes)

    def page(
        self, files: Files, query: RolloutQuery, *, limit: int, after: Position | None
    ) -> tuple[list[Rollout], Position | None]:
        """Up to `limit` rollouts behind a position, and the last one's position where there are more."""
        return self._reading(files, lambda found: self._page(found, query, limit, after))

    def steps(self, files: Files) -> list[StepRollouts]:
        """Every step that has rollouts, in order."""
        return self._reading(files, self._steps)

    def _reading(self, files: Files, read: Callable[[Sequence[RolloutFile]], Any]) -> Any:
        try:
            return read(files())
        except (pl.exceptions.PolarsError, OSError):
            pass  # files of single steps go once they are in a part: look again which there are
        try:
            return read(files())
        except (pl.exceptions.PolarsError, OSError) as error:
            # The message is left out: it may quote an answer of the store, or a row.
            log.warning("rollouts_unreadable", error=type(error).__name__)
            raise Unavailable("Object storage", type(error).__name__) from error

    def _page(
        self, files: Sequence[RolloutFile], query: RolloutQuery, limit: int, after: Position | None
    ) -> tuple[list[Rollout], Position | None]:
        objects: list[_Object] = []
        found = pl.DataFrame()
        for batch in _batches(files, query, after):
            objects += (_Object(file, index) for file, index in zip(batch, self._read_indexes(batch), strict=True))
            found = _select(objects, query, after).head(limit + 1).collect()
            if query.column == "step" and found.height > limit:
                break
        chosen = found.head(limit)
        rollouts = self._read_rows(objects, chosen) if chosen.height else []
        return rollouts, _position(chosen, query) if found.height > limit else None

    def _steps(self, files: Sequence[RolloutFile]) -> list[StepRollouts]:
        indexes = [index for batch in _split(files, FILES_AT_ONCE) for index in self._read_indexes(batch)]
        if not indexes:
            return []
        reward = pl.col("reward_total")
        table = (
            pl.concat(indexes)
            .group_by("step")
            .agg(
                pl.col("epoch").first(),
                completions=pl.len(),
                prompts=pl.col("prompt_id").unique(maintain_order=True),
                reward_mean=reward.mean(),
                reward_min=reward.min(),
                reward_max=reward.max(),
            )
            .sort("step")
        )
        return [StepRollouts(**row) for row in table.iter_rows(named=True)]

    def _read_indexes(self, files: Sequence[RolloutFile]) -> list[pl.DataFrame]:
        """The index of each object, in order."""
        indexes = {file.key: self._indexes.get(file.key) for file in files}
        missing = [key for key, index in indexes.items() if index is None]
        if missing:
            table = self._scan(missing, file="object").select("object", *_INDEX).collect()
            by_url = table.partition_by("object", as_dict=True, maintain_order=True, include_key=False)
            for key in missing:
                rows = by_url.get((self._url(key),))
                indexes[key] = index = _as_index(table.drop("object").clear() if rows is None else rows)
                self._indexes.put(key, index)
        return [index for index in indexes.values() if index is not None]

    def _read_rows(self, objects: Sequence[_Object], chosen: pl.DataFrame) -> list[Rollout]:
        """The chosen rows whole, in their order."""
        used: list[int] = chosen["object"].unique().sort().to_list()
        # Rows are numbered through all objects that are read, in their order.
        starts: dict[int, int] = {}
        rows = 0
        for number in used:
            starts[number] = rows
            rows += objects[number].index.height
        lines: list[int] = [starts[number] + line for number, line in chosen.select("object", "line").iter_rows()]
        steps: list[int] = chosen["step"].unique().to_list()
        table = (
            self._scan([objects[number].file.key for number in used], line="line")
            # The steps pass over whole row groups by their statistics; the lines choose among what is left.
            .filter(pl.col("step").is_in(steps), pl.col("line").is_in(lines))
            .with_columns(_finite(pl.col(pl.Float64)))
            .collect()
        )
        by_line = {row.pop("line"): row for row in table.iter_rows(named=True)}
        return [_rollout(by_line[line]) for line in lines]

    def _scan(self, keys: Sequence[str], *, file: str | None = None, line: str | None = None) -> pl.LazyFrame:
        return pl.scan_parquet(
            [self._url(key) for key in keys],
            include_file_paths=file,
            row_index_name=line,
            glob=False,
            cache=False,
            missing_columns="insert",
            extra_columns="ignore",
            **self._access,
        )

    def _url(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}"


@dataclass(frozen=True, slots=True)
class _Object:
    file: RolloutFile
    index: pl.DataFrame


class _IndexCache:
    """Indexes by object key; the one longest not asked for goes first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[str, pl.DataFrame] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> pl.DataFrame | None:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: str, index: pl.DataFrame) -> None:
        with self._lock:
            if key in self._held:
                return  # two requests have read it
            self._held[key] = index
            self._bytes += int(index.estimated_size())
            while self._bytes > self._limit:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= int(dropped.estimated_size())


def _batches(
    files: Sequence[RolloutFile], query: RolloutQuery, after: Position | None
) -> Iterator[Sequence[RolloutFile]]:
    """The objects that may hold what is asked for; in the order of their steps where that is the order."""
    able = [file for file in files if file.last >= query.first_step and file.first <= query.last_step]
    if query.column != "step":
        return _split(able, FILES_AT_ONCE)
    if after is not None:
        able = [f for f in able if (f.first <= after.step if query.descending else f.last >= after.step)]
    return _split(able[::-1] if query.descending else able, FIRST_FILES)


def _split(files: Sequence[RolloutFile], size: int) -> Iterator[Sequence[RolloutFile]]:
    start = 0
    while start < len(files):
        yield files[start : start + size]
        start, size = start + size, min(2 * size, FILES_AT_ONCE)


def _as_index(rows: pl.DataFrame) -> pl.DataFrame:
    """Narrow rows of one object with each one's line in it and place in its step, which a merge does not change."""
    return rows.with_columns(
        _finite(pl.col("reward_total", "advantage")),
        pl.col("prompt_id", "finish_reason").cast(pl.Categorical),
        line=pl.int_range(pl.len(), dtype=pl.UInt32),
        place=pl.int_range(pl.len(), dtype=pl.UInt32).over("step"),
    ).rechunk()


def _select(objects: Sequence[_Object], query: RolloutQuery, after: Position | None) -> pl.LazyFrame:
    """The index rows that are asked for, in order."""
    table = pl.concat(
        [item.index.lazy().with_columns(object=pl.lit(number, dtype=pl.UInt32)) for number, item in enumerate(objects)]
    )
    conditions = _conditions(query) + ([_behind(query, after)] if after else [])
    if conditions:
        table = table.filter(*conditions)
    if query.column == "step":
        return table.sort("step", "place", descending=[query.descending, False])
    return table.sort(
        query.column, "step", "place", descending=[query.descending, False, False], nulls_last=[True, False, False]
    )


def _conditions(query: RolloutQuery) -> list[pl.Expr]:
    step, reward = pl.col("step"), pl.col("reward_total")
    pairs: list[tuple[object, Callable[[Any], pl.Expr]]] = [
        (query.step, step.eq),
        (query.step_from, step.ge),
        (query.step_to, step.le),
        (query.prompt, pl.col("prompt_id").cast(pl.String).eq),
        (query.reward_lt, reward.lt),
        (query.reward_gt, reward.gt),
        (query.finish, pl.col("finish_reason").cast(pl.String).eq),
    ]
    return [condition(value) for value, condition in pairs if value is not None]


def _behind(query: RolloutQuery, after: Position) -> pl.Expr:
    """Whether a row comes later than a position."""
    column, step = pl.col(query.column), pl.col("step")
    further = column.lt if query.descending else column.gt
    within = (step == after.step) & (pl.col("place") > after.place)
    if query.column == "step":
        return further(after.step) | within
    later = (step > after.step) | within
    if after.value is None:
        return column.is_null() & later
    return further(after.value) | column.is_null() | ((column == after.value) & later)


def _position(chosen: pl.DataFrame, query: RolloutQuery) -> Position:
    last = chosen.row(-1, named=True)
    return Position(value=last[query.column], step=last["step"], place=last["place"])


def _rollout(row: dict[str, Any]) -> Rollout:
    fields = {name: row[name] for name in Rollout.__slots__ if name != "rewards"}
    rewards = {
        name.removeprefix("reward_"): value
        for name, value in row.items()
        if name.startswith("reward_") and name != "reward_total"
    }
    return Rollout(**fields, rewards=rewards)


def _finite(column: pl.Expr) -> pl.Expr:
    return pl.when(column.is_finite()).then(column).otherwise(None)


def _access(settings: StorageSettings) -> dict[str, Any]:
    """How polars reaches the store: as `jobs.storage` does."""
    options: dict[str, str | int] = {
        "aws_region": settings.region,
        "max_retries": 2,
        "connect_timeout": "3s",
        "timeout": "20s",
    }
    if settings.endpoint:
        options |= {"aws_endpoint_url": settings.endpoint, "aws_virtual_hosted_style_request": "false"}
        options["aws_allow_http"] = str(settings.endpoint.startswith("http://")).lower()
    access, secret = settings.access_key.get_secret_value(), settings.secret_key.get_secret_value()
    if not access:
        return {
            "storage_options": options,
            "credential_provider": pl.CredentialProviderAWS(region_name=settings.region),
        }
    options |= {"aws_access_key_id": access, "aws_secret_access_key": secret}
    return cast("dict[str, Any]", {"storage_options": options, "credential_provider": None})
