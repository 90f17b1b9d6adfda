"""Names of modules that take seconds to import, such as torch: imported when a test first uses them.

Every process of `make test` imports every file of tests to know what is in it, and few of them run tests of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """A module, or a name in it."""

    def __init__(self, module: str, name: str = "") -> None:
        vars(self)["_where"] = module, name

    def _real(self) -> Any:
        module, name = self._where
        return getattr(import_module(module), name) if name else import_module(module)

    def __getattr__(self, name: str) -> Any:
        if name == "_mock_name" or name.startswith("__"):
            raise AttributeError(name)  # pytest asks for it when it collects tests
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"patch it by its full name: {self._where[0]}.{name}")

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._real()(*given, **named)


def lazy(module: str, names: str = "") -> Any:
    """Stand in for `import module`, or for `from module import names`; names are separated by spaces."""
    found = [Lazy(module, name) for name in names.split()]
    return Lazy(module) if not names else found[0] if len(found) == 1 else found
