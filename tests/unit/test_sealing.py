"""Secrets are sealed for one place, by the first key, and opened by every key."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import Misconfigured
from jobs.sealing import CannotOpen, SealingKeys, SealingSettings

OLD, NEW = "o" * 32, "n" * 64


def keys(text: str = "", path: Path | None = None) -> SealingKeys:
    return SealingKeys(SealingSettings.model_validate({"keys": text, "keys_file": path}))


def test_what_one_key_seals_it_opens_in_that_place_alone() -> None:
    mine = keys(OLD)
    sealed = mine.seal("whsec_你好", "webhooks/ann/1")
    assert "whsec" not in sealed
    assert mine.open(sealed, "webhooks/ann/1") == "whsec_你好"
    assert mine.seal("whsec_你好", "webhooks/ann/1") != sealed, "each time with another nonce"
    with pytest.raises(CannotOpen, match="another place than webhooks/bob/1"):
        mine.open(sealed, "webhooks/bob/1")


def test_a_changed_character_is_found() -> None:
    mine = keys(OLD)
    sealed = mine.seal("a", "p")
    version, name, data = sealed.split(".")
    for place in range(len(data.rstrip("=")) - 1):  # the last one has bits that say nothing
        other = data[:place] + ("A" if data[place] != "A" else "B") + data[place + 1 :]
        with pytest.raises(CannotOpen, match="damaged"):
            mine.open(f"{version}.{name}.{other}", "p")
    for broken in ("", "v1", "v1.", f"v1.{name}", f"v1.{name}.", f"v1.{name}.%", "v2.a.b"):
        with pytest.raises(CannotOpen):
            mine.open(broken, "p")


def test_the_first_key_seals_and_all_open() -> None:
    before = keys(OLD).seal("secret", "p")
    both = keys(f" {NEW},\n{OLD} ")
    assert both.open(before, "p") == "secret"
    assert not both.is_newest(before)
    after = both.seal("secret", "p")
    assert both.is_newest(after)
    assert keys(NEW).open(after, "p") == "secret"


def test_a_key_that_is_missing_is_named_with_the_setting_and_the_remedy() -> None:
    (name,) = keys(OLD).names
    sealed = keys(OLD).seal("secret", "p")
    with pytest.raises(CannotOpen, match=f"{name}.*GRPO_SEALING_KEYS is not set. Add that key for every API process"):
        keys().open(sealed, "p")
    with pytest.raises(CannotOpen, match=f"{name}.*GRPO_SEALING_KEYS has only {keys(NEW).names[0]}. Add that key"):
        keys(NEW).open(sealed, "p")
    assert OLD not in sealed + name


def test_keys_come_from_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{OLD}\n")
    assert keys(NEW, path).names == keys(f"{NEW},{OLD}").names
    monkeypatch.setenv("GRPO_SEALING_KEYS_FILE", str(path))
    assert SealingKeys().names == keys(OLD).names


@pytest.mark.parametrize(("text", "named"), [("", "has no key"), ("short", "GRPO_SEALING_KEYS_FILE.*5 characters")])
def test_a_file_without_a_usable_key_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(Misconfigured, match=named):
        keys("", path)


def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"GRPO_SEALING_KEYS.*5 characters.*openssl rand -hex 32") as refused:
        keys(f"{OLD},12345")
    assert "12345" not in str(refused.value)
    assert OLD not in str(refused.value)
    with pytest.raises(Misconfigured, match=r"GRPO_SEALING_KEYS_FILE is .*No such file"):
        keys("", tmp_path / "none")
