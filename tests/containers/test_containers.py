"""The images as their users run them: built, hardened, put through a job, stopped."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_core import strict_json
from tests.clock import patience
from tests.containers.conftest import PROJECT, ROOT, Podman, Stack, wait_until

pytestmark = [pytest.mark.containers, pytest.mark.timeout(2400)]

SERVICES = ("valkey", "seaweedfs", "api", "worker")
OURS = ("api", "worker")
TINY = ROOT / "examples" / "tiny"


@pytest.fixture(scope="module")
def tiny_job(stack: Stack) -> dict[str, Any]:
    """The spec of examples/tiny with its data set uploaded, and fewer steps."""
    spec = strict_json.loads((TINY / "job.json").read_bytes())
    spec["data"]["dataset"] = stack.client.upload_dataset(TINY / "train.jsonl")["id"]
    spec["training"] = {"steps": 6, "save_steps": 6, "checkpoint_every": 3}
    return spec


# --- The images ---


def test_the_api_image_is_small_and_has_no_torch(podman: Podman, images: dict[str, str]) -> None:
    # 911 MB: polars reads rollouts from the bucket, pyarrow reads uploads in Parquet, and graders that are tried before
    # a job may import the modules that they have on a worker.
    assert podman.inspect(images["api"])["Size"] < 950e6
    packages = podman("run", "--rm", images["api"], "ls", *site_packages(podman, images["api"]))
    assert "litestar" in packages.split()
    assert {"torch", "transformers", "trl"}.isdisjoint(packages.split())


def test_the_worker_image_has_the_locked_torch_and_a_compiler(podman: Podman, images: dict[str, str]) -> None:
    look = "import importlib.metadata as m, shutil; print(m.version('torch'), m.version('trl'), shutil.which('g++'))"
    torch, trl, compiler = podman("run", "--rm", images["worker"], "python", "-c", look).split()
    locked = (ROOT / "uv.lock").read_text()
    assert f'name = "torch"\nversion = "{torch.split("+")[0]}"' in locked
    assert f'name = "trl"\nversion = "{trl}"' in locked
    assert compiler == "/usr/bin/g++"


@pytest.mark.parametrize("target", OURS)
def test_hostile_graders_are_held_in_an_image(podman: Podman, images: dict[str, str], target: str) -> None:
    """A worker runs a job's graders, the API those that are tried.

    Without a capability, as the image's user, on a root that nobody can write to.
    """
    attacks = f"{ROOT}/tests/grader_attacks.py:/attacks.py:ro"
    hardened = ("--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only", "--tmpfs=/tmp")
    said = podman("run", "--rm", *hardened, "--volume", attacks, images[target], "python", "/attacks.py")
    assert said.splitlines()[-1].endswith("attacks were held")
    assert "GOT THROUGH" not in said


@pytest.mark.parametrize("target", OURS)
def test_an_image_says_what_it_is_and_how_it_runs(podman: Podman, images: dict[str, str], target: str) -> None:
    config = podman.inspect(images[target])["Config"]
    assert config["User"] == "10001:10001"
    assert not config.get("Entrypoint")  # an init would hold every key for all of its user to read
    assert config["Cmd"] == ["grpo", target]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    # A build of ours ran with it; it has no business in the image.
    assert not [variable for variable in config["Env"] if variable.startswith(("PIP_", "UV_", "SSL_CERT"))]
    assert podman("run", "--rm", images[target], "sh", "-c", "command -v uv || true") == ""


def site_packages(podman: Podman, image: str) -> list[str]:
    return podman("run", "--rm", image, "sh", "-c", "echo /venv/lib/python*/site-packages").split()


# --- How they run ---


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_locked_down(stack: Stack, service: str) -> None:
    host = stack.podman.inspect(stack.container(service))["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert "no-new-privileges" in " ".join(host["SecurityOpt"])
    status = process_status(stack, service)
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")} == {0}
    assert status["NoNewPrivs"] == "1"
    written = stack.exec(service, "sh", "-c", "echo x > /usr/x || echo x > /etc/x", check=False)
    assert "Read-only file system" in written.stderr


@pytest.mark.parametrize("service", OURS)
def test_our_processes_run_as_an_ordinary_user_and_hide_their_keys(stack: Stack, service: str) -> None:
    assert process_status(stack, service)["Uid"].split() == ["10001"] * 4
    command = stack.exec(service, "cat", "/proc/1/cmdline").stdout
    # Python itself, not a shell that would keep signals to itself, nor an init that would show its environment.
    assert command.split("\0")[:2] == ["/venv/bin/python", "/venv/bin/grpo"]
    assert "Permission denied" in stack.exec(service, "cat", "/proc/1/environ", check=False).stderr


def test_only_loopback_is_published(stack: Stack) -> None:
    published = [stack.podman("port", stack.container(service)) for service in SERVICES]
    assert all("-> 127.0.0.1:" in line for ports in published for line in ports.splitlines())
    assert [bool(ports) for ports in published] == [False, True, True, False]


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_healthy(stack: Stack, service: str) -> None:
    assert stack.healthy(service)


def test_a_worker_that_is_not_there_is_not_healthy(stack: Stack) -> None:
    done = stack.exec("worker", "env", "GRPO_WORKER_NAME=nobody", "python", "-m", "jobs.health", check=False)
    assert done.returncode == 1
    assert "nobody has not announced itself" in done.stderr
    away = "REDIS_URL=redis://127.0.0.1:1/0"
    done = stack.exec("worker", "env", away, "python", "-m", "jobs.health", check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


def process_status(stack: Stack, service: str) -> dict[str, str]:
    lines = stack.exec(service, "cat", "/proc/1/status").stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


# --- What they do ---


def test_a_job_goes_through(stack: Stack, tiny_job: dict[str, Any], tmp_path: Path) -> None:
    job = stack.client.submit(tiny_job)
    # The API's own wake-up, and not the sweeper's, which comes after 30 s from whichever process is alive.
    wait_until(lambda: stack.client.get(job["id"])["status"] != "queued", "a worker was woken", stack, seconds=20)
    ended = stack.client.wait(job["id"], poll=0.5)
    assert ended["status"] == "succeeded", ended["error"]
    artifacts = stack.client.artifacts(job["id"])["data"]
    # Signed for where clients are, not for the name that the server has among the containers.
    assert all(artifact["url"].startswith(stack.public_s3) for artifact in artifacts)
    files = stack.client.download(job["id"], tmp_path)
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    digests = {file["path"]: file["sha256"] for file in files}
    assert hashlib.sha256(adapter.read_bytes()).hexdigest() == digests["adapter/adapter_model.safetensors"]
    assert len(stack.client.metrics(job["id"])) == 6


def test_a_stopped_worker_hands_its_job_back_within_seconds(stack: Stack, tiny_job: dict[str, Any]) -> None:
    job = stack.client.submit({**tiny_job, "training": {"steps": 500, "save_steps": 500, "checkpoint_every": 100}})
    try:
        wait_until(lambda: stack.client.get(job["id"])["step"] >= 1, "the job has made a step", stack)
        worker = stack.container("worker")
        began = time.monotonic()
        stack.podman("stop", "--time", "150", worker)
        seconds = time.monotonic() - began
        print(f"the worker stopped within {seconds:.1f} s")
        assert seconds < 60
        assert stack.podman.inspect(worker)["State"]["ExitCode"] == 0
        returned = stack.client.get(job["id"])
        assert (returned["status"], returned["attempts"]) == ("queued", 0)
        stack.podman("start", worker)
        wait_until(lambda: stack.client.get(job["id"])["status"] == "running", "the job runs again", stack)
    finally:
        stack.client.cancel(job["id"])
        wait_until(lambda: stack.client.get(job["id"])["status"] == "cancelled", "the job is cancelled", stack)
        wait_until(lambda: stack.healthy("worker"), "the worker is healthy", stack)


def test_the_worker_for_keda_ends_with_its_job_or_without_one(
    stack: Stack, tiny_job: dict[str, Any], images: dict[str, str]
) -> None:
    worker = stack.container("worker")
    config = stack.podman.inspect(worker)["Config"]["Env"]
    wanted = ("REDIS_URL=", "S3_", "AWS_", "GRPO_MODEL_DIR=")
    like_it = [word for variable in config if variable.startswith(wanted) for word in ("--env", variable)]
    like_it += ["--network", f"{PROJECT}_default", "--volume", f"{ROOT}/examples/models:/models:ro"]
    command = [images["worker"], "python", "-m", "deploy.kubernetes.one_job"]
    stack.podman("stop", "--time", "150", worker)
    try:
        job = stack.client.submit(tiny_job)
        stack.podman("run", "--rm", *like_it, *command, "100")
        assert stack.client.get(job["id"])["status"] == "succeeded"
        stack.podman("run", "--rm", *like_it, *command, "1")
    finally:
        stack.podman("start", worker)
        wait_until(lambda: stack.healthy("worker"), "the worker is healthy", stack)


def test_a_stopped_api_ends_at_once_and_comes_back(stack: Stack) -> None:
    api = stack.container("api")
    began = time.monotonic()
    stack.podman("stop", "--time", "15", api)
    assert time.monotonic() - began < patience(12)
    # uvicorn ends by the signal it was sent, once everything is closed; killed it would be 137.
    assert stack.podman.inspect(api)["State"]["ExitCode"] == 143
    stack.podman("start", api)
    wait_until(lambda: stack.healthy("api"), "the API is healthy", stack)
    assert isinstance(stack.client.list()["data"], list)


def test_the_project_is_the_only_one_touched(stack: Stack) -> None:
    names = stack.podman("ps", "--all", "--format", "{{.Names}}").split()
    assert all(name.startswith(PROJECT) for name in names)
