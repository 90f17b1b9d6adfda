"""The rows of a hub data set are shown before a job, by the rules that hold for a training process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo_core.spec import parse_spec
from jobs.errors import Rejected
from jobs.read.hub_look import hub_records
from tests.hub_server import TOKEN, Repo, hub_with

ROWS = [{"question": f"{n}+1", "answer": str(n + 1), "kind": "sum"} for n in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def spec_of(name: str, **data: Any) -> Any:
    return parse_spec({"data": {"source": "hub", "dataset": name, "split": "train", **data}})


def refusal(name: str, owner: str = "ann", **data: Any) -> Any:
    with pytest.raises(Rejected) as refused:
        hub_records(spec_of(name, **data), owner)
    return refused.value.problems[0]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    elsewhere = Repo({"train.jsonl": LINES}, redirects={"train.jsonl": "http://10.0.0.1/secret"})
    repos = {
        "me/sums": Repo({"train.jsonl": LINES}),
        "me/private": Repo({"train.jsonl": LINES}, private=True),
        "me/elsewhere": elsewhere,
        "me/large": Repo({"train.jsonl": b'{"question": "' + b"x" * (70 << 20) + b'"}\n'}),
    }
    with hub_with(repos) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("GRPO_HF_TOKEN_REPOS", "bob:me/private")
        yield server


def test_the_first_rows_with_every_column(hub: Any) -> None:
    assert hub_records(spec_of("me/sums"), "ann") == ROWS[:200]
    assert {token for _, token in hub.tokens} == {None}, "the token is not sent for what anybody may read"


def test_the_token_is_used_for_the_owner_that_may(hub: Any) -> None:
    assert refusal("me/private").code == "dataset_not_found"
    assert TOKEN not in {token for _, token in hub.tokens}
    assert hub_records(spec_of("me/private"), "bob")[0] == ROWS[0]


def test_what_leads_elsewhere_is_not_followed(hub: Any) -> None:
    problem = refusal("me/elsewhere")
    assert problem.code == "egress_refused"
    assert "upload the file" in problem.remedy


def test_the_bytes_of_a_look_are_bounded(hub: Any) -> None:
    assert refusal("me/large").code in ("too_large", "unreadable")
    assert refusal("me/sums", split="test").code == "no_such_split"


def test_a_hub_that_is_away_is_said_at_once(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    problem = refusal("me/sums")
    assert (problem.pointer, problem.code) == ("/data/dataset", "hub_unreachable")
    assert "cannot be shown here" in problem.detail
