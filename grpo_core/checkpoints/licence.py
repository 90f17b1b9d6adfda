"""The licence of a base model, as its own card names it.

Owns what of a foreign card is taken over. Invariant: only text that cannot break out of the field it is written to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}")
_LINK: Final = re.compile(r"https://[A-Za-z0-9./_~%-]{1,300}")
OTHER: Final = "other"
"""What hubs want as `license` where the name is none of their list; the name is then in `license_name`."""


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence by its name."""

    name: str
    is_listed: bool = True
    """Whether the name is one of the hub's list."""
    link: str | None = None
    """Of one that is not: where its text is."""

    @property
    def front_matter(self) -> list[str]:
        """The lines of a card's head."""
        if self.is_listed:
            return [f"license: {self.name}"]
        link = [f"license_link: {self.link}"] if self.link else []
        return [f"license: {OTHER}", f"license_name: {self.name}", *link]


def licence_in(folder: Path) -> Licence | None:
    """The licence that a model's own card names; None if it has no card, or names none."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        named: dict[str, Any] = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    is_listed = named.get("license") != OTHER
    name, link = named.get("license" if is_listed else "license_name"), named.get("license_link")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return None
    return Licence(name, is_listed, link if isinstance(link, str) and _LINK.fullmatch(link) else None)
