"""Where a training process connects to, and what the worker's token opens: by real processes, sockets and libraries."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from grpo_core.datasets import DATASET_DIR_VARIABLE, DatasetError, load_rows
from grpo_core.egress import CLOSED_VARIABLE, HOSTS_VARIABLE, EgressRefused, Host, allowed_hosts, refusal
from grpo_core.errors import JobFailure
from grpo_core.hardware.models import MODEL_DIR_VARIABLE, find_model
from grpo_core.hub import TOKEN_REPOS_VARIABLE
from grpo_core.monitoring import trackers
from grpo_core.spec import parse_spec
from grpo_core.training.classify_error import failure_of
from jobs.read.hub_access import patterns_for
from jobs.worker.trainer_process import clean_environment
from jobs.worker.worker import WorkerSettings
from tests.hub_server import SHA, TOKEN, Recorder, Repo, Server, hub_with, point_at, serve

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = "meta-llama/Tiny", "acme/sums"
ROWS = b'{"question_zh-cn": "1+1", "answer_only": 2}\n'
GATED, NOT_THERE = "model_gated", "model_not_found"


# The guard


@pytest.mark.parametrize(
    ("entry", "host", "port", "has"),
    [
        ("huggingface.co", "HuggingFace.co.", 443, True),
        ("huggingface.co", "evil-huggingface.co", 443, False),
        ("huggingface.co", "huggingface.co.evil.org", 443, False),
        ("*.hf.co", "cdn-lfs.hf.co", 443, True),
        ("*.hf.co", "hf.co", 443, False),
        ("*.hf.co", "10.0.0.1", 443, False),
        ("cache:8080", "cache", 8080, True),
        ("cache:8080", "cache", 22, False),
        ("10.1.0.0/16", "10.1.2.3", 80, True),
        ("10.1.0.0/16", "10.2.2.3", 80, False),
        ("127.0.0.1:80", "0x7f000001", 80, True),
        ("192.0.2.1", "::ffff:192.0.2.1", 80, True),
        ("[2001:db8::1]:443", "2001:db8::1", 443, True),
        ("*", "anything", 1, True),
    ],
)
def test_what_an_entry_allows(entry: str, host: str, port: int, has: bool) -> None:
    assert Host.parse(entry).has(host, port) is has


@pytest.mark.parametrize("entry", ["http://x", "a b", "x:0", "x:99999", "x:y", ""])
def test_a_worker_does_not_start_with_what_is_no_host(entry: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        WorkerSettings.model_validate({"egress_hosts": [entry]})


def test_a_list_of_hosts_is_read_as_variables_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOSTS_VARIABLE, "mirror.example.org, *.example.net:443")
    assert WorkerSettings().egress_hosts == ["mirror.example.org", "*.example.net:443"]
    hosts = allowed_hosts({HOSTS_VARIABLE: "mirror.example.org", "HF_ENDPOINT": "https://hub.example.org:8443/x"})
    assert hosts == (Host("mirror.example.org"), Host("hub.example.org", 8443))


TRY = """
import asyncio, json, socket, sys, urllib.request
from grpo_core import egress

egress.install([egress.Host.parse(entry) for entry in json.loads(sys.argv[1])])

def url(address): return urllib.request.urlopen(address, timeout=5).read().decode()
def tcp(host, port): socket.create_connection((host, int(port)), 5).close()
def name(host): socket.getaddrinfo(host, 80)
def c_name(host): socket.gethostbyname(host)
def udp(host, port): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", (host, int(port)))
def raw(host, port):
    with socket.socket() as plain: plain.connect_ex((host, int(port)))
def async_(host, port): asyncio.run(asyncio.open_connection(host, int(port)))
def httpx(address):
    import httpx; httpx.get(address, timeout=5)
def aiohttp(address):
    import aiohttp
    async def get():
        async with aiohttp.ClientSession() as session, session.get(address) as got: await got.read()
    asyncio.run(get())
def gloo(_):
    import multiprocessing.connection as c, threading, torch.distributed as d
    d.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False).set("a", "b")
    listener = c.Listener()
    threading.Thread(target=listener.accept).start()
    c.Client(listener.address).close()

tried = []
for what, *arguments in json.loads(sys.argv[2]):
    try:
        globals()[what](*arguments)
        tried.append("ok")
    except BaseException as error:
        refused = egress.refusal(error)
        tried.append("refused" if refused else type(error).__name__)
print(json.dumps(tried))
"""


def tried(attempts: list[list[Any]], hosts: list[str] | None = None, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", TRY, json.dumps(hosts or []), json.dumps(attempts)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_guarded_process_connects_to_nobody_who_is_not_listed() -> None:
    """Before a name is looked up or a packet sent: these addresses are no machines, and would take seconds."""
    outside, metadata = "192.0.2.1", "169.254.169.254"
    attempts: list[list[Any]] = [
        ["tcp", outside, 80],
        ["tcp", metadata, 80],
        ["raw", outside, 22],
        ["udp", outside, 53],
        ["name", "secret.attacker.example"],
        ["c_name", "secret.attacker.example"],
        ["tcp", "attacker.example", 443],
        ["url", f"http://{metadata}/latest/meta-data"],
        ["async_", outside, 80],
        ["httpx", f"http://{outside}/"],
        ["aiohttp", f"http://{outside}/"],
        ["aiohttp", "http://attacker.example/"],
        ["tcp", "2001:db8::1", 80],
    ]
    assert tried(attempts) == ["refused"] * len(attempts)


def test_a_guarded_process_connects_to_itself_and_to_those_that_are_listed() -> None:
    with serve(Recorder) as open_one, serve(Recorder) as closed:
        port, own = open_one.url.rpartition(":")[2], closed.url.rpartition(":")[2]
        assert tried(
            [["url", open_one.url], ["tcp", "localhost", port], ["gloo", ""], ["tcp", "127.0.0.1", own]],
            **{CLOSED_VARIABLE: f"1,{own}"},
        ) == ["ok", "ok", "ok", "refused"]
    assert closed.asked == []
    # Listed, and nobody there: the system's own answer.
    attempts: list[list[Any]] = [["name", "hub.invalid"], ["name", "api.wandb.ai"], ["udp", "192.0.2.9", 9]]
    listed = tried(attempts, ["*.wandb.ai", "192.0.2.0/24"], HF_ENDPOINT="https://hub.invalid")
    assert "refused" not in listed
    assert tried([["udp", "192.0.2.1", 9]], **{HOSTS_VARIABLE: "*"}) != ["refused"]
    assert tried([["name", "proxy.invalid"]], HTTPS_PROXY="http://proxy.invalid:3128") != ["refused"]


def test_a_refusal_is_told_with_the_setting_and_the_same_for_every_host() -> None:
    error: Exception = ValueError("could not load")
    error.__cause__ = EgressRefused("10.0.0.1")
    assert refusal(error) is error.__cause__
    report = failure_of(error).report
    assert (report.failure_class, report.code, report.retryable) == ("user_config", "egress_refused", False)
    assert HOSTS_VARIABLE in report.hint
    assert "10.0.0.1" not in report.message + report.hint


def test_trackers_open_their_own_hosts_and_those_that_the_operator_set() -> None:
    environment = {"WANDB_BASE_URL": "https://wandb.example.org", "MLFLOW_TRACKING_URI": "http://ml:5000", "A": "b"}
    named = parse_spec({"training": {"report_to": ["wandb"]}})
    assert trackers.hosts(named, environment) == [Host("*.wandb.ai"), Host("wandb.example.org", 443)]
    assert trackers.hosts(parse_spec({}), environment) == []


def test_the_workers_own_servers_are_closed_to_training_on_the_same_machine() -> None:
    parent = {
        "S3_ENDPOINT": "http://127.0.0.1:8333",
        "S3_PUBLIC_ENDPOINT": "https://s3.example.org",
        "REDIS_URL": "redis://:p@localhost/0",
    }
    assert clean_environment(parent, parse_spec({}), "ann")[CLOSED_VARIABLE] == "6379,8333"


# The token


def test_who_may_use_the_token_for_what() -> None:
    listed = "meta-llama/*, ann:acme/private-*,bob:acme/*"
    assert patterns_for("ann", listed) == ["meta-llama/*", "acme/private-*"]
    assert patterns_for("eve", listed) == ["meta-llama/*"]
    assert patterns_for("eve", "") == []


@pytest.mark.parametrize(
    ("owner", "listed", "given"),
    [
        ("ann", None, False),
        ("ann", "", False),
        ("ann", "other/*", False),
        ("ann", "meta-llama/*", True),
        ("ann", "META-LLAMA/tiny", True),
        ("ann", "bob:meta-llama/*", False),
        ("bob", "bob:meta-llama/*", True),
        ("bob", "acme/*", True),
    ],
)
def test_a_job_gets_the_token_only_for_what_its_owner_may_open(owner: str, listed: str | None, given: bool) -> None:
    parent = {"HF_TOKEN": TOKEN, "HF_HOME": "/cache", **({} if listed is None else {TOKEN_REPOS_VARIABLE: listed})}
    spec = parse_spec({"model": {"name": MODEL}, "data": {"dataset": DATA}})
    environment = clean_environment(parent, spec, owner)
    assert ("HF_TOKEN" in environment) is given
    assert TOKEN_REPOS_VARIABLE in environment
    assert environment["HF_HOME"] == "/cache"


def weights() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(12)


MODEL_FILES = {"config.json": b"{}", "model.safetensors": weights()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Repo]:
    """Repositories, with the operator's token in this process's environment."""
    for variable in (MODEL_DIR_VARIABLE, DATASET_DIR_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("grpo_core.hub.WAIT_SECONDS", ())
    repos: dict[str, Repo] = {}
    return repos


def fetch(repos: Mapping[str, Repo], what: str, monkeypatch: pytest.MonkeyPatch, listed: str) -> tuple[str, Server]:
    """The code of the failure, or nothing, and what the hub was asked."""
    monkeypatch.setenv(TOKEN_REPOS_VARIABLE, listed)
    spec = parse_spec({"model": {"name": MODEL}, "data": {"dataset": DATA}})
    with hub_with(repos) as server:
        point_at(monkeypatch, server.url)
        try:
            if what == "model":
                find_model(spec.model, lambda *_: None)
            else:
                load_rows(spec.data, Path("unused"))
        except (JobFailure, DatasetError) as error:
            report = failure_of(error).report
            assert report.failure_class == ("user_config" if what == "model" else "dataset")
            assert TOKEN_REPOS_VARIABLE in report.hint
            return report.code, server
    return "", server


@pytest.mark.parametrize(
    ("what", "name", "protection", "code"),
    [
        ("model", MODEL, "private", "model_not_found"),
        ("model", MODEL, "gated", "model_gated"),
        ("data", DATA, "private", "dataset_not_found"),
        ("data", DATA, "gated", "dataset_gated"),
    ],
)
def test_the_operators_token_opens_only_what_the_operator_listed(
    hub: dict[str, Repo], monkeypatch: pytest.MonkeyPatch, what: str, name: str, protection: str, code: str
) -> None:
    files = MODEL_FILES if what == "model" else {"train.jsonl": ROWS}
    hub[name] = Repo(files, **{protection: True})
    refused, server = fetch(hub, what, monkeypatch, "some/other,acme/nothing-*")
    assert refused == code
    assert server.tokens
    assert {token for _, token in server.tokens} == {None}
    opened, server = fetch(hub, what, monkeypatch, f"some/other,{name.partition('/')[0]}/*")
    assert opened == ""
    assert TOKEN in {token for _, token in server.tokens}
    # What the token opened is on this machine now, and is still closed to those without it.
    assert fetch(hub, what, monkeypatch, "")[0] == code


def test_a_gated_model_that_an_earlier_release_left_in_the_cache_stays_closed(
    hub: dict[str, Repo], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub[MODEL] = Repo(MODEL_FILES)
    assert fetch(hub, "model", monkeypatch, "")[0] == ""
    hub[MODEL] = Repo(MODEL_FILES, gated=True)
    assert fetch(hub, "model", monkeypatch, "")[0] == "model_gated"


def test_the_token_follows_no_redirect(hub: dict[str, Repo], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Cdn(Recorder):
        def answer(self, path: str) -> None:
            seen.append(self.headers.get("Authorization"))
            self.respond(ROWS)

    with serve(Cdn) as cdn:
        monkeypatch.setenv(HOSTS_VARIABLE, cdn.url.removeprefix("http://"))
        hub[DATA] = Repo({"train.jsonl": ROWS}, private=True, redirects={"train.jsonl": f"{cdn.url}/blob"})
        assert fetch(hub, "data", monkeypatch, "acme/*")[0] == ""
    assert seen
    assert set(seen) == {None}


# A model leads nowhere


def fetched(repos: dict[str, Repo], monkeypatch: pytest.MonkeyPatch, files: Mapping[str, bytes]) -> Any:
    repos[MODEL] = Repo({**MODEL_FILES, **files})
    with hub_with(repos) as server:
        point_at(monkeypatch, server.url)
        return find_model(parse_spec({"model": {"name": MODEL}}).model, lambda *_: None)


def test_neither_code_nor_the_name_of_another_model_is_fetched(
    hub: dict[str, Repo], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = json.dumps({"base_model_name_or_path": "/etc"}).encode()
    files = {"adapter_config.json": adapter, "deep/adapter_config.json": adapter, "modeling.py": b"1", "w.bin": b"\x80"}
    found = fetched(hub, monkeypatch, {**files, "tokenizer_config.json": b"{}"})
    assert found.revision == SHA
    assert {path.name for path in found.path.rglob("*") if path.is_file()} == {*MODEL_FILES, "tokenizer_config.json"}


@pytest.mark.parametrize("shard", ["../../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", ".."])
def test_weights_are_those_beside_the_configuration(
    hub: dict[str, Repo], monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    index = json.dumps({"weight_map": {"w": shard}}).encode()
    with pytest.raises(JobFailure) as failure:
        fetched(hub, monkeypatch, {"model.safetensors.index.json": index})
    assert failure.value.report.code == "model_unreadable"


def test_a_redirect_of_a_models_file_is_judged(hub: dict[str, Repo], monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Recorder) as internal:
        target = f"{internal.url}/x"
        hub[MODEL] = Repo(MODEL_FILES, redirects={"model.safetensors": target})
        with hub_with(hub) as server:
            point_at(monkeypatch, server.url)
            with pytest.raises(Exception) as caught:
                find_model(parse_spec({"model": {"name": MODEL}}).model, lambda *_: None)
    report = failure_of(caught.value).report
    assert (report.failure_class, report.code) == ("user_config", "egress_refused")
    assert internal.asked == []


def test_the_guard_sees_names_as_bytes_and_nothing_else_of_a_process() -> None:
    """The audit hook is called for everything: what is no socket passes at once."""
    assert socket.getaddrinfo.__module__ == "socket"  # this process has none
    assert tried([["name", "localhost"], ["c_name", socket.gethostname()]])[0] == "ok"
