"""The cluster's certificate authority and the certificates of its nodes.

Keys are on the curve P-256, which the TLS of the link (Mbed TLS) and that of enrolment (OpenSSL) both take. A node's
certificate lives for a year and is renewed after two thirds of that; the CA lives for ten years. Validity begins a day
before it is made, because the clocks of two new machines may differ, and certificates must not be the first to notice.

Time is an argument, in seconds since 1970.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sapin.cluster.membership import Credentials, Folder

DAY: Final = 86_400
NODE_LIFE: Final = 365 * DAY
"""Seconds that a node's certificate is valid."""
CA_LIFE: Final = 3_650 * DAY
"""Seconds that the CA is valid."""
RENEWAL: Final = 2 / 3
"""Part of its life after which a certificate is renewed."""
_BACKDATED: Final = DAY
_ORGANISATION: Final = "Sapin cluster"


class CertificateError(Exception):
    """A certificate, key or request cannot be used; the text says why."""


def new_key() -> bytes:
    """A private key, PEM."""
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def new_authority(cluster: str, now: float) -> tuple[bytes, bytes]:
    """A certificate authority for the cluster of that identity: certificate and key, PEM."""
    key = new_key()
    private = _key(key)
    name = _name(cluster)
    builder = (
        _builder(name, name, private.public_key(), now, CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
    )
    return _pem(builder.sign(private, hashes.SHA256())), key


def request(node: str, key: bytes) -> bytes:
    """A signing request for a node's key, PEM.

    Raises:
        CertificateError: the key is none.
    """
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(node))
    return builder.sign(_key(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def sign(asked: bytes, node: str, ca: bytes, ca_key: bytes, now: float, life: float = NODE_LIFE) -> bytes:
    """The certificate of a node, PEM. Only the key is taken from the request; the name is the one given.

    Raises:
        CertificateError: the request is not one for a key of the right kind, or is not signed with that key.
    """
    try:
        wanted = x509.load_pem_x509_csr(asked)
        public = wanted.public_key()
        right = wanted.is_signature_valid
    except Exception as error:  # bytes of a stranger; the library raises whatever its parsers do
        raise CertificateError(f"the signing request cannot be read: {error!r:.100}") from None
    if not right or not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise CertificateError("the signing request must be for a key on P-256, and signed with it")
    authority = _certificate(ca)
    builder = (
        _builder(_name(node), authority.subject, public, now, life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(node)]), critical=False)
    )
    return _pem(builder.sign(_key(ca_key), hashes.SHA256()))


def fingerprint(certificate: bytes) -> bytes:
    """SHA-256 of a certificate given as PEM.

    Raises:
        CertificateError: it is none.
    """
    return _certificate(certificate).fingerprint(hashes.SHA256())


def common_name(certificate: bytes) -> str:
    """Whom a certificate given as PEM names.

    Raises:
        CertificateError: it is none, or names nobody.
    """
    names = _certificate(certificate).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not names:
        raise CertificateError("the certificate names nobody")
    return str(names[0].value)


def expires(certificate: bytes) -> float:
    """When a certificate given as PEM ends.

    Raises:
        CertificateError: it is none.
    """
    return _certificate(certificate).not_valid_after_utc.timestamp()


def renewal(certificate: bytes) -> float:
    """When a certificate given as PEM is to be renewed.

    Raises:
        CertificateError: it is none.
    """
    own = _certificate(certificate)
    begin, end = own.not_valid_before_utc.timestamp() + _BACKDATED, own.not_valid_after_utc.timestamp()
    return begin + (end - begin) * RENEWAL


def check(certificate: bytes, ca: bytes, now: float) -> None:
    """That the CA issued the certificate and it is valid; both PEM.

    Raises:
        CertificateError: it did not, or it is not.
    """
    own = _certificate(certificate)
    try:
        own.verify_directly_issued_by(_certificate(ca))
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateError("the certificate is not one of this cluster's CA") from None
    if not own.not_valid_before_utc.timestamp() <= now < own.not_valid_after_utc.timestamp():
        raise CertificateError(
            f"the certificate is valid from {own.not_valid_before_utc:%Y-%m-%d} to {own.not_valid_after_utc:%Y-%m-%d}: "
            "is the clock right?"
        )


def renew(folder: Folder, now: float, *, force: bool = False) -> Credentials | None:
    """Renew this node's certificate, with a new key, if it is due or forced; None if it is not.

    The old pair stays until the new one is whole on disk: the key goes first under another name, see :func:`repair`.

    Raises:
        CertificateError: the CA has ended, or a file is damaged.
        MembershipError: a file cannot be read or written.
    """
    node, own = folder.membership().node, folder.credentials()
    if not force and now < renewal(own.certificate):
        return None
    if now >= expires(own.ca):
        raise CertificateError("the cluster's CA has ended: make the cluster anew with `sapin cluster init`")
    key = new_key()
    made = sign(request(node, key), node, own.ca, folder.read("ca.key"), now)
    folder.write("next.key", key)
    folder.write("node.crt", made)
    folder.write("node.key", key)
    folder.remove("next.key")
    return Credentials(own.ca, made, key)


def repair(folder: Folder) -> bool:
    """Finish a renewal that a crash interrupted; whether there was one.

    Raises:
        CertificateError: certificate and key do not belong together, and no renewal explains it.
        MembershipError: a file cannot be read or written.
    """
    own = folder.credentials()
    pending = (folder.path / "next.key").exists()
    if not _belongs(own.certificate, own.key):
        key = folder.read("next.key") if pending else b""
        if not pending or not _belongs(own.certificate, key):
            raise CertificateError(
                f"{folder.path / 'node.key'} is not the key of node.crt: `sapin cluster rotate-certificates` makes both anew"
            )
        folder.write("node.key", key)
    if pending:
        folder.remove("next.key")
    return pending


def _belongs(certificate: bytes, key: bytes) -> bool:
    return _certificate(certificate).public_key() == _key(key).public_key()


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: float, life: float
) -> x509.CertificateBuilder:
    moment = datetime.fromtimestamp(now, UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - timedelta(seconds=_BACKDATED))
        .not_valid_after(moment + timedelta(seconds=life))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise CertificateError("this is no certificate") from None


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        raise CertificateError("this is no private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError("the private key is not one on P-256")
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
