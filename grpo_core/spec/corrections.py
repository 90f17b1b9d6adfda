"""Corrections of invalid values: the value as it should be written.

Owns corrections only where they are certain enough to be copied: a number in quotes, an enum in capitals, a section
given as its most important field. Invariant: every value that is suggested is one that the field accepts, or, where
one cannot be given, none is.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from typing import Any, cast

from grpo_core.spec.hints import expected, field_schema, items_of
from grpo_core.spec.sections import HUB_NAME
from grpo_core.strict_json import Path

_SHOWN = 60
_MAIN_FIELD = {
    "model": "name",
    "lora": "rank",
    "optimizer": "name",
    "training": "steps",
    "sampling": "generations",
    "loss": "type",
    "data": "dataset",
    "evaluation": "questions",
    "resources": "gpus",
    "from_checkpoint": "job",
}
"""What somebody means who gives one value for a whole section."""

_SYNONYMS: dict[str, dict[str, str]] = {
    "engine": {"vllm": "unsloth", "tr": "trl"},
    "model.precision": {
        "bf16": "16bit", "bfloat16": "16bit", "fp16": "16bit", "float16": "16bit", "half": "16bit",
        "int4": "4bit", "nf4": "4bit", "bnb4bit": "4bit", "qlora": "4bit", "4": "4bit", "16": "16bit",
        "fp8": "8bit", "float8": "8bit", "8": "8bit",
    },
    "data.source": {
        "huggingface": "hub", "hf": "hub", "jsonl": "upload", "local": "upload", "uploaded": "upload", "bucket": "s3",
    },
    "optimizer.name": {"adamw": "adamw_torch", "adam": "adamw_torch", "adamw8bit": "adamw_8bit"},
    "loss.type": {"drgrpo": "dr_grpo"},
}  # fmt: skip


Refused = Callable[[Path, Any], str | None]
"""What a spec with nothing but a value at a path is answered with; None where it is accepted."""


def correction(field: dict[str, Any], path: Path, given: Any, refused: Refused) -> str | None:
    """One sentence with the value as it should be written; None if that is not certain."""
    kind = field.get("type")
    if given is None:
        return "Leave it out for the default." if kind == "object" and "properties" in field else None
    if "enum" in field:
        return _enum(field, path, given)
    if kind in ("integer", "number") and "const" not in field:
        return _number(field, given)
    if kind == "array":
        return _list(field, path, given)
    if kind == "object":
        return _section(path, given, refused)
    if kind == "string":
        return _text(path, given, refused)
    return None


def _enum(field: dict[str, Any], path: Path, given: Any) -> str | None:
    meant = _synonym(field["enum"], path, given)
    return f"Did you mean {meant}? It is {expected(field)}." if meant else None


def _synonym(values: list[str], path: Path, given: Any) -> str | None:
    plain = re.sub(r"[^a-z0-9]", "", str(given).lower())
    by_plain = {re.sub(r"[^a-z0-9]", "", value): value for value in values}
    meant = by_plain.get(plain) or _SYNONYMS.get(".".join(map(str, path)), {}).get(plain)
    close = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.75)
    return meant or (by_plain[close[0]] if close else None)


def _number(field: dict[str, Any], given: Any) -> str | None:
    how = "without quotes" if isinstance(given, str) else "without a decimal point"
    try:
        number = float(given.replace("_", "") if isinstance(given, str) else given)
    except (TypeError, ValueError, OverflowError):
        return None
    is_whole = field["type"] == "integer"
    if isinstance(given, bool | int) or not _within(field, number) or (is_whole and not number.is_integer()):
        return None
    return f"Write it {how}: {json.dumps(int(number) if is_whole else number)}."


def _within(field: dict[str, Any], number: float) -> bool:
    return (
        abs(number) < float("inf")
        and number >= field.get("minimum", number)
        and number <= field.get("maximum", number)
        and number > field.get("exclusiveMinimum", number - 1)
        and number < field.get("exclusiveMaximum", number + 1)
    )


def _list(field: dict[str, Any], path: Path, given: Any) -> str | None:
    if not isinstance(given, str):
        return None
    if path == ("lora", "target_modules") and given.startswith("all"):
        return "Leave it out for all seven, or give a list of some of them."
    values = cast("list[str]", items_of(field).get("enum", []))
    meant = _synonym(values, path, given)
    if meant:
        return f"Write a list: {json.dumps([meant])}."
    if given.lower() in ("none", "") and not field.get("minItems"):
        return "Write an empty list: []."
    return None


def _section(path: Path, given: Any, refused: Refused) -> str | None:
    """A section given as one value: the name of the model for `model`, and so on."""
    name = str(path[-1])
    main = _MAIN_FIELD.get(name)
    if name == "rewards" and isinstance(given, list):
        return 'Write {"weights": {"correctness": 1.0, ...}}; a reward with weight 0 is recorded and not paid.'
    if not main or isinstance(given, dict | list | bool):
        return None
    is_text = field_schema((*path, main)).get("type") == "string"
    if isinstance(given, str) != is_text or len(str(given)) > _SHOWN:
        return None
    more = ', "step": ...' if name == "from_checkpoint" else ""
    remedy = refused((*path, main), given)
    if remedy:
        return f"Write an object, {{{json.dumps(main)}: ...{more}}}. {remedy}"
    return f"Write {{{json.dumps(main)}: {json.dumps(given, ensure_ascii=False)}{more}}}."


def _text(path: Path, given: Any, refused: Refused) -> str | None:
    if isinstance(given, int | float) and not isinstance(given, bool) and not refused(path, str(given)):
        return f"Write it in quotes: {json.dumps(str(given))}."
    if path == ("model", "name") and isinstance(given, str):
        return _model_name(given)
    return None


def _model_name(given: str) -> str | None:
    address = re.fullmatch(r"(?:https?://)?huggingface\.co/([\w.-]+/[\w.-]+?)/?", given)
    if address and re.fullmatch(HUB_NAME, address[1]):
        return f"Write the name alone: {json.dumps(address[1])}."
    if given.startswith(("/", "./", "~", "s3://")):
        return (
            "Put the folder into the worker's GRPO_MODEL_DIR, as NAME or OWNER/NAME, and give that name; "
            "else give a name on the hub."
        )
    return None
