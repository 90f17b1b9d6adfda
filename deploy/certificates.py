"""The certificates by which SeaweedFS's parts, or Ray's, authenticate each other: `python -m deploy.certificates
FOLDER [ADDRESS...]`.

The store's own authority signs one certificate, which all parts share, as servers and as clients. A program that cannot
read the folder is refused on every port except S3's, which has separate keys. SeaweedFS looks for its `security.toml`
in this folder: `.seaweedfs` in its home, or `/etc/seaweedfs`. Owns the files there. Invariant: a renewed certificate
keeps its key and authority, so that parts with the old one are still trusted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.local.folder import write_private

_VALID = timedelta(days=3653)
_RENEWED_BELOW = _VALID / 2
"""A start renews certificates that are valid for less than this: a store would have to run for five years without
one."""
_NO_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280's date for a certificate without an end."""
_GRPC_PARTS = ("master", "volume", "filer", "s3", "admin", "worker", "client")
_HTTPS_SERVERS = ("master", "volume", "filer", "admin")


@dataclass(frozen=True)
class Certificates:
    """The certificates of one store, in a separate folder."""

    folder: Path
    addresses: tuple[str, ...] = ()
    """Addresses of the hosts, beside this one's own."""

    def ensure(self, now: datetime | None = None) -> None:
        """Make the files if one is missing or they do not match, renew a certificate after half its time, and write
        the settings."""
        now = now or datetime.now(UTC)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)
        certificate = self._usable()
        if certificate is None:
            self._make(now)
        elif certificate.not_valid_after_utc - now < _RENEWED_BELOW:
            self._sign(_key(self._key), now)
        write_private(self.folder / "security.toml", self._settings())

    @property
    def _authority(self) -> Path:
        return self.folder / "authority.crt"

    @property
    def _authority_key(self) -> Path:
        return self.folder / "authority.key"

    @property
    def _certificate(self) -> Path:
        return self.folder / "store.crt"

    @property
    def _key(self) -> Path:
        return self.folder / "store.key"

    def _settings(self) -> str:
        """Return settings with which SeaweedFS's servers require the certificate, and its clients present it."""
        pair = f'cert = "{self._certificate}"\nkey = "{self._key}"\n'
        authority = f'ca = "{self._authority}"\n'
        grpc = [f"[grpc.{part}]\n{pair}" for part in _GRPC_PARTS]
        https = [f"[https.{part}]\n{pair}{authority}" for part in _HTTPS_SERVERS]
        client = f"[https.client]\nenabled = true\n{pair}{authority}"
        return "\n".join([f"[grpc]\n{authority}", *grpc, *https, client])

    def _usable(self) -> x509.Certificate | None:
        """Return the certificate if all four files match."""
        try:
            authority = x509.load_pem_x509_certificate(self._authority.read_bytes())
            certificate = x509.load_pem_x509_certificate(self._certificate.read_bytes())
            certificate.verify_directly_issued_by(authority)
            keys = _key(self._authority_key).public_key(), _key(self._key).public_key()
        except (OSError, ValueError, TypeError, InvalidSignature):
            return None
        return certificate if keys == (authority.public_key(), certificate.public_key()) else None

    def _make(self, now: datetime) -> None:
        authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        name = _name("grpo-jobs store authority")
        authority = (
            _builder(name, name, authority_key, now, _NO_END)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(authority_key, SHA256())
        )
        _write_key(self._authority_key, authority_key)
        _write_key(self._key, key)
        write_private(self._authority, authority.public_bytes(Encoding.PEM).decode())
        self._sign(key, now)

    def _sign(self, key: ec.EllipticCurvePrivateKey, now: datetime) -> None:
        authority = x509.load_pem_x509_certificate(self._authority.read_bytes())
        # Over HTTPS the parts check the address that they call: this one, in a container too.
        found = [x509.IPAddress(ip_address(address)) for address in ("127.0.0.1", *self.addresses)]
        names = [x509.DNSName("localhost"), *found]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(_name("grpo-jobs store"), authority.subject, key, now, now + _VALID)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .sign(_key(self._authority_key), SHA256())
        )
        write_private(self._certificate, certificate.public_bytes(Encoding.PEM).decode())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    # An hour earlier, in case the clock is corrected backwards.
    start = now - timedelta(hours=1)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
    return builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError(f"{path} holds another kind of key")
    return key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


if __name__ == "__main__":
    Certificates(Path(sys.argv[1]), tuple(sys.argv[2:])).ensure()
