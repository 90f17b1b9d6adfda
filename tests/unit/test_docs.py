"""Documentation is tested: what the code has, the pages name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from api.problems import PROBLEMS
from api.settings import ApiSettings
from grpo_core.errors import EXIT_CODES, FAILURE_CLASSES
from jobs.service import ServiceSettings
from jobs.settings import QueueSettings, StorageSettings
from jobs.worker import WorkerSettings

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


@pytest.mark.parametrize("settings", [StorageSettings, QueueSettings, ServiceSettings, ApiSettings, WorkerSettings])
def test_every_setting_is_in_the_page_of_settings(settings: type[BaseSettings]) -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert [name for name in variables(settings) if f"`{name}`" not in page] == []


def test_every_problem_code_is_in_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [code for code in PROBLEMS if f"`{code}`" not in page] == []


def test_every_failure_class_and_exit_code_is_documented() -> None:
    assert [name for name in FAILURE_CLASSES if f"`{name}`" not in (ROOT / "docs" / "api.md").read_text()] == []
    page = (ROOT / "docs" / "run-folder.md").read_text()
    assert [name for name, code in EXIT_CODES.items() if f"| {code} | `{name}` |" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
