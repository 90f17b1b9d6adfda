"""The OpenAPI document says what everything is: a walk over all of its schemas, parameters and answers.

A new field or parameter gets its description where it is declared (`Meta`, `QueryParameter`, `Shown`) or, if its name
says the same everywhere, in `api.described`, and its example there; a new route lists its problems with `responses`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema_rs

from api import described, openapi
from api.app import create_app
from api.problems import PROBLEMS
from tests.unit.fakes import FakeJobService

Schema = dict[str, Any]
ERRORS_OF_ALL = {401, 403, 429, 500, 503}


@cache
def document() -> Schema:
    app = create_app(FakeJobService())  # type: ignore[arg-type]
    # Through JSON, as it is served.
    return json.loads(json.dumps(openapi.complete(app.openapi_schema.to_schema())))


def operations() -> Iterator[tuple[str, Schema]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def properties_of(where: str, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Every property in a schema, however deep, with its place."""
    for name, found in schema.get("properties", {}).items():
        yield f"{where}.{name}", found
        yield from properties_of(f"{where}.{name}", found)
    for part in described.parts_of(schema):
        yield from properties_of(where, part)


def all_properties() -> Iterator[tuple[str, Schema]]:
    for name, schema in document()["components"]["schemas"].items():
        yield from properties_of(name, schema)
    for name, operation in operations():
        contents = [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in (one for each in contents for one in each.get("content", {}).values()):
            yield from properties_of(f"{name} body", content["schema"])


def all_parameters() -> Iterator[tuple[str, Schema]]:
    for name, operation in operations():
        for parameter in operation["parameters"]:
            yield f"{name} {parameter['name']}", parameter


@cache
def registry() -> jsonschema_rs.Registry:
    return jsonschema_rs.Registry([("urn:document", document())])


def invalid(example: Any, schema: Schema) -> str | None:
    """What is wrong with an example of this schema."""
    alone = json.loads(json.dumps(schema).replace('"#/components/', '"urn:document#/components/'))
    validator = jsonschema_rs.Draft202012Validator(alone, registry=registry())
    error = next(iter(validator.iter_errors(example)), None)
    return error and error.message


def test_every_property_is_described() -> None:
    assert [name for name, found in all_properties() if not found.get("description")] == []


def test_every_property_has_a_valid_example() -> None:
    wrong: dict[str, Any] = {}
    for name, found in all_properties():
        if described.is_reference(found):
            continue
        examples = found.get("examples", [])
        why = "has none" if not examples else next(filter(None, (invalid(one, found) for one in examples)), None)
        wrong |= {name: why} if why else {}
    assert wrong == {}


def test_every_parameter_is_described_with_a_valid_example() -> None:
    wrong: dict[str, Any] = {}
    for name, found in all_parameters():
        if not found.get("description"):
            wrong[name] = "has no description"
        if "example" not in found:
            wrong[name] = "has no example"
        elif why := invalid(found["example"], found["schema"]):
            wrong[name] = why
    assert wrong == {}


def test_every_schema_and_every_operation_is_described() -> None:
    schemas = document()["components"]["schemas"]
    assert [name for name, schema in schemas.items() if not schema.get("description") and "enum" not in schema] == []
    texts = [(name, operation.get("summary"), operation.get("description")) for name, operation in operations()]
    assert [name for name, summary, description in texts if not (summary and description)] == []


def test_every_error_lists_its_problem_types() -> None:
    wrong: list[str] = []
    for name, operation in operations():
        for status, answer in operation["responses"].items():
            if int(status) < 400 or name == "GET /readyz":
                continue
            for media_type, content in answer["content"].items():
                codes = content.get("examples", {})
                if not codes:
                    wrong.append(f"{name} {status}: no problem type")
                for code, example in codes.items():
                    if media_type == "application/problem+json" and not is_problem(code, int(status), example["value"]):
                        wrong.append(f"{name} {status}: {code}")
                    if why := invalid(example["value"], content["schema"]):
                        wrong.append(f"{name} {status}: {why}")
    assert wrong == []


def is_problem(code: str, status: int, example: Schema) -> bool:
    kind = PROBLEMS[code]
    given = (example["type"], example["title"], example["status"], example["code"])
    return given == (f"urn:grpo:problem:{code}", kind.title, status, code) and kind.status == status


def test_every_route_with_a_key_lists_the_errors_of_all() -> None:
    for name, operation in operations():
        if operation.get("security") != [{}]:
            assert {int(status) for status in operation["responses"]} >= ERRORS_OF_ALL, name


WITHOUT_BODY = {
    *("cancelJob", "pauseJob", "resumeJob", "cancelGroup", "testWebhook"),
    *("cancelFineTuningJob", "pauseFineTuningJob", "resumeFineTuningJob"),
}
"""Commands that take none; every other POST or PATCH has one, which `api.openapi` describes."""


def test_every_body_is_described() -> None:
    commands = {found["operationId"]: found for name, found in operations() if name.startswith(("POST", "PATCH"))}
    assert {name for name, found in commands.items() if "requestBody" not in found} == WITHOUT_BODY


def test_no_meaning_and_no_example_is_for_what_no_longer_exists() -> None:
    names = {name.split(".")[-1] for name, _ in all_properties()} | {found["name"] for _, found in all_parameters()}
    places = {*document()["components"]["schemas"], *(operation["operationId"] for _, operation in operations())}
    for table in (described.MEANINGS, described.EXAMPLES):
        for key in table:
            where, dot, name = key.rstrip("?").rpartition(".")
            assert name in names, key
            assert not dot or where in places, key
