"""The Ray driver of one run: `python -m jobs.worker.gang_driver REQUEST` reserves its hosts, starts their ranks and
watches them.

Owns everything that is said to Ray. It is a separate process, because Ray takes over its signals and ends it when the
cluster is gone. It writes JSON lines to standard output and reads them from standard input (`gang` has the other end).
Invariant: the reservation lasts as long as this process, which ends with the worker or when its input is closed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo_core import strict_json
from grpo_core.processes import die_with_parent
from jobs.worker.gang_host import GangHost

ANSWER_SECONDS: Final = 10.0
"""Longest time in seconds for a host to answer; then it counts as lost."""
OPEN_SECONDS: Final = 120.0
"""The same for making a run folder, which imports the worker's code."""
CLOSE_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 0.5
PART_BYTES: Final = 8 << 20
"""Size of the parts in which inputs are sent."""


class _Closed(Exception):
    """The worker has closed the input."""


class Driver:
    """One reservation, from the request to the end."""

    def __init__(self, request: Mapping[str, Any], output: TextIO) -> None:
        self._request = request
        self._output = output
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._group: PlacementGroup | None = None
        self._hosts: list[Any] = []
        """One actor per host; the first one is this host, where the worker starts the ranks itself."""
        self._names: list[str] = []
        self._over: set[int] = set()

    def run(self) -> None:
        """Reserve, follow orders, and release everything."""
        threading.Thread(target=self._read, name="orders", daemon=True).start()
        try:
            if self._reserve():
                self._serve()
        except _Closed:
            pass
        except RayError as error:
            self._say("lost", message=f"The Ray cluster cannot be reached ({type(error).__name__}).")
        finally:
            self._release()

    def _reserve(self) -> bool:
        """Reserve as many hosts as possible of the numbers in the request. Says whether that worked."""
        here, gpus = self._addresses()[ray.get_runtime_context().get_node_id()], self._request["gpus"]
        bundle: dict[str, float] = {"CPU": 1, **({"GPU": gpus} if gpus else {})}
        for count in self._request["hosts"]:
            bundles = [bundle | {f"node:{here}": 0.001}, *([bundle] * (count - 1))]
            group = placement_group(bundles, strategy="STRICT_SPREAD")
            if group.wait(timeout_seconds=self._request["seconds"]):
                self._group = group
                return self._take(group, count)
            remove_placement_group(group)
        self._say("refused", hosts=self._fitting(bundle))
        return False

    def _addresses(self) -> dict[str, str]:
        return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}

    def _fitting(self, bundle: Mapping[str, float]) -> int:
        """Return the number of hosts with enough cards, free or not."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(all(has.get(name, 0) >= needed for name, needed in bundle.items()) for has in nodes)

    def _take(self, group: PlacementGroup, count: int) -> bool:
        make = ray.remote(max_restarts=0, max_task_retries=0)(GangHost)
        for at in range(count):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=at)
            options = {"num_cpus": 1, "num_gpus": self._request["gpus"], "scheduling_strategy": place}
            self._hosts.append(make.options(**options).remote())
        found = ray.get([host.place.remote() for host in self._hosts], timeout=OPEN_SECONDS)
        if any(place["memory_bytes"] < self._request["memory_bytes"] for place in found):
            self._say("refused", hosts=0)
            return False
        addresses = self._addresses()
        nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        self._names = [addresses[nodes[at]] for at in range(count)]
        meeting = f"{self._names[0]}:{found[0]['port']}"
        self._say("placed", hosts=self._names, meeting=meeting, cards=found[0]["cards"])
        return True

    def _serve(self) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._obey(self._orders.get(timeout=LOOK_SECONDS))
            self._look()

    def _obey(self, order: dict[str, Any] | None) -> None:
        if order is None:
            raise _Closed
        if "signal" in order:
            for host in self._hosts[1:]:
                host.signal.remote(order["signal"])
        else:
            self._start(order)

    def _start(self, order: Mapping[str, Any]) -> None:
        """Send the inputs to the other hosts, and start their ranks."""
        with contextlib.ExitStack() as files:
            folder = Path(order["folder"])
            paths = [folder / "spec.json", *(path for path in folder.glob("inputs/**/*") if path.is_file())]
            inputs = {path.relative_to(folder): files.enter_context(path.open("rb")) for path in paths}
            self._say("opened")  # from here on the folder may belong to the training process
            others = self._hosts[1:]
            spec = strict_json.loads(inputs[Path("spec.json")].read())
            inputs[Path("spec.json")].seek(0)
            self._call("open", order["job"], order["epoch"], order["owner"], spec, seconds=OPEN_SECONDS)
            for name, file in inputs.items():
                for part in iter(lambda file=file: file.read(PART_BYTES), b""):
                    if others:
                        self._call("write", str(name), ray.put(part), seconds=OPEN_SECONDS)
                    self._require_open()
            started = [
                host.start.remote([*order["arguments"], "--host", str(number)])
                for number, host in enumerate(others, start=1)
            ]
            ray.get(started, timeout=OPEN_SECONDS)

    def _require_open(self) -> None:
        """Stop sending if the worker has closed the input or asks for an end."""
        with contextlib.suppress(queue.Empty):
            order = self._orders.get_nowait()
            if order is None or "signal" in order:
                raise _Closed

    def _call(self, method: str, *arguments: Any, seconds: float) -> None:
        ray.get([getattr(host, method).remote(*arguments) for host in self._hosts[1:]], timeout=seconds)

    def _look(self) -> None:
        """Ask every host how its ranks are, and say who has ended or does not answer."""
        asked = {host.poll.remote(): at for at, host in enumerate(self._hosts) if at not in self._over}
        if not asked:
            return
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for reference, at in asked.items():
            if reference in late:
                self._lose(at, f"did not answer for {ANSWER_SECONDS:.0f} s")
                continue
            try:
                ended: dict[str, Any] | None = ray.get(reference)
            except RayError as error:
                self._lose(at, f"is gone ({type(error).__name__})")
                continue
            if ended is not None:
                self._over.add(at)
                self._say("ended", host=self._names[at], **ended)

    def _lose(self, at: int, how: str) -> None:
        self._over.add(at)
        self._say("lost", message=f"Host {at} of {len(self._hosts)}, {self._names[at]}, {how}.")

    def _release(self) -> None:
        with contextlib.suppress(Exception):
            closed = [host.close.remote() for host in self._hosts[1:]]
            ray.wait(closed, num_returns=len(closed), timeout=CLOSE_SECONDS) if closed else None
        for host in self._hosts:
            with contextlib.suppress(Exception):
                ray.kill(host)
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)

    def _say(self, event: str, **data: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._output.write(json.dumps({"event": event, **data}) + "\n")
            self._output.flush()

    def _read(self) -> None:
        for order in _orders(sys.stdin):
            self._orders.put(order)
        self._orders.put(None)


def _orders(lines: TextIO) -> Iterator[dict[str, Any]]:
    for line in lines:
        yield json.loads(line)


def main() -> None:
    """Serve one request."""
    die_with_parent()
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray prints is no answer
    request = json.loads(sys.argv[1])
    ray.init(address=request["address"], log_to_driver=False, logging_level=logging.ERROR)
    Driver(request, output).run()
    os._exit(0)  # Ray's own end takes seconds, and the reservation ends with this process


if __name__ == "__main__":
    main()
