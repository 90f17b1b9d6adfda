"""Every spec under examples/specs is accepted, named, and free of warnings but for those that it is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from api.cli import stack
from examples import demo
from grpo_core import strict_json
from grpo_core.estimates import warnings
from grpo_core.spec import JobSpec, parse_spec
from scripts import spec_docs

ROOT = Path(__file__).resolve().parents[2]
SPECS = sorted((ROOT / "examples" / "specs").rglob("*.json"))

MEANT = {"recipe.json": ["formats_exclude_each_other"], "recipe-16bit.json": ["formats_exclude_each_other"]}
"""The published rewards have this fault, and are wanted with it."""


def load(path: Path) -> JobSpec:
    return parse_spec(strict_json.loads(path.read_bytes()))


def test_there_are_examples() -> None:
    assert len(SPECS) >= 6


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_example(path: Path) -> None:
    spec = load(path)
    assert spec.name
    assert [warning.code for warning in warnings(spec)] == MEANT.get(path.name, [])


def test_examples_differ() -> None:
    assert len({load(path).digest() for path in SPECS}) == len(SPECS)


def test_the_published_recipe_differs_from_the_default_in_two_values_and_is_evaluated() -> None:
    default, recipe = parse_spec({}).as_dict(), load(ROOT / "examples" / "specs" / "recipe.json").as_dict()
    default["name"] = recipe["name"]
    default["model"]["precision"] = "4bit"
    default["rewards"]["mode"] = "published"
    default["evaluation"]["questions"] = 1319
    assert recipe == default


def test_the_reference_page_is_current() -> None:
    assert spec_docs.PAGE.read_text(encoding="utf-8") == spec_docs.page(), "run python scripts/spec_docs.py"


def test_the_reference_page_has_every_field_and_rule() -> None:
    page = spec_docs.page()
    for section, fields in parse_spec({}).as_dict().items():
        assert f"| `{section}` |" in page
        for name in fields if isinstance(fields, dict) else ():
            assert f"| `{name}` |" in page
    # A rule without a sentence, or a field without one, would leave an empty line or cell.
    assert "\n- \n" not in page
    assert "|  |" not in page


def test_the_demo_stays_out_of_the_folder_of_grpo_up() -> None:
    """That takes no folder that holds something else, and comes next in the README."""
    folders = [demo.DATA, *(lesson.models for lesson in demo.LESSONS.values())]
    assert not any(folder.is_relative_to(stack.DATA) for folder in folders)
