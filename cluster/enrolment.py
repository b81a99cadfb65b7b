"""How a second node comes to the cluster: over TLS, with a token that works once; and how a member leaves it.

A token holds where to go, the fingerprint of the cluster's CA, and a secret of which the issuing node keeps the hash only.
The new node trusts a server only if its certificate was issued by the CA of that fingerprint; then it shows the secret and
a signing request for a key that never leaves it, and is given its certificate and what the members share. A member that
leaves shows its certificate instead.

Every connection is one line of JSON each way after the server's greeting, bounded in size and time; connections are
bounded in number, and wrong tokens in how often they may be tried.
"""

from __future__ import annotations

import hmac
import json
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import structlog
import trio
from pydantic import Field, StrictBool, ValidationError
from pydantic_core import from_json

from sapin.cluster import certificates
from sapin.cluster.certificates import CertificateError
from sapin.cluster.membership import SECRET_SIZE, Credentials, Folder, Member, Membership, MembershipError
from sapin.cluster.tokens import (
    EnrolmentError,
    Strict,
    Token,
    WrongSecret,
    check_secret,
    forget,
    refuse_member,
    store,
    use_up,
)

FAILURE_PAUSE: Final = 1.0
"""Seconds that a wrong secret is kept waiting."""
DEADLINE: Final = 10.0
"""Seconds that one conversation may take."""
MAX_CONNECTIONS: Final = 8
MAX_LINE: Final = 32 * 1024
"""Bytes of what one side says."""

log = structlog.get_logger("sapin.cluster.enrolment")


class _Asked(Strict):
    """What a new node says."""

    secret: str = Field(max_length=64)
    member: Member
    request: str = Field(max_length=8_192)


class _Leaving(Strict):
    """What a member says that leaves."""

    leave: StrictBool


class _Given(Strict):
    """What a new node is given."""

    certificate: str
    ca_key: str
    secret: str = Field(pattern=rf"^[0-9a-f]{{{2 * SECRET_SIZE}}}$")
    cluster: str
    members: tuple[Member, ...]


# answering


async def serve_enrolment(
    folder: Folder,
    clock: Callable[[], float],
    changed: Callable[[Membership], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer those who come with a token and members that leave, until cancelled.

    Args:
        folder: the cluster's files.
        clock: seconds since 1970.
        changed: called with the members whenever they are others than before.
        task_status: told when it listens.

    Raises:
        MembershipError: the files cannot be used.
        OSError: none of the link addresses can be listened on.
    """
    own = folder.membership().own
    listeners = []
    for link in own.links:
        listeners += await trio.open_tcp_listeners(own.port + 1, host=str(link), backlog=MAX_CONNECTIONS)
    door = _Door(folder, clock, changed)
    task_status.started()
    await trio.serve_listeners(door.converse, listeners)


class _Door:
    """Whom it lets in is decided here, one at a time, so that a token is used once."""

    def __init__(
        self, folder: Folder, clock: Callable[[], float], changed: Callable[[Membership], None]
    ) -> None:
        self._folder, self._clock, self._changed = folder, clock, changed
        self._room = trio.CapacityLimiter(MAX_CONNECTIONS)
        self._turn = trio.Lock()

    async def converse(self, stream: trio.SocketStream) -> None:
        """One conversation; whatever happens in it ends it alone."""
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            await stream.aclose()
            return
        try:
            with trio.move_on_after(DEADLINE):
                await self._converse(stream)
        except (OSError, ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side went away or speaks no TLS
        except Exception:
            log.exception("a conversation about membership failed")
        finally:
            self._room.release()
            with trio.move_on_after(0) as scope:
                scope.shield = True
                await trio.aclose_forcefully(stream)

    async def _converse(self, plain: trio.SocketStream) -> None:
        stream = trio.SSLStream(plain, _server_context(self._folder), server_side=True, https_compatible=True)
        await stream.do_handshake()
        await _say(stream, {"ca": self._folder.read("ca.crt").decode()})
        line = await _hear(stream)
        async with self._turn:
            try:
                answer = await self._answer(line, stream)
            except (EnrolmentError, MembershipError, CertificateError) as error:
                log.warning("a node was refused", reason=str(error), address=_address(plain))
                answer = {"error": str(error)}
        await _say(stream, answer)
        await stream.aclose()

    async def _answer(self, line: bytes, stream: trio.SSLStream[trio.SocketStream]) -> dict[str, Any]:
        with suppress(ValidationError):
            if _Leaving.model_validate_json(line).leave:
                return self._leave(_peer_name(stream))
        try:
            return await self._join(_Asked.model_validate_json(line))
        except ValidationError:
            raise EnrolmentError(
                "the request makes no sense: is the other node's version a newer one?"
            ) from None

    def _leave(self, name: str | None) -> dict[str, Any]:
        if name is None:
            raise EnrolmentError("only a member can leave, and it shows its certificate")
        alone = forget(self._folder, name)
        log.info("a node left the cluster", node=name)
        self._changed(alone)
        return {"left": name}

    async def _join(self, asked: _Asked) -> dict[str, Any]:
        try:
            check_secret(self._folder, asked.secret, self._clock())
        except WrongSecret:
            await trio.sleep(FAILURE_PAUSE)
            raise
        membership = self._folder.membership()
        if asked.member.name.lower() == membership.node.lower():
            raise EnrolmentError(
                f"this node is called {membership.node} already: give the new one another --node"
            )
        if membership.peer is not None:
            raise EnrolmentError(
                f"the cluster has two nodes already, {membership.node} and {membership.peer.name}"
            )
        if set(asked.member.links) & set(membership.own.links):
            raise EnrolmentError("the new node's --link is an address of this node: give its own")
        ca_key = self._folder.read("ca.key")
        made = certificates.sign(
            asked.request.encode(), asked.member.name, self._folder.read("ca.crt"), ca_key, self._clock()
        )
        both = membership.model_copy(update={"members": (membership.own, asked.member)})
        use_up(self._folder)  # used, whatever happens from here
        self._folder.write_membership(both)
        log.info(
            "a node joined the cluster", node=asked.member.name, links=[str(x) for x in asked.member.links]
        )
        self._changed(both)
        given = _Given(
            certificate=made.decode(),
            ca_key=ca_key.decode(),
            secret=self._folder.secret().hex(),
            cluster=both.cluster,
            members=both.members,
        )
        return given.model_dump(mode="json")


# asking


async def join(folder: Folder, own: Member, token: Token, clock: Callable[[], float]) -> Membership:
    """Come to the cluster that a token is of.

    Raises:
        EnrolmentError: it cannot be reached, is not the one that issued the token, or refuses.
        MembershipError: a file cannot be written.
    """
    refuse_member(folder)
    key = certificates.new_key()
    asked = _Asked(secret=token.secret, member=own, request=certificates.request(own.name, key).decode())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # trusted by what _trust finds

    def trust(ca: bytes, leaf: bytes) -> None:
        _trust(ca, leaf, bytes.fromhex(token.ca), clock())

    ca, answer = await _ask(
        [str(link) for link in token.links], token.port, context, asked.model_dump(mode="json"), trust
    )
    try:
        given = _Given.model_validate(answer)
        membership = Membership(cluster=given.cluster, node=own.name, members=given.members)
    except ValidationError:
        raise EnrolmentError("the answer makes no sense: are both nodes of the same version?") from None
    made = given.certificate.encode()
    certificates.check(made, ca, clock())
    store(folder, membership, Credentials(ca, made, key), given.ca_key.encode(), bytes.fromhex(given.secret))
    return membership


async def say_goodbye(folder: Folder, clock: Callable[[], float]) -> None:
    """Have the peer take this node off its list.

    Raises:
        EnrolmentError: it cannot be reached, or refuses.
        MembershipError: a file cannot be read.
    """
    peer = folder.membership().peer
    if peer is None:
        return
    own = folder.credentials()
    context = ssl.create_default_context(cadata=own.ca.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # addresses are not in certificates; the name is looked at below
    context.load_cert_chain(folder.path / "node.crt", folder.path / "node.key")

    def trust(_: bytes, leaf: bytes) -> None:
        if certificates.common_name(leaf) != peer.name:
            raise EnrolmentError(f"who answers is not {peer.name}")
        certificates.check(leaf, own.ca, clock())

    await _ask([str(link) for link in peer.links], peer.port + 1, context, {"leave": True}, trust)


async def _ask(
    links: list[str],
    port: int,
    context: ssl.SSLContext,
    request: dict[str, Any],
    trust: Callable[[bytes, bytes], None],
) -> tuple[bytes, dict[str, Any]]:
    """The CA that is answered with, and the answer; the request is sent only to whom ``trust`` finds right."""
    fault: Exception | None = None
    for link in links:
        try:
            with trio.fail_after(DEADLINE):
                plain = await trio.open_tcp_stream(link, port)
                async with trio.SSLStream(plain, context, https_compatible=True) as stream:
                    return await _exchange(stream, request, trust)
        except (OSError, ssl.SSLError, trio.BrokenResourceError, trio.TooSlowError) as error:
            fault = error
    where = " or ".join(f"[{link}]:{port}" if ":" in link else f"{link}:{port}" for link in links)
    raise EnrolmentError(
        f"{where} does not answer ({_reason(fault)}): is the daemon there running, or `sapin cluster init --wait`?"
    )


async def _exchange(
    stream: trio.SSLStream[trio.SocketStream],
    request: dict[str, Any],
    trust: Callable[[bytes, bytes], None],
) -> tuple[bytes, dict[str, Any]]:
    await stream.do_handshake()
    leaf = stream.getpeercert(binary_form=True)
    greeting = _object(await _hear(stream))
    ca = str(greeting.get("ca", "")).encode()
    try:
        trust(ca, ssl.DER_cert_to_PEM_cert(leaf or b"").encode())
    except CertificateError as error:
        raise EnrolmentError(str(error)) from None
    await _say(stream, request)
    answer = _object(await _hear(stream))
    if "error" in answer:
        raise EnrolmentError(f"refused: {answer['error']!s:.300}")
    return ca, answer


def _trust(ca: bytes, leaf: bytes, pinned: bytes, now: float) -> None:
    if not hmac.compare_digest(certificates.fingerprint(ca), pinned):
        raise EnrolmentError("who answers is not the cluster that issued the token: nothing was sent to it")
    certificates.check(leaf, ca, now)


# what both sides use


def _server_context(folder: Folder) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder.path / "node.crt", folder.path / "node.key")
    context.load_verify_locations(cadata=folder.read("ca.crt").decode())
    context.verify_mode = ssl.CERT_OPTIONAL  # who joins has none yet
    return context


def _peer_name(stream: trio.SSLStream[trio.SocketStream]) -> str | None:
    certificate = stream.getpeercert()
    names = [
        value for part in (certificate or {}).get("subject", ()) for key, value in part if key == "commonName"
    ]
    return names[0] if names else None


async def _say(stream: trio.SSLStream[trio.SocketStream], what: dict[str, Any]) -> None:
    await stream.send_all(json.dumps(what).encode() + b"\n")


async def _hear(stream: trio.SSLStream[trio.SocketStream]) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = await stream.receive_some(MAX_LINE)
        if not chunk or len(line) + len(chunk) > MAX_LINE:
            raise trio.BrokenResourceError("the conversation ended early, or a line is too long")
        line += chunk
    return bytes(line)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = from_json(line)  # its depth is bounded, unlike that of the json module
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise EnrolmentError("the answer makes no sense: is that Sapin?")
    return value


def _address(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return "gone"


def _reason(error: Exception | None) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"nothing within {DEADLINE:g} s"
    if isinstance(error, OSError):
        causes = getattr(error.__cause__, "exceptions", (error.__cause__,))  # trio names a group of attempts
        cause = causes[0] if isinstance(causes[0], OSError) else error
        return cause.strerror or str(cause) or type(cause).__name__
    return "the connection ended"
