"""One host of a Ray cluster and its worker, in one container: `python -m deploy.ray_node`.

Owns the options with which Ray is started: a token, a private address, fixed ports and no dashboard. The host whose
address is in `GRPO_RAY_ADDRESS` is the head. The worker is in the same container because Ray's programs on a host share
memory and sockets. Invariant: Ray is not started where strangers could use it, and ends after the worker.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address
from types import FrameType

PORTS = {"node-manager": 6380, "object-manager": 6381, "min-worker": 10002, "max-worker": 10999}
"""Ports that other hosts must reach, beside the head's. The ranks of a job use further ones, chosen by the kernel."""
OBJECT_STORE_BYTES = 200_000_000
"""Inputs pass through it in parts of 8 MB."""
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # the worker has its own limit, and saves
    "RAY_gcs_rpc_server_reconnect_timeout_s": "30",
}
_LOOK_SECONDS = 0.5
_END_SECONDS = 20.0


class Refused(Exception):
    """The settings would leave Ray open, or are incomplete."""


def command(environment: Mapping[str, str]) -> list[str]:
    """Return the command that starts Ray on this host. Raises `Refused`."""
    if environment.get("RAY_AUTH_MODE") != "token":
        raise Refused("Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the same token on every host.")
    if generated := environment.get("KUBERAY_GEN_RAY_START_CMD"):
        return ["sh", "-c", f"exec {generated}" if generated.startswith("ray ") else generated]
    here, address = environment.get("GRPO_RAY_HOST", ""), environment.get("GRPO_RAY_ADDRESS", "")
    head, _, port = address.rpartition(":")
    if not here or not head or not port.isdecimal():
        raise Refused("Set GRPO_RAY_HOST to this host's private address, and GRPO_RAY_ADDRESS to ADDRESS:PORT.")
    with suppress(ValueError):
        if ip_address(here).is_global and environment.get("RAY_USE_TLS") != "1":
            raise Refused(f"GRPO_RAY_HOST {here} is a public address: use a private one, or set RAY_USE_TLS=1.")
    place = ["--head", f"--port={port}", "--include-dashboard=false"] if here == head else [f"--address={address}"]
    ports = [f"--{name}-port={number}" for name, number in PORTS.items()]
    cards = ["--num-gpus=0"] if environment.get("GRPO_RAY_CARDS") == "0" else []
    limits = [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", "--block"]
    return ["ray", "start", *place, f"--node-ip-address={here}", *ports, *cards, *limits]


def main() -> int:
    """Start Ray and the worker, and end both when one ends or this process gets TERM."""
    try:
        start = command(os.environ)
    except Refused as error:
        sys.stderr.write(f"{error}\n")
        return 2
    environment = {**_SETTINGS, "GRPO_RAY_ADDRESS": "auto", **os.environ}
    sys.stderr.write(f"{shlex.join(start)}\n")
    ray = subprocess.Popen(start, env=environment)  # noqa: S603 - our own command
    worker = subprocess.Popen([*(sys.argv[1:] or ["grpo", "worker"])], env=environment)  # noqa: S603 - the operator's

    def stop(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            worker.send_signal(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while worker.poll() is None and ray.poll() is None:
        time.sleep(_LOOK_SECONDS)
    if worker.poll() is None:
        sys.stderr.write("Ray has ended.\n")
        worker.terminate()
    code = worker.wait()
    ray.terminate()
    with suppress(subprocess.TimeoutExpired):
        ray.wait(_END_SECONDS)
    ray.kill()
    return code or (1 if ray.returncode not in (0, -signal.SIGTERM, None) else 0)


if __name__ == "__main__":
    sys.exit(main())
