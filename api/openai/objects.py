"""The objects of OpenAI's API, with the fields that its SDK reads.

Owns these shapes; those of native routes are in `api.schemas`. Invariant: times are seconds since 1970.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class OpenAIErrorBody(Struct, frozen=True, kw_only=True):
    """What went wrong."""

    message: Annotated[str, Meta(description="What happened, and what to do")]
    type: str
    param: Annotated[str | None, Meta(description="The first wrong field, as a path with dots; null: no single one")]
    code: Annotated[str | None, Meta(description="Stable name of the error")]


class OpenAIError(Struct, frozen=True, kw_only=True):
    """The answer to a request that failed."""

    error: OpenAIErrorBody
