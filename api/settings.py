"""Where the HTTP service listens and what it accepts, read from the environment.

The addresses of storage and Valkey are in `jobs.settings`.
"""

from __future__ import annotations

from pydantic import Field, IPvAnyNetwork
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.settings import CommaSeparated


class ApiSettings(BaseSettings):
    """Settings of the API process."""

    model_config = SettingsConfigDict(env_prefix="GRPO_", frozen=True, populate_by_name=True, extra="ignore")

    host: str = Field(default="127.0.0.1", validation_alias="GRPO_API_HOST")
    """Address to listen on; 0.0.0.0 in a container."""
    port: int = Field(default=8080, ge=1, le=65535, validation_alias="GRPO_API_PORT")
    threads: int = Field(default=24, ge=1, le=256, validation_alias="GRPO_API_THREADS")
    """Requests that may wait for storage or Valkey at the same time."""
    owner_threads: int = Field(default=0, ge=0, le=256, validation_alias="GRPO_OWNER_THREADS")
    """Of these, one owner's; 0 is a third of them."""
    max_owner_requests: int = Field(default=256, ge=1, le=65_536)
    """Requests of one owner that may wait for a thread."""
    max_owner_searches: int = Field(default=2, ge=1, le=256)
    """Lists filtered by metadata that are searched for one owner at the same time."""
    max_grader_runs: int = Field(default=4, ge=1, le=256)
    """Requests to run graders at the same time, each in a separate process."""
    max_owner_grader_runs: int = Field(default=2, ge=1, le=256)
    """Of these, one owner's."""
    max_uploads: int = Field(default=16, ge=1, le=1000)
    """Uploads at the same time."""
    max_owner_uploads: int = Field(default=4, ge=1, le=1000)
    """Of these, one owner's."""
    min_free_bytes: int = Field(default=256 * 1024**2, ge=0, le=2**50)
    """Space that uploads leave on the disk for temporary files."""
    trusted_proxies: CommaSeparated[frozenset[IPvAnyNetwork]] = frozenset()
    """Proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted."""
    max_connections: int = Field(default=4096, ge=16, le=65_536)
    """Open connections in total; fewer if the process may not open enough files."""
    max_address_connections: int = Field(default=64, ge=1, le=65_536)
    """Of these, connections of one address without a key that wait for their client."""
    max_header_bytes: int = Field(default=32 * 1024, ge=4096, le=1024**2)
    """Address and headers of one request."""
    header_seconds: float = Field(default=10.0, ge=0.1, le=300)
    """How long they may take to arrive."""
    max_body_bytes: int = Field(default=256 * 1024, ge=1024, le=16 * 1024**2)
    """Largest JSON body."""
    max_dataset_bytes: int = Field(default=256 * 1024**2, ge=1024, le=16 * 1024**3)
    """Largest uploaded data set."""
    max_dataset_rows: int = Field(default=1_000_000, ge=1, le=100_000_000)
    max_streams: int = Field(default=1000, ge=1, le=100_000)
    """Event streams that one process serves at the same time."""
    max_owner_streams: int = Field(default=250, ge=1, le=100_000)
    """Of these, one owner's."""
    shutdown_seconds: int = Field(default=8, ge=1, le=300)
    """How long open requests may continue after SIGTERM."""
    log_level: str = Field(default="INFO", pattern=r"^(DEBUG|INFO|WARNING|ERROR)$")
