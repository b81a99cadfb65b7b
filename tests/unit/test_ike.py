from __future__ import annotations

import hashlib
from ipaddress import ip_address

import pytest

from sapin.core import ike
from sapin.core.ike import Answer, Exchange, Group, Header, Kind, Notify, Payload
from sapin.core.model import Endpoint, Framing

SPI_I = bytes.fromhex("0102030405060708")
SPI_R = bytes.fromhex("a1a2a3a4a5a6a7a8")
NONCE = bytes(range(32))
KE = bytes(range(256))
REQUEST = ike.ike_sa_init(SPI_I, NONCE, KE)
RESPONSE = ike.ike_sa_init_response(SPI_I, SPI_R, NONCE, KE)
MARKER = bytes(4)
PATH = (Endpoint(ip_address("192.0.2.1"), 500), Endpoint(ip_address("2001:db8::2"), 4500))

# A header alone, by hand from RFC 7296 section 3.1: IKE_AUTH, initiator, message 1, length 32, one SK payload.
BY_HAND = SPI_I + SPI_R + bytes.fromhex("2e 20 23 08 00000001 00000020 00000004")


def answer(*payloads: tuple[int, bytes], spi_i: bytes = SPI_I, flags: int = ike.FLAG_RESPONSE) -> bytes:
    return ike.message(Header(spi_i, flags=flags), payloads)


@pytest.mark.parametrize(
    ("data", "framing", "expected"),
    [
        (REQUEST, Framing.IKE, (Kind.IKE, 0)),
        (BY_HAND, Framing.IKE, (Kind.IKE, 0)),
        (REQUEST + b"trailing", Framing.IKE, (Kind.IKE, 0)),
        (REQUEST[:-1], Framing.IKE, (Kind.OTHER, 0)),
        (REQUEST[:27], Framing.IKE, (Kind.OTHER, 0)),
        (b"", Framing.IKE, (Kind.OTHER, 0)),
        (b"\xff", Framing.IKE, (Kind.OTHER, 0)),
        (MARKER + REQUEST, Framing.IKE, (Kind.OTHER, 0)),
        (MARKER + REQUEST, Framing.NATT, (Kind.IKE, 4)),
        (MARKER + REQUEST[:-1], Framing.NATT, (Kind.OTHER, 0)),
        (MARKER + b"garbage that is long enough for a header", Framing.NATT, (Kind.OTHER, 0)),
        (MARKER, Framing.NATT, (Kind.OTHER, 0)),
        (b"\xff", Framing.NATT, (Kind.KEEPALIVE, 0)),
        (b"\xfe", Framing.NATT, (Kind.OTHER, 0)),
        (b"\xff\xff", Framing.NATT, (Kind.OTHER, 0)),
        (b"", Framing.NATT, (Kind.OTHER, 0)),
        (bytes.fromhex("c0000001 00000001") + bytes(60), Framing.NATT, (Kind.ESP, 0)),
        (bytes.fromhex("00000100 00000001"), Framing.NATT, (Kind.ESP, 0)),
        (bytes.fromhex("000000ff 00000001"), Framing.NATT, (Kind.OTHER, 0)),
        (bytes.fromhex("c0000001 000001"), Framing.NATT, (Kind.OTHER, 0)),
        (REQUEST, Framing.NATT, (Kind.ESP, 0)),
        (REQUEST, Framing.OPAQUE, (Kind.OTHER, 0)),
        (b"\xff", Framing.OPAQUE, (Kind.OTHER, 0)),
    ],
)
def test_classify(data: bytes, framing: Framing, expected: tuple[Kind, int]) -> None:
    assert ike.classify(data, framing) == expected
    assert ike.classify(memoryview(data), framing) == expected


@pytest.mark.parametrize(
    ("offset", "value", "kind"),
    [
        (17, b"\x10", Kind.IKE),  # IKEv1
        (17, b"\x2f", Kind.IKE),  # an unknown minor version is no reason to refuse (section 2.5)
        (17, b"\x00", Kind.OTHER),
        (17, b"\x30", Kind.OTHER),
        (24, bytes(4), Kind.OTHER),
        (24, (27).to_bytes(4, "big"), Kind.OTHER),
        (24, (28).to_bytes(4, "big"), Kind.IKE),
        (24, b"\xff\xff\xff\xff", Kind.OTHER),
        (0, bytes(8), Kind.OTHER),  # section 3.1: the initiator's SPI must not be zero
    ],
)
def test_a_header_must_be_plausible(offset: int, value: bytes, kind: Kind) -> None:
    data = REQUEST[:offset] + value + REQUEST[offset + len(value) :]
    assert ike.classify(data, Framing.IKE)[0] is kind
    assert (ike.parse_header(data) is not None) is (kind is Kind.IKE)


def test_spis_are_bytes_behind_either_framing() -> None:
    assert ike.spis(BY_HAND, Framing.IKE) == (SPI_I, SPI_R)
    assert ike.spis(memoryview(MARKER + BY_HAND), Framing.NATT) == (SPI_I, SPI_R)
    assert ike.spis(REQUEST, Framing.IKE) == (SPI_I, bytes(8))
    assert ike.spis(BY_HAND, Framing.NATT) is None
    assert ike.spis(b"\xff", Framing.NATT) is None


def test_parse_header_reads_every_field() -> None:
    header = ike.parse_header(b"xx" + BY_HAND, 2)
    assert header == Header(SPI_I, SPI_R, Payload.ENCRYPTED, 0x20, Exchange.IKE_AUTH, 0x08, 1, 32)
    assert (header.major, header.initiator, header.response) == (2, True, False)
    assert ike.parse_header(BY_HAND, -32) is None
    assert ike.parse_header(BY_HAND, 99) is None


def test_ikev1_flags_mean_nothing_here() -> None:
    header = Header(SPI_I, version=0x10, flags=0xFF)
    assert not header.initiator
    assert not header.response


def test_names() -> None:
    assert ike.exchange_name(34) == "IKE_SA_INIT"
    assert ike.exchange_name(2) == "MAIN_MODE"
    assert ike.exchange_name(99) == "exchange 99"
    assert ike.notify_name(14) == "NO_PROPOSAL_CHOSEN"
    assert ike.notify_name(9999) == "notification 9999"


def test_a_request_holds_what_section_1_2_asks_for() -> None:
    walked = list(ike.payloads(REQUEST))
    assert [kind for kind, _ in walked] == [Payload.SA, Payload.KE, Payload.NONCE]
    assert walked[1][1] == bytes([0, 14, 0, 0]) + KE
    assert walked[2][1] == NONCE
    header = ike.parse_header(REQUEST)
    assert header == Header(SPI_I, next_payload=Payload.SA, length=len(REQUEST))
    assert header.initiator
    assert not header.response


def test_proposals_are_consistent() -> None:
    """Each length, count and "more follow" mark of section 3.3 agrees with what is there."""
    sa = dict(ike.payloads(REQUEST))[Payload.SA]
    ciphers = []
    while sa:
        more, length, protocol, spi_size, count = sa[0], int.from_bytes(sa[2:4], "big"), *sa[5:8]
        assert (more == 2) is (len(sa) > length)
        assert (protocol, spi_size) == (1, 0)
        body, kinds = sa[8:length], []
        while body:
            size = int.from_bytes(body[2:4], "big")
            assert (body[0] == 3) is (len(body) > size)
            kinds.append(body[4])
            if body[4] == 1:
                ciphers.append((int.from_bytes(body[6:8], "big"), body[8:10], body[10:size]))
            body = body[size:]
        assert len(kinds) == count
        assert kinds == sorted(kinds)
        sa = sa[length:]
    key_length = bytes([0x80, 14])
    assert (12, key_length, (256).to_bytes(2, "big")) in ciphers
    assert (20, key_length, (256).to_bytes(2, "big")) in ciphers


def test_an_unusual_group_is_offered_before_the_common_ones() -> None:
    sa = dict(ike.payloads(ike.ike_sa_init(SPI_I, NONCE, bytes(96), group=Group.MODP768)))[Payload.SA]
    modp768, modp2048 = b"\x04\x00\x00\x01", b"\x04\x00\x00\x0e"
    assert 0 < sa.index(modp768) < sa.index(modp2048)


def test_cookie_comes_first_and_nat_detection_last() -> None:
    request = ike.ike_sa_init(SPI_I, NONCE, KE, cookie=b"biscuit", path=PATH)
    found = list(ike.notifies(request))
    assert next(ike.payloads(request))[0] == Payload.NOTIFY
    assert found == [
        (Notify.COOKIE, b"biscuit"),
        (
            Notify.NAT_DETECTION_SOURCE_IP,
            hashlib.sha1(SPI_I + bytes(8) + bytes([192, 0, 2, 1]) + b"\x01\xf4").digest(),
        ),
        (
            Notify.NAT_DETECTION_DESTINATION_IP,
            hashlib.sha1(
                SPI_I + bytes(8) + ip_address("2001:db8::2").packed + (4500).to_bytes(2, "big")
            ).digest(),
        ),
    ]


def test_a_response_names_both_spis() -> None:
    response = ike.ike_sa_init_response(SPI_I, SPI_R, NONCE, bytes(32), group=Group.CURVE25519, path=PATH)
    header = ike.parse_header(response)
    assert header is not None
    assert (header.spi_i, header.spi_r) == (SPI_I, SPI_R)
    assert header.response
    assert not header.initiator
    assert ike.classify_answer(SPI_I, response) is Answer.SA
    assert len(list(ike.notifies(response))) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((bytes(8), NONCE, KE), "zero"),
        ((b"short", NONCE, KE), "8 bytes"),
        ((SPI_I, bytes(15), KE), "nonce"),
        ((SPI_I, bytes(257), KE), "nonce"),
        ((SPI_I, NONCE, KE[:-1]), "MODP2048 has 256 bytes, not 255"),
    ],
)
def test_builders_refuse_what_peers_refuse(arguments: tuple[bytes, bytes, bytes], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ike.ike_sa_init(*arguments)


def test_message_refuses_what_does_not_fit() -> None:
    assert len(ike.message(Header(SPI_I), [(Payload.NONCE, bytes(65_531))])) == 28 + 65_535
    with pytest.raises(ValueError, match="65531"):
        ike.message(Header(SPI_I), [(Payload.NONCE, bytes(65_532))])
    with pytest.raises(ValueError, match="8 bytes"):
        ike.message(Header(SPI_I, b""), [])


def test_the_walk_stops_at_an_encrypted_payload() -> None:
    sealed = ike.message(Header(SPI_I), [(Payload.ENCRYPTED, b"x" * 40), (Payload.NOTIFY, b"inside")])
    assert list(ike.payloads(sealed)) == [(Payload.ENCRYPTED, b"x" * 40)]


def test_the_walk_is_bounded_and_stops_at_damage() -> None:
    many = ike.message(Header(SPI_I), [(Payload.VENDOR_ID, b"")] * 1000)
    assert len(list(ike.payloads(many))) == ike.MAX_PAYLOADS
    too_long = bytearray(ike.message(Header(SPI_I), [(Payload.NONCE, NONCE), (Payload.KE, b"four")]))
    too_long[-5] = 9  # the last payload claims a byte more than there is
    assert list(ike.payloads(bytes(too_long))) == [(Payload.NONCE, NONCE)]
    too_short = bytearray(ike.message(Header(SPI_I), [(Payload.NONCE, b"")]))
    too_short[-1] = 3
    assert list(ike.payloads(bytes(too_short))) == []


def test_the_walk_does_not_read_past_the_message() -> None:
    short = bytearray(answer((Payload.NONCE, NONCE), ike.notify(Notify.COOKIE, b"x")))
    short[24:28] = (28 + 4 + len(NONCE)).to_bytes(4, "big")
    assert [kind for kind, _ in ike.payloads(bytes(short))] == [Payload.NONCE]


def test_notification_data_follows_its_spi() -> None:
    body = bytes([3, 4]) + (11).to_bytes(2, "big") + b"spi!" + b"data"
    assert list(ike.notifies(answer((Payload.NOTIFY, body)))) == [(Notify.INVALID_SPI, b"data")]
    assert list(ike.notifies(answer((Payload.NOTIFY, b"xyz")))) == []


@pytest.mark.parametrize(
    ("data", "expected", "alive"),
    [
        (RESPONSE, Answer.SA, True),
        (answer(ike.notify(Notify.COOKIE, b"c" * 20)), Answer.COOKIE, True),
        (answer(ike.notify(Notify.INVALID_KE_PAYLOAD, b"\0\x0e")), Answer.INVALID_KE_PAYLOAD, True),
        (answer(ike.notify(Notify.NO_PROPOSAL_CHOSEN)), Answer.NO_PROPOSAL_CHOSEN, True),
        (
            answer(ike.notify(Notify.REDIRECT), ike.notify(Notify.NO_PROPOSAL_CHOSEN)),
            Answer.NO_PROPOSAL_CHOSEN,
            True,
        ),
        (answer(ike.notify(Notify.AUTHENTICATION_FAILED)), Answer.OTHER_NOTIFY, True),
        (answer(ike.notify(40_999)), Answer.OTHER_NOTIFY, True),
        (answer((Payload.VENDOR_ID, b"who")), Answer.OTHER_RESPONSE, True),
        (answer(), Answer.OTHER_RESPONSE, True),
        (REQUEST, Answer.NOT_A_RESPONSE, False),
        (answer(ike.notify(Notify.COOKIE), spi_i=SPI_R), Answer.WRONG_SPI, False),
        (ike.message(Header(SPI_I, version=0x10), []), Answer.NOT_IKE, False),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Answer.NOT_IKE, False),
        (b"", Answer.NOT_IKE, False),
    ],
)
def test_classify_answer(data: bytes, expected: Answer, alive: bool) -> None:
    found = ike.classify_answer(SPI_I, data)
    assert found is expected
    assert found.alive is alive
