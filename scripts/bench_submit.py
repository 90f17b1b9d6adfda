"""How many jobs the API accepts: as fast as it can, then at a steady rate, against a running stack.

    grpo up && source .grpo/env && python scripts/bench_submit.py

Prints one JSON line a phase: accepted a second, and percentiles of the time one answer took, in milliseconds.
The jobs ask for a GPU, so that no CPU worker takes them.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import threading
import time
from urllib.parse import urlsplit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second of the steady phase")
    arguments = parser.parse_args()
    report("as fast as it can", flood(arguments.threads, arguments.seconds), arguments.seconds)
    report(f"{arguments.rate:g} a second", steady(arguments.rate, arguments.seconds), arguments.seconds)


def flood(threads: int, seconds: float) -> list[float]:
    """Submit from many threads without a pause; returns the seconds each answer took."""
    taken: list[float] = []
    deadline = time.monotonic() + seconds

    def work() -> None:
        connection = connect()
        while time.monotonic() < deadline:
            taken.append(submit(connection))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return taken


def steady(rate: float, seconds: float) -> list[float]:
    """Submit at fixed moments, whether or not earlier answers have come."""
    taken: list[float] = []
    began = time.monotonic()
    workers: list[threading.Thread] = []
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        workers.append(threading.Thread(target=lambda: taken.append(submit(connect()))))
        workers[-1].start()
    for worker in workers:
        worker.join()
    return taken


def connect() -> http.client.HTTPConnection:
    url = urlsplit(os.environ["GRPO_URL"])
    return http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=30)


def submit(connection: http.client.HTTPConnection) -> float:
    """Post one default job; returns the seconds until its answer was read."""
    headers = {"Authorization": f"Bearer {os.environ['GRPO_API_KEY']}", "Content-Type": "application/json"}
    began = time.perf_counter()
    connection.request("POST", "/jobs", body=b'{"lora": {"rank": 16}}', headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status == 201, body
    return time.perf_counter() - began


def report(phase: str, taken: list[float], seconds: float) -> None:
    taken.sort()
    percentiles = {f"p{p}_ms": round(taken[int(len(taken) * p / 100)] * 1000, 1) for p in (50, 95, 99)}
    print(json.dumps({"phase": phase, "accepted_per_s": round(len(taken) / seconds, 1), **percentiles}))


if __name__ == "__main__":
    main()
