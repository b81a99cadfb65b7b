"""Sapin between real strongSwan clients and gateways.

Twenty-two clients, twelve of them behind two NAT routers, and three gateways. Each test starts Sapin with a
configuration of its own, and asks the gateways, which know best, who is where.
"""

from __future__ import annotations

import pytest

from tests.net.balancer import Balancer
from tests.net.lab import Lab, together

pytestmark = [
    pytest.mark.net,
    pytest.mark.slow,
    pytest.mark.root("network namespaces and TUN devices"),
    pytest.mark.programs(
        "charon-systemd", "swanctl", "ip", "nft", "ping", "openssl", "nsenter", "setpriv", "sysctl", "bash"
    ),
]


@pytest.mark.parametrize("persistence", ["source-address", "ike-spi"])
async def test_every_tunnel_is_on_one_gateway(lab: Lab, persistence: str):
    async with Balancer(lab, persistence=persistence) as sapin:
        assert all(await lab.connect(lab.clients))
        tunnels = await lab.tunnels()
        assert set(tunnels) == {client.name for client in lab.clients}
        assert all(await together(client.ping for client in lab.clients))
        for client in lab.direct:
            gateway = tunnels[client.name].gateway.name
            assert await sapin.flows(client.outer) == {("ike", gateway), ("ike-natt", gateway)}
