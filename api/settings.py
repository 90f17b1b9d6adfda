"""How the HTTP service listens and what it accepts, read from the environment.

Where storage and Valkey are is in `jobs.settings`.
"""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ApiSettings(BaseSettings):
    """Settings of the API process."""

    model_config = SettingsConfigDict(env_prefix="GRPO_", frozen=True, populate_by_name=True, extra="ignore")

    host: str = Field(default="127.0.0.1", validation_alias="GRPO_API_HOST")
    """Address to listen on; 0.0.0.0 in a container."""
    port: int = Field(default=8080, ge=1, le=65535, validation_alias="GRPO_API_PORT")
    threads: int = Field(default=24, ge=1, le=256, validation_alias="GRPO_API_THREADS")
    """Requests that may wait for storage or Valkey at the same time."""
    max_body_bytes: int = Field(default=256 * 1024, ge=1024, le=16 * 1024**2)
    """Largest JSON body."""
    max_dataset_bytes: int = Field(default=256 * 1024**2, ge=1024, le=16 * 1024**3)
    """Largest uploaded data set."""
    max_dataset_rows: int = Field(default=1_000_000, ge=1, le=100_000_000)
    max_streams: int = Field(default=1000, ge=1, le=100_000)
    """Event streams that one process serves at the same time."""
    shutdown_seconds: int = Field(default=8, ge=1, le=300)
    """How long open requests may go on after SIGTERM."""
    log_level: str = Field(default="INFO", pattern=r"^(DEBUG|INFO|WARNING|ERROR)$")
