from __future__ import annotations

from ipaddress import ip_address

import pytest
import trio
from pydantic import ValidationError

from sapin.core.contracts import HealthCheck, Target
from sapin.core.model import Endpoint, Framing
from sapin.plugins.checks.tcp import TcpCheck

LOOPBACK = ip_address("127.0.0.1")


def target(port: int) -> Target:
    return Target("gw1", Endpoint(LOOPBACK, port), Framing.OPAQUE)


async def listener() -> tuple[trio.SocketListener, int]:
    (listening,) = await trio.open_tcp_listeners(0, host=str(LOOPBACK))
    return listening, listening.socket.getsockname()[1]


async def test_an_accepting_port_is_healthy() -> None:
    listening, port = await listener()
    async with listening:
        with trio.fail_after(5):
            result = await TcpCheck(TcpCheck.Config()).check(target(port))
    assert result.healthy
    assert result.reason == f"TCP port {port} accepts connections"
    assert result.round_trip is not None
    assert 0 < result.round_trip < 1


async def test_the_port_option_wins() -> None:
    listening, port = await listener()
    async with listening:
        with trio.fail_after(5):
            result = await TcpCheck(TcpCheck.Config(port=port)).check(target(1))
    assert result.healthy


async def test_a_refusing_port_is_unhealthy() -> None:
    listening, port = await listener()
    await listening.aclose()
    with trio.fail_after(5):
        result = await TcpCheck(TcpCheck.Config()).check(target(port))
    assert not result.healthy
    assert result.reason == f"TCP port {port} refuses connections"
    assert result.round_trip is None


async def test_a_full_backlog_waits_for_the_timeout() -> None:
    """A host that drops the handshake looks like this."""
    with trio.socket.socket() as sock:
        await sock.bind((str(LOOPBACK), 0))
        sock.listen(0)
        port = sock.getsockname()[1]
        async with await trio.open_tcp_stream(str(LOOPBACK), port):
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.2):
                await TcpCheck(TcpCheck.Config()).check(target(port))


def test_its_options_are_strict() -> None:
    assert isinstance(TcpCheck(TcpCheck.Config()), HealthCheck)
    for options in ({"port": 0}, {"port": 65_536}, {"prot": 80}):
        with pytest.raises(ValidationError):
            TcpCheck.Config.model_validate(options)
