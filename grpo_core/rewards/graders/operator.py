"""The operator's settings for graders: judges by name, hosts of endpoints, and secrets.

    GRPO_JUDGES                  {"judge-main": {"base_url": "https://llm.example/v1", "model": "qwen3-32b",
                                  "key": "JUDGE_MAIN_KEY", "concurrency": 32}}
    GRPO_GRADER_ENDPOINT_HOSTS   graders.example,*.internal:8443
    GRPO_GRADER_SECRETS          {"tests": "TESTS_TOKEN"}

A key or a secret is given as the name of a variable, which is set only for training processes of jobs that use it. Owns
reading these three settings. Invariant: a job can only choose among the servers registered here, and no error shows a
key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grpo_core.egress import Host
from grpo_core.errors import GrpoError
from grpo_core.rewards.graders.models import AnyGrader, Endpoint, LabelModel, ScoreModel, members_of

JUDGES: Final = "GRPO_JUDGES"
ENDPOINT_HOSTS: Final = "GRPO_GRADER_ENDPOINT_HOSTS"
SECRETS: Final = "GRPO_GRADER_SECRETS"


class BadRegistration(GrpoError):
    """One of the operator's variables is invalid."""


class JudgeRegistration(BaseModel):
    """One judge: a model behind an OpenAI-compatible API."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(pattern=r"^https?://[^\s?#]+$")
    model: str = Field(min_length=1, max_length=256)
    key: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    """The variable that holds its key; None if it needs no key."""
    concurrency: int = Field(default=32, ge=1, le=1024)
    timeout_seconds: float = Field(default=60, gt=0, le=600)
    attempts: int = Field(default=4, ge=1, le=10)
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The field of its API that limits the tokens of an answer."""
    response_format: bool = True
    """Whether it accepts a JSON schema for its answer; if not, the prompt describes the format."""


def judges(environment: Mapping[str, str]) -> dict[str, JudgeRegistration]:
    """Return the judges by name. Raises `BadRegistration`."""
    try:
        return {name: JudgeRegistration.model_validate(one) for name, one in _object(environment, JUDGES).items()}
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise BadRegistration(f"{JUDGES} is wrong at {where}: {error.errors()[0]['msg']}") from None


def endpoint_hosts(environment: Mapping[str, str]) -> list[Host]:
    """Return the allowed hosts of endpoints. Raises `BadRegistration`."""
    try:
        return [Host.parse(entry) for entry in environment.get(ENDPOINT_HOSTS, "").split(",") if entry.strip()]
    except ValueError as error:
        raise BadRegistration(f"{ENDPOINT_HOSTS}: {error}") from None


def may_call(url: str, environment: Mapping[str, str]) -> bool:
    """Whether an endpoint's address has an allowed host, and no user or password."""
    asked = Host.of_url(url)
    if asked is None or "@" in urlsplit(url).netloc:
        return False
    return any(host.has(asked.pattern, asked.port) for host in endpoint_hosts(environment))


def secret_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that holds each secret, by the secret's name. Raises `BadRegistration`."""
    return {name: str(variable) for name, variable in _object(environment, SECRETS).items()}


def secret(reference: str, environment: Mapping[str, str]) -> str | None:
    """Return the value of `secret://name`; None if it is not set."""
    variable = secret_variables(environment).get(reference.removeprefix("secret://"))
    return environment.get(variable) if variable else None


def environment_for(graders: Mapping[str, AnyGrader], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a training process needs for its graders, and no others."""
    try:
        return _environment_for(graders, environment)
    except BadRegistration:  # the grader reports it, as a failure of the job
        return {}


def _environment_for(graders: Mapping[str, AnyGrader], environment: Mapping[str, str]) -> dict[str, str]:
    leaves = list(_leaves(graders))
    chosen: dict[str, str] = {}
    names = {leaf.model for leaf in leaves if isinstance(leaf, ScoreModel | LabelModel)}
    known = {name: one for name, one in _object(environment, JUDGES).items() if name in names} if names else {}
    if known:
        chosen[JUDGES] = json.dumps(known)
    variables = [cast("dict[str, Any]", one).get("key") for one in known.values() if isinstance(one, dict)]
    endpoints = [leaf for leaf in leaves if isinstance(leaf, Endpoint)]
    if endpoints and ENDPOINT_HOSTS in environment:
        chosen[ENDPOINT_HOSTS] = environment[ENDPOINT_HOSTS]
    wanted = {value.removeprefix("secret://") for leaf in endpoints for value in (leaf.headers or {}).values()}
    secrets = {name: one for name, one in secret_variables(environment).items() if name in wanted} if wanted else {}
    if secrets:
        chosen[SECRETS] = json.dumps(secrets)
    for variable in (*variables, *secrets.values()):
        if isinstance(variable, str) and variable in environment:
            chosen[variable] = environment[variable]
    return chosen


def calls_servers(graders: Mapping[str, AnyGrader]) -> bool:
    """Whether one of them asks a judge or an endpoint."""
    return any(isinstance(leaf, ScoreModel | LabelModel | Endpoint) for leaf in _leaves(graders))


def hosts_for(graders: Mapping[str, AnyGrader], environment: Mapping[str, str]) -> list[Host]:
    """Return the hosts that a job's graders connect to: those of its judges, and of its endpoints if allowed."""
    found: list[Host | None] = []
    try:
        known = judges(environment)
    except BadRegistration:
        return []  # the judge reports it, as a failure of the job
    for leaf in _leaves(graders):
        if isinstance(leaf, ScoreModel | LabelModel) and leaf.model in known:
            found.append(Host.of_url(known[leaf.model].base_url))
        if isinstance(leaf, Endpoint) and may_call(leaf.url, environment):
            found.append(Host.of_url(leaf.url))
    return [host for host in found if host is not None]


def unregistered(graders: Mapping[str, AnyGrader], environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield the pointer, problem and remedy of everything that graders name and the operator has not registered."""
    try:
        yield from _unregistered(graders, environment)
    except BadRegistration as error:
        yield "/rewards/graders", f"cannot be checked: {error}", "Ask the operator to correct it."


def _unregistered(graders: Mapping[str, AnyGrader], environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    known = judges(environment)
    for name, grader in graders.items():
        for key, leaf in members_of(name, grader).items():
            pointer = f"/rewards/graders/{key.replace('.', '/graders/', 1)}"
            if isinstance(leaf, ScoreModel | LabelModel) and leaf.model not in known:
                there = f"Use one of {', '.join(known)}." if known else f"Ask the operator to set {JUDGES}."
                yield f"{pointer}/model", f"{leaf.model!r} is not a judge that the operator has registered", there
            if isinstance(leaf, Endpoint):
                if not may_call(leaf.url, environment):
                    remedy = f"Ask the operator to list it in {ENDPOINT_HOSTS}."
                    yield f"{pointer}/url", "has a host that the operator has not allowed", remedy
                for header, value in (leaf.headers or {}).items():
                    if value.removeprefix("secret://") not in secret_variables(environment):
                        remedy = f"Ask the operator to add it to {SECRETS}."
                        problem = f"{value} is not a secret that the operator has registered"
                        yield f"{pointer}/headers/{header}", problem, remedy


def _leaves(graders: Mapping[str, AnyGrader]) -> Iterable[AnyGrader]:
    return (leaf for name, grader in graders.items() for leaf in members_of(name, grader).values())


def _object(environment: Mapping[str, str], variable: str) -> dict[str, Any]:
    text = environment.get(variable, "").strip()
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadRegistration(f"{variable} is not a JSON object.")
    return cast("dict[str, Any]", value)
