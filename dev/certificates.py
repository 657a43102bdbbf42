"""A throw-away certificate authority, and certificates that it signs for this machine."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dev.processes import LOOPBACK

__all__ = ["Certificates", "make_certificates"]

_LIFETIME = timedelta(days=2)


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files: whom to trust, and what a server or client shows."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def keystore(self) -> Path:
        """Key and certificate in one file, as Kafka's PEM key stores want them."""
        path = self.key.with_name("keystore.pem")
        path.write_bytes(self.key.read_bytes() + self.certificate.read_bytes())
        return path


def make_certificates(folder: Path) -> Certificates:
    """Make an authority, and a key for 127.0.0.1 and localhost with its certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate("llm4es throw-away CA", "llm4es throw-away CA", authority, authority)
    leaf = _certificate("localhost", "llm4es throw-away CA", key, authority)
    made = Certificates(folder / "ca.pem", folder / "certificate.pem", folder / "key.pem")
    made.ca.write_bytes(root.public_bytes(serialization.Encoding.PEM))
    made.certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made


def _certificate(
    name: str,
    issuer: str,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    now = datetime.now(UTC)
    is_authority = name == issuer
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
    )
    if not is_authority:
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ip_address(LOOPBACK))]
        )
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
