"""POST /v1/chat/completions and GET /v1/models: OpenAI's shapes for the models that sessions serve.

Owns the form of the answers, whole and streamed; `chat_request` reads the parameters, `relay` brings the pieces.
Invariant: an error before the first piece is an HTTP status; a later one is the last event of the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.concurrency import sync_to_thread
from litestar.openapi import ResponseSpec
from litestar.params import PathParameter
from litestar.response import Stream

from api.auth import scope
from api.bodies import JSON_ERRORS, read_json
from api.dependencies import Owner, Service
from api.openai import served as names
from api.openai.chat_request import Asked, parse
from api.openai.errors import responses
from api.problems import ApiError
from api.relay import Relay
from api.schemas import ServedModel, ServedModelList
from grpo_core.serving.wire import Piece

READ = scope("jobs:read")
EXPECTED = 'A request is expected in the body: {"model": "JOB", "messages": [{"role": "user", "content": "..."}]}.'
ERRORS = (*JSON_ERRORS, "rejected", "not_found", "not_serving", "overloaded", "session_ended")


@get(
    "/models",
    operation_id="listModels",
    summary="The models that are served now",
    opt=READ,
    responses=responses(),
    sync_to_thread=True,
)
def list_models(owner: Owner, service: Service) -> ServedModelList:
    """Every model of your sessions, the newest session first."""
    found = [model for session in service.sessions(owner) for model in names.models_of(session)]
    return ServedModelList(data=list({model.id: model for model in reversed(found)}.values())[::-1])


@get(
    "/models/{model:path}",
    operation_id="getModel",
    summary="A model that is served now",
    opt=READ,
    responses=responses("bad_query", "not_found", "not_serving"),
    sync_to_thread=True,
)
def get_model(
    model: Annotated[str, PathParameter(description="Its `id`")], owner: Owner, service: Service
) -> ServedModel:
    """One of the served models."""
    session, adapter = names.find(service, owner, str(model).removeprefix("/"))
    return names.model_of(session, adapter)


@post(
    "/chat/completions",
    operation_id="createChatCompletion",
    summary="Ask a served model",
    opt=READ,
    status_code=200,
    response_description="OpenAI's chat completion, or with `stream` its chunks as server-sent events",
    responses={200: ResponseSpec(dict[str, Any], generate_examples=False), **responses(*ERRORS)},
)
async def chat(request: Request[Any, Any, Any], owner: Owner, service: Service) -> Response[Any]:
    """Answer a conversation with the model of a session. A conversation without a system message gets the job's own
    system prompt and worked examples. Greedy with temperature 0; the same seed gives the same answer."""
    asked = await read_json(request, parse, expected=EXPECTED)
    session, adapter = await sync_to_thread(names.find, service, owner, asked.model)
    if asked.request.schema is not None:
        await sync_to_thread(names.require_schema, session, asked.request.schema)
    relay: Relay = request.app.state.relay
    pieces = relay.ask(session, replace(asked.request, adapter=adapter))
    answer = _Answer(asked, session.engine)
    gone = asyncio.ensure_future(_gone(request))
    try:
        if not asked.stream:
            return Response(await _unless(gone, _whole(answer, pieces)))
        first = await _unless(gone, anext(pieces))
        if "error" in first:
            await pieces.aclose()
            raise names.refusal_of(first["error"])
    finally:
        gone.cancel()
        if not asked.stream:
            await pieces.aclose()
    return Stream(_events(answer, first, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


ROUTER = Router("/v1", route_handlers=[list_models, get_model, chat], tags=["chat"])


class _Answer:
    """What is the same in every part of an answer."""

    def __init__(self, asked: Asked, engine: str) -> None:
        self.asked, self.created, self.engine = asked, int(time.time()), engine
        self.begun: set[int] = set()
        """Choices of which the role was sent."""

    def as_object(self, request_id: str, kind: str, **fields: Any) -> dict[str, Any]:
        common = {"id": request_id, "object": kind, "created": self.created, "model": self.asked.model}
        return {**common, "system_fingerprint": self.engine, "service_tier": "default", **fields}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        index = piece["index"]
        delta = {} if index in self.begun else {"role": "assistant"}
        self.begun.add(index)
        if piece.get("text") or delta:
            delta["content"] = piece.get("text", "")
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": piece["logprobs"]} if "logprobs" in piece else None,
            "finish_reason": piece.get("finish"),
        }
        usage = {"usage": None} if self.asked.include_usage else {}
        return self.as_object(piece["id"], "chat.completion.chunk", choices=[choice], **usage)


async def _whole(answer: _Answer, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
    texts: defaultdict[int, list[str]] = defaultdict(list)
    logprobs: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    finish: dict[int, str] = {}
    async for piece in pieces:
        if "error" in piece:
            raise names.refusal_of(piece["error"])
        if "done" in piece:
            choices = [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(texts[index]), "refusal": None},
                    "logprobs": {"content": logprobs[index], "refusal": None}
                    if answer.asked.request.logprobs is not None
                    else None,
                    "finish_reason": finish[index],
                }
                for index in sorted(finish)
            ]
            return answer.as_object(piece["id"], "chat.completion", choices=choices, usage=_usage(piece["done"]))
        index = piece["index"]
        texts[index].append(piece.get("text", ""))
        logprobs[index] += piece.get("logprobs", [])
        if "finish" in piece:
            finish[index] = piece["finish"]
    raise ApiError("session_ended", "The session that answered has ended. Send the request again.")


async def _events(answer: _Answer, first: Piece, rest: AsyncGenerator[Piece]) -> AsyncGenerator[bytes]:
    """The answer as server-sent events. Closing it cancels the request."""
    async with aclosing(rest):
        piece: Piece | None = first
        while piece is not None:
            if "error" in piece:
                problem = names.refusal_of(piece["error"])
                fault = {"message": problem.detail, "type": "server_error", "param": None, "code": problem.code}
                yield _event({"error": fault})
                return
            if "done" in piece:
                if answer.asked.include_usage:
                    usage = _usage(piece["done"])
                    yield _event(answer.as_object(piece["id"], "chat.completion.chunk", choices=[], usage=usage))
                yield b"data: [DONE]\n\n"
                return
            yield _event(answer.chunk(piece))
            piece = await anext(rest, None)


def _usage(done: dict[str, int]) -> dict[str, int]:
    return {**done, "total_tokens": done["prompt_tokens"] + done["completion_tokens"]}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % msgspec.json.encode(body)


async def _gone(request: Request[Any, Any, Any]) -> None:
    """Wait until the client has gone; its whole body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Future[None], work: Any) -> Any:
    """Wait for the work, and drop it if the client goes away first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    raise ApiError("client_gone", "The client has gone.")
