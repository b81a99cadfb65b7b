"""The control socket against whatever may be sent to it."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from sapin.api import client, control
from sapin.api.refused import Refused
from sapin.core.writer import UnknownObject


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: the path of a Unix socket is bounded."""
    with TemporaryDirectory(prefix="sapin-") as name:
        yield Path(name)


def echo(text: str, times: int = 1) -> str:
    return text * times


async def slowly(text: str) -> str:
    await trio.lowlevel.checkpoint()
    return text


def refuse() -> None:
    raise Refused("not today")


def miss() -> None:
    raise UnknownObject("there is no such thing")


def fail() -> None:
    raise RuntimeError("a bug")


CALLS: Mapping[str, Callable[..., Any]] = {
    "echo": echo,
    "slowly": slowly,
    "refuse": refuse,
    "miss": miss,
    "fail": fail,
}


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve, folder, CALLS)
        yield
        nursery.cancel_scope.cancel()


async def ask(folder: Path, name: str, **arguments: Any) -> Any:
    return await trio.to_thread.run_sync(lambda: client.call(folder, name, **arguments))


async def send(folder: Path, request: bytes) -> Any:
    """What comes back for raw bytes: the answer, or nothing if the connection just ends."""
    stream = await trio.open_unix_socket(str(client.socket_path(folder)))
    async with stream:
        await stream.send_all(request)
        await stream.send_eof()
        received = b"".join([chunk async for chunk in stream])
    return json.loads(received) if received else None


async def send_without_end(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b"x" * 100_000)


async def test_it_answers(folder: Path) -> None:
    async with serving(folder):
        assert await ask(folder, "echo", text="ab", times=2) == "abab"
        assert await ask(folder, "slowly", text="x") == "x"


async def test_only_the_owner_can_open_it(folder: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(folder):
            mode = client.socket_path(folder).stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            assert os.umask(0) == 0, "the umask of the process is as it was"
    finally:
        os.umask(before)


async def test_it_takes_the_place_of_one_that_was_left_behind(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(client.socket_path(folder)))
    async with serving(folder):
        assert await ask(folder, "echo", text="a") == "a"
    assert not client.socket_path(folder).exists()


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        ("refuse", "refused", "not today"),
        ("miss", "unknown", "there is no such thing"),
        ("fail", "fault", "a bug"),
        ("nonsense", "unknown", "there is no operation 'nonsense'"),
    ],
)
async def test_each_failure_has_its_kind(folder: Path, call: str, kind: str, says: str) -> None:
    async with serving(folder):
        with pytest.raises(client.ControlError, match=says) as caught:
            await ask(folder, call)
        assert caught.value.kind == kind
        assert await ask(folder, "echo", text="still here") == "still here"


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\n",
        b"\x00\xff\xfe\n",
        b"{\n",
        b"null\n",
        b"[]\n",
        b'"echo"\n',
        b'{"arguments": {}}\n',
        b'{"call": 1}\n',
        b'{"call": ["echo"]}\n',
        b'{"call": "echo", "arguments": []}\n',
        b'{"call": "echo", "arguments": {}}\n',
        b'{"call": "echo", "arguments": {"text": 1}}\n',
        b'{"call": "echo", "arguments": {"text": "a", "times": "2"}}\n',
        b'{"call": "echo", "arguments": {"text": "a", "times": true}}\n',
        b'{"call": "echo", "arguments": {"text": "a", "more": 1}}\n',
        b'{"call": "echo", "arguments": {"text": "a"}, "more": 1}\n',
        b'{"call": "echo", "arguments": {"text": "a", "times": ' + b"9" * 5000 + b"}}\n",
        b"[" * 60_000 + b"\n",
        b'{"call": "echo"}\n{"call": "echo"}\n',
    ],
)
async def test_what_makes_no_sense_is_told_so(folder: Path, request_: bytes) -> None:
    async with serving(folder):
        answer = await send(folder, request_)
        assert answer["kind"] == "malformed"
        assert len(json.dumps(answer)) < 2000
        assert await ask(folder, "echo", text="still here") == "still here"


async def test_a_request_has_a_bound(folder: Path) -> None:
    async with serving(folder):
        with pytest.raises(client.ControlError, match="at most 65536 bytes"):
            await ask(folder, "echo", text="x" * control.MAX_REQUEST)


async def test_who_sends_without_end_is_cut_off(folder: Path) -> None:
    async with serving(folder):
        stream = await trio.open_unix_socket(str(client.socket_path(folder)))
        async with stream:
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(5):
                await send_without_end(stream)
        assert await ask(folder, "echo", text="still here") == "still here"


async def test_who_is_slow_is_cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "DEADLINE", 0.1)
    async with serving(folder):
        stream = await trio.open_unix_socket(str(client.socket_path(folder)))
        async with stream:
            await stream.send_all(b'{"call":')
            with trio.fail_after(5):
                assert await stream.receive_some() == b""


async def test_who_goes_away_is_let_go(folder: Path) -> None:
    async with serving(folder):
        for _ in range(3 * control.MAX_CONNECTIONS):
            stream = await trio.open_unix_socket(str(client.socket_path(folder)))
            await stream.send_all(b'{"call": "slowly", "arguments": {"text": "a"}}\n')
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert await ask(folder, "echo", text="still here") == "still here"


async def test_connections_have_a_bound(folder: Path) -> None:
    async with serving(folder):
        held = [
            await trio.open_unix_socket(str(client.socket_path(folder)))
            for _ in range(control.MAX_CONNECTIONS)
        ]
        await answers(folder, "busy")
        await held.pop().aclose()
        await answers(folder, None)
        for stream in held:
            await stream.aclose()


async def answers(folder: Path, kind: str | None) -> None:
    """Ask until the failure is of that kind, or there is none."""
    with trio.fail_after(5):
        while True:
            try:
                await ask(folder, "echo", text="a")
                found = None
            except client.ControlError as error:
                found = error.kind
            if found == kind:
                return
            await trio.sleep(0.01)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["call", "arguments", "x"]), inner)
    ),
    max_leaves=9,
)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_it_raise(line: bytes) -> None:
    answer = trio.run(control._answer, line, {"echo": control.validate_call(echo)})
    assert "result" in answer or answer["kind"] in ("malformed", "unknown")


def test_without_a_daemon_the_remedy_is_told(folder: Path) -> None:
    with pytest.raises(client.ControlError, match="start `sapin run`") as caught:
        client.call(folder, "status")
    assert caught.value.kind == "down"
    with pytest.raises(client.ControlError) as caught:
        client.call(folder / "not" / "there", "status")
    assert caught.value.kind == "down"


@pytest.mark.parametrize("says", [b"", b"{}", b"rubbish\n", b"\xff\n"])
def test_what_is_no_daemon_is_told_apart(folder: Path, says: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(client.socket_path(folder)))
        listener.listen()
        listener.setblocking(False)

        async def pretend() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                with pytest.raises(client.ControlError, match="does not answer") as caught:
                    await ask(folder, "status")
                assert caught.value.kind == "silent"

        async def answer() -> None:
            await trio.lowlevel.wait_readable(listener)
            connection, _ = listener.accept()
            with connection:
                await trio.lowlevel.wait_readable(connection)
                connection.recv(10_000)
                connection.sendall(says)

        trio.run(pretend)
