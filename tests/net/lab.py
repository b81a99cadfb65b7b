"""A network of its own for real IKE: clients, NAT routers, the place of the balancer, and gateways.

    c01 … c10 ──────────────┐                             ┌── gw1 10.60.0.11 ─ 10.99.0.1
    c11 … c16 ── NAT router ┼── 198.18.0.1 lb 10.60.0.1 ──┼── gw2 10.60.0.12 ─ 10.99.0.1
    c17 … c22 ── NAT router ┘                             └── gw3 10.60.0.13 ─ 10.99.0.1

Clients and gateways run strongSwan. Each gateway has the same address inside, which answers a ping from
the tunnel, and gives its clients inner addresses of its own.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import trio

from tests.net.certificates import Authority
from tests.net.namespaces import Namespace, Wire
from tests.net.strongswan import Charon, IkeSa, Settings

T = TypeVar("T")
SaKind = Literal["ike", "child"]

VIP = "198.18.0.1"
VIP6 = "2001:db8:18::1"
FLOATING = "10.60.0.1"
FLOATING6 = "2001:db8:60::1"
"""The balancer's addresses on the servers' side, which the gateways route to."""
INSIDE = "10.99.0.1"
PATIENCE = 15.0
"""Seconds that every exchange has come to its end in, good or bad."""

GATEWAY_ID = "gateways.lab.test"
IKE_PROPOSAL = "aes128-sha256-x25519"
ESP_PROPOSAL = "aes128gcm16-x25519"
SECRETS = {"ike": {"secret": "a-secret-of-the-lab"}}


@dataclass(frozen=True)
class Connection:
    """A way for a client to connect."""

    name: str
    vip: str = VIP
    auth: str = "psk"
    fragmentation: str = "yes"
    dpd_delay: str = "0s"
    """After this long without traffic the client asks whether its gateway is there; 0 for never."""

    def identity(self, client: str) -> str:
        """The client's name for itself; a gateway sees from it how it will prove that."""
        return f"{client}@{self.auth}.lab.test"

    def settings(self, client: str) -> Settings:
        """The client's section of swanctl.conf."""
        child = {"remote_ts": f"{INSIDE}/32", "dpd_action": "restart", "esp_proposals": ESP_PROPOSAL}
        return {
            "remote_addrs": self.vip,
            "vips": "0.0.0.0",
            "fragmentation": self.fragmentation,
            "dpd_delay": self.dpd_delay,
            "proposals": IKE_PROPOSAL,
            "local": {"auth": self.auth, "id": self.identity(client)},
            "remote": {"auth": self.auth, "id": GATEWAY_ID},
            "children": {self.name: child},
        }


PSK = Connection("psk")
PSK6 = Connection("psk6", vip=VIP6)
CERTIFICATE = Connection("certificate", auth="pubkey")
"""IKE_AUTH in fragments of RFC 7383."""
CERTIFICATE_WHOLE = Connection("certificate-whole", auth="pubkey", fragmentation="no")
"""IKE_AUTH in one datagram, which IP has to fragment."""
WATCHFUL = Connection("watchful", dpd_delay="1s")
"""A tunnel that the client sets up again when its gateway is gone."""
CONNECTIONS = (PSK, PSK6, CERTIFICATE, CERTIFICATE_WHOLE, WATCHFUL)


class Installer:
    """Makes hosts: namespaces, and IKE daemons that each have a folder, a certificate and a configuration.

    Args:
        label: what the names of the namespaces start with, so that two labs do not meet.
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        self._folder = folder
        self._label = label
        self._authority = Authority(folder)

    def namespace(self, name: str) -> Namespace:
        """A new network namespace."""
        return Namespace(self._label + name)

    def charon(self, name: str, namespace: Namespace, identity: str, settings: Settings) -> Charon:
        """A new daemon, not started yet."""
        folder = self._folder / name
        folder.mkdir()
        self._authority.issue(folder, identity)
        return Charon(namespace, folder, settings)


class Gateway:
    """A VPN gateway: its IKE daemon, and an address that only its tunnels lead to."""

    def __init__(self, number: int, wire: Wire, install: Installer) -> None:
        self.name = f"gw{number}"
        self.address = f"10.60.0.{10 + number}"
        self.address6 = f"2001:db8:60::{10 + number}"
        self.namespace = namespace = install.namespace(self.name)
        self._port = wire.attach(namespace, "eth0", f"{self.address}/24", f"{self.address6}/64")
        namespace.ip(
            f"address add {INSIDE}/32 dev lo",
            f"route add default via {FLOATING}",
            f"route add default via {FLOATING6}",
        )
        self.charon = install.charon(self.name, namespace, GATEWAY_ID, _gateway_settings(number))

    async def ping(self, inner: str) -> bool:
        """Whether traffic flows inside the tunnel of the client with that inner address."""
        return await _ping(self.namespace, inner, "-I", INSIDE)

    def crash(self) -> None:
        """End the IKE daemon; the kernel goes on, and says that nobody is there."""
        self.charon.kill()

    def lose_power(self) -> None:
        """End everything, so that nothing is ever answered."""
        self._port.unplug()
        self.charon.kill()

    async def recover(self) -> None:
        """Undo :meth:`crash` and :meth:`lose_power`."""
        self._port.plug()
        if not self.charon.running:
            self.charon.start()
            await self.charon.load()


class Client:
    """A VPN client in a namespace of its own.

    Args:
        addresses: its own, in CIDR notation.
        outer: the address that it has beyond the NAT router, if it is behind one.
    """

    def __init__(
        self, number: int, wire: Wire, addresses: Sequence[str], install: Installer, outer: str = ""
    ) -> None:
        self.name = f"c{number:02}"
        self.outer = outer or addresses[0].partition("/")[0]
        self.namespace = install.namespace(self.name)
        wire.attach(self.namespace, "eth0", *addresses)
        identity = CERTIFICATE.identity(self.name)
        settings: Settings = {
            "connections": {each.name: each.settings(self.name) for each in CONNECTIONS},
            "secrets": SECRETS,
        }
        self.charon = install.charon(self.name, self.namespace, identity, settings)

    async def connect(self, how: Connection = PSK) -> bool:
        """Bring the tunnel up; whether it is."""
        initiate = ["--initiate", "--child", how.name, "--timeout", str(int(PATIENCE))]
        printed = await self.charon.control(*initiate, check=False, patience=PATIENCE + 5)
        up = "initiate completed successfully" in printed
        if not up:
            print(f"{self.name} does not connect:\n{printed}")
        return up

    async def ping(self) -> bool:
        """Whether traffic flows inside the tunnel."""
        return await _ping(self.namespace, INSIDE)

    async def talk(self, seconds: int) -> None:
        """Send something through the tunnel ten times a second, whether it is answered or not."""
        await self.namespace.run("ping", "-q", "-i", "0.1", "-w", str(seconds), INSIDE)

    async def stray(self, port: int) -> None:
        """Send a datagram from nowhere to the balancer: ESP of a tunnel that nobody knows."""
        await self.namespace.run("bash", "-c", f"printf 0123456789abcdef > /dev/udp/{VIP}/{port}")


class NatRouter:
    """A router that many clients share an address of; every flow gets a source port by chance."""

    def __init__(self, number: int, wire: Wire, install: Installer) -> None:
        self.address = f"198.18.0.{200 + number}"
        self._net = f"192.168.{number}"
        self._namespace = install.namespace(f"nat{number}")
        wire.attach(self._namespace, "outside", f"{self.address}/24")
        self.inside = Wire(self._namespace, "inside")
        self._namespace.ip(f"address add {self._net}.1/24 dev inside")
        self._namespace.sysctl("net.ipv4.ip_forward", 1)
        self._namespace.nft(
            "table ip nat { chain out { type nat hook postrouting priority srcnat;"
            " oifname outside masquerade fully-random; }; }"
        )

    def client(self, number: int, install: Installer) -> Client:
        """A new client behind this router."""
        client = Client(number, self.inside, [f"{self._net}.{100 + number}/24"], install, self.address)
        client.namespace.ip(f"route add default via {self._net}.1")
        return client


@dataclass(frozen=True)
class Tunnel:
    """A tunnel that is up, as its ends see it."""

    client: Client
    gateway: Gateway
    near: IkeSa
    """What the client says."""
    far: IkeSa
    """What the gateway says."""

    def spis(self, kind: SaKind) -> frozenset[str]:
        """What changes when it is rekeyed or set up again, and not otherwise."""
        if kind == "ike":
            return frozenset(self.near.spis)
        return frozenset(spi for child in self.near.children for spi in (child.spi_in, child.spi_out))


class Network:
    """The network around the balancer's place, in which there is nothing yet.

    Args:
        label: what the names of the namespaces start with.
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        self.folder = folder
        self.install = install = Installer(folder, label)
        self.wires = install.namespace("wires")
        self.front, self.back = front, back = Wire(self.wires, "front"), Wire(self.wires, "back")
        self.gateways = [Gateway(n, back, install) for n in (1, 2, 3)]
        self.direct = [
            Client(n, front, [f"198.18.0.{100 + n}/24", f"2001:db8:18::{100 + n}/64"], install)
            for n in range(1, 11)
        ]
        routers = [NatRouter(n, front, install) for n in (1, 2)]
        self.behind_nat = [
            [router.client(n, install) for n in range(first, first + 6)]
            for router, first in zip(routers, (11, 17), strict=True)
        ]
        self.clients = [*self.direct, *(client for clients in self.behind_nat for client in clients)]

    @property
    def charons(self) -> Iterator[Charon]:
        """Every IKE daemon."""
        yield from (gateway.charon for gateway in self.gateways)
        yield from (client.charon for client in self.clients)

    def start(self) -> None:
        """Start all IKE daemons."""
        for charon in self.charons:
            charon.start()
        trio.run(together, [charon.load for charon in self.charons])

    async def connect(self, clients: Iterable[Client], how: Connection = PSK) -> list[bool]:
        """Bring tunnels up at the same time; which of them are."""
        return await together(partial(client.connect, how) for client in clients)

    async def tunnels(self) -> dict[str, Tunnel]:
        """The tunnels that are up, by the client's name: one SA, known to both ends, and to one gateway only."""
        near = await together(client.charon.sas for client in self.clients)
        far = await together(gateway.charon.sas for gateway in self.gateways)
        ends = [(gateway, sa) for gateway, sas in zip(self.gateways, far, strict=True) for sa in sas]
        found = [_tunnel(client, sas, ends) for client, sas in zip(self.clients, near, strict=True)]
        return {tunnel.client.name: tunnel for tunnel in found if tunnel}

    async def connects_begun(self) -> int:
        """How many IKE_SA_INIT requests the clients sent so far."""
        return sum(
            await together(partial(client.charon.counter, "ike-init-out-req") for client in self.clients)
        )

    async def reset(self) -> None:
        """End all tunnels, and start the gateways that were killed."""
        await together([gateway.recover for gateway in self.gateways])
        await together([charon.terminate for charon in self.charons])

    def stop(self) -> None:
        """End all IKE daemons."""
        for charon in self.charons:
            charon.kill()


class Lab(Network):
    """The whole network. The balancer's namespace is ``balancer``, and nothing runs in it yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.balancer = self.install.namespace("lb")
        self.front.attach(self.balancer, "front", f"{VIP}/24", f"{VIP6}/64")
        self.back.attach(self.balancer, "back", f"{FLOATING}/24", f"{FLOATING6}/64")

    async def reassembled(self) -> int:
        """How many datagrams the balancer's kernel put together from IP fragments so far."""
        headings, figures = re.findall(
            r"^Ip: (.*)$", (await self.balancer.run("cat", "/proc/net/snmp")).stdout, re.MULTILINE
        )
        return int(dict(zip(headings.split(), figures.split(), strict=True))["ReasmOKs"])


def _tunnel(client: Client, near: list[IkeSa], ends: Iterable[tuple[Gateway, IkeSa]]) -> Tunnel | None:
    match near, [(gateway, far) for gateway, far in ends if far.spi_i in {sa.spi_i for sa in near}]:
        case [sa], [(gateway, far)] if sa.spis == far.spis and sa.established and far.established:
            return Tunnel(client, gateway, sa, far)
    return None


async def _ping(namespace: Namespace, address: str, *options: str) -> bool:
    """Whether one of three echo requests is answered."""
    argv = ["ping", "-q", "-c", "3", "-i", "0.1", "-W", "1", *options, address]
    return (await namespace.run(*argv)).returncode == 0


def _gateway_settings(number: int) -> Settings:
    def connection(auth: str) -> Settings:
        return {
            "pools": "inside",
            "proposals": IKE_PROPOSAL,
            "local": {"auth": auth, "id": GATEWAY_ID},
            "remote": {"auth": auth, "id": f"*@{auth}.lab.test"},
            "children": {auth: {"local_ts": f"{INSIDE}/32", "esp_proposals": ESP_PROPOSAL}},
        }

    return {
        "connections": {auth: connection(auth) for auth in ("psk", "pubkey")},
        "pools": {"inside": {"addrs": f"10.99.{number}.0/24"}},
        "secrets": SECRETS,
    }


async def together(actions: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Do things at the same time; what they returned, in their order."""
    results: dict[int, T] = {}

    async def do(number: int, action: Callable[[], Awaitable[T]]) -> None:
        results[number] = await action()

    async with trio.open_nursery() as nursery:
        for number, action in enumerate(actions):
            nursery.start_soon(do, number, action)
    return [results[number] for number in sorted(results)]
