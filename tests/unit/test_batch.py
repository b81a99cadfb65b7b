"""Batches of datagrams: what the kernel gives and takes, slot by slot, and peers as things to look up."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sapin.core.dataplane.batch import (
    SOL_UDP,
    UDP_GRO,
    UDP_SEGMENT,
    Batch,
    ancillary,
    peer_address,
    peer_name,
    peer_of,
)
from sapin.core.dataplane.listeners import local_address

SLOTS = 64
FAMILIES = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
ADDRESSES = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
PORTS = st.integers(0, 65_535)


def udp(host: str) -> socket.socket:
    sock = socket.socket(FAMILIES[host], socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
    sock.bind((host, 0))
    return sock


@pytest.fixture(params=FAMILIES)
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def batch(host: str) -> Batch:
    return Batch(FAMILIES[host], SLOTS)


@pytest.fixture
def near(host: str) -> Iterator[socket.socket]:
    """The socket that the batch uses."""
    with closing(udp(host)) as sock:
        yield sock


@pytest.fixture
def far(host: str) -> Iterator[socket.socket]:
    with closing(udp(host)) as sock:
        yield sock


def name_of(sock: socket.socket) -> bytes:
    """A socket's address as Batch.send wants it."""
    host, port = sock.getsockname()[:2]
    return peer_name(peer_of(ip_address(host).packed, port))


def fill(batch: Batch, *datagrams: bytes) -> list[int]:
    for view, data in zip(batch.views, datagrams, strict=False):
        view[: len(data)] = data
    return [len(data) for data in datagrams]


# receiving


def test_nothing_to_receive_is_no_error(batch: Batch, near: socket.socket) -> None:
    assert batch.receive(near.fileno()) == 0


def test_datagrams_arrive_whole_in_order_and_with_their_sender(
    batch: Batch, near: socket.socket, far: socket.socket, host: str
) -> None:
    sent = [bytes([n]) * size for n, size in enumerate((0, 1, 3, 1472, 9000, 65_507, 0, 4))]
    for data in sent:
        far.sendto(data, near.getsockname())
    count = batch.receive(near.fileno())
    sizes = batch.sizes(count)
    assert [bytes(data) for data in batch.datagrams(sizes)] == sent
    assert {peer_address(peer) for peer in batch.peers(count)} == {
        (ip_address(host).packed, far.getsockname()[1])
    }
    assert batch.segments(count) is None
    assert batch.first_words(count)[4] == 0x04040404


def test_more_than_the_slots_hold_is_left_for_the_next_time(
    batch: Batch, near: socket.socket, far: socket.socket
) -> None:
    sent = [b"%d" % number for number in range(SLOTS + 3)]
    for data in sent:
        far.sendto(data, near.getsockname())
    received = []
    for expected in (SLOTS, 3, 0):
        count = batch.receive(near.fileno())
        assert count == expected
        received += [bytes(data) for data in batch.datagrams(batch.sizes(count))]
    assert received == sent


def test_a_batch_with_the_lengths_of_the_one_before_shows_the_new_bytes(
    batch: Batch, near: socket.socket, far: socket.socket
) -> None:
    for data in (b"old", b"new"):
        far.sendto(data, near.getsockname())
        count = batch.receive(near.fileno())
        assert [bytes(each) for each in batch.datagrams(batch.sizes(count))] == [data]


def test_a_pending_error_is_raised_and_then_gone(batch: Batch, near: socket.socket, host: str) -> None:
    with closing(udp(host)) as gone:
        address = gone.getsockname()
    near.connect(address)
    near.send(b"to nobody")
    with pytest.raises(ConnectionRefusedError):
        batch.receive(near.fileno())
    assert batch.receive(near.fileno()) == 0


def test_a_closed_descriptor_is_an_error(batch: Batch) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        batch.receive(-1)


def test_merged_datagrams_come_with_their_segment_size(
    batch: Batch, near: socket.socket, far: socket.socket
) -> None:
    near.setsockopt(SOL_UDP, UDP_GRO, 1)
    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", 100))]
    far.sendto(b"single", near.getsockname())
    far.sendmsg([b"x" * 250], control, 0, near.getsockname())
    count = batch.receive(near.fileno())
    assert batch.sizes(count) == [6, 250]
    assert batch.segments(count) == [0, 100]


def test_control_data_of_one_batch_does_not_outlive_it(
    batch: Batch, near: socket.socket, far: socket.socket
) -> None:
    near.setsockopt(SOL_UDP, UDP_GRO, 1)
    far.sendmsg([b"x" * 200], [(SOL_UDP, UDP_SEGMENT, struct.pack("H", 100))], 0, near.getsockname())
    assert batch.segments(batch.receive(near.fileno())) == [100]
    far.sendto(b"x" * 200, near.getsockname())
    assert batch.segments(batch.receive(near.fileno())) is None


def test_without_control_nothing_is_received_of_it(near: socket.socket, far: socket.socket) -> None:
    batch = Batch(near.family, SLOTS, control=False)
    near.setsockopt(SOL_UDP, UDP_GRO, 1)
    far.sendto(b"data", near.getsockname())
    assert batch.segments(batch.receive(near.fileno())) is None


def test_segment_size_and_local_address_fit_the_room_for_control_data(
    batch: Batch, near: socket.socket, far: socket.socket, host: str
) -> None:
    """Both at once, as on a wildcard service whose client has GSO."""
    near.setsockopt(SOL_UDP, UDP_GRO, 1)
    if near.family == socket.AF_INET6:
        near.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        near.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO
    far.sendmsg([b"x" * 200], [(SOL_UDP, UDP_SEGMENT, struct.pack("H", 100))], 0, near.getsockname())
    count = batch.receive(near.fileno())
    assert batch.segments(count) == [100]
    assert [local_address(control) for control in batch.controls(count)] == [ip_address(host)]


# sending


def test_each_slot_goes_to_its_own_address(
    batch: Batch, near: socket.socket, far: socket.socket, host: str
) -> None:
    with closing(udp(host)) as other:
        sizes = fill(batch, b"first", b"", b"third")
        assert batch.send(near.fileno(), [name_of(far), name_of(other), name_of(far)], sizes) == 3
        assert [far.recv(100), far.recv(100)] == [b"first", b"third"]
        data, source = other.recvfrom(100)
        assert (data, source) == (b"", near.getsockname())


def test_a_whole_batch_is_sent_in_order(batch: Batch, near: socket.socket, far: socket.socket) -> None:
    sent = [b"%d" % number for number in range(SLOTS)]
    assert batch.send(near.fileno(), [name_of(far)] * SLOTS, fill(batch, *sent)) == SLOTS
    assert [far.recv(100) for _ in sent] == sent


def test_what_cannot_be_sent_is_left_out_and_the_rest_goes(
    batch: Batch, near: socket.socket, far: socket.socket, host: str
) -> None:
    nowhere = peer_name(peer_of(ip_address(host).packed, 0))  # no datagram goes to port 0
    names = [nowhere, name_of(far), nowhere, nowhere, name_of(far), nowhere]
    assert batch.send(near.fileno(), names, fill(batch, b"a", b"b", b"c", b"d", b"e", b"f")) == 2
    assert [far.recv(100), far.recv(100)] == [b"b", b"e"]


def test_a_datagram_that_is_too_long_is_left_out(
    batch: Batch, near: socket.socket, far: socket.socket
) -> None:
    sizes = [65_536, 3]
    fill(batch, b"", b"end")
    assert batch.send(near.fileno(), [name_of(far)] * 2, sizes) == 1
    assert far.recv(65_536) == b"end"


def test_what_is_sent_after_receiving_has_no_control_data_left(
    batch: Batch, near: socket.socket, far: socket.socket
) -> None:
    """Received control data in a sent header would be an instruction to the kernel."""
    near.setsockopt(SOL_UDP, UDP_GRO, 1)
    far.sendmsg([b"x" * 200], [(SOL_UDP, UDP_SEGMENT, struct.pack("H", 100))], 0, near.getsockname())
    assert batch.receive(near.fileno()) == 1
    assert batch.send(near.fileno(), [name_of(far)], [200]) == 1
    assert far.recv(1000) == b"x" * 200


def test_slots_serve_receiving_again_after_sending(
    batch: Batch, near: socket.socket, far: socket.socket
) -> None:
    """The lengths of what was sent must not cut off what is received."""
    assert batch.send(near.fileno(), [name_of(far)], fill(batch, b"x")) == 1
    far.sendto(b"long" * 300, near.getsockname())
    count = batch.receive(near.fileno())
    assert batch.sizes(count) == [1200]


def test_a_closed_socket_sends_nothing(batch: Batch, far: socket.socket) -> None:
    assert batch.send(-1, [name_of(far)] * 3, fill(batch, b"a", b"b", b"c")) == 0


# peers


@given(ADDRESSES, PORTS)
def test_a_peer_is_the_address_and_port_that_it_was_made_of(address: bytes, port: int) -> None:
    assert peer_address(peer_of(address, port)) == (address, port)


@given(ADDRESSES, PORTS, ADDRESSES, PORTS)
@example(b"\x7f\0\0\1", 1, b"\x7f\0\0\1".ljust(16, b"\0"), 1)
def test_peers_differ_when_addresses_or_ports_do(one: bytes, port: int, other: bytes, its: int) -> None:
    assert (peer_of(one, port) == peer_of(other, its)) == ((one, port) == (other, its))


@given(ADDRESSES, PORTS)
def test_the_names_of_peers_all_have_a_slots_length(address: bytes, port: int) -> None:
    name = peer_name(peer_of(address, port))
    assert len(name) == 32
    assert struct.unpack_from("=H", name)[0] == (socket.AF_INET if len(address) == 4 else socket.AF_INET6)


def test_a_peer_that_was_restored_is_the_one_that_the_kernel_shows(
    batch: Batch, near: socket.socket, far: socket.socket, host: str
) -> None:
    far.sendto(b"x", near.getsockname())
    batch.receive(near.fileno())
    assert batch.peers(1)[0] == peer_of(ip_address(host).packed, far.getsockname()[1])


# control data


def cmsg(level: int, kind: int, data: bytes) -> bytes:
    length = 16 + len(data)
    return struct.pack("Qii", length, level, kind) + data + bytes(-length % 8)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.binary(max_size=24)), max_size=4))
def test_control_data_is_read_as_the_kernel_lays_it_out(messages: list[tuple[int, int, bytes]]) -> None:
    assert ancillary(b"".join(cmsg(*message) for message in messages)) == messages


@given(st.binary(max_size=64))
@example(struct.pack("Qii", 2**64 - 1, SOL_UDP, UDP_GRO))
@example(struct.pack("Qii", 0, SOL_UDP, UDP_GRO))
@example(struct.pack("Qii", 17, socket.IPPROTO_IP, 8) + b"x")
@example(struct.pack("Qii", 64, socket.IPPROTO_IPV6, socket.IPV6_PKTINFO) + b"short")
def test_whatever_the_control_data_is_nothing_is_raised(control: bytes) -> None:
    for _, _, data in ancillary(control):
        assert data in control
    local_address(control)
