"""Pushing to a hub: the real library against a hub on loopback that keeps what it gets."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from grpo_client.errors import PushError
from grpo_client.push import Form, check_access, check_repository, connect, push
from tests.hub_server import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own upload

TOKEN = "hf_the_owners_own_token"
NAME = "ann/my-model"


@dataclass
class Stored:
    """A repository that is written to."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])


class WritableHub(Recorder):
    """As much of the hub's HTTP as its library uses to make a repository and to upload a folder."""

    repos: dict[str, Stored]
    large: dict[str, bytes]
    """Files that are sent apart from the commit, by their SHA-256."""

    do_PUT = Recorder.do_GET  # noqa: N815 - named by the standard library

    def answer(self, path: str) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/large/"):  # storage, which is not given the token
            assert "Authorization" not in self.headers
            self.large[path.removeprefix("/large/")] = raw
            self.respond(b"")
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.respond({"error": "Invalid username or password."}, 401)
        elif path == "/api/whoami-v2":
            self.respond({"type": "user", "name": "ann", "orgs": [{"name": "team"}], "auth": {"type": "access_token"}})
        elif path == "/api/repos/create":
            self.create(json.loads(raw))
        else:
            self.on_repo(path, raw)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name.startswith("other/"):
            self.respond({"error": "You don't have the rights"}, 403)
        elif name in self.repos:
            self.respond({"error": "You already created this model repo", "url": f"{self.base}/{name}"}, 409)
        else:
            self.repos[name] = Stored(private=asked["visibility"] == "private")
            self.respond({"url": f"{self.base}/{name}"})

    def on_repo(self, path: str, raw: bytes) -> None:
        name = next((name for name in self.repos if f"/{name}" in path), "")
        if path == f"/api/models/{name}":
            repo = self.repos[name]
            self.respond({"id": name, "private": repo.private, "siblings": [{"rfilename": f} for f in repo.files]})
        elif path.startswith(f"/api/models/{name}/preupload/"):
            self.respond({"files": [self.mode(file["path"]) for file in json.loads(raw)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.respond({"transfer": "basic", "objects": [self.place(one) for one in json.loads(raw)["objects"]]})
        elif path.startswith(f"/api/models/{name}/commit/"):
            self.commit(self.repos[name], [json.loads(line) for line in raw.splitlines() if line])
            self.respond({"commitUrl": f"{self.base}/{name}/commit/1", "commitOid": "1" * 40, "pullRequestUrl": None})
        elif path == "/api/validate-yaml":
            wrong = "license: made-up" in json.loads(raw)["content"]
            errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}] if wrong else []
            self.respond({"warnings": [], "errors": errors}, 400 if wrong else 200)
        else:
            self.respond({"error": f"{self.command} {path}"}, 404)

    @staticmethod
    def mode(path: str) -> dict[str, Any]:
        is_large = path.endswith((".safetensors", ".gguf"))
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": None}

    def place(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.large:
            return {"oid": one["oid"], "size": one["size"]}
        upload = {"href": f"{self.base}/large/{one['oid']}", "header": {}}
        return {"oid": one["oid"], "size": one["size"], "actions": {"upload": upload}}

    def commit(self, repo: Stored, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.large[value["oid"]]

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"


@pytest.fixture
def repos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Stored]]:
    """The repositories of a hub that the library takes for the hub."""
    from huggingface_hub import constants

    found: dict[str, Stored] = {}
    handler = type("Handler", (WritableHub,), {"asked": [], "repos": found, "large": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter as it was downloaded."""
    root = tmp_path / "adapter"
    root.mkdir()
    (root / "README.md").write_text("---\nbase_model: owner/base\nlibrary_name: peft\n---\n\n# It\n")
    (root / "adapter_config.json").write_text("{}")
    (root / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4000)
    return root


def test_a_folder_becomes_a_private_repository(repos: dict[str, Stored], folder: Path) -> None:
    for _ in range(2):  # again: a push that was interrupted is repeated
        address = push(connect(), folder, NAME, private=True, message="Upload")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ann/my-model", address)
    assert repos[NAME].private
    sent = {name: body for name, body in repos[NAME].files.items() if name != ".gitattributes"}
    assert sent == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_public_repository_gets_nothing_that_is_to_be_private(repos: dict[str, Stored], folder: Path) -> None:
    repos[NAME] = Stored(private=False)
    with pytest.raises(PushError, match="is public"):
        push(connect(), folder, NAME, private=True, message="Upload")
    assert not repos[NAME].files
    push(connect(), folder, NAME, private=False, message="Upload")
    assert "README.md" in repos[NAME].files


@pytest.mark.parametrize(
    ("there", "pushed", "refused"),
    [
        ("model.safetensors", "adapter_model.safetensors", True),
        ("adapter_model.safetensors", "model.safetensors", True),
        ("model-00001-of-00002.safetensors", "model.safetensors", True),
        ("model-q8_0.gguf", "model.safetensors", True),
        ("model.safetensors", "model-q8_0.gguf", True),
        ("model-f16.gguf", "model-q8_0.gguf", False),
        ("model.safetensors", "model.safetensors", False),
        (".gitattributes", "model.safetensors", False),
    ],
)
def test_no_repository_gets_two_models(
    repos: dict[str, Stored], tmp_path: Path, there: str, pushed: str, refused: bool
) -> None:
    repos[NAME] = Stored(private=True, files={there: b"1"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / pushed).write_bytes(b"2")
    if refused:
        with pytest.raises(PushError, match=f"has another model, {there}, .* Name another repository"):
            push(connect(), tmp_path / "out", NAME, private=True, message="Upload")
        assert repos[NAME].files == {there: b"1"}
    else:
        push(connect(), tmp_path / "out", NAME, private=True, message="Upload")
        assert repos[NAME].files[pushed] == b"2"


def test_what_can_be_known_is_known_before_there_are_files(
    repos: dict[str, Stored], monkeypatch: pytest.MonkeyPatch
) -> None:
    repos["ann/public"] = Stored(private=False)
    repos["ann/adapter"] = Stored(private=True, files={"adapter_model.safetensors": b"1"})
    repos["ann/merged"] = Stored(private=True, files={"model-00001-of-00002.safetensors": b"1", "README.md": b"2"})
    hub = connect()
    for name in (NAME, "team/model", "ann/merged"):
        check_access(hub, name, "merged", private=True)
    check_access(hub, "ann/public", "gguf", private=False)
    check_access(hub, "ann/adapter", "adapter", private=True)
    with pytest.raises(PushError, match=r"token is of ann, and other/model would be other's\. Use ann/NAME"):
        check_access(hub, "other/model", "gguf", private=True)
    with pytest.raises(PushError, match="is public"):
        check_access(hub, "ann/public", "gguf", private=True)
    others: list[tuple[str, Form]] = [("ann/adapter", "merged"), ("ann/merged", "adapter"), ("ann/merged", "gguf")]
    for name, form in others:
        with pytest.raises(PushError, match="has another model"):
            check_access(hub, name, form, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PushError, match="401"):
        check_access(connect(), NAME, "gguf", private=True)
    assert NAME not in repos  # nothing was made


def test_a_card_that_the_hub_does_not_take_is_an_answer(repos: dict[str, Stored], folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: made-up\n---\n\n# It\n")
    with pytest.raises(PushError, match=r'does not take the files for ann/my-model: .*"license" must be one of'):
        push(connect(), folder, NAME, private=True, message="Upload")
    assert "adapter_model.safetensors" not in repos[NAME].files


def test_a_hub_that_refuses_says_why(
    repos: dict[str, Stored], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(PushError, match=r"403 for other/model.* Check that your token may write there"):
        push(connect(), folder, "other/model", private=True, message="Upload")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PushError, match="401"):
        push(connect(), folder, NAME, private=True, message="Upload")
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PushError, match="hf auth login"):
        connect()
    assert not repos


@pytest.mark.parametrize("name", ["model", "../etc/passwd", "ann/..", "ann/a b", "ann/x/y", "ann/a--b", "http://x/y"])
def test_names_that_are_no_repositories_are_refused(name: str) -> None:
    with pytest.raises(PushError, match="owner/name"):
        check_repository(name)
