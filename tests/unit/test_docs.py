"""Documentation is tested: what the code has, the pages name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from api.app import create_app
from api.cli import COMMANDS, app
from api.problems import PROBLEMS
from api.routes.jobs import EventType
from api.settings import ApiSettings
from grpo_core.errors import EXIT_CODES, FailureClass
from jobs.service import ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.sources import SourceSettings
from jobs.worker import WorkerSettings
from tests.unit.fakes import FakeJobService

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


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
    "settings", [StorageSettings, QueueSettings, ServiceSettings, SourceSettings, ApiSettings, WorkerSettings]
)
def test_every_setting_is_in_the_page_of_settings(settings: type[BaseSettings]) -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert [name for name in variables(settings) if f"`{name}`" not in page] == []


FAILURES = {"JobFailure": 1, "fault": 0, "require_agreement": 0, "_bad_model": 0, "_bad_data": 0, "_failed": 0}
CODE_PLACES = FAILURES | {"warning": 0, "warn": 0, "_warn": 0}
"""Which argument of a call is the code of a failure or of a warning event; `code=` is one with `FailureReport`s too."""


def codes_in(source: str) -> set[str]:
    """The codes of failures and warnings that a module names where it makes them."""
    found: set[str] = set()
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        name = "" if re.search(r"\blog\.", called) else called.rpartition(".")[2]
        values = [keyword.value for keyword in call.keywords if keyword.arg == "code" and name == "FailureReport"]
        if (place := CODE_PLACES.get(name)) is not None:
            values += call.args[place : place + 1]
        found |= {one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return {code for code in found if re.fullmatch(r"[a-z0-9_]+", code)}


def test_every_code_of_a_failure_or_warning_is_in_the_page_of_failures() -> None:
    sources = [path.read_text() for package in ("grpo_core", "jobs") for path in (ROOT / package).rglob("*.py")]
    codes = set().union(*map(codes_in, sources))
    assert {"no_reward_variance", "worker_lost", "model_gated", "peft_disagrees", "data_changed", "hub_away"} <= codes
    page = (ROOT / "docs" / "failures.md").read_text()
    assert sorted(code for code in codes if f"`{code}`" not in page) == []
    rows = [line for line in page.splitlines() if line.startswith("|")]
    named = {code for row in rows for cell in row.split("|")[1:3] for code in re.findall(r"`([a-z0-9_]+)`", cell)}
    everything = "\n".join(sources)
    assert sorted(code for code in named if f'"{code}"' not in everything) == []


def modules_of(package: str) -> set[str]:
    """The modules and packages in a package's folder."""
    folder = ROOT / package
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    return names - {"__init__", "__main__"}


@pytest.mark.parametrize("package", ["grpo_core", "jobs"])
def test_every_module_is_on_the_map_of_its_package(package: str) -> None:
    text = (ROOT / package / "__init__.py").read_text().partition("Where to look:")[2].partition('"""')[0]
    rows = [re.split(r" {2,}", line.strip(), maxsplit=1) for line in text.splitlines() if line.strip()]
    listed = [name for _, names in rows for name in names.split(", ")]
    assert sorted(listed) == sorted(modules_of(package))


def test_torch_comes_only_with_what_needs_it() -> None:
    """The API and the worker import the rest, on machines that have no torch."""
    light = sorted(modules_of("grpo_core") - {"checkpoints", "tensor_tree", "selftest", "probes", "stock"})
    code = "import importlib, sys\n" + "".join(f"importlib.import_module('grpo_core.{name}')\n" for name in light)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_every_problem_code_is_in_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [code for code in PROBLEMS if f"`{code}`" not in page] == []


def test_every_failure_class_and_exit_code_is_documented() -> None:
    assert [name for name in get_args(FailureClass) if f"`{name}`" not in (ROOT / "docs" / "api.md").read_text()] == []
    page = (ROOT / "docs" / "run-folder.md").read_text()
    assert [name for name, code in EXIT_CODES.items() if f"| {code} | `{name}` |" not in page] == []


def test_every_event_type_is_documented() -> None:
    types = get_args(EventType)
    for page in ("api.md", "run-folder.md"):
        text = (ROOT / "docs" / page).read_text()
        assert [name for name in types if f"| `{name}` |" not in text] == [], page


def test_every_route_is_in_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    document = create_app(FakeJobService()).openapi_schema.to_schema()  # type: ignore[arg-type]
    routes = [
        f"{method.upper()} {re.sub('{[a-z_]+}', '{id}', path)}"
        for path, methods in document["paths"].items()
        for method in methods
    ]
    assert [route for route in routes if f"`{route}`" not in page and route != "GET /schema/job"] == []
    assert "`/schema/job`" in page


def cli_section(words: str) -> str:
    """What docs/cli.md says of a command: the text below its heading."""
    page = (ROOT / "docs" / "cli.md").read_text()
    match = re.search(rf"^### `grpo {words}[A-Z_ ]*`\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    assert match is not None, f"docs/cli.md has no section for grpo {words}"
    return match[0]


@pytest.mark.parametrize("words", [words for words, _, _ in COMMANDS])
def test_every_command_and_option_is_documented_and_no_other(words: str) -> None:
    command = app
    for word in words.split():
        command = command[word]
    names = {name for argument in command.assemble_argument_collection() for name in argument.names}
    section = cli_section(words)
    heading = section.splitlines()[0]
    assert [name for name in names if not name.startswith("--") and name not in heading] == []
    assert set(re.findall(r"`(--[a-z0-9-]+)`", section)) == {name for name in names if name.startswith("--")}


def test_no_command_is_documented_that_there_is_not() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    documented = {" ".join(re.findall(r"[a-z]+", words)) for words in re.findall(r"^### `grpo (.*)`$", page, re.M)}
    assert documented == {words for words, _, _ in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
