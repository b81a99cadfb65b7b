"""Where the demonstration plays: addresses, ports, the configuration, and how fast it goes."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from sapin.core.model import Endpoint, Framing

IKE_PORT, NATT_PORT = 10_500, 14_500
"""Stand for 500 and 4500, which need privilege."""
GATEWAYS = 3


@dataclass(frozen=True, slots=True)
class Network:
    """A network of loopback addresses, 127.x.0.0/16, for the balancer, its gateways and their clients."""

    number: int

    @property
    def balancer(self) -> IPv4Address:
        """The virtual address."""
        return self._address(0, 1)

    def gateway(self, number: int) -> IPv4Address:
        """The address of a gateway, counted from 1."""
        return self._address(1, number)

    def client(self, number: int) -> IPv4Address:
        """The address of a client, counted from 0."""
        return self._address(10 + number // 200, 1 + number % 200)

    def virtual(self, framing: Framing) -> Endpoint:
        """Where clients send what is framed so."""
        return Endpoint(self.balancer, port(framing))

    def _address(self, third: int, fourth: int) -> IPv4Address:
        return IPv4Address(bytes((127, self.number, third, fourth)))


def port(framing: Framing) -> int:
    """The port for what is framed so, on the balancer and on the gateways alike."""
    return NATT_PORT if framing is Framing.NATT else IKE_PORT


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast things happen; all in seconds."""

    think: tuple[float, float]
    """Between a client's two exchanges, for key exchange and credentials."""
    esp: float
    """Between two datagrams in a tunnel."""
    patience: float
    """Of a client whose tunnel is silent. Real ones wait for longer; nobody would watch that."""
    check: float
    """Between two health checks of a gateway."""
    pause: float
    """To read what was shown."""


CALM = Pace(think=(0.3, 1.8), esp=0.8, patience=2.4, check=0.5, pause=2.5)
FAST = Pace(think=(0.0, 0.2), esp=0.2, patience=0.8, check=0.1, pause=0.0)


def configuration(network: Network, state_dir: Path, check: float, *, follows: bool, persistence: str) -> str:
    """What Sapin is to do: with following, or as two services that know nothing of each other."""
    servers = ", ".join(
        f'{{ name = "gw{n}", address = "{network.gateway(n)}" }}' for n in range(1, GATEWAYS + 1)
    )
    own = f"""
scheduler = "round-robin"
persistence = "{persistence}"
checks = [{{ plugin = "ike", interval = {check}, timeout = {max(0.5, check)}, rise = 2, fall = 2 }}]
real_servers = [{servers}]
"""
    following = f"""
follows = "ike"
following = {{ plugin = "port", port = {NATT_PORT} }}
"""
    return f"""
[node]
name = "demo"
state_dir = "{state_dir}"
max_flows = 1000
max_pins = 1000
receive_buffer = "64KiB"

[[virtual_services]]
name = "ike"
address = "{network.balancer}"
port = {IKE_PORT}
framing = "ike"
{own}
[[virtual_services]]
name = "ike-natt"
address = "{network.balancer}"
port = {NATT_PORT}
framing = "ike-natt"
{following if follows else own}
"""
