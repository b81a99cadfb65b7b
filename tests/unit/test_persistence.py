"""How a client is recognised, and where a follower's servers are."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sapin.core.contracts import Client, Datagram, Key, Persistence, key
from sapin.core.ike import Kind
from sapin.core.model import Endpoint, Framing, PluginRef, RealServer, VirtualService
from sapin.plugins.following.port import Port
from sapin.plugins.persistence.ike_spi import IkeSpi
from sapin.plugins.persistence.none import NoPersistence
from sapin.plugins.persistence.source_address import SourceAddress

SPI = bytes(range(1, 9))
NEW_SPI = bytes(range(11, 19))
ZERO = bytes(8)


def client(address: str, port: int = 500) -> Client:
    return Client(ip_address(address).packed, port)


def ike(source: Client, spi_i: bytes = SPI, port: int = 500) -> Datagram:
    return Datagram(source, port, Kind.IKE, spi_i, ZERO)


def esp(source: Client, port: int = 4500) -> Datagram:
    return Datagram(source, port, Kind.ESP, b"", b"")


def source_address(**options: int) -> SourceAddress:
    return SourceAddress(SourceAddress.Config(**options))


class Pins:
    """The rule of the contract: the first pinned key decides, then all of them are pinned."""

    def __init__(self, persistence: Persistence) -> None:
        self._persistence = persistence
        self._pins: dict[Key, str] = {}

    def send(self, datagram: Datagram, otherwise: str) -> str:
        """The server that the datagram goes to; ``otherwise`` if its client is new."""
        keys: Sequence[Key] = self._persistence.keys(datagram)
        server = next((self._pins[k] for k in keys if k in self._pins), otherwise)
        self._pins.update(dict.fromkeys(keys, server))
        return server


# Source address


def test_source_address_ignores_all_but_the_address() -> None:
    one = source_address()
    datagrams = [ike(client("192.0.2.1")), ike(client("192.0.2.1", 9), NEW_SPI), esp(client("192.0.2.1", 7))]
    assert {tuple(one.keys(datagram)) for datagram in datagrams} == {(key("src", bytes([192, 0, 2, 1])),)}


@pytest.mark.parametrize(
    ("options", "one", "other", "same"),
    [
        ({}, "192.0.2.1", "192.0.2.2", False),
        ({"prefix4": 24}, "192.0.2.1", "192.0.2.254", True),
        ({"prefix4": 24}, "192.0.2.1", "192.0.3.1", False),
        ({"prefix4": 31}, "192.0.2.2", "192.0.2.3", True),
        ({"prefix4": 31}, "192.0.2.1", "192.0.2.2", False),
        ({"prefix4": 1}, "0.0.0.1", "127.255.255.255", True),
        ({}, "2001:db8::1", "2001:db8::2", False),
        ({"prefix6": 64}, "2001:db8::1", "2001:db8::ffff:1", True),
        ({"prefix6": 64}, "2001:db8::1", "2001:db8:0:1::1", False),
        ({"prefix4": 8}, "2001:db8::1", "2001:db8::2", False),
    ],
)
def test_source_address_prefixes(options: dict[str, int], one: str, other: str, same: bool) -> None:
    persistence = source_address(**options)
    assert (persistence.keys(ike(client(one))) == persistence.keys(ike(client(other)))) is same


@given(st.ip_addresses(), st.integers(1, 32), st.integers(1, 128))
def test_source_address_is_the_network_of_the_client(address: Any, prefix4: int, prefix6: int) -> None:
    prefix = prefix4 if address.version == 4 else prefix6
    network = ip_network((address, prefix), strict=False).network_address.packed
    keys = source_address(prefix4=prefix4, prefix6=prefix6).keys(ike(Client(address.packed, 1)))
    assert keys == (key("src", network),)


@pytest.mark.parametrize("options", [{"prefix4": 0}, {"prefix4": 33}, {"prefix6": 129}, {"prefix": 24}])
def test_source_address_refuses(options: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        SourceAddress.Config.model_validate(options)


# IKE SPI


def test_ike_spi_puts_the_spi_before_the_tuple() -> None:
    (spi, outer) = IkeSpi().keys(ike(client("192.0.2.1", 0x1234), port=0x1194))
    assert spi == key("spi", SPI)
    assert outer == key("tuple", bytes([192, 0, 2, 1, 0x12, 0x34, 0x11, 0x94]))


@pytest.mark.parametrize("kind", [Kind.ESP, Kind.KEEPALIVE, Kind.OTHER])
def test_ike_spi_knows_all_but_ike_by_the_tuple_alone(kind: Kind) -> None:
    source = client("2001:db8::1", 4500)
    datagram = Datagram(source, 4500, kind, b"", b"")
    assert IkeSpi().keys(datagram) == IkeSpi().keys(ike(source, port=4500))[1:]


def test_ike_spi_takes_no_spi_of_zero() -> None:
    assert IkeSpi().keys(ike(client("192.0.2.1"), ZERO)) == IkeSpi().keys(esp(client("192.0.2.1"), 500))


def test_ike_spi_tells_the_ports_of_the_service_apart() -> None:
    source = client("192.0.2.1", 4500)
    assert IkeSpi().keys(esp(source, 4500)) != IkeSpi().keys(esp(source, 500))


def test_ike_spi_holds_a_client_over_both_ports() -> None:
    """Behind a NAT the outer ports of 500 and 4500 have nothing in common."""
    pins = Pins(IkeSpi())
    assert pins.send(ike(client("192.0.2.1", 1025)), "gw1") == "gw1"
    assert pins.send(ike(client("192.0.2.1", 60000), port=4500), "gw2") == "gw1"
    assert pins.send(esp(client("192.0.2.1", 60000)), "gw3") == "gw1"


def test_ike_spi_spreads_the_clients_of_one_nat() -> None:
    pins = Pins(IkeSpi())
    assert pins.send(ike(client("192.0.2.1", 1025), SPI), "gw1") == "gw1"
    assert pins.send(ike(client("192.0.2.1", 1026), NEW_SPI), "gw2") == "gw2"
    assert pins.send(ike(client("192.0.2.1", 60001), NEW_SPI, 4500), "gw1") == "gw2"


def test_ike_spi_follows_a_rekeyed_sa() -> None:
    """The new SPI is agreed on in secret; it is first seen on the tuple of the old one, then may roam."""
    pins = Pins(IkeSpi())
    pins.send(ike(client("192.0.2.1", 4500), SPI, 4500), "gw1")
    assert pins.send(ike(client("192.0.2.1", 4500), NEW_SPI, 4500), "gw2") == "gw1"
    assert pins.send(ike(client("203.0.113.9", 4500), NEW_SPI, 4500), "gw2") == "gw1"


def test_ike_spi_follows_a_client_that_roams() -> None:
    pins = Pins(IkeSpi())
    pins.send(ike(client("192.0.2.1", 4500), SPI, 4500), "gw1")
    assert pins.send(ike(client("203.0.113.9", 7777), SPI, 4500), "gw2") == "gw1"
    assert pins.send(esp(client("203.0.113.9", 7777)), "gw2") == "gw1"


def test_ike_spi_takes_over_the_tuple_of_a_client_that_left() -> None:
    """A known SPI on a tuple that was another client's: the tuple's ESP follows the SPI from now on."""
    pins = Pins(IkeSpi())
    pins.send(ike(client("192.0.2.1", 4500), SPI, 4500), "gw1")
    pins.send(ike(client("203.0.113.9", 7777), NEW_SPI, 4500), "gw2")
    assert pins.send(ike(client("192.0.2.1", 4500), NEW_SPI, 4500), "gw3") == "gw2"
    assert pins.send(esp(client("192.0.2.1", 4500)), "gw3") == "gw2"


def test_ike_spi_lets_clients_share_port_500_of_a_nat() -> None:
    """Some NATs keep port 500 for all clients: the second inherits the first's server, and keeps it on 4500."""
    pins = Pins(IkeSpi())
    pins.send(ike(client("192.0.2.1", 500), SPI), "gw1")
    assert pins.send(ike(client("192.0.2.1", 500), NEW_SPI), "gw2") == "gw1"
    assert pins.send(ike(client("192.0.2.1", 60002), NEW_SPI, 4500), "gw2") == "gw1"


# None


def test_no_persistence_recognises_nobody() -> None:
    assert NoPersistence().keys(ike(client("192.0.2.1"))) == ()


# Following


def service(name: str, port: int, follows: str | None = None) -> VirtualService:
    return VirtualService(
        name,
        ip_address("198.18.0.1"),
        port,
        Framing.IKE,
        (),
        PluginRef("a"),
        PluginRef("b"),
        60,
        60,
        follows=follows,
    )


@pytest.mark.parametrize(
    ("options", "expected"), [({}, 4500), ({"port": None}, 4500), ({"port": 14500}, 14500)]
)
@pytest.mark.parametrize("address", ["10.60.0.11", "2001:db8::11"])
@pytest.mark.parametrize("own_port", [None, 1500])
def test_port_is_the_followers(options: Any, expected: int, address: str, own_port: int | None) -> None:
    """A port of the server's own is where it serves the leader; it must not leak to the follower."""
    server = RealServer("gw1", ip_address(address), port=own_port)
    found = Port(Port.Config(**options)).endpoint(server, service("ike", 500), service("natt", 4500, "ike"))
    assert found == Endpoint(ip_address(address), expected)


@pytest.mark.parametrize("options", [{"port": 0}, {"port": 65536}, {"prot": 4500}])
def test_port_refuses(options: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Port.Config.model_validate(options)
