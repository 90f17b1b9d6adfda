"""The operator's settings for webhooks; equal in all API processes."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.settings import CommaSeparated

PUBLIC = "public"
"""The entry for every host with public addresses, over https."""


class WebhookSettings(BaseSettings):
    """Which webhooks are allowed, and how long they are tried."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    hosts: CommaSeparated[list[str]] = Field(default=[PUBLIC], validation_alias="GRPO_WEBHOOK_HOSTS")
    """`public`, and hosts as in `GRPO_EGRESS_HOSTS`, which may have private addresses and be called over http."""
    most: int = Field(default=20, ge=0, le=1000, validation_alias="GRPO_MAX_OWNER_WEBHOOKS")
    """Largest number of webhooks per owner; 0 allows none."""
    waits: CommaSeparated[list[float]] = Field(
        default=[5, 30, 120, 600, 1800, 3600, 7200, 14_400, 28_800, 28_800],
        validation_alias="GRPO_WEBHOOK_RETRY_SECONDS",
        max_length=100,
    )
    """Seconds before each retry: together about a day."""
    timeout_seconds: float = Field(default=10, gt=0, le=60, validation_alias="GRPO_WEBHOOK_TIMEOUT_SECONDS")
    """Time for one attempt, from the connection to the status."""
