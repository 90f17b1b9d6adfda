"""Settings of Valkey and object storage, read from environment variables.

The API, the worker and the admin commands share them; each has further settings in a separate class. Secrets are
`SecretStr`, so they are never printed.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import AliasChoices, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

T = TypeVar("T")


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaSeparated = Annotated[T, NoDecode, BeforeValidator(_split)]
"""A collection written as names separated by commas, as in `CommaSeparated[list[str]]`."""


class StorageSettings(BaseSettings):
    """The S3-compatible bucket with everything that must be kept."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    endpoint: str = Field(default="", validation_alias="S3_ENDPOINT")
    """URL of the S3 server as this process reaches it; empty for AWS itself."""
    public_endpoint: str = Field(default="", validation_alias="S3_PUBLIC_ENDPOINT")
    """URL of the same server as clients reach it: presigned links are signed for it. Empty: the same as `endpoint`."""
    bucket: str = Field(default="grpo-jobs", min_length=3, max_length=63, validation_alias="S3_BUCKET")
    region: str = Field(default="us-east-1", validation_alias=AliasChoices("S3_REGION", "AWS_REGION"))
    access_key: SecretStr = Field(default=SecretStr(""), validation_alias="AWS_ACCESS_KEY_ID")
    secret_key: SecretStr = Field(default=SecretStr(""), validation_alias="AWS_SECRET_ACCESS_KEY")


class QueueSettings(BaseSettings):
    """Valkey (or Redis): job records, leases, event streams and the Celery broker."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    redis_url: SecretStr = Field(default=SecretStr("redis://127.0.0.1:6379/0"), validation_alias="REDIS_URL")
    prefix: str = Field(default="grpo", pattern=r"^[a-z0-9-]{1,32}$", validation_alias="GRPO_PREFIX")
    """First part of every key, so that several services can share one server."""
    lease_seconds: float = Field(default=60.0, ge=1.0, le=3600.0, validation_alias="GRPO_LEASE_SECONDS")
    """Seconds for which a silent worker keeps its job. It sends six heartbeats in that time."""

    @property
    def broker_prefix(self) -> str:
        """First part of the key of each list of wake-ups; the queue's name follows."""
        return f"{self.prefix}:celery:"
