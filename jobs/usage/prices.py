"""What an hour of a GPU costs, as the operator says, and in which currency.

Owns the prices, not the hours (`jobs.usage.gpu_time`). Invariant: without a price nothing has a cost, which is not the
same as a cost of 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

OTHERS = "*"
"""The name that stands for every GPU whose name has no price."""


class PriceSettings(BaseSettings):
    """Prices of GPUs; for the API alone."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    by_gpu: Annotated[dict[str, float], NoDecode] = Field(default={}, validation_alias="GRPO_GPU_PRICES")
    """Price of one GPU for one hour, by the GPU's name: `NVIDIA H200=3.5, A100=1.8, *=1`. Empty: nothing has a cost."""
    currency: str = Field(default="USD", min_length=1, max_length=8, validation_alias="GRPO_CURRENCY")
    """Label of all costs."""

    @field_validator("by_gpu", mode="before")
    @classmethod
    def _read(cls, text: object) -> object:
        if not isinstance(text, str):
            return text
        return dict(_price(part.strip()) for part in text.split(",") if part.strip())

    @field_validator("by_gpu")
    @classmethod
    def _is_possible(cls, prices: dict[str, float]) -> dict[str, float]:
        for name, price in prices.items():
            if not math.isfinite(price) or price < 0:
                raise ValueError(f"the price of {name!r} is {price}: give a finite number from 0")
        return prices


class Prices:
    """Computes costs."""

    def __init__(self, settings: PriceSettings | None = None) -> None:
        settings = settings or PriceSettings()
        self._by_gpu = {_words(name): price for name, price in settings.by_gpu.items()}
        self.currency = settings.currency if self._by_gpu else None
        """None: no GPU has a price."""

    def per_hour(self, gpu: str) -> float | None:
        """Return the price of one GPU for an hour: that of the longest name that its own starts with; None without."""
        words = _words(gpu)
        for length in range(len(words), 0, -1):
            if words[:length] in self._by_gpu:
                return self._by_gpu[words[:length]]
        return self._by_gpu.get((OTHERS,))

    def cost(self, gpu_hours: Mapping[str, float]) -> float | None:
        """Return the cost of GPU-hours by the GPUs' names; None where one of them has no price, or there are none."""
        prices = {gpu: self.per_hour(gpu) for gpu in gpu_hours}
        if not prices or None in prices.values():
            return None
        return sum(hours * (prices[gpu] or 0.0) for gpu, hours in gpu_hours.items())


def _words(name: str) -> tuple[str, ...]:
    """The words of a GPU's name, without the vendor's: workers have it, and estimates do not."""
    words = re.findall(r"[^\s_-]+", name.casefold())
    return tuple(words[1:] if words[:1] == ["nvidia"] else words)


def _price(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        if equals and name.strip():
            return name.strip(), float(number)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is not NAME=PRICE: give prices such as 'NVIDIA H200=3.5, *=1'")
