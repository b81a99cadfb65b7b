"""IKE as bytes: what a datagram carries, who it belongs to, and the messages of IKE_SA_INIT.

Sans-IO and pure. What reads bytes from the network never raises and looks at each byte at most once:
bad input is :data:`Kind.OTHER`, ``None``, or the end of the walk. What builds messages raises
``ValueError`` for arguments that no peer would accept. Random bytes are arguments.

Data is ``bytes`` or a contiguous ``memoryview`` of bytes. Section numbers without a name are of
RFC 7296 (IKEv2). IKEv1 (RFC 2408 section 3.1) has its cookies where IKEv2 has its SPIs, and is
recognised too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum, StrEnum
from struct import Struct
from typing import NamedTuple

from sapin.core.model import Endpoint, Framing

Buffer = bytes | memoryview

HEADER_LENGTH = 28
"""Bytes of an IKE header (section 3.1)."""
NON_ESP_MARKER = bytes(4)
"""Stands before an IKE message on UDP 4500 (RFC 3948 section 2.2)."""
KEEPALIVE = b"\xff"
"""A whole NAT keepalive (RFC 3948 section 2.3)."""
VERSION_2 = 0x20
"""The version byte of IKEv2: major version 2, minor version 0 (section 3.1)."""
FLAG_INITIATOR = 0x08
"""Sent by the original initiator of the IKE SA (section 3.1)."""
FLAG_RESPONSE = 0x20
"""Answers the request of the same message id (section 3.1)."""

MAX_PAYLOADS = 128
"""A walk ends after so many payloads; real messages have some twenty."""


class Kind(IntEnum):
    """What a datagram carries."""

    IKE = 1
    ESP = 2
    KEEPALIVE = 3
    OTHER = 4


class Exchange(IntEnum):
    """Exchange types: IKEv1 below 34 (RFC 2408 section 3.1), then IKEv2 (section 3.1)."""

    BASE = 1
    MAIN_MODE = 2
    AUTHENTICATION_ONLY = 3
    AGGRESSIVE_MODE = 4
    INFORMATIONAL_V1 = 5
    QUICK_MODE = 32
    """RFC 2409 section 5.5."""
    NEW_GROUP_MODE = 33
    """RFC 2409 section 5.6."""
    IKE_SA_INIT = 34
    IKE_AUTH = 35
    CREATE_CHILD_SA = 36
    INFORMATIONAL = 37
    IKE_SESSION_RESUME = 38
    """RFC 5723 section 4.3.2."""
    IKE_INTERMEDIATE = 43
    """RFC 9242 section 3.2."""
    IKE_FOLLOWUP_KE = 44
    """RFC 9370 section 2.2.4."""


class Payload(IntEnum):
    """IKEv2 payload types (section 3.2)."""

    NONE = 0
    SA = 33
    KE = 34
    ID_I = 35
    ID_R = 36
    CERT = 37
    CERTREQ = 38
    AUTH = 39
    NONCE = 40
    NOTIFY = 41
    DELETE = 42
    VENDOR_ID = 43
    TS_I = 44
    TS_R = 45
    ENCRYPTED = 46
    CONFIGURATION = 47
    EAP = 48
    ENCRYPTED_FRAGMENT = 53
    """RFC 7383 section 2.5."""


class Notify(IntEnum):
    """Notify message types (section 3.10.1): errors below 16384, status above."""

    UNSUPPORTED_CRITICAL_PAYLOAD = 1
    INVALID_IKE_SPI = 4
    INVALID_MAJOR_VERSION = 5
    INVALID_SYNTAX = 7
    INVALID_MESSAGE_ID = 9
    INVALID_SPI = 11
    NO_PROPOSAL_CHOSEN = 14
    INVALID_KE_PAYLOAD = 17
    AUTHENTICATION_FAILED = 24
    TEMPORARY_FAILURE = 43
    NAT_DETECTION_SOURCE_IP = 16388
    NAT_DETECTION_DESTINATION_IP = 16389
    COOKIE = 16390
    REDIRECT_SUPPORTED = 16406
    """RFC 5685 section 3."""
    REDIRECT = 16407
    """RFC 5685 section 3."""
    FRAGMENTATION_SUPPORTED = 16430
    """RFC 7383 section 2.3."""


class Group(IntEnum):
    """Key exchange groups (section 3.3.2, transform type 4)."""

    MODP768 = 1
    """Appendix B.1; broken, so offered only where it must not be chosen."""
    MODP1024 = 2
    """Appendix B.2; what Windows offers and takes by default."""
    MODP2048 = 14
    """RFC 3526 section 3."""
    ECP256 = 19
    """RFC 5903 section 3.1."""
    ECP384 = 20
    """RFC 5903 section 3.2."""
    CURVE25519 = 31
    """RFC 8031 section 2."""


KE_LENGTH = {
    Group.MODP768: 96,
    Group.MODP1024: 128,
    Group.MODP2048: 256,
    Group.ECP256: 64,
    Group.ECP384: 96,
    Group.CURVE25519: 32,
}
"""Bytes of a public value of each group (section 3.4, RFC 5903 section 7, RFC 8031 section 3.1)."""

COMMON_GROUPS = (Group.MODP2048, Group.CURVE25519, Group.ECP256, Group.ECP384, Group.MODP1024)
"""What gateways accept, by default or after hardening."""


class Answer(StrEnum):
    """What came back for an IKE_SA_INIT request."""

    SA = "SA"
    """A proposal was chosen; the responder holds a half-open SA now (section 1.2)."""
    COOKIE = "COOKIE"
    """It is busy and wants proof of our address first (section 2.6)."""
    INVALID_KE_PAYLOAD = "INVALID_KE_PAYLOAD"
    """It chose a proposal, and wants another group for it (section 1.3)."""
    NO_PROPOSAL_CHOSEN = "NO_PROPOSAL_CHOSEN"
    """It refuses all proposals (section 3.10.1)."""
    OTHER_NOTIFY = "another notification"
    """A response with none but other notifications."""
    OTHER_RESPONSE = "another response"
    """A response to our SPI with neither an SA nor a notification."""
    NOT_A_RESPONSE = "not a response"
    """IKEv2 with our SPI that answers nothing, such as our own request thrown back."""
    WRONG_SPI = "another SPI"
    """IKEv2, and not about our request."""
    NOT_IKE = "not IKEv2"

    @property
    def alive(self) -> bool:
        """Only a working IKEv2 daemon that read our request gives this answer."""
        return self not in _DEAD


_DEAD = frozenset({Answer.NOT_A_RESPONSE, Answer.WRONG_SPI, Answer.NOT_IKE})
_TELLING = {
    Notify.COOKIE: Answer.COOKIE,
    Notify.INVALID_KE_PAYLOAD: Answer.INVALID_KE_PAYLOAD,
    Notify.NO_PROPOSAL_CHOSEN: Answer.NO_PROPOSAL_CHOSEN,
}


class Header(NamedTuple):
    """An IKE header (section 3.1). The defaults are those of a new IKE_SA_INIT."""

    spi_i: bytes
    spi_r: bytes = bytes(8)
    next_payload: int = Payload.NONE
    version: int = VERSION_2
    """Major version in the upper four bits, minor version in the lower."""
    exchange: int = Exchange.IKE_SA_INIT
    flags: int = FLAG_INITIATOR
    message_id: int = 0
    length: int = HEADER_LENGTH
    """Bytes of the whole message, this header included."""

    @property
    def major(self) -> int:
        """1 for IKEv1, 2 for IKEv2."""
        return self.version >> 4

    @property
    def initiator(self) -> bool:
        """The sender began this IKE SA; always false in IKEv1."""
        return self.major == 2 and bool(self.flags & FLAG_INITIATOR)

    @property
    def response(self) -> bool:
        """This answers a request; always false in IKEv1."""
        return self.major == 2 and bool(self.flags & FLAG_RESPONSE)


_HEADER = Struct("!8s8sBBBBII")
_PLAUSIBLE = Struct("!Q9xB6xI")  # initiator's SPI, version, length
_SPIS = Struct("!8s8s")
_U32 = Struct("!I")
_U16 = Struct("!H")
_PAYLOAD = Struct("!BBH")  # next payload, critical bit, length with this header
_NOTIFY = Struct("!BBH")  # protocol, SPI size, type
_KE = Struct("!HH")  # group, reserved
_PROPOSAL = Struct("!BxHBBBB")  # more follow, length, number, protocol, SPI size, transforms
_TRANSFORM = Struct("!BxHBxH")  # more follow, length, type, id

_IKE_BARE = (Kind.IKE, 0)
_IKE_MARKED = (Kind.IKE, len(NON_ESP_MARKER))
_ESP = (Kind.ESP, 0)
_KEEPALIVE = (Kind.KEEPALIVE, 0)
_OTHER = (Kind.OTHER, 0)

_ESP_MIN = 8  # SPI and sequence number, RFC 4303 section 2
_LAST_RESERVED_SPI = 255


def classify(data: Buffer, framing: Framing) -> tuple[Kind, int]:
    """What the datagram carries, and the offset at which its IKE message begins (0 unless it is IKE).

    IKE is what has a plausible header: a nonzero initiator's SPI, major version 1 or 2, and a length
    that covers the header and does not exceed the datagram. ESP is what begins with an SPI above 255:
    smaller ones are reserved (RFC 4303 section 2.1) and never negotiated, hence :data:`Kind.OTHER`.
    """
    if framing is Framing.NATT:
        if len(data) < _ESP_MIN:
            return _KEEPALIVE if data == KEEPALIVE else _OTHER
        (spi,) = _U32.unpack_from(data)
        if spi > _LAST_RESERVED_SPI:
            return _ESP
        return _IKE_MARKED if spi == 0 and _plausible(data, 4) else _OTHER
    return _IKE_BARE if framing is Framing.IKE and _plausible(data, 0) else _OTHER


def spis(data: Buffer, framing: Framing) -> tuple[bytes, bytes] | None:
    """The initiator's and the responder's SPI, 8 bytes each; ``None`` unless the datagram is IKE."""
    kind, offset = classify(data, framing)
    if kind is not Kind.IKE:
        return None
    spi_i, spi_r = _SPIS.unpack_from(data, offset)
    return spi_i, spi_r


def parse_header(data: Buffer, offset: int = 0) -> Header | None:
    """The header of the IKE message that begins at ``offset``, ``None`` if it is not plausible."""
    if offset < 0 or not _plausible(data, offset):
        return None
    return Header._make(_HEADER.unpack_from(data, offset))


def _plausible(data: Buffer, offset: int) -> bool:
    available = len(data) - offset
    if available < HEADER_LENGTH:
        return False
    spi_i, version, length = _PLAUSIBLE.unpack_from(data, offset)
    return spi_i != 0 and version >> 4 in (1, 2) and HEADER_LENGTH <= length <= available


def exchange_name(exchange: int) -> str:
    """The exchange's name, or its number where it has none here."""
    return _name(Exchange, exchange, "exchange")


def notify_name(notify: int) -> str:
    """The notification's name, or its number where it has none here."""
    return _name(Notify, notify, "notification")


def group_name(group: int) -> str:
    """The key exchange group's name, or its number where it has none here."""
    return _name(Group, group, "group")


def _name(names: type[IntEnum], number: int, noun: str) -> str:
    try:
        return names(number).name
    except ValueError:
        return f"{noun} {number}"


def payloads(message: Buffer) -> Iterator[tuple[int, bytes]]:
    """Type and body of each cleartext payload of an IKEv2 message that begins at offset 0.

    The walk ends at the first payload that is damaged, after :data:`MAX_PAYLOADS`, and after an
    encrypted payload, whose "next payload" speaks of what is inside it (section 3.14).
    """
    header = parse_header(message)
    if header is None or header.major != 2:
        return
    kind, offset = header.next_payload, HEADER_LENGTH
    for _ in range(MAX_PAYLOADS):
        if kind == Payload.NONE or offset + _PAYLOAD.size > header.length:
            return
        following, _, length = _PAYLOAD.unpack_from(message, offset)
        if length < _PAYLOAD.size or offset + length > header.length:
            return
        yield kind, bytes(message[offset + _PAYLOAD.size : offset + length])
        if kind in (Payload.ENCRYPTED, Payload.ENCRYPTED_FRAGMENT):
            return
        kind, offset = following, offset + length


def notifies(message: Buffer) -> Iterator[tuple[int, bytes]]:
    """Type and data of each cleartext notification (section 3.10) of an IKEv2 message."""
    for kind, body in payloads(message):
        if kind == Payload.NOTIFY and len(body) >= _NOTIFY.size:
            _, spi_size, notify = _NOTIFY.unpack_from(body)
            yield notify, body[_NOTIFY.size + spi_size :]


def classify_answer(request_spi_i: bytes, data: Buffer) -> Answer:
    """What a message, without a marker, says about the IKE_SA_INIT request of that initiator's SPI."""
    header = parse_header(data)
    if header is None or header.major != 2:
        return Answer.NOT_IKE
    if header.spi_i != request_spi_i:
        return Answer.WRONG_SPI
    if not header.response or header.initiator:
        return Answer.NOT_A_RESPONSE
    if any(kind == Payload.SA for kind, _ in payloads(data)):
        return Answer.SA
    found = [notify for notify, _ in notifies(data)]
    for notify in found:
        if notify in _TELLING:
            return _TELLING[Notify(notify)]
    return Answer.OTHER_NOTIFY if found else Answer.OTHER_RESPONSE


def message(header: Header, payloads: Iterable[tuple[int, bytes]]) -> bytes:
    """An IKE message of these payloads; "next payload" and length are filled in.

    Raises:
        ValueError: an SPI that is not 8 bytes, or a payload longer than 65,531 bytes.
    """
    if len(header.spi_i) != 8 or len(header.spi_r) != 8:
        raise ValueError("an IKE SPI has 8 bytes")
    chain = list(payloads)
    following = [kind for kind, _ in chain[1:]] + [Payload.NONE]
    body = b"".join(_payload(after, content) for after, (_, content) in zip(following, chain, strict=False))
    first = chain[0][0] if chain else Payload.NONE
    filled = header._replace(next_payload=first, length=HEADER_LENGTH + len(body))
    return _HEADER.pack(*filled) + body


def _payload(following: int, body: bytes) -> bytes:
    length = _PAYLOAD.size + len(body)
    if length > 0xFFFF:
        raise ValueError(f"a payload of {len(body)} bytes does not fit, 65531 do")
    return _PAYLOAD.pack(following, 0, length) + body


def notify(kind: int, data: bytes = b"") -> tuple[int, bytes]:
    """A Notify payload about the IKE SA itself (section 3.10)."""
    return Payload.NOTIFY, _NOTIFY.pack(0, 0, kind) + data


def nat_detection(spi_i: bytes, spi_r: bytes, endpoint: Endpoint) -> bytes:
    """The data of a NAT_DETECTION_SOURCE_IP or NAT_DETECTION_DESTINATION_IP (section 2.23)."""
    what = spi_i + spi_r + endpoint.address.packed + _U16.pack(endpoint.port)
    return hashlib.sha1(what, usedforsecurity=False).digest()


def ike_sa_init(
    spi_i: bytes,
    nonce: bytes,
    ke: bytes,
    *,
    group: Group = Group.MODP2048,
    groups: Sequence[Group] = COMMON_GROUPS,
    path: tuple[Endpoint, Endpoint] | None = None,
    cookie: bytes | None = None,
) -> bytes:
    """A complete IKE_SA_INIT request (section 1.2) with the proposals that gateways commonly accept.

    Args:
        spi_i: the initiator's SPI, 8 bytes, not all zero.
        nonce: 16 to 256 bytes (section 3.9).
        ke: a public value of ``group``; any bytes will do for MODP and Curve25519.
        group: what ``ke`` belongs to; it is offered besides ``groups`` if it is not among them.
        groups: offered to the responder.
        path: source and destination as the initiator sees them, for NAT detection.
        cookie: the data of a COOKIE notification to send back (section 2.6).

    Raises:
        ValueError: an argument that responders must refuse.
    """
    offered = groups if group in groups else (group, *groups)
    chain = [] if cookie is None else [notify(Notify.COOKIE, cookie)]
    chain += _exchange_payloads(_proposals(offered), nonce, ke, group)
    if path is not None:
        chain += _nat_detections(spi_i, bytes(8), path)
    return message(Header(_checked_spi(spi_i)), chain)


def ike_sa_init_response(
    spi_i: bytes,
    spi_r: bytes,
    nonce: bytes,
    ke: bytes,
    *,
    group: Group = Group.MODP2048,
    path: tuple[Endpoint, Endpoint] | None = None,
) -> bytes:
    """The response that chooses AES-CBC-256, SHA2-256 and ``group``; arguments as of :func:`ike_sa_init`.

    Raises:
        ValueError: an argument that initiators must refuse.
    """
    chain = _exchange_payloads(
        _proposal(1, (_AES_CBC_256, _PRF_SHA256, _INTEG_SHA256), (group,)), nonce, ke, group
    )
    if path is not None:
        chain += _nat_detections(spi_i, spi_r, path)
    header = Header(_checked_spi(spi_i), _checked_spi(spi_r), flags=FLAG_RESPONSE)
    return message(header, chain)


class _Transform(NamedTuple):
    """Section 3.3.2; ``key_length`` in bits, for ciphers that have several."""

    kind: int
    id: int
    key_length: int | None = None


_AES_CBC_256, _AES_CBC_128 = _Transform(1, 12, 256), _Transform(1, 12, 128)
_AES_GCM_256, _AES_GCM_128 = _Transform(1, 20, 256), _Transform(1, 20, 128)  # RFC 5282, 16-byte ICV
_PRF_SHA1, _PRF_SHA256, _PRF_SHA384 = _Transform(2, 2), _Transform(2, 5), _Transform(2, 6)
_INTEG_SHA1, _INTEG_SHA256, _INTEG_SHA384 = _Transform(3, 2), _Transform(3, 12), _Transform(3, 13)
_PRFS = (_PRF_SHA256, _PRF_SHA384, _PRF_SHA1)


def _proposals(groups: Sequence[Group]) -> bytes:
    # A combined-mode cipher needs a proposal of its own, without INTEG (section 3.3).
    cbc = (_AES_CBC_256, _AES_CBC_128, *_PRFS, _INTEG_SHA256, _INTEG_SHA384, _INTEG_SHA1)
    gcm = (_AES_GCM_256, _AES_GCM_128, *_PRFS)
    return _proposal(1, cbc, groups, more=True) + _proposal(2, gcm, groups)


def _proposal(
    number: int, transforms: Sequence[_Transform], groups: Sequence[Group], *, more: bool = False
) -> bytes:
    chosen = [*transforms, *(_Transform(4, group) for group in groups)]
    body = b"".join(_transform(one, more=one is not chosen[-1]) for one in chosen)
    return _PROPOSAL.pack(2 if more else 0, _PROPOSAL.size + len(body), number, 1, 0, len(chosen)) + body


def _transform(transform: _Transform, *, more: bool) -> bytes:
    attribute = b"" if transform.key_length is None else _KE.pack(0x8000 | 14, transform.key_length)
    length = _TRANSFORM.size + len(attribute)
    return _TRANSFORM.pack(3 if more else 0, length, transform.kind, transform.id) + attribute


def _exchange_payloads(sa: bytes, nonce: bytes, ke: bytes, group: Group) -> list[tuple[int, bytes]]:
    if not 16 <= len(nonce) <= 256:
        raise ValueError(f"a nonce has 16 to 256 bytes, not {len(nonce)}")
    if len(ke) != KE_LENGTH[group]:
        raise ValueError(f"a public value of {group.name} has {KE_LENGTH[group]} bytes, not {len(ke)}")
    return [(Payload.SA, sa), (Payload.KE, _KE.pack(group, 0) + ke), (Payload.NONCE, nonce)]


def _nat_detections(spi_i: bytes, spi_r: bytes, path: tuple[Endpoint, Endpoint]) -> list[tuple[int, bytes]]:
    kinds = (Notify.NAT_DETECTION_SOURCE_IP, Notify.NAT_DETECTION_DESTINATION_IP)
    return [notify(kind, nat_detection(spi_i, spi_r, end)) for kind, end in zip(kinds, path, strict=True)]


def _checked_spi(spi: bytes) -> bytes:
    if len(spi) != 8 or not any(spi):
        raise ValueError("an IKE SPI has 8 bytes, not all zero")
    return spi
