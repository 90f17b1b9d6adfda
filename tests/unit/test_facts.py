"""A fact is written once: whoever shows it takes it from there, and a second copy of it is found."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast, get_args, get_type_hints

import pytest
from litestar import Litestar, get
from litestar.serialization import encode_json

from api import metric_table, schemas
from api.app import create_app
from api.openapi import RecordSchemas
from api.page.assets import assets
from api.page.words import REASONS, Language, words
from grpo_client import words as client_words
from grpo_core.monitoring.audits import RULES, Audit
from grpo_core.monitoring.trackers import as_trl
from grpo_core.reasons import EventType, FailureClass, FetchFailure, FinishReason, Phase, Reason, WarningCode
from grpo_core.report_page.view import _curves
from grpo_core.run_dir import metrics
from grpo_core.run_dir.metrics import Chart, Metric, Short, StepMetrics
from grpo_core.run_dir.records import Completion, Rollout, RolloutColumns, read_rollouts, write_rollouts
from grpo_core.shown import Shown, plain_type, shown_fields
from jobs.read.fleet import WorkerState
from jobs.read.queue_position import WaitReason
from jobs.read.rollouts import _rollout
from jobs.store import job_store
from jobs.store.job import JobRecord, JobStatus, JobView, Priority
from scripts import client_types, fact_docs
from tests.unit.fakes import FakeJobService, make_record

ROOT = Path(__file__).resolve().parents[2]
ALL = (
    EventType,
    FailureClass,
    FetchFailure,
    FinishReason,
    JobStatus,
    Phase,
    Priority,
    WaitReason,
    WarningCode,
    WorkerState,
)
CODE = [path for package in ("api", "jobs", "grpo_core", "grpo_client") for path in (ROOT / package).rglob("*.py")]


class Mood(Reason):
    """A reason that only this test has."""

    GOOD = "good", "it goes well", "一切顺利"


def page_words(language: str) -> dict[str, str]:
    return json.loads(assets()[f"locale/{language}.json"].body)


@cache
def openapi() -> str:
    return json.dumps(create_app(cast("Any", FakeJobService())).openapi_schema.to_schema(), ensure_ascii=False)


def groups_of_words(source: str) -> Iterator[set[str]]:
    """The words of each list, tuple, set, `Literal` and dictionary's keys in a module, and of each enum's values."""
    for node in ast.walk(ast.parse(source)):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            found = list(node.elts)
        elif isinstance(node, ast.Dict):
            found = list(node.keys)
        elif isinstance(node, ast.ClassDef):
            found = [line.value for line in node.body if isinstance(line, ast.Assign)]
            found += [one.elts[0] for one in found if isinstance(one, ast.Tuple)]
        yield {one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str)}


@cache
def words_of_modules() -> dict[str, list[set[str]]]:
    """The groups of words in each module that is written by hand."""
    generated = [path.name for path in client_types.MODULES]
    return {
        path.relative_to(ROOT).as_posix(): list(groups_of_words(path.read_text()))
        for path in CODE
        if path.name not in generated
    }


@pytest.mark.parametrize("reasons", [EventType, FailureClass, JobStatus, Phase, WaitReason, WarningCode])
def test_the_words_are_listed_in_one_module(reasons: type[StrEnum]) -> None:
    """More than half of them in another place are a copy; a generated module has a test of its own."""
    words = {one.value for one in reasons}
    places = [
        place
        for place, groups in words_of_modules().items()
        if any(len(words & group) > max(2, len(words) / 2) for group in groups)
    ]
    assert len(places) == 1, f"take them from {reasons.__module__}: {places}"


@pytest.mark.parametrize("reasons", ALL)
def test_every_word_has_a_sentence_that_all_show(reasons: type[Reason]) -> None:
    document = openapi()
    assert set(ALL) == set(REASONS.values())
    [group] = [name for name, one in REASONS.items() if one is reasons]
    for one in reasons:
        assert one.sentence
        assert (page_words("en")[f"{group}.{one.value}"], page_words("zh")[f"{group}.{one.value}"]) == (
            one.english,
            one.chinese,
        )
    if reasons not in (
        EventType,
        FetchFailure,
        JobStatus,
        WarningCode,
    ):  # the document has these without their sentences
        assert all(one.sentence in document for one in reasons)


def test_a_new_word_reaches_page_and_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REASONS, "mood", Mood)
    assets.cache_clear()
    try:
        assert (page_words("en")["mood.good"], page_words("zh")["mood.good"]) == ("it goes well", "一切顺利")
    finally:
        assets.cache_clear()
    table = fact_docs.table(fact_docs.with_sentences("mood", Mood), "| mood | meaning | since |\n|---|---|---|")
    assert table.splitlines() == ["| mood | meaning | since |", "|---|---|---|", "| `good` | it goes well |  |"]
    assert fact_docs.table(fact_docs.with_sentences("mood", Mood), f"{table[:-2]}1 |") == f"{table[:-2]}1 |"


def test_no_word_is_in_a_catalogue_of_the_page_too() -> None:
    for language in get_args(Language):
        own: dict[str, str] = json.loads((ROOT / f"api/page/static/locale/{language}.json").read_text())
        assert own.keys() & words(language).keys() == set()


def test_generated_modules_and_tables_are_current() -> None:
    for path, text in client_types.MODULES.items():
        assert path.read_text("utf-8") == text(), "run make docs"
    paths = [path for folder in fact_docs.PAGES for path in folder.glob("*.md")]
    for path in paths:
        assert path.read_text("utf-8") == fact_docs.filled(path.read_text("utf-8")), "run make docs"
    pages = "".join(path.read_text("utf-8") for path in paths)
    assert [name for name in fact_docs.tables() if f"<!-- facts: {name} -->" not in pages] == []


def test_the_terminal_knows_why_a_job_waits() -> None:
    assert {one.value: one.sentence for one in WaitReason} == client_words.WAIT_REASONS


def test_every_warning_is_given_somewhere_and_every_audit_has_a_title() -> None:
    source = "".join(path.read_text() for path in CODE)
    assert [code for code in WarningCode if f"WarningCode.{code.name}" not in source] == []
    for audit in Audit:
        titles = [page_words(language)[f"warning.{audit.value}"] for language in ("en", "zh")]
        assert titles == [audit.english, audit.chinese]
    assert [rule.name for rule in RULES] == list(Audit)


# --- rollouts


@dataclass(frozen=True, kw_only=True)
class LongRollout(Rollout):
    """A rollout with a column that only this test has."""

    mood: Annotated[str, Shown("How the model felt", least=1)]


def test_a_column_of_the_rollouts_is_stored_read_and_described(tmp_path: Path) -> None:
    values: dict[str, Any] = {"row": 2**40, "seed": 2**40, "rewards": {"r": 1.0}, "finish_reason": FinishReason.LENGTH}
    columns = {name: plain_type(each.type) for name, each in shown_fields(RolloutColumns).items()}
    completion = Completion(**{name: values.get(name) or kind(1) for name, kind in columns.items()})
    write_rollouts(tmp_path / "step-000001.parquet", [completion], step=1, epoch=2)
    [row] = read_rollouts(tmp_path)
    assert list(row) == [name if name != "rewards" else "reward_r" for name in shown_fields(Rollout)]
    assert (row["row"], row["reward_r"], row["epoch"]) == (2**40, 1.0, 2)
    assert _rollout(row) == Rollout(step=1, epoch=2, **{name: getattr(completion, name) for name in columns})
    described = json.loads(openapi())["components"]["schemas"]["Rollout"]["properties"]
    assert {name: field.get("description", "") for name, field in described.items()} == {
        name: each.mark.meaning for name, each in shown_fields(Rollout).items()
    }


def test_a_field_that_is_shown_is_in_the_openapi_document_with_its_bounds() -> None:
    @get("/")
    async def answer() -> LongRollout:
        raise NotImplementedError

    schema = Litestar([answer], plugins=[RecordSchemas()]).openapi_schema.to_schema()["components"]["schemas"]
    mood = schema["LongRollout"]["properties"].pop("mood")
    assert mood == {"type": "string", "description": "How the model felt", "minimum": 1.0}
    assert "mood" in schema["LongRollout"]["required"]


# --- metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class MoodyMetrics(StepMetrics):
    """A step with a metric that only this test has."""

    mood: Annotated[
        float,
        Metric("How the model feels", least=0, most=1, unit="share", better="higher", trl="mood/{}"),
        Short("mood", "心情", is_watched=True),
        Chart("Mood", "心情", "模型的心情"),
    ] = 0.5


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The catalogue with one more metric, and nothing else."""
    monkeypatch.setattr(metrics.described, "__defaults__", (MoodyMetrics,))
    assets.cache_clear()
    yield
    assets.cache_clear()


@pytest.mark.usefixtures("moody")
def test_a_new_metric_reaches_everyone_who_shows_metrics() -> None:
    chart = {"name": "mood", "unit": "share", "by_name": False, "lines": ["mood"], "band": []}
    assert chart in json.loads(assets()["charts.json"].body)
    shown = ("metric.mood", "metric.mood.hint", "metric.mood.short")
    assert [page_words("en")[key] for key in shown] == ["Mood", "How the model feels", "mood"]
    assert [page_words("zh")[key] for key in shown] == ["心情", "模型的心情", "心情"]
    assert ["`mood`", "share", "higher", "How the model feels"] in [list(row) for row in fact_docs.tables()["metrics"]]
    assert '"mood": ("mood", ".0%")' in client_types.words()
    assert "mood" in metric_table.columns([])
    assert as_trl({"mood": 0.5})["mood/"] == 0.5
    [curve] = [one for one in _curves([{"step": 1, "mood": 0.5}], []) if one.title == "Mood"]
    assert (curve.values, curve.most, curve.note) == ([0.5], 1, "How the model feels")


def test_every_field_of_a_step_is_described() -> None:
    every = metrics.described()
    fields_of = [field.name for field in fields(StepMetrics) if field.name != "step"]
    assert [one.name for one in every.values() if len(one.path) == 1] == fields_of
    for one in every.values():
        assert one.metric.meaning
    for one, chart, lines in metrics.charts():
        assert all(edge in metrics.short_names() for edge in chart.band)
        assert one.is_by_name or all(line.short for line in lines)


def test_trl_knows_the_names_that_are_given_as_its_own() -> None:
    found = find_spec("trl")  # not imported, which takes seconds
    assert found is not None
    assert found.origin is not None
    source = (Path(found.origin).parent / "trainer" / "grpo_trainer.py").read_text()
    by_transformers = {"loss", "grad_norm", "learning_rate"}
    names = {one.metric.trl for one in metrics.described().values() if one.metric.trl} - by_transformers
    assert [name for name in names if f'"{name.replace("{}", "{reward_func_name}")}"' not in source] == []


# --- jobs

ANY: dict[Any, Any] = {
    str: "text",
    int: 7,
    float: 0.5,
    bool: True,
    dict: {"a": "b"},
    datetime: datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC),
    JobStatus: JobStatus.PAUSED,
    Phase: Phase.LOADING,
    Priority: Priority.HIGH,
}


def kinds_of(record: type) -> dict[str, Any]:
    return {name: plain_type(hint) for name, hint in get_type_hints(record).items()}


@dataclass(frozen=True, kw_only=True)
class MoodyJob(JobRecord):
    """A job with a field that only this test has."""

    mood: dict[str, int] = field(default_factory=dict[str, int])


def test_a_field_of_a_job_is_stored_and_read_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "JobRecord", MoodyJob)
    monkeypatch.setattr(job_store, "_KINDS", kinds_of(MoodyJob))
    record = MoodyJob(**{name: ANY[kind] for name, kind in kinds_of(MoodyJob).items()})
    times = {name: job_store._to_ms(ANY[datetime]) for name in job_store.TIMES}  # written by scripts
    stored = {**job_store._to_fields(record), **times}
    assert stored["mood"] == '{"a":"b"}'
    assert job_store._from_fields(stored) == record
    earlier = {name: text for name, text in stored.items() if name != "mood"}
    assert job_store._from_fields(earlier) == replace(record, mood={})


def test_a_phase_of_a_later_release_leaves_a_record_readable() -> None:
    assert job_store._from_fields({**job_store._to_fields(make_record()), "phase": "dreaming"}).phase is None


def test_what_is_shown_of_a_job_is_in_every_answer_in_the_order_of_earlier_releases() -> None:
    shown = list(shown_fields(schemas.Job))
    own = ("object", "progress", "error", "links")
    assert [name for name in shown if name not in own] == list(shown_fields(JobView))
    assert (shown[:2], shown.index("progress")) == (["id", "object"], shown.index("total_steps") + 1)
    record = replace(make_record(), epoch=3, reward=0.5, phase=Phase.TRAINING)
    answer = json.loads(encode_json(schemas.job_detail(record, None, None)))
    assert list(answer) == [*shown, "requested_spec", "waiting", "result", "use"]
    assert (answer["epoch"], answer["reward"], answer["phase"], answer["object"]) == (3, 0.5, "training", "job")
