from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address

import pytest
import trio
from pydantic import ValidationError

from sapin.core import ike
from sapin.core.contracts import CheckResult, HealthCheck, Target
from sapin.core.ike import Group, Header, Notify, Payload
from sapin.core.model import Endpoint, Framing
from sapin.plugins.checks.ike import IkeCheck

Answers = Callable[[bytes], list[bytes]]
"""What a gateway sends for a request, both without a marker."""


def check(**options: object) -> IkeCheck:
    return IkeCheck(IkeCheck.Config.model_validate(options))


def sa(request: bytes) -> bytes:
    return ike.ike_sa_init_response(request[:8], b"gateway1", bytes(32), bytes(256))


def refusal(kind: int, data: bytes, request: bytes) -> bytes:
    return ike.message(Header(request[:8], flags=ike.FLAG_RESPONSE), [ike.notify(kind, data)])


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@asynccontextmanager
async def gateway(
    answers: Answers, *, host: str = "127.0.0.1", framing: Framing = Framing.IKE
) -> AsyncIterator[tuple[Target, list[bytes]]]:
    """A UDP responder on loopback: where it is, and the requests that it got."""
    requests: list[bytes] = []
    marker = ike.NON_ESP_MARKER if framing is Framing.NATT else b""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET

    async def serve(sock: trio.socket.SocketType) -> None:
        while True:
            data, sender = await sock.recvfrom(65_535)
            requests.append(data)
            for answer in answers(data[len(marker) :]):
                await sock.sendto(answer if answer.startswith(b"raw") else marker + answer, sender)

    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock:
        await sock.bind((host, 0))
        endpoint = Endpoint(ip_address(host), sock.getsockname()[1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, sock)
            yield Target("gw1", endpoint, framing), requests
            nursery.cancel_scope.cancel()


async def found(probe: IkeCheck, target: Target) -> CheckResult:
    with trio.fail_after(5):
        return await probe.check(target)


def test_it_is_a_health_check() -> None:
    assert isinstance(check(), HealthCheck)


def test_its_options_are_strict() -> None:
    for options in ({"group": "MODP768"}, {"retransmit": 0}, {"half_open": True}):
        with pytest.raises(ValidationError):
            check(**options)


@pytest.mark.parametrize("framing", [Framing.IKE, Framing.NATT, Framing.OPAQUE])
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="needs IPv6")),
    ],
)
async def test_an_answer_is_healthy_and_timed(host: str, framing: Framing) -> None:
    async with gateway(lambda request: [sa(request)], host=host, framing=framing) as (target, requests):
        result = await found(check(), target)
    assert result.healthy
    assert result.reason == "SA"
    assert result.round_trip is not None
    assert 0 < result.round_trip < 1
    expected = Framing.NATT if framing is Framing.NATT else Framing.IKE
    assert ike.spis(requests[0], expected) is not None


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        (Notify.COOKIE, bytes(20), "COOKIE"),
        (Notify.NO_PROPOSAL_CHOSEN, b"", "NO_PROPOSAL_CHOSEN"),
        (Notify.INVALID_KE_PAYLOAD, b"\0\x02", "INVALID_KE_PAYLOAD, it wants MODP1024"),
        (Notify.INVALID_KE_PAYLOAD, b"\0\x63", "INVALID_KE_PAYLOAD, it wants group 99"),
        (Notify.AUTHENTICATION_FAILED, b"", "AUTHENTICATION_FAILED"),
        (12_345, b"", "notification 12345"),
    ],
)
async def test_the_reason_names_the_answer(kind: int, data: bytes, reason: str) -> None:
    answer = partial(refusal, kind, data)
    async with gateway(lambda request: [answer(request)]) as (target, _):
        result = await found(check(), target)
    assert result.healthy
    assert result.reason == reason


async def test_what_is_not_ours_is_ignored() -> None:
    def answers(request: bytes) -> list[bytes]:
        stranger = ike.ike_sa_init_response(b"stranger", b"gateway1", bytes(32), bytes(256))
        garbage = b"raw garbage that is longer than an IKE header"
        return [b"", garbage, request, stranger, sa(request)[:-1], sa(request)]

    async with gateway(answers, framing=Framing.NATT) as (target, _):
        result = await found(check(), target)
    assert result.healthy
    assert result.reason == "SA"


@pytest.mark.parametrize("answers", [lambda _: [], lambda request: [request, b"raw nonsense"]])
async def test_silence_and_nonsense_wait_for_the_timeout(answers: Answers) -> None:
    async with gateway(answers) as (target, requests):
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.3):
            await check(retransmit=0.05).check(target)
    assert len(requests) == 2
    assert requests[0] == requests[1]


async def test_a_lost_request_is_sent_once_more() -> None:
    seen: list[bytes] = []

    def answers(request: bytes) -> list[bytes]:
        seen.append(request)
        return [sa(request)] if len(seen) == 2 else []

    async with gateway(answers) as (target, _):
        result = await found(check(retransmit=0.1), target)
    assert result.healthy
    assert result.round_trip is not None
    assert result.round_trip >= 0.1


async def test_an_icmp_error_is_unhealthy_at_once() -> None:
    async with gateway(lambda _: []) as (target, _):
        pass
    result = await found(check(retransmit=4), target)
    assert not result.healthy
    assert f"UDP port {target.endpoint.port} is closed" in result.reason


async def test_each_request_is_fresh_and_leaves_nothing_half_open() -> None:
    async with gateway(lambda request: [sa(request)]) as (target, requests):
        probe = check()
        for _ in range(5):
            await found(probe, target)
    assert len({request[:8] for request in requests}) == 5
    bodies = [dict(ike.payloads(request)) for request in requests]
    assert len({body[Payload.NONCE] for body in bodies}) == 5
    assert {body[Payload.KE][:2] for body in bodies} == {Group.MODP768.to_bytes(2, "big")}


async def test_a_group_asks_for_an_sa() -> None:
    async with gateway(lambda request: [sa(request)]) as (target, requests):
        await found(check(group="MODP2048"), target)
    body = dict(ike.payloads(requests[0]))
    assert body[Payload.KE][:4] == bytes([0, 14, 0, 0])
    assert body[Payload.SA].count(b"\x04\x00\x00\x0e") == 2
    assert b"\x04\x00\x00\x01" not in body[Payload.SA]
