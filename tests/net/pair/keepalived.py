"""The yardstick: keepalived moves the virtual addresses, and nftables spreads the clients.

Both nodes rewrite without state: the gateway is a hash of the client's address (of one seed: nft chooses one by
chance otherwise), and what comes back from a gateway gets the virtual address as its source. So no node needs to know anything of the other, and what comes first after a
takeover, a client's packet or a gateway's, spoils nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM, Signals

from tests.net.lab import FLOATING, VIP
from tests.net.namespaces import Daemon, until
from tests.net.pair.lab import Node, PairLab


class Keepalived:
    """A pair of keepalived and nftables.

    Args:
        adverts: seconds between two adverts of the active node.
    """

    addresses = (VIP, FLOATING)

    def __init__(self, lab: PairLab, adverts: float) -> None:
        self.lab = lab
        self._daemons: dict[str, Daemon] = {}
        self._folders: dict[str, Path] = {}
        for node in lab.nodes:
            folder = lab.folder / f"keepalived-{adverts}-{node.name}"
            folder.mkdir(exist_ok=True)
            (folder / "keepalived.conf").write_text(_config(node, adverts))
            self._folders[node.name] = folder
            self._daemons[node.name] = Daemon(node.namespace, _command(folder), folder / "output.log", {})

    async def start(self, node: Node) -> None:
        """Start it on a node, unless it runs there."""
        if self._daemons[node.name].running:
            return
        for stale in self._folders[node.name].glob("*pid"):  # else it takes a dead one for itself
            stale.unlink()
        node.forget()
        node.namespace.nft(_rules(self.lab))
        self._daemons[node.name].start()

    def kill(self, node: Node) -> None:
        """End it on a node as a crash would."""
        self._signal(node, SIGKILL)
        self._daemons[node.name].kill()

    def terminate(self, node: Node) -> None:
        """Ask it to end on a node."""
        self._daemons[node.name].signal(SIGTERM)

    def pause(self, node: Node) -> None:
        """Have it hang on a node."""
        self._signal(node, SIGSTOP)

    def resume(self, node: Node) -> None:
        """Let it go on."""
        self._signal(node, SIGCONT)

    async def mend(self) -> None:
        """Put all cables back, and start it on both nodes unless it runs there."""
        for node in self.lab.nodes:
            node.plug()
            await self.start(node)

    async def settled(self) -> Node:
        """Wait until the addresses are on one node, and both run; that node."""
        found: list[Node] = []

        async def one() -> bool:
            found[:] = [node for node in self.lab.nodes if await _holds(node)]
            return len(found) == 1 and all(each.running for each in self._daemons.values())

        await until(one, "one node has the addresses", 20)
        return found[0]

    async def pins(self, node: Node) -> Mapping[str, str]:
        """Nothing: there are none."""
        return {}

    async def ended(self, node: Node) -> None:
        """Wait until it has ended on a node that was asked to."""

        async def over() -> bool:
            return not self._daemons[node.name].running

        await until(over, f"keepalived ends on {node.name}")

    async def step_down(self, node: Node) -> None:
        """Restart it there, which is what its operators do."""
        self.terminate(node)
        await self.ended(node)
        await self.start(node)

    async def stop(self) -> None:
        """End it on both nodes."""
        for node in self.lab.nodes:
            self.resume(node)
            self._daemons[node.name].stop()
            node.forget()

    def _signal(self, node: Node, number: Signals) -> None:
        """To all its processes: keepalived has a parent that watches its worker."""
        for pid in node.namespace.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


async def _holds(node: Node) -> bool:
    return f" {VIP}/" in (await node.namespace.run("ip", "-o", "-4", "address", "show", "front")).stdout


def _command(folder: Path) -> list[str]:
    return [
        *("keepalived", "--dont-fork", "--log-console", "--log-detail", "--vrrp"),
        *("--use-file", str(folder / "keepalived.conf")),
        *("--pid", str(folder / "pid"), "--vrrp_pid", str(folder / "vrrp.pid")),
    ]


def _config(node: Node, adverts: float) -> str:
    return f"""
        global_defs {{
            router_id {node.name}
            vrrp_version 3
        }}
        vrrp_instance pair {{
            state BACKUP
            nopreempt
            interface front
            virtual_router_id 51
            priority {100 + (node.name == "lb-a")}
            advert_int {adverts}
            virtual_ipaddress {{
                {VIP}/24 dev front
                {FLOATING}/24 dev back
            }}
        }}
    """


def _rules(lab: PairLab) -> str:
    servers = ", ".join(f"{n} : {gateway.address}" for n, gateway in enumerate(lab.gateways))
    return f"""
        flush ruleset
        table ip balance {{
            chain in {{
                type filter hook prerouting priority raw;
                ip daddr {VIP} udp dport {{ 500, 4500 }} notrack ip daddr set jhash ip saddr mod \\
                    {len(lab.gateways)} seed 1 map {{ {servers} }}
                iifname back udp sport {{ 500, 4500 }} notrack
            }}
            chain out {{
                type filter hook postrouting priority raw;
                oifname front udp sport {{ 500, 4500 }} ip saddr set {VIP}
            }}
        }}
    """
