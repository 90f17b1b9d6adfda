"""A browser before the real stack: API, Valkey, SeaweedFS and two workers, on which real and made-up runs train.

The stack lives as long as the session, since it takes seconds to start; each test has its own browser context, so its
own cookies and storage. Where no Chromium is installed the tests are skipped. Invariant: when a module's tests are
over, no event loop of Playwright runs on: `asyncio.run` works in whatever test comes next.

An address changes before the page acts on it, so a test that only waits for the address may look at what was there
before: `Visitor.arrived` waits for the page. `GRPO_TEST_LATE_MS=300 make browser` makes every view and answer come that
much later, and `GRPO_TEST_CPU_SLOWDOWN=4 make browser` slows the page's scripts down, which is where such tests fail.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from grpo_core.spec import parse_spec
from jobs.auth.api_keys import SCOPES
from jobs.service import JobService
from jobs.settings import QueueSettings, StorageSettings
from jobs.store.job import TERMINAL, JobStatus
from tests.clock import patience
from tests.conftest import SeaweedFSServer, ValkeyServer
from tests.integration.running import RunningApi

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMAGES = ROOT / "docs" / "images"
OWNER = "mia"
LATE_MS = int(os.environ.get("GRPO_TEST_LATE_MS", "0"))
CPU_SLOWDOWN = int(os.environ.get("GRPO_TEST_CPU_SLOWDOWN", "1"))
# Says which address the page has acted on, since only its own listener knows; runs before any script of the page.
WATCH = """{
  const late = %d;
  const later = (call) => (late ? setTimeout(call, late) : call());
  const listen = window.addEventListener.bind(window);
  const ask = window.fetch.bind(window);
  window.actedOn = location.hash;
  const acting = (call) => (event) => later(() => (call(event), (window.actedOn = location.hash)));
  window.addEventListener = (type, call, ...options) =>
    listen(type, type === "hashchange" ? acting(call) : call, ...options);
  if (late) window.fetch = (...all) => new Promise((go) => setTimeout(go, late)).then(() => ask(...all));
}"""
CHROMIUM = os.environ.get("GRPO_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: run tests/browser/install.sh, or name one in GRPO_TEST_CHROMIUM")
    return CHROMIUM


# By module, and not for the session: Playwright's loop counts as running in this thread for as long as it is open.
@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        # Chromium's own sandbox refuses to be run by root; what is shown here is ours.
        running = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


class Stack:
    """The service as a person finds it, with a key to it."""

    def __init__(self, api: RunningApi, key: str) -> None:
        self.api, self.service, self.url, self.key = api, api.service, api.url, key
        self._made: dict[str, str] = {}

    def made_up(self, kind: str, name: str, steps: int, seconds: float = 0.005, **spec: Any) -> str:
        """The id of a made-up run (`trainer.py`); the same one for the same name."""
        if name not in self._made:
            body = {
                "name": name,
                "metadata": {"made_up": kind, "step_seconds": str(seconds), "team": "reasoning"},
                "resources": {"gpus": 0},
                "optimizer": {"name": "adamw_torch"},
                "training": {"steps": steps, "checkpoint_every": 50},
                **spec,
            }
            self._made[name] = self.service.submit(parse_spec(body), OWNER).id
        return self._made[name]

    def wait(self, job_id: str, *statuses: JobStatus, step: int = 0, seconds: float = 120) -> None:
        """Until the job has one of these states (any end where none is named) and has come so far."""
        deadline = time.monotonic() + patience(seconds)
        while True:
            record = self.service.get(job_id, OWNER)
            if record.status in (statuses or TERMINAL) and record.step >= step:
                return
            assert time.monotonic() < deadline, f"{job_id} is {record.status} at step {record.step}: {record.error}"
            time.sleep(0.1)

    def ended(self, kind: str, name: str, steps: int, **spec: Any) -> str:
        """A made-up run that is over."""
        job_id = self.made_up(kind, name, steps, **spec)
        self.wait(job_id)
        assert self.service.get(job_id, OWNER).status is JobStatus.SUCCEEDED, self.service.get(job_id, OWNER).error
        return job_id

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=patience(20))


@pytest.fixture(scope="session")
def stack(
    chromium: str,  # where there is none, no stack is started
    valkey: ValkeyServer,
    seaweedfs: SeaweedFSServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    queue = QueueSettings.model_validate({"redis_url": valkey.url, "prefix": "t-browser", "lease_seconds": 15.0})
    storage = StorageSettings.model_validate(
        {
            "endpoint": seaweedfs.endpoint,
            "bucket": seaweedfs.bucket,
            "region": seaweedfs.region,
            "access_key": seaweedfs.access_key,
            "secret_key": seaweedfs.secret_key,
        }
    )
    folder = tmp_path_factory.mktemp("workers")
    api = RunningApi(JobService(storage, queue))
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with api.run():
            api.service.check_storage()
            workers += [start_worker(folder, number, valkey, queue, storage) for number in range(2)]
            key, _ = api.service.keys.create(OWNER, SCOPES)
            yield Stack(api, key)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(timeout=patience(60))


def start_worker(
    folder: Path, number: int, valkey: ValkeyServer, queue: QueueSettings, storage: StorageSettings
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "REDIS_URL": valkey.url,
        "GRPO_PREFIX": queue.prefix,
        "GRPO_LEASE_SECONDS": str(queue.lease_seconds),
        "S3_ENDPOINT": storage.endpoint,
        "S3_BUCKET": storage.bucket,
        "S3_REGION": storage.region,
        "AWS_ACCESS_KEY_ID": storage.access_key.get_secret_value(),
        "AWS_SECRET_ACCESS_KEY": storage.secret_key.get_secret_value(),
        "GRPO_WORKER_NAME": f"browser-{number}",
        "GRPO_WORK_DIR": str(folder / f"work{number}"),
        "GRPO_MODEL_DIR": str(ROOT / "examples" / "models"),
        "GRPO_LAUNCHER": shlex.join([sys.executable, str(HERE / "trainer.py")]),
    }
    with (folder / f"worker{number}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "jobs"], env=environment, stdout=log, stderr=log, cwd=ROOT)


@dataclass
class Expected:
    """Lines of the console that a test brings about; `sure` where at least one must come."""

    text: re.Pattern[str]
    url: re.Pattern[str]
    sure: bool
    count: int = 0

    def takes(self, text: str, url: str) -> bool:
        is_this = bool(self.text.search(text) and self.url.search(url))
        self.count += is_this
        return is_this

    @property
    def is_missing(self) -> bool:
        return self.sure and not self.count


class Visitor:
    """A person with a browser window.

    A browser reports a refused request some time after the page has acted on it. So a test declares beforehand which
    reports it brings about (`expect_refusals`, `expect_trouble`), and `leave` waits for these and fails for any other.
    """

    def __init__(self, page: Page, stack: Stack) -> None:
        self.page, self.stack = page, stack
        self.troubles: list[str] = []
        self.expected: list[Expected] = []
        self.is_torn = False
        """Whether Chromium dropped what it was loading, since a network interface of this machine came or went."""
        page.on("pageerror", lambda error: self._trouble(f"error: {error}", ""))
        page.on("console", self._read)

    def expect_refusals(self, status: int, path: str, *, sure: bool = True) -> None:
        """From here on, answers of this status to requests whose address has this expression are no trouble.

        At least one must come before the test is over, unless `sure` is False.
        """
        self.expect_trouble(rf"^Failed to load resource: .*status of {status} ", path, sure=sure)

    def expect_trouble(self, text: str, path: str = "", *, sure: bool = True) -> None:
        """From here on, lines of the console with this expression, about an address with this path, are no trouble."""
        self.expected.append(Expected(re.compile(text), re.compile(path), sure))

    def leave(self) -> list[str]:
        """What went wrong that no test brought about, once all that one did bring about has come."""
        if not self.troubles and not self.page.is_closed():
            late = time.monotonic() + patience(5)
            while any(one.is_missing for one in self.expected) and time.monotonic() < late:
                self.page.wait_for_timeout(50)
        return self.troubles + [f"never came: {one}" for one in self.expected if one.is_missing]

    def _read(self, line: ConsoleMessage) -> None:
        if "net::ERR_NETWORK_CHANGED" in line.text:
            self.is_torn = True
        elif line.type in ("error", "warning"):
            self._trouble(line.text, line.location["url"])

    def _trouble(self, text: str, url: str) -> None:
        taken = [one.takes(text, url) for one in self.expected]  # each counts: two may expect the same line
        if not any(taken):
            self.troubles.append(f"{text} {url}".strip())

    def log_in(self, path: str = "/", *, key: str = "") -> None:
        """Log in as a person would, then go to an address. Without a `key`, it is that of the stack's owner."""
        self.page.goto(f"{self.stack.url}/")
        while self.is_torn:
            self.is_torn = False
            self.page.reload()
        self.page.locator("#key").fill(key or self.stack.key)
        self.page.locator("#key").press("Enter")
        self.page.locator("#list").wait_for()
        if path != "/":
            self.go(path)

    def go(self, path: str) -> None:
        """Go to an address, and wait until the page shows it."""
        self.page.goto(f"{self.stack.url}/#{path}")
        self.settled()

    def until(self, expression: str, seconds: float = 20) -> None:
        """Wait until a JavaScript expression is true; Playwright's own way to wait is forbidden by the policy."""
        self.wait(lambda: self.page.evaluate(expression), seconds, f"never true: {expression}")

    def wait(self, true: Callable[[], Any], seconds: float = 20, trouble: str = "it did not come true") -> None:
        """Wait for something while the window lives on; a plain sleep would hold up its requests and their routes."""
        deadline = time.monotonic() + patience(seconds)
        while not true():
            assert time.monotonic() < deadline, trouble
            self.page.wait_for_timeout(50)

    def settled(self) -> None:
        """Wait until the view of this address shows what it came to show."""
        self.until("window.actedOn === location.hash")
        self.page.locator("main h1").wait_for()
        self.until("!document.querySelector('.busy, [aria-busy=true]')")

    def arrived(self, address: str) -> None:
        """Wait until the address matches an expression and the page shows it."""
        self.page.wait_for_url(re.compile(address))
        self.settled()

    def step(self, name: str) -> None:
        """Go to a step of the guide to a new job."""
        self.page.locator(f".steps button[data-step={name}]").click()
        self.page.locator(f"#step-{name}").wait_for()

    def too_wide(self) -> list[str]:
        """What makes the page scroll sideways; nothing where it does not."""
        return self.page.evaluate(
            """() => {
              const width = document.documentElement.clientWidth;
              if (document.documentElement.scrollWidth <= width) return [];
              const wide = [...document.querySelectorAll("body *")].filter(
                (one) => !one.closest(".scroll") && one.getBoundingClientRect().right > width,
              );
              const named = wide.map((one) => `${one.tagName}.${one.className}: ${one.getBoundingClientRect().right}`);
              const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
              while (texts.nextNode()) {
                const { currentNode: text } = texts;
                const range = document.createRange();
                range.selectNodeContents(text);
                const { right } = range.getBoundingClientRect();
                const isHidden = text.parentElement.closest(".scroll, .sr-only");
                if (right > width && !isHidden) named.push(`${text.data}: ${right}`);
              }
              return [`${document.documentElement.scrollWidth} > ${width}`, ...named];
            }"""
        )

    def photograph(self, name: str) -> None:
        """A picture for the documents, where the run was asked for them."""
        if os.environ.get("GRPO_PAGE_IMAGES"):
            IMAGES.mkdir(exist_ok=True)
            self.page.locator(".toast").wait_for(state="detached")
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=IMAGES / f"{name}.png")


@pytest.fixture
def visit(browser: Browser, stack: Stack) -> Iterator[Callable[..., Visitor]]:
    """Opens windows; none of them may have seen an error or a broken policy when the test ends."""
    contexts: list[Any] = []
    visitors: list[Visitor] = []

    def open_window(**options: Any) -> Visitor:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-US", **options})
        context.set_default_timeout(1000 * patience(15))
        context.add_init_script(WATCH % LATE_MS)
        contexts.append(context)
        page = context.new_page()
        if CPU_SLOWDOWN > 1:
            context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": CPU_SLOWDOWN})
        visitors.append(Visitor(page, stack))
        return visitors[-1]

    yield open_window
    troubles = [trouble for visitor in visitors for trouble in visitor.leave()]
    for context in contexts:
        context.close()
    assert troubles == []
