"""A Ray cluster of two hosts on this machine: the second one is a network namespace, on a cable that can be cut.

Needs root. The first host is the machine itself, with an address of its own on the cable; so servers on it need nothing
special. Each host has its own settings, by the environment in which Ray is started, as on real hosts.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from deploy.certificates import Certificates
from grpo_core import processes
from tests.clock import patience

RAY = Path(sys.executable).with_name("ray")


def unavailable() -> str:
    """Why this machine cannot have such a cluster, or an empty string."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    if not RAY.exists():
        return "Ray is not installed (make setup)"
    probe = f"gp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", probe], check=True)
    return "" if made else "this root may not make network namespaces"


class RayCluster:
    """Two hosts with a processor each."""

    def __init__(self, folder: Path, port: int, *, tls: bool = False, **environment: str) -> None:
        number = os.getpid() % 65536
        net = f"10.{77 + number % 100}.{number >> 8 & 255}"
        self.addresses = [f"{net}.1", f"{net}.2"]
        self.address = f"{self.addresses[0]}:{port}"
        self._namespace, self._cable = f"g{number}", f"ga{number}"
        self._log = folder / "ray.log"
        self._temporary = Path(tempfile.mkdtemp(prefix="gr", dir="/tmp"))  # short, for sockets
        self.token = secrets.token_hex(32)
        self.variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "GRPO_RAY_ADDRESS": self.address}
        if tls:
            self.variables |= self._encrypt(folder / "tls")
        # Ray's own limit is 30 s, for a whole machine that does nothing else.
        patient = {"RAY_raylet_start_wait_time_s": "150", "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment = {**os.environ, **self.variables, **patient, **environment}
        self.work = folder / "work-of-host-2"
        self._hosts: list[subprocess.Popen[bytes] | None] = [None, None]

    def _encrypt(self, folder: Path) -> dict[str, str]:
        Certificates(folder, tuple(self.addresses)).ensure()
        files = {"SERVER_CERT": "store.crt", "SERVER_KEY": "store.key", "CA_CERT": "authority.crt"}
        return {"RAY_USE_TLS": "1", **{f"RAY_TLS_{name}": str(folder / file) for name, file in files.items()}}

    def start(self) -> None:
        ours, theirs = self.addresses
        inside = ("ip", "-n", self._namespace)
        for command in (
            ("ip", "netns", "add", self._namespace),
            ("ip", "link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self._namespace),
            ("ip", "addr", "add", f"{ours}/24", "dev", self._cable),
            ("ip", "link", "set", self._cable, "up"),
            (*inside, "addr", "add", f"{theirs}/24", "dev", "eth0"),
            (*inside, "link", "set", "eth0", "up"),
            (*inside, "link", "set", "lo", "up"),
        ):
            subprocess.run(command, check=True)
        head = ("--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self._temporary}")
        self._hosts[0] = self._start(0, [*head, "--include-dashboard=false"], self._environment)
        self.start_second()

    def start_second(self) -> None:
        """Start the second host, or start it again."""
        there = {"GRPO_WORK_DIR": str(self.work), "GRPO_CACHE_DIR": f"{self.work}-caches"}
        # A folder of its own: Ray's hosts take theirs from the first one, and a real host has another disk.
        own = f'mount -t tmpfs none {self._temporary} && exec "$@"'
        within = ["ip", "netns", "exec", self._namespace, "sh", "-c", own, "sh"]
        options = [f"--address={self.address}"]
        self._hosts[1] = self._start(1, options, {**self._environment, **there}, within)

    def kill_second(self) -> None:
        """End every process of the second host at once."""
        found = subprocess.run(["ip", "netns", "pids", self._namespace], capture_output=True, check=False)
        for pid in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if self._hosts[1] is not None:
            self._hosts[1].wait()

    def cut(self) -> None:
        subprocess.run(["ip", "link", "set", self._cable, "down"], check=True)

    def mend(self) -> None:
        subprocess.run(["ip", "link", "set", self._cable, "up"], check=True)

    def stop(self) -> None:
        self.kill_second()
        if self._hosts[0] is not None:
            for pid in (*processes.descendants(self._hosts[0].pid), self._hosts[0].pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._hosts[0].wait()
        subprocess.run(["ip", "link", "del", self._cable], check=False)
        subprocess.run(["ip", "netns", "del", self._namespace], check=False)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(
        self, at: int, options: list[str], environment: dict[str, str], within: list[str] | None = None
    ) -> subprocess.Popen[bytes]:
        limits = [
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--num-cpus=1",
            "--num-gpus=0",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            "--block",
        ]
        address = f"--node-ip-address={self.addresses[at]}"
        before = self._log.read_text().count("Ray runtime started") if self._log.exists() else 0
        with self._log.open("ab") as output:
            host = subprocess.Popen(
                [*(within or []), str(RAY), "start", address, *options, *limits],
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + patience(60)
        while self._log.read_text().count("Ray runtime started") == before:
            assert host.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)
        return host
