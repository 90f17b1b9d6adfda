"""Podman, the images, and deploy/compose.yaml running with them, for the tests of this folder.

Everything podman stores lies in a folder of its own, so that a stand-in image is never taken for the real one outside
these tests. The images are built as a user builds them, save that certificates and a CPU build of torch may come from
this machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.local import seaweedfs, valkey
from deploy.local.ports import pick_port
from grpo_client import GrpoClient
from tests.clock import patience

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = Path("/var/tmp/grpo-jobs-containers")
TOOLS = ("podman", "buildah", "debootstrap", "runc")
BASE = "docker.io/library/python:3.11-slim-bookworm"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PROJECT = "grpo-test"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "containers: builds and runs the images, which takes minutes and 10 GB")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    missing += [] if importlib.util.find_spec("podman_compose") else ["podman-compose"]
    if "containers" not in config.option.markexpr:
        reason = "takes minutes and 10 GB, so only on demand: pytest -m containers"
    elif missing:
        reason = f"{', '.join(missing)} not installed: run make setup and tests/containers/install.sh"
    elif os.geteuid() != 0:
        reason = "debootstrap makes the base image and needs root"
    else:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class Podman:
    """Runs podman and buildah on the tests' own storage."""

    def __init__(self) -> None:
        CACHE.mkdir(exist_ok=True)
        storage = CACHE / "storage.conf"
        storage.write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{CACHE}/storage"\nrunroot = "/run/grpo-jobs-containers"\n'
        )
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(HERE / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(storage),
        }

    def run(self, *words: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Any command in podman's environment; its output is in the failure."""
        done = subprocess.run(
            [str(word) for word in words], env=self.environment, capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == 0 or not check, f"{words} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def __call__(self, *words: str, check: bool = True) -> str:
        return self.run("podman", *words, check=check).stdout.strip()

    def inspect(self, what: str) -> dict[str, Any]:
        """A container or an image."""
        return json.loads(self("inspect", what))[0]

    def has_image(self, name: str) -> bool:
        return self.run("podman", "image", "exists", name, check=False).returncode == 0

    def build(self, image: str, target: str, context: Path, *options: str) -> float:
        """Build as a user would; returns the seconds it took."""
        if certificates := os.environ.get("PIP_CERT"):
            options = (*options, "--volume", f"{certificates}:{CERTIFICATES}:ro")
        began = time.monotonic()
        # Docker's format, since OCI's has no health check. Niced: a build takes every core.
        self.run(
            *("nice", "-n", "10", "buildah", "build", "--format", "docker", "--layers", "--pull-never"),
            *("--target", target, "--tag", image, *options, context),
        )
        return time.monotonic() - began


@pytest.fixture(scope="session")
def podman() -> Podman:
    return Podman()


@pytest.fixture(scope="session")
def base_image(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Dockerfile's base, made of Debian's packages where it is not there."""
    if not podman.has_image(BASE):
        root = tmp_path_factory.mktemp("base") / "root"
        packages = "python3,python3-venv,ca-certificates"
        podman.run("nice", "-n", "10", "debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", root)
        for folder in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / folder)
        (root / "var/cache/apt/archives/partial").mkdir(parents=True)
        # As in the real image: what apt fetches does not stay.
        (root / "etc/apt/apt.conf.d/docker-clean").write_text(
            'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };\n'
            'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
        )
        with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
            podman.run("podman", "import", "-", BASE, stdin=tar.stdout)
        shutil.rmtree(root)
    return BASE


@pytest.fixture(scope="session")
def api_image(podman: Podman, base_image: str) -> str:
    """The API's image under the name of deploy/compose.yaml."""
    return build(podman, "api")


@pytest.fixture(scope="session")
def images(podman: Podman, api_image: str) -> dict[str, str]:
    """The service's images by target, as deploy/compose.yaml names them."""
    worker_options = ["--build-arg", "EXTRA=cpu"]
    if find_links := os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS"):
        worker_options += ["--build-arg", f"UV_FIND_LINKS={find_links}"]
        if Path(find_links).is_dir():
            worker_options += ["--volume", f"{find_links}:{find_links}:ro"]
    return {"api": api_image, "worker": build(podman, "worker", *worker_options)}


def build(podman: Podman, target: str, *options: str) -> str:
    """One of the service's images; returns its name."""
    image = f"localhost/grpo-{target}:latest"
    seconds = podman.build(image, target, ROOT, *options)
    print(f"{target}: {podman.inspect(image)['Size'] / 1e6:.0f} MB, built in {seconds:.0f} s")
    return image


@pytest.fixture(scope="session")
def server_images(podman: Podman, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Valkey and SeaweedFS under the names of deploy/compose.yaml."""
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    context = tmp_path_factory.mktemp("servers")
    shutil.copy(valkey.find_binary(), context / "valkey-server")
    shutil.copy(seaweedfs.find_binary(), context / "weed")
    for name in ("valkey", "seaweedfs"):
        if not podman.has_image(services[name]["image"]):
            podman.build(services[name]["image"], name, context, "--file", str(HERE / "servers.Containerfile"))


@dataclass(frozen=True)
class Stack:
    """The running services of deploy/compose.yaml, and a client with a key."""

    podman: Podman
    client: GrpoClient
    public_s3: str
    project: str = PROJECT

    def container(self, service: str) -> str:
        """The id of a service's container."""
        labels = [f"label=com.docker.compose.project={self.project}", f"label=com.docker.compose.service={service}"]
        return self.podman("ps", "--all", "--quiet", *(word for label in labels for word in ("--filter", label)))

    def exec(self, service: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.podman.run("podman", "exec", self.container(service), *words, check=check)

    def healthy(self, service: str) -> bool:
        """What the container's own health check says now; here nothing runs it by the clock."""
        return self.podman.run("podman", "healthcheck", "run", self.container(service), check=False).returncode == 0


@pytest.fixture(scope="session")
def stack(
    podman: Podman, images: dict[str, str], server_images: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    api_port, s3_port = pick_port(), pick_port()
    public_s3 = f"http://127.0.0.1:{s3_port}"
    compose = compose_command(PROJECT, tmp_path_factory.mktemp("compose"), api_port, s3_port)
    podman.run(*compose, "down", "--volumes", check=False)
    try:
        podman.run(*compose, "up", "--detach", "--no-build")
        client = GrpoClient(f"http://127.0.0.1:{api_port}", "none yet")
        stack = Stack(podman, client, public_s3)
        for service in ("valkey", "seaweedfs", "api", "worker"):
            wait_until(lambda service=service: stack.healthy(service), f"{service} is healthy", stack)
        created = stack.exec("api", "grpo", "keys", "create", "--owner", "tests", "--json")
        with GrpoClient(f"http://127.0.0.1:{api_port}", json.loads(created.stdout)["key"]) as client:
            yield Stack(podman, client, public_s3)
    finally:
        podman.run(*compose, "down", "--volumes", check=False)


def compose_command(project: str, folder: Path, api_port: int, s3_port: int) -> list[str]:
    """`podman-compose` of deploy/compose.yaml, with secrets made as docs/how-to/deploy.md tells and these ports."""
    env_file = folder / "compose.env"
    ports = f"GRPO_PORT={api_port}\nS3_PORT={s3_port}\nS3_PUBLIC_ENDPOINT=http://127.0.0.1:{s3_port}\n"
    env_file.write_text(f"{make_env_file(folder)}\n{ports}")
    command = [sys.executable, "-m", "podman_compose", "--project-name", project, "--env-file", str(env_file)]
    return [*command, "--file", str(ROOT / "deploy" / "compose.yaml")]


def make_env_file(folder: Path) -> str:
    """What the line of docs/how-to/deploy.md makes of the example."""
    line = re.search(r"^\(umask 077.*$", (ROOT / "docs" / "how-to" / "deploy.md").read_text(), re.MULTILINE)
    assert line, "docs/how-to/deploy.md tells no way to make deploy/compose.env"
    target = folder / "made.env"
    subprocess.run(["sh", "-c", line[0].replace("> deploy/compose.env", f"> {target}")], cwd=ROOT, check=True)
    assert target.stat().st_mode & 0o077 == 0
    return target.read_text()


def wait_until(condition: Callable[[], bool], what: str, stack: Stack, seconds: float = 120) -> None:
    """Poll; a failure shows the end of every container's log."""
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        if time.monotonic() > deadline:
            ids = stack.podman(
                "ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={stack.project}"
            )
            logs = [stack.podman.run("podman", "logs", "--tail", "15", each, check=False) for each in ids.split()]
            said = "\n---\n".join(log.stdout + log.stderr for log in logs)
            pytest.fail(f"not within {seconds:.0f} s: {what}\n{said}")
        time.sleep(0.5)
