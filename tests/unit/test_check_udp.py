from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest
import trio
from pydantic import ValidationError

from sapin.core.contracts import CheckResult, HealthCheck, Target
from sapin.core.model import Endpoint, Framing
from sapin.plugins.checks.udp import UdpCheck

LOOPBACK = ip_address("127.0.0.1")


@asynccontextmanager
async def server(answer: bytes | None) -> AsyncIterator[tuple[Target, list[bytes]]]:
    requests: list[bytes] = []

    async def serve(sock: trio.socket.SocketType) -> None:
        while True:
            data, sender = await sock.recvfrom(65_535)
            requests.append(data)
            if answer is not None:
                await sock.sendto(answer, sender)

    with trio.socket.socket(type=socket.SOCK_DGRAM) as sock:
        await sock.bind((str(LOOPBACK), 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, sock)
            yield Target("gw1", Endpoint(LOOPBACK, sock.getsockname()[1]), Framing.OPAQUE), requests
            nursery.cancel_scope.cancel()


async def found(target: Target, **options: object) -> CheckResult:
    with trio.fail_after(5):
        return await UdpCheck(UdpCheck.Config.model_validate(options)).check(target)


@pytest.mark.parametrize("expect", ["01", "01 02 FF", "0? ?2", "0102ff"])
async def test_an_answer_that_begins_as_expected_is_healthy(expect: str) -> None:
    async with server(b"\x01\x02\xff") as (target, requests):
        result = await found(target, send="de AD\nbe ef", expect=expect)
    assert requests == [b"\xde\xad\xbe\xef"]
    assert result.healthy
    assert result.reason == "answered as expected"
    assert result.round_trip is not None
    assert 0 < result.round_trip < 1


@pytest.mark.parametrize(
    ("answer", "expect", "shown"),
    [
        (b"\x01\x02", "0103", "answered 0102, expected 0103"),
        (b"\x01", "01??", "answered 01, expected 01??"),
        (b"", "00", "answered nothing, expected 00"),
        (b"\xaa" * 1000, "ab" * 100, f"answered {'aa' * 16}…, expected {'ab' * 16}"),
    ],
)
async def test_another_answer_is_unhealthy_and_shown(answer: bytes, expect: str, shown: str) -> None:
    async with server(answer) as (target, _):
        result = await found(target, expect=expect)
    assert not result.healthy
    assert result.reason == shown


async def test_silence_fails_an_expectation_by_the_timeout() -> None:
    async with server(None) as (target, requests):
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.2):
            await UdpCheck(UdpCheck.Config(expect="00")).check(target)
    assert len(requests) == 1


async def test_silence_passes_where_nothing_is_expected() -> None:
    async with server(None) as (target, _):
        result = await found(target, wait=0.05)
    assert result == CheckResult(True, "no ICMP error within 0.05 s")


async def test_any_answer_passes_where_nothing_is_expected() -> None:
    async with server(b"?") as (target, _):
        result = await found(target, wait=4)
    assert result.healthy
    assert result.reason == "answered"
    assert result.round_trip is not None


@pytest.mark.parametrize("options", [{"wait": 4}, {"expect": "00"}])
async def test_a_closed_port_is_unhealthy_at_once(options: dict[str, object]) -> None:
    async with server(None) as (target, _):
        pass
    result = await found(target, **options)
    assert not result.healthy
    assert "ICMP port unreachable" in result.reason


@pytest.mark.parametrize(
    "options",
    [
        {"send": "abc"},
        {"send": "zz"},
        {"send": "??"},
        {"send": "00" * 1_401},
        {"expect": ""},
        {"expect": "0"},
        {"expect": "0x00"},
        {"wait": 0},
        {"sned": "00"},
    ],
)
def test_its_options_are_strict(options: dict[str, object]) -> None:
    assert isinstance(UdpCheck(UdpCheck.Config()), HealthCheck)
    with pytest.raises(ValidationError):
        UdpCheck.Config.model_validate(options)
