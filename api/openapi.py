"""The OpenAPI 3.1 document and its page: what Litestar derives from the handlers, completed where it cannot know.

Owns the parts that handlers read by themselves: request bodies, the metadata filter, the resolved spec in answers.
Invariant: the body of POST /jobs is the job spec's own JSON Schema, not a copy of it.
"""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any, Final, Literal, cast, get_origin

from litestar import Request, Router
from litestar.connection import ASGIConnection
from litestar.exceptions import NotFoundException
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.openapi.spec import Components, License, Schema, SecurityScheme, Server
from litestar.params import ParameterKwarg
from litestar.plugins import OpenAPISchemaPlugin
from litestar.types import Empty
from litestar.typing import FieldDefinition

from api import schemas
from api.auth import PUBLIC
from api.bodies import JSON, JSONL
from api.described import describe, operations
from api.idempotency import KEY_PATTERN
from api.metric_table import MEDIA_TYPE as CSV
from api.openai import objects
from api.openai.multipart import PURPOSES
from api.streams import MEDIA_TYPE as EVENT_STREAM
from grpo_core import __version__, estimates
from grpo_core.reasons import Phase
from grpo_core.run_dir import records
from grpo_core.scoring.requests import MAX_ROWS
from grpo_core.shown import Shown, plain_type, shown_fields
from grpo_core.spec import JOB_ID, json_schema
from jobs.auth.api_keys import OWNER, OWNER_SCOPES, SCOPES
from jobs.read import rollouts
from jobs.store import job
from jobs.store.job import Priority
from jobs.webhooks.address import MAX_URL
from jobs.webhooks.events import WebhookEvent

REF = "#/components/schemas/"
_DEFINED_IN: Final = (schemas, objects, estimates, rollouts, records, job)
"""Modules with the classes that are components."""

DESCRIPTION = """\
Trains LoRA adapters with GRPO from a JSON job.

Every request needs `Authorization: Bearer KEY`, except the probes and this page. Errors are RFC 9457 problem
documents: `code` says which, `errors` names every invalid field with its remedy, `request_id` finds it in the log.
"""

PAGE = b"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>GRPO jobs: the API</title>
</head>
<body>
<redoc spec-url="/schema/openapi.json" disable-search="true" hide-loading="true"></redoc>
<script src="/schema/redoc.js"></script>
<noscript>This page needs JavaScript. The document itself is at /schema/openapi.json.</noscript>
</body>
</html>
"""

# The script creates style sheets at run time, hence unsafe-inline for styles. Only our own script runs.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Document(JsonRenderPlugin):
    """Serves the completed document at /schema/openapi.json."""

    def __init__(self) -> None:
        super().__init__(path="/openapi.json", media_type=cast("Any", JSON))
        self._encoded: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        """The document as JSON, made once."""
        if self._encoded is None:
            self._encoded = json.dumps(complete(openapi_schema), ensure_ascii=False).encode()
        return self._encoded


class Page(OpenAPIRenderPlugin):
    """Serves the documentation page at /schema."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        """The page; the document is loaded by its script."""
        return PAGE


class RecordSchemas(OpenAPISchemaPlugin):
    """Describes records by what is `Shown` of their fields."""

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        """Whether it is a record."""
        return field_definition.is_dataclass_type and bool(shown_fields(field_definition.type_))

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Schema:
        """The component of a record."""
        shown = shown_fields(field_definition.type_)
        return schema_creator.create_component_schema(
            field_definition,
            required=sorted(name for name, field in shown.items() if get_origin(field.type) is not Literal),
            property_fields={
                name: FieldDefinition.from_kwarg(
                    _as_sent(field.type),
                    name,
                    kwarg_definition=_described(field.mark),
                    default=field.default if get_origin(field.type) is Literal else Empty,
                )
                for name, field in shown.items()
            },
        )


def _as_sent(kind: Any) -> Any:
    """A phase as a list of words: the enum would be a component of the document, unlike in earlier releases."""
    words: Any = Literal[tuple(map(str, Phase))]
    return words | None if plain_type(kind) is Phase else kind


def _described(mark: Shown) -> ParameterKwarg:
    least, most = (None if bound is None else float(bound) for bound in (mark.least, mark.most))
    return ParameterKwarg(description=mark.meaning or None, pattern=mark.pattern, ge=least, le=most)


async def _only_known(connection: ASGIConnection[Any, Any, Any, Any], _handler: BaseRouteHandler) -> None:
    """Litestar answers unknown addresses below /schema with its own page; here they are problems like any other."""
    if "path" in connection.path_params:
        raise NotFoundException


def config() -> OpenAPIConfig:
    """What the application needs to know to describe itself."""
    return OpenAPIConfig(
        title="GRPO jobs",
        version=__version__,
        description=DESCRIPTION,
        license=License(name="Apache-2.0", identifier="Apache-2.0"),
        servers=[
            Server(url="/"),
            Server(url="/v1", description="Preview: the same routes. They may still change until this is no preview."),
        ],
        components=Components(
            security_schemes={
                "key": SecurityScheme(type="http", scheme="bearer", description="A key from `grpo keys create`")
            }
        ),
        security=[{"key": []}],
        use_handler_docstrings=True,
        render_plugins=[Document(), Page()],
        openapi_router=Router(
            "/schema",
            route_handlers=[],
            guards=[_only_known],
            include_in_schema=False,
            opt=dict(PUBLIC),
            response_headers={"Content-Security-Policy": PAGE_POLICY},
        ),
    )


def complete(derived: dict[str, Any]) -> dict[str, Any]:
    """Litestar's document with the parts that it cannot derive."""
    document = copy.deepcopy(derived)
    components = document["components"]["schemas"]
    components |= _spec_components()
    for name, component in components.items():
        component.setdefault("description", _meaning_of(name))
    for answer in ("Job", "JobDetail", "SubmittedJob", "DryRun"):
        components[answer]["properties"]["spec"] = {"$ref": f"{REF}JobSpec"}
    for operation in operations(document):
        for parameter in operation.get("parameters", []):
            parameter["schema"] = _sendable(parameter["schema"])
        operation["parameters"] = [
            *operation.get("parameters", []),
            *_EXTRA_PARAMETERS.get(operation["operationId"], []),
        ]
        if any(parameter["name"] == "cursor" for parameter in operation["parameters"]):
            operation["responses"]["200"].setdefault("headers", {})["Link"] = _LINK
        for answer in operation["responses"].values():
            answer.setdefault("headers", {})["X-Request-Id"] = _REQUEST_ID
            for example in (one for held in answer.get("content", {}).values() for one in _examples_of(held)):
                example.pop("id", None)  # Litestar's own, and no field of OpenAPI
                if "error" in example["value"]:
                    example["value"]["error"].setdefault("param", None)  # Litestar leaves out null
        if operation["operationId"] in _BODIES:
            operation["requestBody"] = _BODIES[operation["operationId"]]
    describe(document)
    document["paths"]["/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"][EVENT_STREAM] = _STREAM
    document["paths"]["/jobs/{job_id}/metrics"]["get"]["responses"]["200"]["content"][CSV] = _TABLE
    document["paths"]["/usage/gpu-hours"]["get"]["responses"]["200"]["content"][CSV] = _USAGE_TABLE
    return document


def _meaning_of(component: str) -> str:
    """What the class of a component says first."""
    defined = next((found for each in _DEFINED_IN if (found := getattr(each, component, None)) is not None), None)
    return inspect.cleandoc((defined and defined.__doc__) or "Any JSON value")


def _examples_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return list(content.get("examples", {}).values())


def _sendable(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter's schema without null, which no address can hold, and with whole bounds written as such."""
    options: list[dict[str, Any]] = [option for option in schema.get("oneOf", []) if option.get("type") != "null"]
    if options:
        schema = {**options[0], **{key: value for key, value in schema.items() if key != "oneOf"}}
    if isinstance(schema.get("type"), list):
        schema = {**schema, "type": next(kind for kind in schema["type"] if kind != "null")}
    if "enum" in schema:
        schema = {**schema, "enum": [value for value in schema["enum"] if value is not None]}
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in schema.items()}


def _spec_components() -> dict[str, Any]:
    """The job spec and its sections as components: the same schemas with references to their new places."""
    text = json.dumps(json_schema()).replace('"#/$defs/', f'"{REF}')
    schema: dict[str, Any] = json.loads(text)
    sections: dict[str, Any] = schema.pop("$defs")
    schema.pop("$schema")
    return {**sections, "JobSpec": schema}


_REQUEST_ID = {"description": "Identifies the request in the service's log", "schema": {"type": "string"}}

_LINK = {
    "description": 'The next page, as `<ADDRESS>; rel="next"`; absent on the last',
    "schema": {"type": "string"},
}

_GRADER: dict[str, Any] = {"type": "object", "description": "A grader, as in rewards.graders of a job spec"}
_EXAMPLE_GRADER: dict[str, Any] = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
_ITEM: dict[str, Any] = {"type": "object", "description": "Columns of the data set's row"}
_SAMPLE: dict[str, Any] = {"type": "string", "description": "The completion"}


def _object_body(description: str, required: list[str], properties: dict[str, Any], example: Any) -> dict[str, Any]:
    schema = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
    content = {JSON: {"schema": schema, "example": example}}
    return {"required": True, "description": description, "content": content}


def _parts(component: str, *names: str, where: str = "") -> dict[str, Any]:
    """Fields of the job spec that are fields of a body too. Not by reference: generators follow only whole schemas."""
    properties = _spec_components()[component]["properties"]
    return {name: {**properties[name], "description": f"As `{where}{name}` of a job spec"} for name in names}


_RUN = _object_body(
    "A grader, a completion and the row it answers, in OpenAI's fields.",
    ["grader", "model_sample"],
    {"grader": _GRADER, "item": _ITEM, "model_sample": _SAMPLE},
    {"grader": _EXAMPLE_GRADER, "item": {"answer": "12"}, "model_sample": "12"},
)
_VALIDATION = _object_body("A grader.", ["grader"], {"grader": _GRADER}, {"grader": _EXAMPLE_GRADER})

_OPENAI_JOB: dict[str, Any] = {
    "model": {"type": "string", "minLength": 1, "description": "A hub name, a folder of models, or `job-ID:step-50`"},
    "training_file": {"type": "string", "description": "The id of a file"},
    "validation_file": {"type": ["string", "null"]},
    "suffix": {"type": ["string", "null"], "maxLength": 64},
    "seed": {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31 - 1},
    "metadata": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
    "integrations": {"type": ["array", "null"], "items": {"type": "object"}},
    "method": {
        "type": "object",
        "required": ["type", "reinforcement"],
        "properties": {
            "type": {"const": "reinforcement"},
            "reinforcement": {
                "type": "object",
                "properties": {
                    "grader": _GRADER,
                    "response_format": {"type": ["object", "null"]},
                    "hyperparameters": {"type": "object"},
                },
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    },
    "grpo": {"$ref": f"{REF}JobSpec"},
}
"""docs/how-to/openai-sdk.md says what becomes of each field."""

_SPEC_BODY: dict[str, Any] = {
    "required": True,
    "description": "A job spec. Omitted fields have the recipe's values.",
    "content": {JSON: {"schema": {"$ref": f"{REF}JobSpec"}, "example": {"name": "the recipe"}}},
}

_MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"], "description": "Who says it"},
        "content": {"type": "string", "description": "What is said"},
    },
}
_CHAT: dict[str, Any] = {
    "model": {"type": "string", "description": "An `id` of GET /v1/models"},
    "messages": {"type": "array", "minItems": 1, "items": _MESSAGE, "description": "The conversation so far"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "description": "0: always the likeliest token"},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1, "description": "Only the likeliest tokens of this share"},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "description": "Tokens of an answer, at most"},
    "n": {"type": "integer", "minimum": 1, "description": "Number of answers"},
    "seed": {"type": "integer", "description": "The same seed gives the same answer"},
    "response_format": {
        "type": "object",
        "description": "`text`, `json_object`, or `json_schema` with the schema that answers must match",
    },
    "stream": {"type": "boolean", "description": "Send the answer as it is written, as server-sent events"},
}

_BODIES: dict[str, Any] = {
    "previewDataset": _SPEC_BODY,
    "submitGroup": _object_body(
        "A job spec, and the values that its fields take.",
        ["spec"],
        {
            "spec": {"$ref": f"{REF}JobSpec", "description": "What all of the jobs have in common"},
            "grid": {
                "type": "object",
                "additionalProperties": {"type": "array", "minItems": 1, "items": {}},
                "description": "Fields, named with dots, each with its values; a job is made of each combination",
            },
            "repeat": {"type": "integer", "minimum": 1, "maximum": 100, "description": "Jobs of each combination"},
        },
        {"spec": {"name": "sweep"}, "grid": {"optimizer.learning_rate": [1e-5, 3e-5]}, "repeat": 2},
    ),
    "serve": _object_body(
        "One of your jobs, or a base model, and for how long to serve it.",
        [],
        {
            **_parts("ServingSection", "job", "steps", "ttl_seconds", "idle_seconds", where="serving."),
            "model": {"type": "string", "description": "Instead of `job`: a base model alone"},
            **_parts("JobSpec", "name", "metadata", "resources", "data"),
        },
        {"job": "job-01ARZ3NDEKTSV4RRFFQ69G5FAV", "steps": [50], "ttl_seconds": 900},
    ),
    "createChatCompletion": {
        "required": True,
        "description": "OpenAI's request. Other parameters of OpenAI's are refused unless they have no effect.",
        "content": {
            JSON: {
                "schema": {"type": "object", "required": ["model", "messages"], "properties": _CHAT},
                "example": {
                    "model": "job-01ARZ3NDEKTSV4RRFFQ69G5FAV",
                    "messages": [{"role": "user", "content": "3+4="}],
                },
            }
        },
    },
    "runGrader": _RUN,
    "validateGrader": _VALIDATION,
    "changeJob": _object_body(
        "The new priority.",
        ["priority"],
        {"priority": {"enum": [*Priority], "description": Priority.described()}},
        {"priority": "high"},
    ),
    "actOnJobs": _object_body(
        "What to do, with up to 100 jobs.",
        ["action", "jobs"],
        {
            "action": {"enum": ["cancel", "pause", "resume", "delete"], "description": "What to do with each job"},
            "jobs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 100,
                "items": {"type": "string", "pattern": JOB_ID},
                "description": "Ids of jobs",
            },
        },
        {"action": "cancel", "jobs": ["job-01ARZ3NDEKTSV4RRFFQ69G5FAV"]},
    ),
    "drainWorker": {
        **_object_body(
            "What becomes of its job; without a body it finishes.",
            [],
            {"mode": {"enum": ["finish", "checkpoint"], "description": "`finish` by default"}},
            {"mode": "checkpoint"},
        ),
        "required": False,
    },
    "scoreRows": _object_body(
        "A job spec, of which `rewards`, `data` and `sampling.response_format` matter, and up to 200 rows.",
        ["spec", "rows"],
        {
            "spec": {"$ref": f"{REF}JobSpec"},
            "rows": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_ROWS,
                "items": {
                    "type": "object",
                    "required": ["model_sample"],
                    "properties": {"item": _ITEM, "model_sample": _SAMPLE},
                    "additionalProperties": False,
                },
            },
        },
        {
            "spec": {"rewards": {"graders": {"exact": _EXAMPLE_GRADER}}, "data": {"answer_column": "answer"}},
            "rows": [{"item": {"answer": "12"}, "model_sample": "12"}],
        },
    ),
    "runOpenAIGrader": _RUN,
    "validateOpenAIGrader": _VALIDATION,
    "createOpenAIFile": {
        "required": True,
        "description": "A form with a JSONL file: one object per line, with `messages` and what graders read.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                    "additionalProperties": False,
                }
            }
        },
    },
    "createFineTuningJob": _object_body(
        "OpenAI's job with the method `reinforcement`; `grpo` has sections of a job spec.",
        ["model", "training_file", "method"],
        _OPENAI_JOB,
        {
            "model": "Qwen/Qwen2.5-7B-Instruct",
            "training_file": "ds-01JDZ5T1E4Q8Y7M2N3P4R5S6T7",
            "method": {
                "type": "reinforcement",
                "reinforcement": {"grader": _EXAMPLE_GRADER, "hyperparameters": {"n_epochs": 2, "batch_size": 4}},
            },
        },
    ),
    "createKey": {
        **_object_body(
            "What the key is for; without a body it is one of yours for jobs and data.",
            [],
            {
                "owner": {
                    "type": "string",
                    "pattern": f"^{OWNER}$",
                    "description": "Whose jobs it sees; you by default",
                },
                "scopes": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"enum": [*SCOPES]},
                    "description": f"What it may do; {', '.join(OWNER_SCOPES)} by default",
                },
                "name": {"type": "string", "minLength": 1, "maxLength": 100, "description": "A label"},
                "expires_at": {
                    "type": "string",
                    "format": "date-time",
                    "description": "When it expires; never by default",
                },
            },
            {"scopes": ["jobs:read", "jobs:write"], "name": "laptop", "expires_at": "2027-01-01T00:00:00Z"},
        ),
        "required": False,
    },
    "createWebhook": _object_body(
        "A URL, and the names of events; without them, all.",
        ["url"],
        {
            "url": {"type": "string", "maxLength": MAX_URL, "description": "https, at a public address"},
            "events": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "string", "enum": [event.value for event in WebhookEvent]},
            },
        },
        {"url": "https://example.com/hooks", "events": ["fine_tuning.job.succeeded", "fine_tuning.job.failed"]},
    ),
    "submitExport": _object_body(
        "One of your jobs, and the form to write its adapter in.",
        ["job"],
        {
            **_parts("ExportSection", "job", "step", "format", "type", where="export."),
            **_parts("JobSpec", "name", "metadata", "resources"),
        },
        {"job": "job-01ARZ3NDEKTSV4RRFFQ69G5FAV", "format": "gguf", "type": "q8_0"},
    ),
    "submitJob": _SPEC_BODY,
    "uploadDataset": {
        "required": True,
        "description": "One JSON object per line, each with a question and an answer, by default under those names.",
        "content": {
            media_type: {
                "schema": {"type": "string", "format": "binary"},
                "example": '{"question": "6+6=?", "answer": "12"}\n',
            }
            for media_type in JSONL
        },
    },
}

_IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": (
        "Makes the request safe to send again: for 48 hours, the same key with the same body gets the first answer and "
        "makes nothing new. Use a new one, such as a UUID, for each new request."
    ),
    "schema": {"type": "string", "pattern": KEY_PATTERN},
}

_STREAM: dict[str, Any] = {
    "schema": {"type": "string"},
    "example": 'id: 7\nevent: metric\ndata: {"v": 1, "seq": 7, "epoch": 1, "type": "metric", "step": 3, ...}\n\n',
}
"""Server-sent events: `id` is the event's number, `event` its type, `data` the event as JSON in one line."""

_TABLE: dict[str, Any] = {
    "schema": {"type": "string"},
    "example": "step,epoch,reward,reward_std,...\r\n1,1,0.5,0.25,...\r\n",
}
"""One line per step; a column for each number, such as `rewards.correctness`."""

_USAGE_TABLE: dict[str, Any] = {
    "schema": {"type": "string"},
    "example": "start,owner,gpu,gpu_hours,jobs,cost,currency\r\n2026-11-30,ann,NVIDIA H200,12.500000,3,43.7500,EUR\r\n",
}
"""One line per period, owner and kind of GPU."""

_METADATA: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "description": "Only jobs with these pairs: metadata[key]=value",
    "style": "deepObject",
    "explode": True,
    "schema": {
        "type": "object",
        "propertyNames": {"minLength": 1, "maxLength": 64, "pattern": r"^[^\x00-\x1f\x7f]+$"},
        "additionalProperties": {"type": "string", "maxLength": 512},
        "maxProperties": 16,
    },
}

_EXTRA_PARAMETERS: dict[str, list[Any]] = {
    "serve": [_IDEMPOTENCY_KEY],
    "submitExport": [_IDEMPOTENCY_KEY],
    "submitGroup": [_IDEMPOTENCY_KEY],
    "submitJob": [_IDEMPOTENCY_KEY],
    "uploadDataset": [_IDEMPOTENCY_KEY],
    "listEvents": [
        {
            "name": "Last-Event-ID",
            "in": "header",
            "description": "With text/event-stream: the last event that was read; takes precedence over `after`",
            "schema": {"type": "string", "pattern": "^[0-9]{1,15}$"},
        }
    ],
    "listJobs": [_METADATA],
    "listFineTuningJobs": [_METADATA],
}
