"""Configurations to start from, written for the operator who edits them next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sapin.core.model import IPAddress
from sapin.core.schema import families, parse_address, parse_server_address

_HEAD = """\
# Sapin: IKEv2 clients over several VPN gateways.
# Check this file with `sapin check FILE`; a running daemon takes it over with `sapin reload`.
# Every key is described in docs/configuration.md; what is commented out below shows the default.

[node]
name = "lb-a"
# state_dir = "/var/lib/sapin"     # pins, flows and the control socket; must survive a restart
# max_pins = 1_000_000             # clients remembered; beyond it the least recently seen is forgotten
# max_flows = 200_000              # each costs one file descriptor
# receive_buffer = "8MiB"          # per service; the kernel may give less (sysctl net.core.rmem_max)
"""

_LEADER = """
# IKE on UDP 500: where a client speaks first, and where its gateway is chosen.
[[virtual_services]]
name = "{name}"
address = "{address}"
port = 500

# Who gets a new client: the gateway with the fewest clients. With different gateways, say
# "weighted-least-connections" and give each a weight. `sapin plugin list` shows what else there is.
scheduler = "least-connections"

# A client is known by its address, and keeps its gateway until it was silent for this long.
# Many clients behind one NAT all go to one gateway then; {{ plugin = "ike-spi" }} spreads them.
persistence = {{ plugin = "source-address", timeout = "8h" }}

# A real IKE_SA_INIT is sent to each gateway. After `fall` failures in a row it gets no clients and
# those it had are free to go elsewhere; after `rise` successes it is back.
checks = [{{ plugin = "ike", interval = "5s", timeout = "2s", rise = 2, fall = 3 }}]

# To empty a gateway before work on it, give it state = "draining": it keeps its clients and gets no
# new ones. state = "disabled" sends its clients away too.
real_servers = [
{servers}
]
"""

_FOLLOWER = """
# IKE and ESP in UDP 4500, where clients go on behind a NAT. It follows "{leader}": it has the same
# gateways, and a client's datagrams on both ports go to one and the same.
[[virtual_services]]
name = "{name}"
address = "{address}"
port = 4500
follows = "{leader}"
# flow_timeout = "1h"              # a silent flow's port is given back after this long
"""


def ikev2(vip: Sequence[str], servers: Sequence[str]) -> str:
    """A commented configuration that spreads the IKEv2 clients of each ``vip`` over the ``servers``.

    There is a pair of services, UDP 500 and UDP 4500, for each virtual address. It has the servers of
    its address family, and those of both for ``::``.

    Raises:
        ValueError: an address is wrong or given twice, there are two virtual addresses of one family, or a
            virtual address or a server has nobody of its family; the text names it.
    """
    vips = [_parsed("virtual address", parse_address, text) for text in vip]
    gateways = [_parsed("server", parse_server_address, text) for text in servers]
    _refuse_repeats(vips, gateways)
    names = {address: f"gw{number}" for number, address in enumerate(gateways, start=1)}
    if not vips:
        raise ValueError("there is no virtual address")
    pairs = [
        _pair(address, [g for g in gateways if g.version in families(address)], names) for address in vips
    ]
    for gateway in gateways:
        if not any(gateway.version in families(address) for address in vips):
            raise ValueError(f"server {gateway} has no virtual address of IPv{gateway.version}")
    first, *others = pairs
    return _HEAD + first + "".join(map(_without_comments, others))


def _without_comments(pair: str) -> str:
    """The same for a second time: what the comments say was said."""
    lines = [line for line in pair.splitlines() if line and not line.startswith("#")]
    return "\n".join(lines).replace("[[", "\n[[") + "\n"


def _parsed(what: str, parse: Callable[[object], IPAddress], text: str) -> IPAddress:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{what} {text!r} {error}") from None


def _refuse_repeats(vips: Sequence[IPAddress], gateways: Sequence[IPAddress]) -> None:
    given = [*vips, *gateways]
    for address in given:
        if given.count(address) > 1:
            raise ValueError(f"address {address} is given twice")
    for address in vips:
        if sum(other.version in families(address) for other in vips) > 1:
            raise ValueError(f"give one virtual address of each family; there is another beside {address}")


def _pair(address: IPAddress, gateways: Sequence[IPAddress], names: dict[IPAddress, str]) -> str:
    if not gateways:
        raise ValueError(f"virtual address {address} has no server of IPv{address.version}")
    leader = "ike" if address.version == 4 or address.is_unspecified else "ike6"
    servers = "\n".join(f'    {{ name = "{names[g]}", address = "{g}", weight = 1 }},' for g in gateways)
    return _LEADER.format(name=leader, address=address, servers=servers) + _FOLLOWER.format(
        name=f"{leader}-natt", address=address, leader=leader
    )
