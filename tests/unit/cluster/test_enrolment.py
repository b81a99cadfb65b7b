"""A second node comes to the cluster, once, and leaves it; over real TLS on loopback."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sapin.cluster import certificates, enrolment, tokens
from sapin.cluster.enrolment import join, say_goodbye, serve_enrolment
from sapin.cluster.membership import Folder, Member, Membership, parse_member
from sapin.cluster.tokens import EnrolmentError, Token, forget, found, issue_token, token_expires

NETWORK = f"127.{140 + os.getpid() % 100}"
_ports = count(10_000 + os.getpid() % 9_000, 2)


class Clock:
    """The wall clock, and what it is wrong by."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class First:
    """The node that made the cluster."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.path = path
        self.folder = Folder(path / "a")
        self.port = next(_ports)
        self.own = parse_member("lb-a", [f"{NETWORK}.0.1"], self.port)
        found(self.folder, self.own, self.clock(), os.urandom)
        self.changes: list[Membership] = []

    def token(self) -> Token:
        return Token.decode(issue_token(self.folder, self.clock(), os.urandom))

    def second(self, name: str = "lb-b", link: str = f"{NETWORK}.0.2") -> Member:
        return parse_member(name, [link], self.port)

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_enrolment, self.folder, self.clock, self.changes.append)
            yield
            nursery.cancel_scope.cancel()

    async def join(self, token: Token, name: str = "lb-b", link: str = f"{NETWORK}.0.2") -> Folder:
        folder = Folder(self.path / name)
        await join(folder, self.second(name, link), token, self.clock)
        return folder

    async def refuses(
        self, token: Token, match: str, name: str = "lb-b", link: str = f"{NETWORK}.0.2"
    ) -> None:
        with pytest.raises(EnrolmentError, match=match):
            await self.join(token, name, link)
        assert not Folder(self.path / name).is_member()


@pytest.fixture
def first(tmp_path: Path) -> First:
    return First(tmp_path)


async def test_a_second_node_joins(first: First) -> None:
    async with first.answering():
        folder = await first.join(first.token())
    mine, theirs = first.folder.membership(), folder.membership()
    assert (mine.node, theirs.node) == ("lb-a", "lb-b")
    assert mine.members == theirs.members
    assert mine.cluster == theirs.cluster
    assert theirs.peer == first.own
    assert mine.peer == first.second()
    assert folder.secret() == first.folder.secret()
    own = folder.credentials()
    certificates.check(own.certificate, first.folder.read("ca.crt"), time.time())
    assert certificates.common_name(own.certificate) == "lb-b"
    assert not certificates.repair(folder)
    assert certificates.renew(folder, time.time(), force=True)
    assert first.changes == [mine]


async def test_a_token_is_used_once(first: First) -> None:
    token = first.token()
    async with first.answering():
        await first.join(token)
        await first.refuses(token, "no token waits", name="lb-c")
        forget(first.folder, "lb-b")
        await first.refuses(token, "no token waits", name="lb-c")


async def test_of_two_that_come_at_once_one_gets_in(first: First) -> None:
    token = first.token()
    came: list[Folder | str] = []

    async def come(name: str, link: str) -> None:
        try:
            came.append(await first.join(token, name, link))
        except EnrolmentError as error:
            came.append(str(error))

    async with first.answering(), trio.open_nursery() as nursery:
        nursery.start_soon(come, "lb-b", f"{NETWORK}.0.2")
        nursery.start_soon(come, "lb-c", f"{NETWORK}.0.3")
        while len(came) < 2:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert sorted(type(each).__name__ for each in came) == ["Folder", "str"]


async def test_a_token_ends_after_an_hour(first: First) -> None:
    token = first.token()
    assert token_expires(first.folder) == pytest.approx(time.time() + 3_600, abs=5)
    first.clock.ahead = 3_601
    async with first.answering():
        await first.refuses(token, "has expired")
    assert token_expires(first.folder) is None


async def test_a_newer_token_voids_the_older(first: First, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "FAILURE_PAUSE", 0.01)
    old, new = first.token(), first.token()
    async with first.answering():
        await first.refuses(old, "not the one that was issued last")
        await first.join(new)


async def test_guessing_is_slow_and_ends(first: First, monkeypatch: pytest.MonkeyPatch) -> None:
    token = first.token()
    wrong = token.model_copy(update={"secret": "x" * 32})
    async with first.answering():
        began = trio.current_time()
        await first.refuses(wrong, "not the one")
        assert trio.current_time() - began >= 1.0
        monkeypatch.setattr(enrolment, "FAILURE_PAUSE", 0.0)
        for _ in range(tokens.MAX_FAILURES - 2):
            await first.refuses(wrong, "not the one")
        await first.refuses(wrong, "void after too many")
        await first.refuses(token, "no token waits")


async def test_nothing_is_sent_to_a_cluster_that_did_not_issue_the_token(
    first: First, tmp_path: Path
) -> None:
    token = first.token()
    other = First(tmp_path / "other")
    false = token.model_copy(update={"port": other.port + 1})
    with capture_logs() as lines:
        async with other.answering():
            await first.refuses(false, "nothing was sent to it")
    assert lines == []


async def test_a_ca_that_is_shown_without_a_certificate_of_it(
    first: First, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CA's certificate is no secret: who shows it must hold a certificate that it issued."""
    token = first.token()
    other = First(tmp_path / "other")
    false = token.model_copy(update={"port": other.port + 1})
    other.folder.write("ca.crt", first.folder.read("ca.crt"))
    async with other.answering():
        await first.refuses(false, "not one of this cluster's CA")


async def test_where_nobody_answers(first: First) -> None:
    await first.refuses(first.token(), "does not answer .*refused.*is the daemon there running")


@pytest.mark.parametrize(
    ("name", "link", "match"),
    [
        ("LB-A", f"{NETWORK}.0.2", "called lb-a already"),
        ("lb-b", f"{NETWORK}.0.1", "is an address of this node"),
    ],
)
async def test_a_second_node_is_another(first: First, name: str, link: str, match: str) -> None:
    token = first.token()
    async with first.answering():
        await first.refuses(token, match, name, link)
        await first.join(token)  # a mistake does not cost the token


async def test_a_member_joins_nothing_and_makes_nothing(first: First) -> None:
    with pytest.raises(EnrolmentError, match="belongs to a cluster already"):
        await join(first.folder, first.own, first.token(), first.clock)
    with pytest.raises(EnrolmentError, match="belongs to a cluster already"):
        found(first.folder, first.own, 0.0, os.urandom)


async def test_a_full_cluster_issues_no_token(first: First) -> None:
    async with first.answering():
        await first.join(first.token())
    with pytest.raises(EnrolmentError, match="two nodes: `sapin cluster leave` on lb-b"):
        first.token()


async def test_a_member_leaves(first: First) -> None:
    async with first.answering():
        folder = await first.join(first.token())
        await say_goodbye(folder, first.clock)
        assert first.folder.membership().peer is None
        assert first.changes[-1].peer is None
        with pytest.raises(EnrolmentError, match="lb-b is not the other node"):
            await say_goodbye(folder, first.clock)
        again = await first.join(first.token(), "lb-c", f"{NETWORK}.0.3")
        assert again.membership().peer == first.own


async def test_who_shows_no_certificate_does_not_leave_for_another(first: First) -> None:
    async with first.answering():
        await first.join(first.token())
        answer = await talk(first, b'{"leave": true}\n')
    assert json.loads(answer)["error"] == "only a member can leave, and it shows its certificate"
    assert first.folder.membership().peer is not None


async def talk(first: First, line: bytes) -> bytes:
    """What is answered to a line, after the greeting."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with trio.fail_after(15):
        plain = await trio.open_tcp_stream(str(first.own.links[0]), first.port + 1)
        async with plain:
            stream = trio.SSLStream(plain, context, https_compatible=True)
            received = b""
            try:
                await stream.send_all(line)
                async for chunk in stream:
                    received += chunk
            except trio.BrokenResourceError:
                pass
            return received.partition(b"\n")[2]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"[]\n",
        b"null\n",
        b"{}\n",
        b'{"leave": 1}\n',
        b'{"secret": 3}\n',
        b"\xff\xfe\n",
        b"[" * 20_000 + b"\n",
        b'{"secret": "'
        + b"x" * 100
        + b'", "member": {"name": "lb-b", "links": ["127.0.0.1"]}, "request": ""}\n',
    ],
)
async def test_nonsense_is_answered_with_an_error(first: First, line: bytes) -> None:
    token = first.token()
    async with first.answering():
        assert "makes no sense" in json.loads(await talk(first, line))["error"]
        await first.join(token)


async def test_strangers_do_not_keep_the_second_node_out(
    first: First, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "DEADLINE", 1.0)
    token = first.token()
    async with first.answering():
        assert await talk(first, b"x" * 100_000) == b""  # too long a line
        plain = []
        for _ in range(enrolment.MAX_CONNECTIONS + 3):
            plain.append(await trio.open_tcp_stream(str(first.own.links[0]), first.port + 1))
            await plain[-1].send_all(b"GET / HTTP/1.1\r\n" if len(plain) % 2 else b"\x16")
        await trio.sleep(1.5)
        await first.join(token)
        for stream in plain:
            await trio.aclose_forcefully(stream)


async def test_no_secret_is_logged_or_shown(first: First) -> None:
    token = first.token()
    with capture_logs() as lines:
        async with first.answering():
            await first.join(token)
    assert len(lines) == 1
    assert token.secret not in repr((lines, token))
    assert token.secret not in first.folder.path.joinpath("members.json").read_text()
    first = First(first.path / "again")
    token = first.token()
    assert token.secret.encode() not in first.folder.read("pending.json")


def test_a_token_survives_being_wrapped_by_a_terminal(first: First) -> None:
    text = issue_token(first.folder, first.clock(), os.urandom)
    wrapped = "\n  ".join(text[at : at + 40] for at in range(0, len(text), 40))
    assert Token.decode(wrapped) == Token.decode(text)


@given(st.one_of(st.text(max_size=200), st.binary(max_size=100).map(lambda data: data.hex())))
def test_what_is_no_token_is_told(text: str) -> None:
    with pytest.raises(EnrolmentError, match="this is no token"):
        Token.decode(text)
