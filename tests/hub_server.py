"""A hub on loopback with the repositories a test gives it, and a server that nobody should ever call."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_operators_own_token"


@dataclass
class Repo:
    files: Mapping[str, bytes]
    private: bool = False
    gated: bool = False
    """Its description is open to all, its files are not: as on the hub."""
    redirects: Mapping[str, str] = field(default_factory=dict[str, str])
    """Files that lie elsewhere, by the address they are redirected to."""


class Recorder(BaseHTTPRequestHandler):
    """Writes down who asks for what."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.command, self.path))
        self.answer(unquote(urlsplit(self.path).path))

    do_HEAD = do_POST = do_GET  # noqa: N815 - named by the standard library

    def answer(self, path: str) -> None:
        self.respond(b"a secret of the internal network")

    def respond(self, body: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        """JSON, or bytes of which the request may want a range."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = dict(headers)
        wanted = self.headers.get("Range")
        if wanted and status == 200:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(raw)) + 1, len(raw))
            given["Content-Range"] = f"bytes {start}-{end - 1}/{len(raw)}"
            raw, status = raw[start:end], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **given}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the standard library
        pass


class HubHandler(Recorder):
    """As much of the hub's HTTP as its library uses to look repositories up and to fetch their files."""

    repos: Mapping[str, Repo]
    tokens: list[tuple[str, str | None]]
    """Paths with the token that came with each."""

    def answer(self, path: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.tokens.append((path, token))
        name = next((name for name in self.repos if f"/{name}/" in f"{path}/"), None)
        repo = self.repos[name] if name else None
        if name is None or repo is None or (repo.private and token != TOKEN):
            self.respond({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/"):
            self._describe(name, repo, path, body)
        elif repo.gated and token != TOKEN:
            self.respond({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        else:
            self._send(repo, path.partition(f"/{name}/resolve/")[2].partition("/")[2])

    def _describe(self, name: str, repo: Repo, path: str, body: str) -> None:
        files = [
            {"type": "file", "path": file, "oid": _etag(content), "size": len(content)}
            for file, content in repo.files.items()
        ]
        if "/paths-info/" in path:
            form = body if body.startswith("{") else json.dumps(parse_qs(body))
            wanted = json.loads(form)["paths"]
            self.respond([file for file in files if file["path"] in wanted])
        elif "/tree/" in path:
            below = path.partition("/tree/")[2].partition("/")[2]
            self.respond([file for file in files if str(file["path"]).startswith(below)])
        else:
            siblings = [{"rfilename": file} for file in repo.files]
            gated = "auto" if repo.gated else False
            self.respond({"id": name, "sha": SHA, "siblings": siblings, "tags": [], "gated": gated})

    def _send(self, repo: Repo, file: str) -> None:
        content = repo.files.get(file)
        headers = {
            "X-Repo-Commit": SHA,
            "ETag": f'"{_etag(content or b"")}"',
            "X-Linked-Size": str(len(content or b"")),
        }
        if file in repo.redirects:
            self.respond(b"", 302, {**headers, "Location": repo.redirects[file]})
        elif content is None:
            self.respond(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        else:
            self.respond(content, headers=headers)


@dataclass
class Server:
    url: str
    asked: list[tuple[str, str]]
    tokens: list[tuple[str, str | None]]


@contextmanager
def serve(handler: type[Recorder], **attributes: Any) -> Iterator[Server]:
    """A server on a free port of loopback that knows what it was asked."""
    asked: list[tuple[str, str]] = []
    tokens: list[tuple[str, str | None]] = []
    made = type("Handler", (handler,), {"asked": asked, "tokens": tokens, **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}", asked, tokens)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hub_with(repos: Mapping[str, Repo]) -> Iterator[Server]:
    with serve(HubHandler, repos=repos) as server:
        yield server


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Make a server the hub of this process."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:40]
