"""The cluster's beginning, and the token that lets a second node in.

A token holds where to go, the fingerprint of the cluster's CA, and a secret of which the issuing node keeps the hash only.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress, ValidationError

from sapin.cluster import certificates
from sapin.cluster.membership import (
    MAX_LINKS,
    SECRET_SIZE,
    Credentials,
    Folder,
    Member,
    Membership,
    MembershipError,
)

TOKEN_LIFE: Final = 3_600.0
"""Seconds that a token may be used."""
MAX_FAILURES: Final = 10
"""Wrong secrets until the token is void: a guess is hopeless anyway, so this is somebody who tries."""
_PENDING: Final = "pending.json"
_SECRET_BYTES: Final = 24


class EnrolmentError(Exception):
    """A node cannot come or leave; the text says why and what to do."""


class WrongSecret(EnrolmentError):
    """The token is a wrong one: whoever shows it is made to wait."""


class Strict(BaseModel):
    """What is kept or said: nothing more than what is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Token(Strict):
    """What a new node is told."""

    links: tuple[IPvAnyAddress, ...] = Field(min_length=1, max_length=MAX_LINKS)
    port: int = Field(ge=1, le=65_535)
    """Where enrolment is answered, the port after the link's."""
    ca: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the CA's certificate."""
    secret: str = Field(min_length=16, max_length=64)

    def __repr__(self) -> str:
        return "Token(…)"

    def encode(self) -> str:
        """The token as text without spaces."""
        packed = json.dumps(self.model_dump(mode="json"), separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Token:
        """A token from its text.

        Raises:
            EnrolmentError: it is none.
        """
        plain = "".join(text.split())
        try:
            packed = base64.b64decode(plain + "=" * (-len(plain) % 4), altchars=b"-_", validate=True)
            return cls.model_validate_json(packed)
        except (ValueError, binascii.Error):  # pydantic's error is a ValueError
            raise EnrolmentError(
                "this is no token: copy the whole line that `sapin cluster init` or `token` printed"
            ) from None


class _Pending(Strict):
    """What is kept of a token."""

    hash: str
    expires: float
    failures: int = 0


def found(folder: Folder, own: Member, now: float, random: Callable[[int], bytes]) -> Membership:
    """Make a cluster of one node.

    Raises:
        EnrolmentError: this node belongs to one.
        MembershipError: a file cannot be written.
    """
    refuse_member(folder)
    membership = Membership(cluster=random(16).hex(), node=own.name, members=(own,))
    ca, ca_key = certificates.new_authority(membership.cluster, now)
    key = certificates.new_key()
    made = certificates.sign(certificates.request(own.name, key), own.name, ca, ca_key, now)
    store(folder, membership, Credentials(ca, made, key), ca_key, random(SECRET_SIZE))
    return membership


def issue_token(folder: Folder, now: float, random: Callable[[int], bytes]) -> str:
    """A token for the second node; one that was issued before is void from now on.

    Raises:
        EnrolmentError: the cluster has two nodes.
        MembershipError: a file cannot be read or written.
    """
    membership = folder.membership()
    if membership.peer is not None:
        raise EnrolmentError(
            f"the cluster has two nodes: `sapin cluster leave` on {membership.peer.name}, "
            f"or `sapin cluster forget {membership.peer.name}` here if it is gone for good"
        )
    token = Token(
        links=membership.own.links,
        port=membership.own.port + 1,
        ca=certificates.fingerprint(folder.read("ca.crt")).hex(),
        secret=base64.urlsafe_b64encode(random(_SECRET_BYTES)).decode(),
    )
    _keep(folder, _Pending(hash=_hash(token.secret), expires=now + TOKEN_LIFE))
    return token.encode()


def token_expires(folder: Folder) -> float | None:
    """When the token that waits to be used ends, in seconds since 1970; None if none waits."""
    pending = _pending(folder)
    return None if pending is None else pending.expires


def forget(folder: Folder, name: str) -> Membership:
    """Take the other node off the list: its certificate is worth nothing from now on.

    Raises:
        EnrolmentError: there is no such node.
        MembershipError: a file cannot be read or written.
    """
    membership = folder.membership()
    if membership.peer is None or membership.peer.name != name:
        raise EnrolmentError(f"{name} is not the other node of this cluster")
    alone = membership.model_copy(update={"members": (membership.own,)})
    folder.write_membership(alone)
    return alone


def check_secret(folder: Folder, secret: str, now: float) -> None:
    """That a secret is the one of the token that waits to be used.

    Raises:
        EnrolmentError: it is not, or none waits.
        MembershipError: a file cannot be written.
    """
    pending = _pending(folder)
    if pending is None:
        raise EnrolmentError(
            "no token waits to be used: it was used, or replaced; make one with `sapin cluster token`"
        )
    if now >= pending.expires:
        use_up(folder)
        raise EnrolmentError("the token has expired: make another with `sapin cluster token`")
    if hmac.compare_digest(_hash(secret), pending.hash):
        return
    failed = pending.model_copy(update={"failures": pending.failures + 1})
    if failed.failures >= MAX_FAILURES:
        use_up(folder)
        raise WrongSecret(
            "the token is void after too many wrong ones: make another with `sapin cluster token`"
        )
    _keep(folder, failed)
    raise WrongSecret("the token is not the one that was issued last")


def use_up(folder: Folder) -> None:
    """The token that waits, if one does, is worth nothing any more.

    Raises:
        MembershipError: its file cannot be removed.
    """
    folder.remove(_PENDING)


def refuse_member(folder: Folder) -> None:
    """Only a node without a cluster makes one or comes to one.

    Raises:
        EnrolmentError: it belongs to one.
    """
    if folder.is_member():
        raise EnrolmentError(
            f"this node belongs to a cluster already, see {folder.path}: `sapin cluster leave` first"
        )


def store(folder: Folder, membership: Membership, own: Credentials, ca_key: bytes, secret: bytes) -> None:
    """Keep everything, the members last: with them this node is one.

    Raises:
        MembershipError: a file cannot be written.
    """
    files = {
        "ca.crt": own.ca,
        "ca.key": ca_key,
        "node.crt": own.certificate,
        "node.key": own.key,
        "secret": secret,
    }
    for name, data in files.items():
        folder.write(name, data)
    folder.write_membership(membership)


def _keep(folder: Folder, pending: _Pending) -> None:
    folder.write(_PENDING, pending.model_dump_json().encode())


def _pending(folder: Folder) -> _Pending | None:
    if not (folder.path / _PENDING).exists():
        return None
    try:
        return _Pending.model_validate_json(folder.read(_PENDING))
    except (ValidationError, MembershipError):
        return None  # a damaged token is none; another is made in a second


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()
