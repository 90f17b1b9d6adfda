"""The files of a store's certificates: made once, renewed in time, never readable by others."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from deploy.certificates import Certificates

FILES = ("authority.crt", "authority.key", "store.crt", "store.key", "security.toml")
MADE = FILES[:4]
YEAR = timedelta(days=365)


@pytest.fixture
def made(tmp_path: Path) -> Certificates:
    certificates = Certificates(tmp_path / "certificates")
    certificates.ensure()
    return certificates


def contents(certificates: Certificates) -> dict[str, bytes]:
    return {name: (certificates.folder / name).read_bytes() for name in MADE}


def load(certificates: Certificates, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((certificates.folder / name).read_bytes())


def test_only_their_owner_reads_them(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "certificates"
        folder.mkdir(mode=0o777)
        Certificates(folder).ensure()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == dict.fromkeys(FILES, 0o600)


def test_they_are_made_once(made: Certificates) -> None:
    before = contents(made)
    made.ensure(datetime.now(UTC) + YEAR)
    assert contents(made) == before
    load(made, "store.crt").verify_directly_issued_by(load(made, "authority.crt"))


def test_a_certificate_that_is_half_over_is_renewed_and_both_are_trusted(made: Certificates) -> None:
    before, old = contents(made), load(made, "store.crt")
    now = datetime.now(UTC) + 6 * YEAR
    assert old.not_valid_after_utc > now
    made.ensure(now)
    after = contents(made)
    assert {name for name in MADE if before[name] != after[name]} == {"store.crt"}
    new, authority = load(made, "store.crt"), load(made, "authority.crt")
    assert new.not_valid_after_utc > now + 9 * YEAR
    assert authority.not_valid_after_utc > now + 1000 * YEAR
    for certificate in (old, new):
        certificate.verify_directly_issued_by(authority)
    assert new.public_key() == old.public_key()


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("damage", ["gone", "cut off", "of another store"])
def test_what_does_not_fit_together_is_made_anew(made: Certificates, tmp_path: Path, name: str, damage: str) -> None:
    other = Certificates(tmp_path / "other")
    other.ensure()
    path = made.folder / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_bytes((other.folder / name).read_bytes())
    made.ensure()
    whole = contents(made)
    load(made, "store.crt").verify_directly_issued_by(load(made, "authority.crt"))
    made.ensure()
    assert contents(made) == whole


def test_a_container_makes_them_with_one_command(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "deploy.certificates", str(tmp_path / "certificates")], check=True)
    assert {path.name for path in (tmp_path / "certificates").iterdir()} == set(FILES)


def test_the_settings_name_the_files_where_the_folder_is_now(made: Certificates) -> None:
    moved = Certificates(made.folder.rename(made.folder.with_name("moved")))
    moved.ensure()
    settings = tomllib.loads((moved.folder / "security.toml").read_text())
    own = {"cert": str(moved.folder / "store.crt"), "key": str(moved.folder / "store.key")}
    authority = {"ca": str(moved.folder / "authority.crt")}
    parts = ("master", "volume", "filer", "s3", "admin", "worker", "client")
    assert settings["grpc"] == {**authority, **dict.fromkeys(parts, own)}
    servers = ("master", "volume", "filer", "admin")
    both = {**own, **authority}
    assert settings["https"] == {**dict.fromkeys(servers, both), "client": {"enabled": True, **both}}
