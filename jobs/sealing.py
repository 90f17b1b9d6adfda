"""Secrets sealed for storage, so that a copy of the bucket does not give them away.

Owns the keys, which come from the deployment's settings, and the form of a sealed text: `v1.KEY.DATA`, where KEY names
the key and DATA is the nonce and the ciphertext of AES-256-GCM in base64. The first key seals, every key opens. Knows
nothing of what is sealed. Invariant: a text opens only in the place that it was sealed for; a copy elsewhere does not.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.errors import JobsError, Misconfigured

KEYS: Final = "GRPO_SEALING_KEYS"
KEYS_FILE: Final = "GRPO_SEALING_KEYS_FILE"
SHORTEST: Final = 32
"""Characters of a key: 32 hexadecimal digits are 128 bits."""
_MAKE_ONE: Final = "Make one with `openssl rand -hex 32`."
_VERSION: Final = "v1"
_NONCE_BYTES: Final = 12
_NAME_BYTES: Final = 4


class SealingSettings(BaseSettings):
    """The keys, for the API and `grpo admin seal` alone: workers read no sealed secret."""

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    keys: SecretStr = Field(default=SecretStr(""), validation_alias=KEYS)
    """Keys separated by commas or line breaks. The first one seals."""
    keys_file: Path | None = Field(default=None, validation_alias=KEYS_FILE)
    """A file with further keys in the same form."""


class CannotOpen(JobsError):
    """A sealed text cannot be read. The message is for the operator: it names the setting and the remedy."""


@dataclass(frozen=True)
class _Key:
    name: str
    """Tells keys apart without telling anything of them."""
    cipher: AESGCM


class SealingKeys:
    """The keys of one process."""

    def __init__(self, settings: SealingSettings | None = None) -> None:
        """Raises `Misconfigured` for a key that is too short and a file that cannot be read."""
        settings = settings or SealingSettings()
        texts = _parted(KEYS, settings.keys.get_secret_value())
        if settings.keys_file is not None:
            texts += _parted(KEYS_FILE, _content(settings.keys_file))
        self._keys = {key.name: key for key in map(_derived, texts)}

    @property
    def names(self) -> list[str]:
        """The names of the keys, that of the one that seals first; empty without any."""
        return list(self._keys)

    def seal(self, text: str, place: str) -> str:
        """Return the text sealed with the first key."""
        key = next(iter(self._keys.values()))
        nonce = os.urandom(_NONCE_BYTES)
        data = nonce + key.cipher.encrypt(nonce, text.encode(), place.encode())
        return f"{_VERSION}.{key.name}.{base64.urlsafe_b64encode(data).decode()}"

    def is_newest(self, sealed: str) -> bool:
        """Whether the first key sealed a text."""
        return self.names[:1] == sealed.split(".")[1:2]

    def open(self, sealed: str, place: str) -> str:
        """Return what was sealed for this place. Raises `CannotOpen`."""
        version, _, rest = sealed.partition(".")
        name, _, data = rest.partition(".")
        if version != _VERSION:
            raise CannotOpen(
                f"It is sealed in the form {version[:8]!r}, which a later release writes. Use that release."
            )
        if name not in self._keys:
            has = f"has only {', '.join(self._keys)}" if self._keys else "is not set"
            raise CannotOpen(
                f"It is sealed with the key {name!r}, and {KEYS} {has}. Add that key for every API process."
            )
        try:
            raw = base64.urlsafe_b64decode(data)
            opened = self._keys[name].cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], place.encode())
        except (InvalidTag, ValueError):
            fault = f"It is damaged, or was sealed for another place than {place}."
            raise CannotOpen(f"{fault} Restore it from a backup, or have it registered again.") from None
        return opened.decode()


def _parted(variable: str, text: str) -> list[str]:
    keys = [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]
    for key in keys:
        if len(key) < SHORTEST:
            value = f"a text with a key of {len(key)} characters"
            raise Misconfigured(variable, value, f"is too short: a key has at least {SHORTEST}", _MAKE_ONE)
    return keys


def _content(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fault = getattr(error, "strerror", None) or "it is not text"
        raise Misconfigured(
            KEYS_FILE, path, f"cannot be read ({fault})", "Name a file with a key in each line."
        ) from None
    if not text.strip():
        raise Misconfigured(KEYS_FILE, path, "has no key", _MAKE_ONE)
    return text


def _derived(text: str) -> _Key:
    return _Key(_bytes_of(text, b"name", _NAME_BYTES).hex(), AESGCM(_bytes_of(text, b"AES-256-GCM", 32)))


def _bytes_of(text: str, use: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=b"grpo-jobs sealing " + use).derive(text.encode())
