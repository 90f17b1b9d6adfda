"""What a normal client notices while others ask for all they can: against a running stack on this host.

    grpo up && source .grpo/env && python scripts/bench_hostile.py --seconds 60

A third of the hostile clients have a separate owner and key each, a third share one owner's, a third have none.
Each does the same thing over and over: bad specs, filters that match nothing, orders, event streams, uploads that do
not end, half requests and endless headers, completions sorted, thousands of parameters, wrong keys. Meanwhile one owner
submits, lists, looks at, watches and cancels jobs, and requests the probes ten times a second. Prints a JSON line for
each kind of call before the attack and during it: how many, percentiles in milliseconds, and answers that were no 2xx.

Bounded in clients and time, and refuses to ask any host but this one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo_core.spec import parse_spec
from jobs.service import JobService

SPEC = {"resources": {"gpus": 1}, "metadata": {"team": "a"}}
"""For a machine that is not there: the jobs wait."""
MOST_CLIENTS, MOST_SECONDS = 64, 600.0
BAD = json.dumps({f"training_stepz_{number}": number for number in range(8000)})
MANY = "&".join(f"limitt{number:x}=1" for number in range(2500))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=2000, help="jobs of the hostile owner that are searched through")
    arguments = parser.parse_args()
    url = os.environ["GRPO_URL"]
    service = JobService.from_settings()
    for line in measure(service, url, min(arguments.clients, MOST_CLIENTS), arguments.seconds, arguments.jobs):
        print(json.dumps(line))


def measure(service: JobService, url: str, clients: int, seconds: float, jobs: int) -> list[dict[str, Any]]:
    """The figures of the normal client, without and with the others."""
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise SystemExit(f"{url} is not on this host; attack no other.")
    seconds = min(seconds, MOST_SECONDS)
    normal, _ = service.keys.create("normal")
    crowded, _ = service.keys.create("crowded")
    targets = [service.submit(parse_spec(SPEC), "crowded").id for _ in range(jobs)]
    quiet = Normal(url, normal).run(max(2.0, seconds / 4))
    keys = [
        service.keys.create(f"hostile-{n}")[0] if n % 3 == 0 else crowded if n % 3 == 1 else "" for n in range(clients)
    ]
    # A separate process: what they compute must not delay the clock of who is measured.
    context = multiprocessing.get_context("spawn")
    begun, stop = context.Event(), context.Event()
    attackers = context.Process(target=attack, args=(url, keys, targets, begun, stop), daemon=True)
    attackers.start()
    try:
        begun.wait(60)
        loud = Normal(url, normal).run(seconds)
    finally:
        stop.set()
        attackers.join(60)
    return [
        {"call": name, "when": when, **figures(times, other)}
        for when, found in (("before", quiet), ("attack", loud))
        for name, (times, other) in found.items()
    ]


def attack(url: str, keys: list[str], targets: list[str], begun: Event, stop: Event) -> None:
    """Be one hostile client for each key, and for each that is empty one without."""
    kinds = itertools.cycle(WITH_KEY)
    clients = [
        Hostile(url, key, next(kinds), targets) if key else Stranger(url, number) for number, key in enumerate(keys)
    ]
    threads = [threading.Thread(target=_again, args=(client.attack, stop), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    begun.set()
    for thread in threads:
        thread.join()
    for client in clients:
        client.close()


def figures(times: list[float], other: int) -> dict[str, Any]:
    """Count, percentiles in milliseconds, and answers other than 2xx."""
    times = sorted(times)

    def percentile(share: float) -> float:
        return round(times[min(len(times) - 1, int(len(times) * share))] * 1000, 1)

    return {"n": len(times), "p50": percentile(0.5), "p99": percentile(0.99), "max": percentile(1), "not_2xx": other}


def _again(attack: Callable[[], None], stop: Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(httpx.HTTPError, OSError):
            attack()
        time.sleep(0.005)


class Normal:
    """An owner at work, and the probes of whatever runs the service."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        self._found: dict[str, tuple[list[float], int]] = {}
        self._stop = threading.Event()

    def run(self, seconds: float) -> dict[str, tuple[list[float], int]]:
        """Times of each kind of call, and how many were not answered with 2xx."""
        probes = threading.Thread(target=self._probe)
        probes.start()
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                self._work()
        finally:
            self._stop.set()
            probes.join()
            self._client.close()
        return self._found

    def _work(self) -> None:
        answer = self._time("submit", lambda: self._client.post("/jobs", json=SPEC))
        job = answer.json()["id"] if answer.is_success else None
        self._time("list", lambda: self._client.get("/jobs"))
        if job:
            self._time("show", lambda: self._client.get(f"/jobs/{job}"))
            self._time("watch, first event", lambda: self._watch(job))
            self._time("cancel", lambda: self._client.post(f"/jobs/{job}/cancel"))
        time.sleep(0.1)

    def _watch(self, job: str) -> httpx.Response:
        with self._client.stream("GET", f"/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as answer:
            for text in answer.iter_text():
                if "id: " in text:
                    break
        return answer

    def _probe(self) -> None:
        # A connection for each, as most that probe do.
        with httpx.Client(base_url=self._url, timeout=60, headers={"Connection": "close"}) as client:
            while not self._stop.is_set():
                for path in ("/healthz", "/readyz"):
                    self._time(path, lambda path=path: client.get(path))
                time.sleep(0.1)

    def _time(self, name: str, call: Callable[[], httpx.Response]) -> httpx.Response:
        begun = time.perf_counter()
        try:
            answer = call()
        except httpx.TransportError as error:
            answer = httpx.Response(599, text=repr(error))
            print(name, repr(error), file=sys.stderr)
        times, other = self._found.get(name, ([], 0))
        self._found[name] = ([*times, time.perf_counter() - begun], other + (not answer.is_success))
        return answer


class Hostile:
    """One with a key."""

    def __init__(self, url: str, key: str, kind: str, targets: list[str]) -> None:
        self._url, self._kind, self._targets = url, kind, itertools.cycle(targets)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=url, headers=self._headers, timeout=30)
        self._held: list[socket.socket] = []

    def attack(self) -> None:
        """Once."""
        getattr(self, f"_{self._kind}")()

    def close(self) -> None:
        """Let go of what is held."""
        self._client.close()
        for sock in self._held:
            sock.close()

    def _bad_spec(self) -> None:
        self._client.post("/jobs", content=BAD, headers={"Content-Type": "application/json"})

    def _search(self) -> None:
        self._client.get("/jobs", params={"metadata[team]": "nobody", "limit": 100})

    def _order(self) -> None:
        job = next(self._targets)
        for order in ("pause", "resume"):
            self._client.post(f"/jobs/{job}/{order}")
        self._client.delete(f"/jobs/{job}")

    def _submit(self) -> None:
        self._client.post("/jobs", json=SPEC)

    def _stream(self) -> None:
        self._hold(f"GET /jobs/{next(self._targets)}/events HTTP/1.1", "Accept: text/event-stream", 300)

    def _upload(self) -> None:
        self._hold("POST /datasets HTTP/1.1", "Content-Type: application/x-ndjson\r\nContent-Length: 200000000", 30)

    def _rollouts(self) -> None:
        self._client.get(f"/jobs/{next(self._targets)}/rollouts", params={"limit": 500, "order": "-reward"})

    def _parameters(self) -> None:
        self._client.get(f"/jobs?{MANY}")

    def _hold(self, line: str, more: str, most: int) -> None:
        sock = _connect(self._url)
        sock.sendall(f"{line}\r\nHost: a\r\nAuthorization: {self._headers['Authorization']}\r\n{more}\r\n\r\n".encode())
        self._held.append(sock)
        if len(self._held) > most:
            self._held.pop(0).close()


WITH_KEY = ("bad_spec", "search", "order", "submit", "stream", "upload", "rollouts", "parameters")


class Stranger:
    """One without."""

    def __init__(self, url: str, number: int) -> None:
        self._url = url
        self._attack = (self._half, self._endless, self._wrong_key)[number // 3 % 3]
        self._held: list[socket.socket] = []

    def attack(self) -> None:
        """Once."""
        self._attack()

    def close(self) -> None:
        """Let go of what is held."""
        for sock in self._held:
            sock.close()

    def _half(self) -> None:
        sock = _connect(self._url)
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n")
        self._held.append(sock)
        if len(self._held) > 250:
            self._held.pop(0).close()

    def _endless(self) -> None:
        with _connect(self._url) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: ")
            for _ in range(1000):
                sock.sendall(b"a" * 65536)

    def _wrong_key(self) -> None:
        httpx.post(f"{self._url}/session", json={"key": "grpo_wrong"}, headers={"X-GRPO-Page": "1"}, timeout=30)


def _connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 80), timeout=10)


if __name__ == "__main__":
    main()
