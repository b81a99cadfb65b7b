from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from socket import SO_LINGER, SOL_SOCKET

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sapin.core.contracts import CheckResult, HealthCheck, Target
from sapin.core.model import AdminState, Endpoint, Framing
from sapin.plugins.checks.agent import AgentCheck, Word, parse

Handler = Callable[[trio.SocketStream], Awaitable[None]]
TARGET = Target("gw1", Endpoint(ip_address("127.0.0.1"), 500), Framing.IKE)


@asynccontextmanager
async def agent(handler: Handler) -> AsyncIterator[int]:
    """An agent on loopback; its port."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await handler(stream)

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def says(line: bytes) -> Handler:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(line)

    return handler


async def found(port: int, **options: object) -> CheckResult:
    with trio.fail_after(5):
        return await AgentCheck(AgentCheck.Config.model_validate({"port": port, **options})).check(TARGET)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("75%", Word(share=75)),
        ("0%", Word(share=0)),
        ("150%", Word(share=150)),
        ("up", Word(healthy=True)),
        ("UP 50% ready", Word(True, 50, AdminState.ENABLED)),
        ("drain", Word(state=AdminState.DRAINING)),
        ("maint", Word(state=AdminState.DISABLED)),
        ("down", Word(False)),
        ("fail#disk full", Word(False, reason="disk full")),
        ("stopped # for lunch, back soon", Word(False, reason="for lunch, back soon")),
        ("up,\t30% , maxconn:10", Word(True, 30)),
        ("10% 20%", Word(share=20)),
    ],
)
def test_the_words(line: str, expected: Word) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "",
        "   ",
        "#only a reason",
        "hello",
        "up 5",
        "%",
        "-5%",
        "1000%",
        "\N{ARABIC-INDIC DIGIT FIVE}%",
        "maxconn:",
    ],
)
def test_nonsense_is_none(line: str) -> None:
    assert parse(line) is None


@given(st.text())
def test_any_text_is_understood_or_none(line: str) -> None:
    word = parse(line)
    assert word is None or word.share is None or 0 <= word.share < 1000


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"", b"\nsecond line\n"])
async def test_a_line_is_a_result(end: bytes) -> None:
    async with agent(says(b"up 75% drain#backup" + end)) as port:
        result = await found(port)
    assert (result.healthy, result.reason) == (True, "backup")
    assert (result.share, result.state) == (75, AdminState.DRAINING)
    assert result.round_trip is not None


async def test_down_is_unhealthy() -> None:
    async with agent(says(b"down\n")) as port:
        result = await found(port)
    assert (result.healthy, result.reason, result.state) == (False, "the agent says 'down'", None)


async def test_a_share_alone_is_healthy() -> None:
    async with agent(says(b"40%\n")) as port:
        result = await found(port)
    assert (result.healthy, result.share, result.state) == (True, 40, None)


async def test_the_line_may_come_in_pieces_and_the_connection_stay_open() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        for piece in (b"\n3", b"3", b"%", b"\n"):
            await stream.send_all(piece)
            await trio.sleep(0.01)
        await trio.sleep_forever()

    async with agent(handler) as port:
        assert (await found(port)).share == 33


async def test_the_agent_is_asked_what_is_configured() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        asked = await stream.receive_some(100)
        await stream.send_all(b"60%\n" if asked == b"load gw1\n" else b"0%\n")

    async with agent(handler) as port:
        assert (await found(port, send="load gw1\n")).share == 60


async def _silence(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def _reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))


async def _endless(stream: trio.SocketStream) -> None:
    try:
        while True:
            await stream.send_all(b"7" * 1000)
    except trio.BrokenResourceError:
        pass


@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        (_silence, "within 0.1 s"),
        (_reset, "no word from the agent"),
        (_endless, "nonsense: '777"),
        (says(b""), "nonsense: ''"),
        (says(b"\x00\xff\x1b[2J\n"), "nonsense"),
    ],
)
@pytest.mark.parametrize("required", [False, True])
async def test_an_agent_without_sense_counts_only_if_required(
    handler: Handler, reason: str, required: bool
) -> None:
    async with agent(handler) as port:
        result = await found(port, required=required, wait=0.1)
    assert result.healthy is not required
    assert reason in result.reason
    assert result.reason.isprintable()
    assert len(result.reason) < 250
    assert (result.share, result.state) == (None, None)


@pytest.mark.parametrize("required", [False, True])
async def test_a_refused_connection_counts_only_if_required(required: bool) -> None:
    async with agent(_silence) as port:
        pass
    result = await found(port, required=required)
    assert result.healthy is not required
    assert "refused" in result.reason


@pytest.mark.parametrize("options", [{}, {"port": 0}, {"port": 1, "wait": 0}, {"port": 1, "sent": ""}])
def test_its_options_are_strict(options: dict[str, object]) -> None:
    assert isinstance(AgentCheck(AgentCheck.Config(port=1)), HealthCheck)
    with pytest.raises(ValidationError):
        AgentCheck.Config.model_validate(options)
