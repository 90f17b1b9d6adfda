"""SeaweedFS of deploy/compose.yaml, looked at from another container of its network: what no key opens stays shut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from deploy.local.ports import pick_port
from grpo_client import GrpoClient
from tests.containers.conftest import PROJECT, Podman, Stack, compose_command, wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = [pytest.mark.containers, pytest.mark.timeout(2400)]

STORE = f"{PROJECT}-store"
HTTP_PORTS = {"filer": 8888, "master": 9333, "volume": 9340, "admin": 23646}
"""SeaweedFS's own, without S3's; a gRPC port is 10000 above, S3's included."""
LOOK = """
import http.client, socket, sys
for port in sys.argv[1:]:
    answer = "nothing"
    try:
        client = http.client.HTTPConnection("seaweedfs", int(port), timeout=5)
        client.request("GET", "/col/delete?collection=grpo-jobs")
        answer = str(client.getresponse().status)
    except (OSError, http.client.HTTPException):
        pass
    greeted = b""
    try:
        with socket.create_connection(("seaweedfs", int(port)), timeout=5) as grpc:
            grpc.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes.fromhex("000000040000000000"))
            greeted = grpc.recv(9)
    except OSError:
        pass
    print(port, answer, "grpc" if greeted[3:4] == b"\\4" else "refused")
"""


@pytest.fixture(scope="module")
def store(
    podman: Podman, api_image: str, server_images: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The store alone, with the maker of its certificates, once it has made its bucket."""
    s3_port = pick_port()
    compose = compose_command(STORE, tmp_path_factory.mktemp("compose"), pick_port(), s3_port)
    podman.run(*compose, "down", "--volumes", check=False)
    try:
        podman.run(*compose, "up", "--detach", "--no-build", "seaweedfs")
        stack = Stack(podman, GrpoClient("http://127.0.0.1:1", "unused"), f"http://127.0.0.1:{s3_port}", STORE)
        wait_until(lambda: stack.healthy("seaweedfs"), "seaweedfs is healthy", stack)
        wait_until(lambda: has_bucket(stack), "seaweedfs has made its bucket, which it does after it is healthy", stack)
        yield stack
    finally:
        podman.run(*compose, "down", "--volumes", check=False)


def variables(store: Stack) -> dict[str, str]:
    lines = store.podman.inspect(store.container("seaweedfs"))["Config"]["Env"]
    return dict(line.split("=", 1) for line in lines)


def s3_client(store: Stack) -> S3Client:
    own = variables(store)
    return boto3.client(
        "s3",
        endpoint_url=store.public_s3,
        region_name="us-east-1",
        aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )


def has_bucket(store: Stack) -> bool:
    try:
        s3_client(store).head_bucket(Bucket="grpo-jobs")
    except ClientError:
        return False
    return True


def test_certificates_are_made_once_and_only_the_store_reads_them(store: Stack) -> None:
    made = store.podman.inspect(store.container("certificates"))
    assert made["State"]["ExitCode"] == 0
    assert made["HostConfig"]["ReadonlyRootfs"]
    seen = store.exec("seaweedfs", "sh", "-c", "stat -c '%U %a %n' /etc/seaweedfs/* && stat -c '%a' /etc/seaweedfs")
    *files, folder = seen.stdout.splitlines()
    names = ("authority.crt", "authority.key", "security.toml", "store.crt", "store.key")
    assert files == [f"root 600 /etc/seaweedfs/{name}" for name in names]
    assert folder == "700"
    written = store.exec("seaweedfs", "sh", "-c", "echo x > /etc/seaweedfs/x", check=False)
    assert "Read-only file system" in written.stderr
    before = store.exec("seaweedfs", "sha256sum", "/etc/seaweedfs/store.crt").stdout
    store.podman("start", "--attach", store.container("certificates"))
    assert store.exec("seaweedfs", "sha256sum", "/etc/seaweedfs/store.crt").stdout == before


def test_no_port_but_s3_answers_another_container(store: Stack, api_image: str) -> None:
    ports = [*HTTP_PORTS.values(), *(port + 10000 for port in (8333, *HTTP_PORTS.values()))]
    look = store.podman(
        *("run", "--rm", "--network", f"{STORE}_default", api_image, "python", "-c", LOOK), *map(str, ports)
    )
    lines = [line.split() for line in look.splitlines()]
    assert [int(port) for port, _, _ in lines] == ports
    assert [line for line in lines if line[1] not in ("nothing", "400") or line[2] != "refused"] == []


def test_only_who_has_the_certificate_can_erase(store: Stack) -> None:
    client = s3_client(store)
    client.put_object(Bucket="grpo-jobs", Key="jobs/one", Body=b"precious" * 1_000_000)
    command = "printf 'lock\\nfs.rm -rf /buckets/grpo-jobs/jobs\\nunlock\\n' | timeout 10 weed shell"
    image = store.podman.inspect(store.container("seaweedfs"))["ImageName"]
    addresses = "-master=seaweedfs:9333.19333 -filer=seaweedfs:8888.18888"
    network = ("--network", f"{STORE}_default", "--entrypoint", "sh")
    stranger = ("podman", "run", "--rm", *network, image, "-c", f"{command} {addresses}")
    assert store.podman.run(*stranger, check=False).returncode != 0
    assert client.get_object(Bucket="grpo-jobs", Key="jobs/one")["Body"].read() == b"precious" * 1_000_000
    store.exec("seaweedfs", "sh", "-c", f"{command} -master=127.0.0.1:9333 -filer=127.0.0.1:8888")
    assert "Contents" not in client.list_objects_v2(Bucket="grpo-jobs")


def test_the_health_check_refuses_a_store_whose_ports_are_open(store: Stack) -> None:
    check = store.podman.inspect(store.container("seaweedfs"))["Config"]["Healthcheck"]["Test"][-1]
    open_store = check.replace("9333", "8333")  # a port that answers /healthz to everyone
    assert store.exec("seaweedfs", "sh", "-c", check, check=False).returncode == 0
    assert store.exec("seaweedfs", "sh", "-c", open_store, check=False).returncode != 0
