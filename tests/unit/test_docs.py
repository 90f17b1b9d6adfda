"""Documentation is tested: what the code has, the pages name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from api.app import create_app
from api.cli import ALL
from api.problems import PROBLEMS
from api.settings import ApiSettings
from grpo_client.cli import make_app
from grpo_core.reasons import FailureCode
from jobs.lifecycle.retention import RetentionSettings
from jobs.lifecycle.time_limit import TimeLimitSettings
from jobs.sealing import SealingSettings
from jobs.service import ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.audit_log import AuditSettings
from jobs.store.s3_datasets import SourceSettings
from jobs.store.valkey_checks import ValkeySettings
from jobs.usage.prices import PriceSettings
from jobs.usage.quotas import QuotaSettings
from jobs.webhooks.settings import WebhookSettings
from jobs.worker.worker import WorkerSettings
from scripts import plain_english
from tests.unit.fakes import FakeJobService

ROOT = Path(__file__).resolve().parents[2]
WORDS = [command.words for each in ALL for command in each.commands]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def variables(settings: type[BaseSettings]) -> list[str]:
    """Every environment variable a settings class reads."""
    prefix = settings.model_config.get("env_prefix", "")
    found: list[str] = []
    for name, field in settings.model_fields.items():
        alias = field.validation_alias
        if isinstance(alias, AliasChoices):
            found += [str(choice) for choice in alias.choices]
        else:
            found.append(alias if isinstance(alias, str) else f"{prefix}{name}".upper())
    return found


@pytest.mark.parametrize(
    "settings",
    [
        *(StorageSettings, QueueSettings, ServiceSettings, SourceSettings, ApiSettings, WorkerSettings),
        *(RetentionSettings, TimeLimitSettings, QuotaSettings, AuditSettings, ValkeySettings, WebhookSettings),
        *(PriceSettings, SealingSettings),
    ],
)
def test_every_setting_is_in_the_page_of_settings(settings: type[BaseSettings]) -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert [name for name in variables(settings) if f"`{name}`" not in page] == []


def test_every_failure_code_is_used_and_the_page_says_what_to_do() -> None:
    code = "".join(path.read_text() for package in ("grpo_core", "jobs") for path in (ROOT / package).rglob("*.py"))
    assert [one for one in FailureCode if f"FailureCode.{one.name}" not in code] == []
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", (ROOT / "docs/reference/failures.md").read_text(), re.MULTILINE)
    assert set(FailureCode) <= {code for code, _ in rows}


TAKE_A_CODE = {"JobFailure", "fault", "GraderUnavailable", "FailureReport.of"}


def test_no_failure_code_is_a_plain_string() -> None:
    """A code that is written where it is used has no sentence, and is missing in the page."""
    plain = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for package in ("grpo_core", "jobs", "api")
        for path in (ROOT / package).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in TAKE_A_CODE
        and any(isinstance(one, ast.Constant) for one in call.args[:1])
    ]
    assert plain == []


def modules_of(package: str) -> set[str]:
    """The modules and packages of a package, by dotted name."""
    found = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    names = {".".join(path.parts).removesuffix(".__init__") for path in found}
    return {name for name in names if not name.endswith(".__main__")}


def test_torch_comes_only_with_what_needs_it() -> None:
    """The API and the worker import the rest, on machines that have no torch."""
    heavy = (
        "grpo_core.eight_bits",
        "grpo_core.engines.",
        "grpo_core.export.",
        *(f"grpo_core.serving.{name}" for name in ("asked", "batch", "completion", "guide", "model", "native_model")),
        *(
            f"grpo_core.serving.{name}"
            for name in ("pool", "run", "stack", "transformers_model", "vllm_batch", "vllm_engine")
        ),
        "grpo_core.selftest.",
        "grpo_core.checkpoints.writer",
        "grpo_core.checkpoints.tensor_tree",
        "grpo_core.compat.trl",
    )
    light = sorted(name for name in modules_of("grpo_core") if not name.startswith(heavy))
    code = "import importlib, sys\n" + "".join(f"importlib.import_module('{name}')\n" for name in light)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_every_problem_code_is_in_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert [code for code in PROBLEMS if f"`{code}`" not in page] == []


def test_every_route_is_in_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    document = create_app(FakeJobService()).openapi_schema.to_schema()  # type: ignore[arg-type]
    routes = [
        f"{method.upper()} {re.sub('{[a-z_]+}', '{id}', path)}"
        for path, methods in document["paths"].items()
        for method in methods
    ]
    assert [route for route in routes if f"`{route}`" not in page and route != "GET /schema/job"] == []
    assert "`/schema/job`" in page


def cli_section(words: str) -> str:
    """What docs/reference/cli.md says of a command: the text below its heading."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    match = re.search(rf"^### `grpo {words}[A-Z_ ]*`\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    assert match is not None, f"docs/reference/cli.md has no section for grpo {words}"
    return match[0]


@pytest.mark.parametrize("words", WORDS)
def test_every_command_and_option_is_documented_and_no_other(words: str) -> None:
    command = make_app(ALL)
    for word in words.split():
        command = command[word]
    names = {name for argument in command.assemble_argument_collection() for name in argument.names}
    section = cli_section(words)
    heading = section.splitlines()[0]
    assert [name for name in names if not name.startswith("--") and name not in heading] == []
    assert set(re.findall(r"`(--[a-z0-9-]+)`", section)) == {name for name in names if name.startswith("--")}


def test_no_command_is_documented_that_there_is_not() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    documented = {" ".join(re.findall(r"[a-z-]+", words)) for words in re.findall(r"^### `grpo (.*)`$", page, re.M)}
    assert documented == set(WORDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_check_of_english_finds_the_dialect_and_leaves_plain_sentences() -> None:
    text = "A run goes on from step 5. Whoever asks is told so.\nOf a job that ended, nobody reads\nit for good."
    found = [phrase for phrase in plain_english.PHRASES if re.search(phrase, text, re.IGNORECASE | re.MULTILINE)]
    assert len(found) == 6
    plain = "The run resumes from step 5. The client gets an answer that says so. A job's records are kept for 7 days."
    assert [phrase for phrase in plain_english.PHRASES if re.search(phrase, plain, re.IGNORECASE | re.MULTILINE)] == []


def test_every_test_that_the_threat_model_names_is_there() -> None:
    """SECURITY.md claims nothing without a test."""
    named = re.findall(r"`(tests/[a-z_/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    missing = [
        f"{path}::{test}"
        for path, test in named
        if not (ROOT / path).exists() or f"def {test}" not in (ROOT / path).read_text()
    ]
    assert missing == []


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if f"({page}" not in index] == ["index.md"]
