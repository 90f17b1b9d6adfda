from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litestar import Litestar
from litestar.testing import TestClient

from api.app import create_app
from api.settings import ApiSettings
from tests.unit.fakes import FakeJobService, bearer

Client = TestClient[Litestar]
JSON = {"Content-Type": "application/json"}
JSONL = {"Content-Type": "application/x-ndjson"}
ROW = b'{"question": "6+6=?", "answer": "12"}\n'


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"NaN", "NaN"),
        (b"[" * 100_000, "nested"),
        (b"[" * 50_000 + b"]" * 50_000, "nested"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"name": "\xff"}', "UTF-8"),
        (b'{"name": "a"', "not JSON"),
        (b"{} {}", "not JSON"),
        (b"\x00", "not JSON"),
        (b"name=a", "not JSON"),
        ('{"name": "a"}'.encode("utf-16"), "UTF-8"),
    ],
)
def test_what_is_not_strict_json_is_a_400_that_says_why(client: Client, body: bytes, says: str) -> None:
    answer = client.post("/jobs", content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "invalid_json"
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "pointer", "says"),
    [
        (b'{"training": {"steps": NaN}}', "/training/steps", "NaN"),
        (b'{"optimizer": {"learning_rate": Infinity}}', "/optimizer/learning_rate", "Infinity"),
        (b'{"optimizer": {"learning_rate": 1e999}}', "/optimizer/learning_rate", "too large"),
        (b'{"training": {"steps": ' + b"9" * 5000 + b"}}", "/training/steps", "digits"),
        (b'{"name": "a", "name": "b"}', "/name", "twice"),
        (b'{"lora": {"rank": 1, "rank": 2}}', "/lora/rank", "twice"),
        (b'{"name": "\\ud800"}', "/name", "surrogate"),
        (b'{"name": "a\\u0000b"}', "/name", "NUL"),
        (b'{"metadata": {"\\udfff": "x"}}', "/metadata", "surrogate"),
    ],
)
def test_a_field_that_is_not_strict_json_is_named(client: Client, body: bytes, pointer: str, says: str) -> None:
    answer = client.post("/jobs", content=body, headers=JSON).json()
    (error,) = answer["errors"]
    assert (answer["status"], answer["code"]) == (400, "invalid_json")
    assert (error["pointer"], error["code"]) == (pointer, "bad_json")
    assert says in error["detail"]
    assert error["remedy"]


@pytest.mark.parametrize("body", [b"", b" \n"])
@pytest.mark.parametrize("headers", [{}, JSON])
def test_an_empty_body_is_told_how_to_ask_for_the_recipe(client: Client, body: bytes, headers: dict[str, str]) -> None:
    answer = client.post("/jobs", content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "empty_body")
    assert "{}" in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"3", b"true"])
def test_a_spec_is_an_object(client: Client, body: bytes) -> None:
    answer = client.post("/jobs", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_spec")
    assert answer.json()["errors"][0]["pointer"] == ""


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/json", "é"],
)
def test_a_wrong_content_type_is_a_415_that_names_the_right_one(client: Client, content_type: str) -> None:
    answer = client.post("/jobs", content=b"{}", headers={"Content-Type": content_type.encode()})  # type: ignore[dict-item]
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "application/json" in answer.json()["detail"]
    assert answer.headers["accept-post"] == "application/json"


@pytest.mark.parametrize(("path", "headers"), [("/jobs", JSON), ("/datasets", JSONL)])
def test_a_compressed_body_is_a_415_that_says_so(client: Client, path: str, headers: dict[str, str]) -> None:
    body = gzip.compress(ROW)
    answer = client.post(path, content=body, headers={**headers, "Content-Encoding": "GZIP"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "compressed (Content-Encoding: 'gzip'). Send it as it is" in answer.json()["detail"]
    assert answer.headers["accept-encoding"] == "identity"
    plain = client.post(
        path, content=ROW if path == "/datasets" else b"{}", headers={**headers, "Content-Encoding": "identity"}
    )
    assert plain.status_code == 201


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_spellings_of_the_content_type(client: Client, content_type: str) -> None:
    assert client.post("/jobs", content=b"{}", headers={"Content-Type": content_type}).status_code == 201


def test_a_large_body_is_refused_with_and_without_its_length(client: Client) -> None:
    body = b'{"name": "' + b"a" * 256 * 1024 + b'"}'
    for content in (body, iter([body[:100_000], body[100_000:200_000], body[200_000:]])):
        answer = client.post("/jobs", content=content, headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert "262144" in answer.json()["detail"]


def test_a_body_just_within_the_limit_is_read(client: Client) -> None:
    body = b'{"name": "' + b"a" * 200 + b'"}'
    answer = client.post("/jobs", content=body + b" " * (256 * 1024 - len(body)), headers=JSON)
    assert answer.json()["code"] == "invalid_spec"  # for the name's length


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=300).filter(lambda body: body.strip() != b"{}"))  # which is the recipe
def test_random_bytes_are_refused_and_never_fail(client: Client, body: bytes) -> None:
    for path, headers in (("/jobs", JSON), ("/datasets", JSONL)):
        answer = client.post(path, content=body, headers=headers)
        assert 400 <= answer.status_code < 500
        assert answer.headers["content-type"] == "application/problem+json"


_JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_SECTIONS = st.sampled_from(
    ["name", "metadata", "model", "lora", "optimizer", "training", "sampling", "loss", "rewards", "data", "engine"]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=st.dictionaries(_SECTIONS | st.text(max_size=5), _JSON_VALUES, max_size=4))
def test_random_specs_never_fail(client: Client, spec: dict[str, object]) -> None:
    answer = client.post("/jobs?dry_run=true", content=json.dumps(spec).encode(), headers=JSON)
    assert answer.status_code in (200, 400, 422)
    if answer.status_code == 422:
        assert all(error["remedy"] for error in answer.json()["errors"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.text(max_size=30), query=st.text(max_size=30))
def test_random_addresses_never_fail(client: Client, path: str, query: str) -> None:
    # Quoted by hand: httpx would refuse some of these itself.
    quoted = "".join(f"%{byte:02X}" for byte in path.encode("utf-8", "replace"))
    asked = "".join(f"%{byte:02X}" for byte in query.encode("utf-8", "replace"))
    for prefix in ("/", "/jobs/", "/datasets/", "/schema/"):
        assert client.get(f"{prefix}{quoted}?{asked}=1").status_code < 500


def test_a_data_set_is_checked_and_stored_as_it_was_sent(client: Client, service: FakeJobService) -> None:
    answer = client.post("/datasets?name=sums", content=ROW * 3, headers=JSONL)
    dataset = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/datasets/{dataset['id']}"
    expected = {"object": "dataset", "owner": "alice", "name": "sums", "rows": 3, "bytes": len(ROW) * 3}
    assert expected.items() <= dataset.items()
    assert dataset["columns"] == ["question", "answer"]
    assert service.uploads[dataset["id"]][1] == ROW * 3
    assert dataset.pop("chats") == []
    assert client.get(f"/datasets/{dataset['id']}").json() == dataset


def test_a_data_set_may_come_in_pieces(client: Client, service: FakeJobService) -> None:
    body = ROW * 1000
    pieces = iter([body[start : start + 777] for start in range(0, len(body), 777)])
    dataset = client.post("/datasets", content=pieces, headers={"Content-Type": "application/jsonl"}).json()
    assert dataset["rows"] == 1000
    assert service.uploads[dataset["id"]][1] == body


def test_bad_lines_of_a_data_set_are_named(client: Client, service: FakeJobService) -> None:
    answer = client.post("/datasets", content=ROW + b"nonsense\n" + ROW + b'{"question": NaN}\n', headers=JSONL)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_dataset")
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/lines/2", "/lines/4"]
    assert service.uploads == {}


def test_more_bad_lines_than_are_named_are_told_of(client: Client) -> None:
    answer = client.post("/datasets", content=b"nonsense\n" * 50, headers=JSONL).json()
    assert len(answer["errors"]) == 20
    assert answer["detail"] == "More than 20 things are wrong with the file; `errors` names the first 20."


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("text/csv", b"question,answer\nq,1\n"), ("application/json", b'[{"question": "q", "answer": "1"}]')],
)
def test_other_forms_are_made_into_json_lines(client: Client, content_type: str, body: bytes) -> None:
    answer = client.post("/datasets", content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 201
    assert (answer.json()["rows"], answer.json()["columns"]) == (1, ["question", "answer"])


def test_a_file_of_another_form_than_it_says_is_refused(client: Client) -> None:
    answer = client.post("/datasets", content=b"x" * 100, headers={"Content-Type": "application/vnd.apache.parquet"})
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (422, "unreadable")


@pytest.mark.parametrize("content_type", ["text/plain", "application/zip", ""])
def test_a_data_set_has_a_form_that_is_read(client: Client, content_type: str) -> None:
    answer = client.post("/datasets", content=ROW, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_an_empty_data_set_is_refused(client: Client) -> None:
    assert client.post("/datasets", content=b"", headers=JSONL).json()["errors"][0]["code"] == "empty"


@pytest.mark.parametrize("name", ["", "a" * 101, "a%00b", "a%0Ab"])
def test_a_bad_name_of_a_data_set_is_named(client: Client, name: str) -> None:
    answer = client.post(f"/datasets?name={name}", content=ROW, headers=JSONL)
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["parameter"] == "name"


def test_the_bounds_of_data_sets_are_settings() -> None:
    limits = ApiSettings.model_validate({"max_dataset_bytes": 2000, "max_dataset_rows": 5})
    with TestClient(create_app(FakeJobService(), limits)) as client:  # type: ignore[arg-type]
        client.headers.update(bearer())
        for body in (ROW * 6, ROW * 100, b'{"question": "' + b"x" * 3000 + b'"}'):
            for content in (body, iter([body])):
                answer = client.post("/datasets", content=content, headers=JSONL)
                assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert client.post("/datasets", content=ROW * 5, headers=JSONL).status_code == 201


@pytest.mark.parametrize("dataset_id", ["x", "ds-01ARZ3NDEKTSV4RRFFQ69G5FAV", "..%2f..%2fetc"])
def test_a_data_set_that_is_not_there(client: Client, dataset_id: str) -> None:
    assert client.get(f"/datasets/{dataset_id}").status_code == 404


def test_data_sets_of_others_are_not_there(client: Client, service: FakeJobService) -> None:
    theirs = client.post("/datasets", content=ROW, headers={**JSONL, **bearer("grpo_bob-key")}).json()
    assert theirs["owner"] == "bob"
    assert client.get(f"/datasets/{theirs['id']}").status_code == 404


def test_a_form_is_told_to_be_a_body(client: Client) -> None:
    answer = client.post("/datasets", files={"file": ("rows.jsonl", b'{"question": "1", "answer": 1}')})
    assert answer.status_code == 415
    assert "--data-binary @FILE, not -F" in answer.json()["detail"]
