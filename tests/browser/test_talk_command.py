"""The command that `make demo` ends with: it serves a job of a stopped stack, and the page it opens answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.sync_api import Browser

from deploy.local.ports import pick_port, pick_s3_port
from grpo_client import GrpoClient
from tests.browser.conftest import ROOT, Visitor
from tests.clock import patience

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

GRPO = Path(sys.executable).with_name("grpo")
FIRST_WORDS_SECONDS = 60
"""For a machine on which other tests run; two idle cores take a fifth of it."""


class Demo:
    """A stack of its own, in a folder, on free ports."""

    def __init__(self, data: Path) -> None:
        ports = {"--port": pick_port(), "--valkey-port": pick_port(), "--s3-port": pick_s3_port()}
        self._up = ["up", "--data", str(data), "--model-dir", str(ROOT / "examples" / "models")]
        self._up += [str(word) for option in ports.items() for word in option]
        self.data = data

    def grpo(self, *arguments: str) -> str:
        command = [str(GRPO), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience(240), cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def up(self, *more: str) -> dict[str, Any]:
        return json.loads(self.grpo(*self._up, "--json", *more))

    def down(self) -> None:
        self.grpo("down", "--data", str(self.data))

    @property
    def key(self) -> str:
        lines = (self.data / "env").read_text().splitlines()
        (line,) = [line for line in lines if "GRPO_API_KEY=" in line]
        return line.partition("=")[2].strip("'\"")


@pytest.fixture
def demo(chromium: str, tmp_path: Path) -> Iterator[Demo]:
    assert chromium
    demo = Demo(tmp_path / "demo")
    yield demo
    demo.down()


def train(url: str, key: str) -> str:
    """A job of the demo's kind, with fewer steps."""
    spec = json.loads((ROOT / "examples/tiny/job.json").read_text())
    spec["training"] |= {"steps": 4, "checkpoint_every": 2, "save_steps": 2}
    spec["evaluation"] = {"questions": 8, "max_completion_tokens": 48}
    with GrpoClient(url, key) as client:
        spec["data"]["dataset"] = client.upload_dataset(ROOT / "examples/tiny/train.jsonl").id
        job = client.submit(spec)
        client.wait(job.id, timeout=patience(240))
        assert client.get(job.id).status == "succeeded"
    return job.id


@pytest.mark.skipif(os.environ.get("GRPO_TEST_LATE_MS") is not None, reason="it measures the page as it is")
def test_the_model_of_a_stopped_demo_answers_on_the_page_that_the_command_opens(demo: Demo, browser: Browser) -> None:
    url = demo.up()["url"]
    job = train(url, demo.key)
    demo.down()

    began = time.monotonic()
    page = demo.up("--talk", job)["page"]
    served = time.monotonic() - began
    assert page == f"{url}/#/talk/{job}?question=0"
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US")
    visitor = Visitor(context.new_page(), SimpleNamespace(url=url, key=demo.key))  # type: ignore[arg-type]
    visitor.log_in()
    visitor.page.goto(page)
    visitor.wait(
        lambda: any(text.strip() for text in visitor.page.locator(".talk-answer .completion").all_inner_texts()),
        FIRST_WORDS_SECONDS,
        "no answer came",
    )
    seconds = time.monotonic() - began
    print(f"\nfrom the command to the first words {seconds:.1f} s, of it {served:.1f} s until the model is served")
    assert seconds < patience(FIRST_WORDS_SECONDS)
    context.close()
