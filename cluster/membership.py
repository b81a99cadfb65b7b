"""Who the cluster is, on disk: the members, this node's certificate and key, the CA, the shared secret.

Everything is in ``cluster`` under the state directory, readable by its owner alone, and each file is replaced as a whole:
written beside, synced, renamed. ``members.json`` is written last when a node comes to a cluster and removed first when it
leaves, so a node either is a member with all that belongs to it, or is none.

The CA's key is on both nodes, so that each can renew its own certificate while the other is away. Who holds one node
therefore holds the cluster: after a theft, make the cluster anew.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, IPvAnyAddress, TypeAdapter, ValidationError

FOLDER = "cluster"
MAX_FILE = 256 * 1024
"""Bytes that a file of the folder may have."""
MAX_LINKS = 8
NAME = r"^[A-Za-z0-9](?:[A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$"
"""A node's name is its certificate's common name and DNS name, so it is what a host may be called."""
SECRET_SIZE = 32
_MODE = 0o600

NodeName = Annotated[str, Field(pattern=NAME)]
Address = Annotated[str, Field(max_length=45)]


class MembershipError(Exception):
    """The cluster's files are missing, cannot be used or cannot be written; the text is one sentence for the operator."""


class Member(BaseModel):
    """One node of the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: NodeName
    links: tuple[IPvAnyAddress, ...] = Field(min_length=1, max_length=MAX_LINKS)
    """Its addresses on the cluster's links, the preferred one first."""
    port: int = Field(default=4510, ge=1, le=65_534)
    """TCP port of its link; enrolment is answered on the next one."""


class Membership(BaseModel):
    """The cluster as one of its nodes knows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cluster: str = Field(pattern=r"^[0-9a-f]{32}$")
    """Its random identity, in hex."""
    node: NodeName
    """Which of the members this node is."""
    members: tuple[Member, ...] = Field(min_length=1, max_length=2)

    @property
    def own(self) -> Member:
        """This node."""
        return next(member for member in self.members if member.name == self.node)

    @property
    def peer(self) -> Member | None:
        """The other node, once it has joined."""
        return next((member for member in self.members if member.name != self.node), None)

    def model_post_init(self, _: object) -> None:
        """Refuses what no cluster looks like."""
        names = [member.name for member in self.members]
        if self.node not in names or len({name.lower() for name in names}) != len(names):
            raise ValueError("the members are not this node and at most one other")


class Credentials(NamedTuple):
    """What a node proves itself with and checks others by; PEM."""

    ca: bytes
    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Credentials(…)"


class Folder:
    """The cluster's files under a state directory.

    Args:
        state_dir: the daemon's state directory.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / FOLDER

    def is_member(self) -> bool:
        """Whether this node belongs to a cluster."""
        return (self.path / "members.json").exists()

    def membership(self) -> Membership:
        """The members.

        Raises:
            MembershipError: there is no cluster, or its file makes no sense.
        """
        if not self.is_member():
            raise MembershipError(
                "this node belongs to no cluster: `sapin cluster init` makes one, `sapin cluster join` comes to one"
            )
        try:
            return Membership.model_validate_json(self.read("members.json"))
        except ValidationError as error:
            raise MembershipError(f"{self.path / 'members.json'} makes no sense: {_first(error)}") from None

    def credentials(self) -> Credentials:
        """The CA's certificate, and this node's certificate and key.

        Raises:
            MembershipError: one of the files cannot be read.
        """
        return Credentials(self.read("ca.crt"), self.read("node.crt"), self.read("node.key"))

    def secret(self) -> bytes:
        """What the nodes share to sign their beacons.

        Raises:
            MembershipError: the file cannot be read, or is not a secret.
        """
        secret = self.read("secret")
        if len(secret) != SECRET_SIZE:
            raise MembershipError(
                f"{self.path / 'secret'} has {len(secret)} bytes, and must have {SECRET_SIZE}"
            )
        return secret

    def read(self, name: str) -> bytes:
        """One of the files.

        Raises:
            MembershipError: it cannot be read, or is too long to be meant.
        """
        try:
            with (self.path / name).open("rb") as file:
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise MembershipError(f"{self.path / name} cannot be read: {error.strerror}") from None
        if len(data) > MAX_FILE:
            raise MembershipError(f"{self.path / name} has more than {MAX_FILE} bytes")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Replace one of the files, durably.

        Raises:
            MembershipError: it cannot be written; what was there is there still.
        """
        place, beside = self.path / name, self.path / f".{name}.new"
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, _MODE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(place)
            self._sync()
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise MembershipError(f"{place} cannot be written: {error.strerror}") from None

    def write_membership(self, membership: Membership) -> None:
        """Replace the members, durably.

        Raises:
            MembershipError: as :meth:`write`.
        """
        self.write("members.json", json.dumps(membership.model_dump(mode="json"), indent=2).encode() + b"\n")

    def remove(self, *names: str) -> None:
        """Remove some of the files, or all; those that are not there are passed over.

        Raises:
            MembershipError: one cannot be removed.
        """
        try:
            for name in names or self._all():
                (self.path / name).unlink(missing_ok=True)
            if self.path.exists():
                self._sync()
        except OSError as error:
            raise MembershipError(f"{self.path} cannot be cleared: {error.strerror}") from None

    def _all(self) -> list[str]:
        """Every file, the one that says that this node is a member first."""
        there = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        return sorted(there, key=lambda name: name != "members.json")

    def _sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def parse_member(name: str, links: list[str], port: int) -> Member:
    """A member from what an operator wrote.

    Raises:
        ValueError: the text says what is wrong.
    """
    try:
        return TypeAdapter(Member).validate_python({"name": name, "links": links, "port": port})
    except ValidationError as error:
        raise ValueError(_first(error)) from None


def _first(error: ValidationError) -> str:
    fault = error.errors()[0]
    return ": ".join((".".join(map(str, fault["loc"])), fault["msg"]))
