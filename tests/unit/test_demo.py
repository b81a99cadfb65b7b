"""The demonstration: its gateway answers as one should, and the whole of it comes out as it says."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from sapin.api.demo import USUAL, find_network
from sapin.api.demo.client import Client, State
from sapin.api.demo.gateway import MAX_SAS, Gateway
from sapin.api.demo.stage import FAST, GATEWAYS, IKE_PORT, Network, configuration
from sapin.core import ike
from sapin.core.config import parse
from sapin.core.ike import Answer, Exchange, Group, Header, Notify, Payload
from sapin.core.model import Framing
from sapin.core.registry import Registry

NETWORK = Network(228)
SPI = bytes(range(1, 9))
PATIENCE = 120


def gateway() -> Gateway:
    return Gateway(2, NETWORK.gateway(2), Random(1))


def init(spi: bytes = SPI, group: Group = Group.MODP2048) -> bytes:
    return ike.ike_sa_init(spi, bytes(32), bytes(ike.KE_LENGTH[group]), group=group)


def auth(spi_r: bytes, spi: bytes = SPI) -> bytes:
    header = Header(spi, spi_r, exchange=Exchange.IKE_AUTH, message_id=1)
    return ike.NON_ESP_MARKER + ike.message(header, [(Payload.ENCRYPTED, bytes(100))])


def begun(at: Gateway, spi: bytes = SPI) -> bytes:
    """The responder's SPI of a new SA."""
    answer = at.answer(init(spi), Framing.IKE)
    assert answer is not None
    assert ike.classify_answer(spi, answer) is Answer.SA
    header = ike.parse_header(answer)
    assert header is not None
    return header.spi_r


def test_an_sa_begins_on_either_port() -> None:
    at = gateway()
    assert begun(at)[0] == at.number
    framed = at.answer(ike.NON_ESP_MARKER + init(), Framing.NATT)
    assert framed is not None
    assert ike.classify_answer(SPI, framed[4:]) is Answer.SA


def test_another_group_is_refused_as_the_health_check_expects() -> None:
    answer = gateway().answer(init(group=Group.CURVE25519), Framing.IKE)
    assert answer is not None
    assert ike.classify_answer(SPI, answer) is Answer.INVALID_KE_PAYLOAD


def test_authentication_gives_an_spi_whose_esp_comes_back() -> None:
    at = gateway()
    answer = at.answer(auth(begun(at)), Framing.NATT)
    assert answer is not None
    header = ike.parse_header(answer, 4)
    assert header is not None
    assert (header.response, header.exchange, header.message_id) == (True, Exchange.IKE_AUTH, 1)
    esp = next(body[:4] for kind, body in ike.payloads(answer[4:]) if kind == Payload.ENCRYPTED)
    assert at.answer(esp + bytes(100), Framing.NATT) == esp + bytes(100)
    assert gateway().answer(esp + bytes(100), Framing.NATT) is None


def test_authentication_of_an_sa_that_began_elsewhere_is_refused() -> None:
    spi_r = begun(gateway())
    other = Gateway(3, NETWORK.gateway(3), Random(2))
    answer = other.answer(auth(spi_r), Framing.NATT)
    assert answer is not None
    assert [kind for kind, _ in ike.notifies(answer[4:])] == [Notify.INVALID_IKE_SPI]
    assert list(other.refused) == [SPI]


def test_a_gateway_remembers_so_many_sas_and_no_more() -> None:
    at = gateway()
    for number in range(MAX_SAS + 10):
        begun(at, (number + 1).to_bytes(8))
    assert len(at._sas) == MAX_SAS


@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda rest: init()[:28] + rest))
def test_no_bytes_make_a_gateway_raise(data: bytes) -> None:
    for framing in Framing:
        gateway().answer(data, framing)
        gateway().answer(ike.NON_ESP_MARKER + data, framing)


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("persistence", ["source-address", "ike-spi"])
def test_its_configurations_are_valid(follows: bool, persistence: str, tmp_path: Path) -> None:
    text = configuration(NETWORK, tmp_path, 0.5, follows=follows, persistence=persistence)
    config = parse(text, Registry())
    assert config.service("ike-natt").follows == ("ike" if follows else None)
    assert len(config.service("ike-natt").real_servers) == GATEWAYS


def test_it_goes_elsewhere_where_its_ports_are_taken() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        with suppress(OSError):  # somebody watches the demonstration right now
            sock.bind((str(Network(USUAL).balancer), IKE_PORT))
        assert find_network(Random(1)).number != USUAL


class Straight(Network):
    """Without a balancer between: clients reach a gateway directly."""

    @property
    def balancer(self):  # type: ignore[no-untyped-def]
        return self.gateway(1)


async def test_a_client_connects_and_notices_a_dead_gateway() -> None:
    network = Straight(129 + os.getpid() % 90)
    at = Gateway(1, network.gateway(1), Random(1))
    someone = Client(network.client(0), network, FAST, Random(2))
    async with trio.open_nursery() as nursery:
        await nursery.start(at.run)
        nursery.start_soon(someone.live)
        await state(someone, State.UP)
        assert (someone.gateway, someone.connects) == (1, 1)
        at.stop()
        await state(someone, State.TRYING)
        await nursery.start(at.run)
        await state(someone, State.UP)
        assert someone.connects == 2
        nursery.cancel_scope.cancel()


async def state(client: Client, wanted: State) -> None:
    with trio.fail_after(20):
        while client.state is not wanted:  # noqa: ASYNC110 (it tells nobody)
            await trio.sleep(0.01)


# the whole


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "sapin.api.cli", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def children(pid: int) -> list[int]:
    """Processes whose parent it is (proc_pid_stat(5), the fields after the name)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            _, parent, *_ = stat.read_text().rpartition(")")[2].split()
            if int(parent) == pid:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_it_shows_what_it_says(tmp_path: Path) -> None:
    with demo(tmp_path, "--fast") as process:
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert "\x1b" not in out
    failed = re.search(r"(\d+) of 12 failed; (\d+) connected", out)
    assert failed is not None
    assert int(failed[1]) > 0
    assert int(failed[1]) + int(failed[2]) == 12
    assert "which never saw it: INVALID_IKE_SPI" in out
    assert f"12 of 12 new clients connected, and {failed[1]} of the {failed[1]} that had been refused" in out
    assert re.search(r"is on gw\d because key src:127\.\d+\.10\.13 is pinned there since", out)
    assert re.search(r"noticed after \d+\.\d s; (\d+) of its \1 clients were back after", out)
    assert re.search(r"gw3 kept (\d+) of its \1 clients; the new ones: 3 on gw1, 3 on gw2", out)
    assert re.search(r"; (\d+) of \1 tunnels went on, none of them connected anew", out)
    assert re.search(r"by source address 6 on gw\d; by IKE SPI 2 on gw1, 2 on gw2, 2 on gw3", out)
    assert re.search(r"one client +127\.\d+\.10\.13 is on gw\d because key src:", out)
    assert "sapin init ikev2" in out
    assert list(tmp_path.iterdir()) == [], "it cleans up"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    with demo(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "VPN clients connect" in line:
                break
        (child,) = children(process.pid)
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert not Path(f"/proc/{child}").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sapin_does_not_outlive_it(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "VPN clients connect" in line:
                break
        (child,) = children(process.pid)
    until = time.monotonic() + PATIENCE
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.05)
