"""A private use of huggingface_hub: the HTTP client that it makes by default, to which we add a hook."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from grpo_core.compat import Use, require

if TYPE_CHECKING:
    import httpx

READ_IN: Final = "1.33.0"
_MODULE: Final = "huggingface_hub.utils._http"
_FACTORY: Final = "default_client_factory"
USES: Final = (Use(name=f"{_MODULE}:{_FACTORY}"),)


def default_client() -> httpx.Client:
    """A client as the library makes it when no factory is set. Raises `LibraryChanged`."""
    require("huggingface_hub", READ_IN, USES)
    return getattr(import_module(_MODULE), _FACTORY)()
