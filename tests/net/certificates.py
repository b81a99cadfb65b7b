"""A certificate authority of one day, with keys so long that IKE_AUTH does not fit into a packet."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Authority:
    """Signs 4096-bit RSA certificates. They all carry one public key, as making a key takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._certificate = folder / "ca.pem"
        self._signing_key = folder / "ca.key"
        self._key = folder / "shared.key"
        with ThreadPoolExecutor() as threads:
            list(threads.map(_make_key, [self._signing_key, self._key]))
        _openssl(*self._request("/CN=Lab CA"), "-key", str(self._signing_key), "-out", str(self._certificate))

    def issue(self, folder: Path, identity: str) -> None:
        """Put a certificate for an e-mail address or host name, its key and the CA where ``swanctl`` looks."""
        kind = "email" if "@" in identity else "DNS"
        for part in "x509", "x509ca", "private":
            (folder / part).mkdir()
        (folder / "x509ca/ca.pem").symlink_to(self._certificate)
        (folder / "private/own.key").symlink_to(self._key)
        _openssl(
            *self._request(f"/CN={identity}"),
            *["-addext", "basicConstraints=critical,CA:FALSE"],
            *["-addext", f"subjectAltName={kind}:{identity}", "-key", str(self._key)],
            *["-CA", str(self._certificate), "-CAkey", str(self._signing_key)],
            *["-out", f"{folder}/x509/own.pem"],
        )

    @staticmethod
    def _request(subject: str) -> list[str]:
        return ["req", "-x509", "-new", "-days", "1", "-sha256", "-subj", subject]


def _make_key(path: Path) -> None:
    _openssl("genrsa", "-out", str(path), "4096")


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
