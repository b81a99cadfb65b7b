"""Every byte string goes through every function that reads from the network: none raises, all end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sapin.core import ike
from sapin.core.ike import Answer, Header, Kind
from sapin.core.model import Framing

SPI = b"initiate"
SPIS = st.binary(min_size=8, max_size=8)
BYTE = st.integers(0, 255)
HEADERS = st.builds(
    Header,
    spi_i=st.one_of(st.just(SPI), SPIS),
    spi_r=SPIS,
    version=st.one_of(st.just(0x20), BYTE),
    exchange=BYTE,
    flags=BYTE,
    message_id=st.integers(0, 2**32 - 1),
)
CHAINS = st.lists(st.tuples(BYTE, st.binary(max_size=40)), max_size=8)
MESSAGES = st.builds(ike.message, HEADERS, CHAINS)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with some bytes changed, and cut or extended, perhaps behind a marker."""
    data = bytearray(draw(MESSAGES))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(BYTE)
    cut = draw(st.integers(0, len(data)))
    marker = draw(st.sampled_from([b"", ike.NON_ESP_MARKER, b"\0\0"]))
    return marker + bytes(data[:cut]) + draw(st.binary(max_size=8))


DATA = st.one_of(st.binary(max_size=200), MESSAGES, damaged())


@given(DATA, st.sampled_from(Framing), st.booleans(), st.integers(-40, 300))
def test_nothing_raises(data: bytes, framing: Framing, viewed: bool, offset: int) -> None:
    given_data = memoryview(data) if viewed else data
    kind, begin = ike.classify(given_data, framing)
    found = ike.spis(given_data, framing)
    header = ike.parse_header(given_data, begin)
    ike.parse_header(given_data, offset)
    assert (found is not None) is (kind is Kind.IKE)
    if found is not None:
        assert header is not None
        assert (
            found == (header.spi_i, header.spi_r) == (data[begin : begin + 8], data[begin + 8 : begin + 16])
        )
        assert header.length <= len(data) - begin


@given(DATA)
def test_walks_end_and_invent_nothing(data: bytes) -> None:
    walked = list(ike.payloads(data))
    assert len(walked) <= ike.MAX_PAYLOADS
    assert sum(4 + len(body) for _, body in walked) <= len(data)
    assert len(list(ike.notifies(data))) <= len(walked)
    assert isinstance(ike.classify_answer(SPI, data), Answer)


@given(HEADERS, CHAINS)
def test_what_is_built_is_read_back(header: Header, chain: list[tuple[int, bytes]]) -> None:
    built = ike.message(header, chain)
    read = ike.parse_header(built)
    if header.major not in (1, 2) or not any(header.spi_i):
        assert read is None
        return
    first = chain[0][0] if chain else 0
    assert read == header._replace(next_payload=first, length=len(built))
    ends = [n for n, (kind, _) in enumerate(chain) if kind in (46, 53)]
    zeros = [n for n, (kind, _) in enumerate(chain) if kind == 0]
    stop = min([n + 1 for n in ends] + zeros + [len(chain)])
    assert list(ike.payloads(built)) == (chain[:stop] if header.major == 2 else [])


@given(BYTE)
def test_every_number_has_a_name(number: int) -> None:
    assert ike.exchange_name(number)
    assert ike.notify_name(number)
