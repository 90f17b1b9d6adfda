"""The page's files: read once, served with the policy that keeps the page to itself.

Invariant: only names found in the folder when the process started are served, so no address can lead elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, cast, get_args

from litestar import Response, get
from litestar.exceptions import NotFoundException
from litestar.params import PathParameter

from api.auth import PUBLIC
from api.page.words import Language, page_charts, words

FOLDER = Path(__file__).resolve().parent / "static"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""No Trusted Types policy is allowed, so a string that reaches innerHTML or eval is an error in the browser."""

_MEDIA_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
"""Without a charset: Litestar adds it to every text."""


@dataclass(frozen=True)
class Asset:
    """One file as it is sent."""

    body: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """Every file of the page by its path below `static`."""
    found: dict[str, Asset] = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in _MEDIA_TYPES:
            body = path.read_bytes()
            if path.parent.name == "locale" and path.stem in get_args(Language):
                body = json.dumps(json.loads(body) | words(cast("Language", path.stem)), ensure_ascii=False).encode()
            found[path.relative_to(FOLDER).as_posix()] = _asset(body, path.suffix)
    return found | {"charts.json": _asset(json.dumps(page_charts()).encode(), ".json")}


def _asset(body: bytes, suffix: str) -> Asset:
    return Asset(body, _MEDIA_TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


@get("/", opt=PUBLIC, include_in_schema=False, sync_to_thread=False)
def index() -> Response[bytes]:
    """The page itself: the same for everyone, with nothing of anyone's in it."""
    return _answer("index.html")


@get("/page/{name:path}", opt=PUBLIC, include_in_schema=False, sync_to_thread=False)
def asset(name: Annotated[Path, PathParameter()]) -> Response[bytes]:
    """One of its files."""
    return _answer(name.as_posix().lstrip("/"))


def _answer(name: str) -> Response[bytes]:
    found = assets().get(name)
    if found is None:
        raise NotFoundException
    # Always asked for again and mostly answered with nothing: a new release is never half in the browser's cache.
    headers = {"ETag": found.etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    return Response(found.body, headers=headers, media_type=found.media_type)
