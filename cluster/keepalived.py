"""A configuration of keepalived for a pair whose addresses are to be moved by VRRP (RFC 5798).

Pure. keepalived moves the addresses; the node sees it on its devices and is told by hooks besides, and follows. The adverts
go over the service network, never over the cluster's link alone: a cut link would leave nobody with the addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from sapin.cluster.config import Cluster, Side, VirtualAddress

_GARP_AGAIN = 5
"""Seconds after which keepalived announces the addresses once more."""
_PRECEDENCE = 50
"""Of keepalived over other processes (SCHED_RR), 1 to 99; above that of the guard."""


def keepalived_conf(cluster: Cluster, node: str, identity: str, command: str, options: str = "") -> str:
    """The text of a keepalived.conf for this node; the other's differs in its name and priority.

    Args:
        cluster: the ``[cluster]`` table.
        node: this node's name.
        identity: the cluster's, which both nodes' router number is made of.
        command: how ``sapin`` is called, with an absolute path.
        options: what each call ends with, so that it finds the daemon.
    """
    return "\n".join(_lines(cluster, node, identity, command, options)) + "\n"


def router_number(identity: str) -> int:
    """The virtual router's number, 1 to 255: the same on both nodes, and by chance another than that of other clusters."""
    return sha256(identity.encode()).digest()[0] % 255 + 1


def _lines(cluster: Cluster, node: str, identity: str, command: str, options: str) -> Iterator[str]:
    end = f' {options}"' if options else '"'
    first = next(
        (a for a in cluster.virtual_addresses if a.side is Side.CLIENTS), cluster.virtual_addresses[0]
    )
    version = first.interface.version
    same = [a for a in cluster.virtual_addresses if a.interface.version == version]
    others = [a for a in cluster.virtual_addresses if a.interface.version != version]
    yield f"# keepalived.conf of {node}, made by `sapin cluster keepalived`. Make it anew rather than edit it."
    yield from (
        "global_defs {",
        f"    router_id {node}",
        "    enable_script_security",
        "    script_user root",
        "    vrrp_version 3",
        "    # A busy node must not miss its adverts: they are as frequent as the pair's heartbeats.",
        f"    vrrp_rt_priority {_PRECEDENCE}",
        f"    vrrp_garp_master_delay {_GARP_AGAIN}",
        "}",
        "",
        "# A node whose daemon does not answer does not forward, and must not have the addresses.",
        "vrrp_script sapin {",
        f'    script "{command} status --json{end}',
        "    interval 1",
        "    timeout 1",
        "    fall 2",
        "    rise 2",
        "}",
        "",
        "vrrp_instance sapin {",
        "    state BACKUP",
    )
    if not cluster.preempt:
        yield "    nopreempt"
    yield f"    interface {first.device}"
    yield f"    virtual_router_id {router_number(identity)}"
    yield f"    priority {min(cluster.priority, 254)}"
    yield f"    advert_int {max(cluster.heartbeat, 0.01):.2f}"
    yield from _addresses("virtual_ipaddress", same)
    if others:
        yield "    # Of the other address family: they move together with those above."
        yield from _addresses("virtual_ipaddress_excluded", others)
    tracked = dict.fromkeys(a.device for a in cluster.virtual_addresses if a.device != first.device)
    if tracked:
        yield "    track_interface {"
        yield from (f"        {device}" for device in tracked)
        yield "    }"
    yield from (
        "    track_script {",
        "        sapin",
        "    }",
        f'    notify_master "{command} cluster notify active{end}',
        f'    notify_backup "{command} cluster notify standby{end}',
        f'    notify_fault "{command} cluster notify standby{end}',
        "}",
    )


def _addresses(keyword: str, addresses: list[VirtualAddress]) -> Iterator[str]:
    yield f"    {keyword} {{"
    yield from (f"        {each.interface} dev {each.device}" for each in addresses)
    yield "    }"
