"""The page's files, words and log-in, without a browser; what it does in one is `tests/browser`'s."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from api.app import create_app
from api.auth import COOKIE, PAGE_HEADER
from api.page.assets import FOLDER, POLICY, assets
from api.page.curves import POINTS, thin
from api.page.guide import PRESETS
from grpo_core import estimates, row_warnings
from grpo_core.estimates import guess_parameters, least_gpu_memory, warnings
from grpo_core.monitoring.audits import RULES, Auditor
from grpo_core.spec import json_schema, parse_spec
from jobs import service
from jobs.auth.api_keys import SCOPES
from jobs.store.job import JobStatus
from tests.unit.fakes import ALICE, READER, FakeJobService, bearer, make_record
from tests.unit.test_audits import SICK, steps_of
from tests.unit.traces import spec_of

Client = TestClient[Litestar]
PAGE = {PAGE_HEADER: "1"}
BROWSER_TESTS = Path(__file__).resolve().parents[1] / "browser"
SCRIPTS = {path.name: path.read_text("utf-8") for path in (FOLDER / "js").glob("*.js")}
WORDS = {name: json.loads(assets()[f"locale/{name}.json"].body) for name in ("en", "zh")}
SERVICE = json.loads((FOLDER / "locale" / "zh.service.json").read_text("utf-8"))


@pytest.fixture
def browser() -> Iterator[tuple[Client, FakeJobService]]:
    """A client without a key, which keeps cookies."""
    service = FakeJobService()
    with TestClient(create_app(service), raise_server_exceptions=False) as client:  # type: ignore[arg-type]
        yield client, service


def log_in(client: Client, key: str = ALICE) -> None:
    assert client.post("/session", json={"key": key}, headers=PAGE).status_code == 200


# --- files


@pytest.mark.parametrize("folder", [FOLDER / "vendor", BROWSER_TESTS / "vendor"])
def test_vendored_files_are_what_was_published(folder: Path) -> None:
    rows = re.findall(r"^\| `([^`]+)` \|.*`([0-9a-f]{64})` \|$", (folder / "VENDORED.md").read_text(), re.M)
    assert {name for name, _ in rows} == {path.name for path in folder.iterdir() if path.suffix in (".js", ".css")}
    for name, expected in rows:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name


def test_the_browser_checks_vendored_files_too() -> None:
    index = (FOLDER / "index.html").read_text()
    found = dict(re.findall(r'(?:src|href)="/page/(vendor/[^"]+)" integrity="sha384-([^"]+)"', index))
    assert set(found) == {f"vendor/{path.name}" for path in (FOLDER / "vendor").glob("*.[jc]s*")}
    for name, expected in found.items():
        assert base64.b64encode(hashlib.sha384((FOLDER / name).read_bytes()).digest()).decode() == expected, name


def test_nothing_is_inline_and_nothing_is_from_elsewhere() -> None:
    index = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", index)
    own = index + (FOLDER / "page.css").read_text() + "".join(SCRIPTS.values())
    assert set(re.findall(r"https?://[^\s\"'`)]+", own)) == {"http://www.w3.org/2000/svg"}
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\"style\""
    assert not re.search(sinks, "".join(SCRIPTS.values()))


def test_no_script_imports_what_it_does_not_use() -> None:
    for name, script in SCRIPTS.items():
        for names in re.findall(r"^import \{([^}]+)\} from", script, re.M):
            for imported in (one.rpartition(" as ")[2].strip() for one in names.split(",")):
                # `...name` uses it, `other.name` is something else.
                used = re.findall(rf"(?:\.\.\.|(?<![\w.])){re.escape(imported)}\b", script)
                assert len(used) > 1, (name, imported)


@pytest.mark.parametrize("path", ["/", "/page/js/main.js", "/page/page.css", "/page/locale/zh.json", "/page/icon.svg"])
def test_files_need_no_key_and_come_with_the_policy(browser: tuple[Client, FakeJobService], path: str) -> None:
    client, _ = browser
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].count("charset") == answer.headers["content-type"].startswith("text/")
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["nope", "vendor/VENDORED.md", "../assets.py", "..%2fassets.py", "%2e%2e/assets.py"])
def test_nothing_else_is_served(browser: tuple[Client, FakeJobService], name: str) -> None:
    assert browser[0].get(f"/page/{name}").status_code == 404
    assert all(not path.endswith((".py", ".md")) for path in assets())


# --- words


def test_both_catalogues_say_the_same_things() -> None:
    assert list(WORDS["en"]) == list(WORDS["zh"])
    for key, text in WORDS["en"].items():
        assert text.strip(), key
        assert WORDS["zh"][key].strip(), key
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", WORDS["zh"][key])), key


def test_every_word_asked_for_is_there_and_every_word_there_is_asked_for() -> None:
    source = "".join(SCRIPTS.values())
    asked = set(re.findall(r"\bt\(\s*\"([^\"]+)\"", source))
    plural = {key.removesuffix(form) for key in WORDS["en"] for form in (".one", ".other") if key.endswith(form)}
    assert asked <= set(WORDS["en"]) | plural
    literals = set(re.findall(r"[\"'`]([\w.]+)[\"'`]", source))
    prefixes = tuple(re.findall(r"`([a-z]+(?:\.[a-z]+)*\.)\$\{", source))
    for key in WORDS["en"]:
        bare = re.sub(r"\.(one|other)$", "", key)
        assert {key, bare} & literals or key.startswith(prefixes), f"{key} is in the catalogues and nowhere used"


def test_chinese_is_written_as_chinese() -> None:
    """Full-width marks between Chinese characters, one word for one thing, and no plain English left."""
    sentences = dict(WORDS["zh"])
    sentences |= {f"service {name}": text for name, text in SERVICE["sentences"].items()}
    sentences |= {f"service {code}": text for code, text in SERVICE["advice"].items()}
    sentences |= {f"service {pointer}": field["text"] for pointer, field in SERVICE["fields"].items()}
    known = {"API", "JSON", "KL", "SHA-256", "McNemar", "JSON Lines", "CPU", "GPU", "Hub", "p", "A", "B", "id"}
    for key, text in sentences.items():
        bare = re.sub(r"`[^`]*`|\{\w+\}", "", text)
        assert not re.search(r"[\u4e00-\u9fff][,;:?!]|[\u4e00-\u9fff]\.(?!\w)|\([\u4e00-\u9fff]", bare), (
            f"{key}: {text}"
        )
        assert re.search(r"[\u4e00-\u9fff]", bare) or bare.strip(" /") in known | {""}, f"{key} is English: {text}"
        for word, instead in SAME_THING.items():
            assert word not in text, f"{key}: {instead} and not {word}"


SAME_THING = {
    "补全": "回答",
    "令牌": "词元",
    "优点": "优势",
    "存档点": "检查点",
    "作业": "任务",
    "工人": "工作进程",
}


def test_what_the_service_says_of_fields_and_audits_is_said_in_chinese_too() -> None:
    """Each translation stands beside the English it is of: a field that changes is shown in English until it is new."""
    described = descriptions(json_schema())
    outdated = {pointer for pointer, text in described.items() if SERVICE["fields"].get(pointer, {}).get("en") != text}
    assert not outdated, (
        f"api/page/static/locale/zh.service.json: bring `en` and `text` of these up to date: {outdated}"
    )
    assert set(SERVICE["fields"]) == set(described)
    assert set(SERVICE["sentences"]) == {"verdict", "over", *(rule.name for rule in RULES)}


def test_advice_is_said_in_chinese_too() -> None:
    sources = [inspect.getsource(module) for module in (estimates, row_warnings, service)]
    codes = {code for text in sources for code in re.findall(r"SpecWarning\([^)]*?code=\"(\w+)\"", text)}
    assert len(codes) > 20
    assert set(SERVICE["advice"]) == codes


def test_every_field_of_the_spec_has_a_name_in_words() -> None:
    """The guide to a new job shows no key of the spec."""
    groups = {"rewards.tags", "rewards.on_error", "evaluation.stop_when"}
    fields = {pointer[1:].replace("/", ".") for pointer in descriptions(json_schema())} | groups
    answers = {"none", "empty", "yes", "no"}
    named = {key.removeprefix("field.") for key in WORDS["en"] if key.startswith("field.")}
    assert named == fields | answers
    assert not [name for name in fields if "_" in WORDS["en"][f"field.{name}"]]


def test_an_audit_said_in_chinese_has_the_numbers_that_the_rule_gives() -> None:
    for name, sick in SICK.items():
        spec = spec_of(8, 8)
        found = next(one for one in Auditor(spec).replay(steps_of(spec, sick)) if one.audit == name)
        assert set(re.findall(r"\{(\w+)\}", SERVICE["sentences"][name])) <= set(found.values), name


def descriptions(schema: dict[str, Any], part: dict[str, Any] | None = None, pointer: str = "") -> dict[str, str]:
    """What the form says of each of its fields, as the page's script finds it."""

    def resolved(one: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][one["$ref"].split("/")[-1]] if "$ref" in one else one

    found: dict[str, str] = {}
    for name, one in resolved(part or schema)["properties"].items():
        inner = resolved(one)
        if "properties" in inner and not inner.get("required"):
            found |= descriptions(schema, one, f"{pointer}/{name}")
        else:
            options = [resolved(option).get("description") for option in one.get("anyOf", [])]
            found[f"{pointer}/{name}"] = next(filter(None, [one.get("description"), *options]), "")
    return {pointer: text for pointer, text in found.items() if pointer != "/schema_version"}


# --- log-in


def test_a_key_is_exchanged_for_a_cookie_that_scripts_cannot_read(browser: tuple[Client, FakeJobService]) -> None:
    client, _ = browser
    assert client.get("/session").status_code == 204
    answer = client.post("/session", json={"key": f" {ALICE}\n"}, headers=PAGE)
    assert answer.json()["owner"] == "alice"
    assert ALICE not in answer.text
    cookie = answer.headers["set-cookie"]
    assert ALICE not in cookie
    assert {"HttpOnly", "Path=/"} <= set(cookie.split("; "))
    assert "samesite=strict" in cookie.lower()
    assert "secure" not in cookie.lower(), "a plain-http stack on a laptop must work"
    assert client.get("/jobs").status_code == 200
    assert client.get("/session").json()["scopes"] == [scope for scope in SCOPES if scope != "operator"]


def test_behind_tls_the_cookie_is_secure(browser: tuple[Client, FakeJobService]) -> None:
    headers = {**PAGE, "Origin": "https://grpo.example"}
    cookie = browser[0].post("/session", json={"key": ALICE}, headers=headers).headers["set-cookie"]
    assert "Secure" in cookie


def test_a_wrong_key_is_said_to_be_wrong_and_too_many_to_wait(browser: tuple[Client, FakeJobService]) -> None:
    client, service = browser
    answer = client.post("/session", json={"key": "grpo_wrong"}, headers=PAGE)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert "set-cookie" not in answer.headers
    service.too_many_attempts = True
    answer = client.post("/session", json={"key": "grpo_wrong"}, headers=PAGE)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"key": 1}', b'"grpo_x"', b"not json"])
def test_a_log_in_without_a_key_is_refused(browser: tuple[Client, FakeJobService], body: bytes) -> None:
    assert browser[0].post("/session", content=body, headers=PAGE).status_code == 400


def test_logging_out_ends_the_session(browser: tuple[Client, FakeJobService]) -> None:
    client, service = browser
    log_in(client)
    token = client.cookies[COOKIE]
    assert client.delete("/session", headers=PAGE).status_code == 204
    assert not service.logins
    assert COOKIE not in client.cookies
    assert client.get("/jobs", headers={"Cookie": f"{COOKIE}={token}"}).status_code == 401


def test_a_revoked_key_ends_its_sessions(browser: tuple[Client, FakeJobService]) -> None:
    client, service = browser
    log_in(client)
    del service.known_keys[ALICE]
    answer = client.get("/jobs")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_a_session_has_its_keys_scopes(browser: tuple[Client, FakeJobService]) -> None:
    client, _ = browser
    log_in(client, READER)
    assert client.get("/jobs").status_code == 200
    assert client.post("/jobs", json={}, headers=PAGE).json()["code"] == "forbidden"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "https://evil.test"},
        {**PAGE, "Sec-Fetch-Site": "cross-site"},
        {**PAGE, "Sec-Fetch-Site": "same-site"},
        {**PAGE, "Sec-Fetch-Site": "none"},
    ],
)
@pytest.mark.parametrize("path", ["/jobs", "/session"])
def test_another_site_cannot_use_the_cookie(
    browser: tuple[Client, FakeJobService], path: str, headers: dict[str, str]
) -> None:
    client, service = browser
    log_in(client)
    body = {"key": ALICE} if path == "/session" else {}
    answer = client.post(path, json=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert not service.jobs
    assert len(service.logins) == 1


def test_a_bearer_key_needs_no_such_thing_and_wins_over_the_cookie(browser: tuple[Client, FakeJobService]) -> None:
    client, _ = browser
    log_in(client)
    assert client.post("/jobs", json={}, headers={**bearer(), "Sec-Fetch-Site": "cross-site"}).status_code == 201
    assert client.get("/jobs", headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize("token", ["", "x", "a" * 42, "a" * 44, "a" * 43, 'a"; b'])
def test_any_other_cookie_opens_nothing(browser: tuple[Client, FakeJobService], token: str) -> None:
    answer = browser[0].get("/jobs", headers={"Cookie": f"{COOKIE}={token}"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


# --- what the page asks beside the API


def test_curves_of_several_jobs_come_in_one_answer(browser: tuple[Client, FakeJobService]) -> None:
    client, service = browser
    log_in(client)
    job = service.put(make_record(), status=JobStatus.RUNNING, step=2)
    service.job_events[job.id] = [
        {"v": 1, "seq": n, "epoch": 1, "type": "metric", "time": "", "step": n, "data": {"step": n, "reward": n / 2}}
        for n in (1, 2)
    ]
    other = service.put(make_record(owner="bob"), status=JobStatus.RUNNING, step=2)
    answer = client.get(f"/page/curves?job={job.id}&job={other.id}&job=nonsense")
    assert answer.json() == {job.id: [[1, 0.5], [2, 1.0]]}


def test_presets_of_the_guide_are_valid_and_fit_the_gpu_they_ask_for(browser: tuple[Client, FakeJobService]) -> None:
    client, _ = browser
    log_in(client)
    body = client.get("/page/guide").json()
    assert [preset["name"] for preset in body["presets"]] == list(PRESETS)
    for preset in body["presets"]:
        spec = parse_spec(preset["spec"])
        assert spec.model.name == preset["model"]
        assert warnings(spec) == []
        assert (preset["gpu_gb"] is None) == (spec.resources.gpus == 0)
        parameters = guess_parameters(spec.model.name)
        if parameters is not None:
            assert least_gpu_memory(parameters, "4bit") <= preset["gpu_gb"] * 1024**3
            assert preset["training_seconds"] > 60
        assert preset["has_worker"] is False, "the fake service has none"
    assert body["judges"] == []
    assert body["prompts"]["en"].isascii()
    assert "<reasoning>" in body["prompts"]["zh"]


def test_the_guide_names_judges_and_nothing_else_of_them(
    browser: tuple[Client, FakeJobService], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = browser
    log_in(client)
    monkeypatch.setenv("GRPO_JUDGES", '{"judge-main": {"base_url": "https://llm.example/v1", "model": "m"}}')
    answer = client.get("/page/guide")
    assert answer.json()["judges"] == ["judge-main"]
    assert "llm.example" not in answer.text


def test_long_curves_are_thinned_to_means() -> None:
    curve = thin([(step, float(step)) for step in range(1, 10_001)])
    assert len(curve) == POINTS
    assert curve[-1][0] == 10_000
    assert curve == sorted(curve)
    assert thin([(1, 1 / 3)]) == [(1, 0.3333)]


def test_a_job_without_a_report_has_none(browser: tuple[Client, FakeJobService]) -> None:
    client, service = browser
    log_in(client)
    job = service.put(make_record())
    assert client.get(f"/page/reports/{job.id}").status_code == 204
    assert client.get("/page/reports/nonsense").status_code == 404
    other = service.put(make_record(owner="bob"))
    assert client.get(f"/page/reports/{other.id}").status_code == 404
