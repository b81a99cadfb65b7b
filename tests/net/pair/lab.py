"""The lab with two balancers in the balancer's place.

                         198.19.0.1 ─ cluster link ─ 198.19.0.2
    clients ── 198.18.0.2 lb-a 10.60.0.2        198.18.0.3 lb-b 10.60.0.3 ── gateways
                 the active one has 198.18.0.1 and 10.60.0.1 as well

Around them are the clients, NAT routers and gateways of :mod:`tests.net.lab`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.net.lab import FLOATING, FLOATING6, PSK, PSK6, VIP, VIP6, Network
from tests.net.namespaces import LabError, Port, Wire, clear, sweep

LABEL = "pair-"
VIRTUAL = {"front": (f"{VIP}/24", f"{VIP6}/64"), "back": (f"{FLOATING}/24", f"{FLOATING6}/64")}
"""The virtual addresses of each device."""


class Node:
    """A machine that a balancer runs on.

    Args:
        number: 1 or 2.
    """

    def __init__(self, number: int, network: Network, cluster: Wire) -> None:
        self.name = f"lb-{'ab'[number - 1]}"
        self.link = f"198.19.0.{number}"
        self.own = f"198.18.0.{number + 1}"
        self.namespace = namespace = network.install.namespace(self.name)
        host = number + 1
        self.front = network.front.attach(namespace, "front", f"{self.own}/24", f"2001:db8:18::{host}/64")
        self.back = network.back.attach(namespace, "back", f"10.60.0.{host}/24", f"2001:db8:60::{host}/64")
        self.cluster = cluster.attach(namespace, "cluster", f"{self.link}/24")
        namespace.sysctl("net.ipv4.ip_forward", 1)  # for the yardstick, which forwards in the kernel

    def lose_power(self) -> None:
        """Cut the cables, end everything, and forget what only the kernel knew."""
        Port.unplug_all([self.front, self.back, self.cluster])
        self.namespace.kill()
        self.forget()

    def forget(self) -> None:
        """Take away the virtual addresses and packet rules, as a restart of the machine does."""
        for device, addresses in VIRTUAL.items():
            bare = (
                each.partition("/")[0] for each in addresses
            )  # with its prefix it means the whole network
            self.namespace.ip(*(f"address flush dev {device} to {each}" for each in bare))
        self.namespace.nft("flush ruleset")

    def plug(self) -> None:
        """Put all cables back."""
        for port in (self.front, self.back, self.cluster):
            port.plug()


class PairLab(Network):
    """The whole network; nothing runs on the nodes yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, LABEL)
        cluster = Wire(self.wires, "cluster")
        self.nodes = (Node(1, self, cluster), Node(2, self, cluster))

    def other(self, node: Node) -> Node:
        """The peer of a node."""
        return self.nodes[1] if node is self.nodes[0] else self.nodes[0]

    async def connect_all(self, addresses: Container[str]) -> None:
        """Bring the tunnels up that are not; half of the direct clients come by IPv6 where the pair has it.

        Raises:
            LabError: somebody does not connect.
        """
        up = await self.tunnels()
        six = [client for client in self.direct[::2] if VIP6 in addresses]
        four = [client for client in self.clients if client not in six]
        for clients, how in (six, PSK6), (four, PSK):
            missing = [client for client in clients if client.name not in up]
            if not all(await self.connect(missing, how)):
                raise LabError("a client does not connect")


@contextmanager
def open_lab(folder: Path) -> Iterator[PairLab]:
    """The lab with its IKE daemons running, as long as the context lasts."""
    sweep()
    try:
        lab = PairLab(folder)
        try:
            lab.start()
            yield lab
        finally:
            lab.stop()
    finally:
        clear(LABEL)
