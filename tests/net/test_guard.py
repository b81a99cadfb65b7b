"""Guards in namespaces: the addresses never stay with a daemon that is gone, and its peer is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest

from sapin.cluster.beacon import Beacon, Codec, Kind
from sapin.cluster.config import Cluster, Side, Takeover, VirtualAddress
from sapin.cluster.keepalived import keepalived_conf
from tests.net.namespaces import Namespace, Wire, clear, sweep

pytestmark = [pytest.mark.root("network namespaces"), pytest.mark.programs("ip", "nsenter"), pytest.mark.net]

VIP, VIP6, BACK = "198.18.0.1", "2001:db8:18::1", "10.60.0.1"
CLUSTER, SECRET = "ab" * 16, "cd" * 32
NODES = ("lb-a", "lb-b")


class Stand:
    """A daemon's stand-in and its guard, in a namespace."""

    def __init__(self, namespace: Namespace, number: int, moves: bool = True) -> None:
        self.namespace = namespace
        node, peer = NODES[number], NODES[1 - number]
        setup = {
            "node": node, "peer": peer, "cluster": CLUSTER, "secret": SECRET, "boot": 70 + number, "port": 4510,
            "links": [f"198.19.0.{number + 1}"], "peer_links": [f"198.19.0.{2 - number}"],
            "addresses": [[VIP, 24, "front"], [VIP6, 64, "front"], [BACK, 24, "back"]],
            "moves": moves, "holding": 0,
        }  # fmt: skip
        self.process = subprocess.Popen(
            namespace.inside(sys.executable, str(Path(__file__).with_name("guarded.py")), json.dumps(setup)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.output = ""
        self.guard = int(self.wait_for(r"guard (\d+)")[1])
        self.say("release")  # it is up when it answers
        self.wait_for("Released", 20)
        self.output = ""

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        with suppress(BlockingIOError):
            self.output += os.read(self.process.stdout.fileno(), 65_536).decode()
        return self.output

    def wait_for(self, pattern: str, patience: float = 5.0) -> re.Match[str]:
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if found := re.search(pattern, self.read()):
                return found
            time.sleep(0.0005)
        raise AssertionError(f"no {pattern} in:\n{self.output}")

    def holds(self) -> bool:
        shown = subprocess.run(
            self.namespace.inside("ip", "-o", "address"), capture_output=True, text=True, check=True
        ).stdout
        here = [f" {address}/" in shown for address in (VIP, VIP6, BACK)]
        assert len(set(here)) == 1, shown
        return here[0]

    def claim(self) -> None:
        self.say("claim")
        self.wait_for("Claimed")
        assert self.holds()

    def end(self) -> None:
        for pid in (self.process.pid, self.guard):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(5)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def clean(namespace: Namespace) -> None:
    """Without the virtual addresses, whoever has left them."""
    for address, device in ((f"{VIP}/24", "front"), (f"{VIP6}/64", "front"), (f"{BACK}/24", "back")):
        argv = ["ip", "-n", namespace.name, "address", "del", address, "dev", device]
        subprocess.run(argv, capture_output=True, check=False)


def until(condition: Callable[[], Any], patience: float = 5.0) -> float:
    """Seconds until it held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < patience
        time.sleep(0.001)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def places() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    sweep()
    try:
        wires = Namespace("gw")
        front, back, between = Wire(wires, "front"), Wire(wires, "back"), Wire(wires, "between")
        nodes = Namespace("ga"), Namespace("gb")
        for number, node in enumerate(nodes):
            front.attach(node, "front", f"198.18.0.{2 + number}/24", f"2001:db8:18::{2 + number}/64")
            back.attach(node, "back", f"10.60.0.{2 + number}/24")
            between.attach(node, "cluster", f"198.19.0.{1 + number}/24")
        client = Namespace("gc")
        front.attach(client, "front", "198.18.0.9/24", "2001:db8:18::9/64")
        yield *nodes, client
    finally:
        clear()


@pytest.fixture
def stands(places: tuple[Namespace, Namespace, Namespace]) -> Iterator[tuple[Stand, Stand]]:
    made: list[Stand] = []
    for node in places[:2]:
        clean(node)
    try:
        made += [Stand(places[0], 0), Stand(places[1], 1)]
        yield made[0], made[1]
    finally:
        for stand in made:
            stand.end()


def test_claim_and_release(stands: tuple[Stand, Stand]) -> None:
    a, _ = stands
    assert not a.holds()
    a.claim()
    a.say("release")
    a.wait_for("Released")
    assert not a.holds()


def test_a_killed_daemon_loses_the_addresses_and_its_peer_knows(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    a.claim()
    killed = time.monotonic()
    a.process.kill()
    told = b.wait_for(r"([\d.]+) Farewell\(boot=70, epoch=3\)")
    print(f"farewell after {(float(told[1]) - killed) * 1000:.1f} ms")
    until(lambda: not a.holds())
    assert float(told[1]) - killed < 0.2


def test_a_stopped_daemon_loses_the_addresses_too(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    a.claim()
    os.kill(a.process.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    told = b.wait_for(r"([\d.]+) Farewell\(boot=70, epoch=3\)")
    assert 0.15 < float(told[1]) - stopped < 0.5
    until(lambda: not a.holds())
    os.kill(a.process.pid, signal.SIGCONT)
    a.wait_for("Lost")


def test_a_daemon_whose_loop_hangs_loses_them_too_and_hears_of_it(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    a.claim()
    a.say("hang")
    b.wait_for("Farewell")
    assert not a.holds()
    a.wait_for("Lost")


def test_a_daemon_outlives_its_guard_and_the_addresses_stay(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    a.claim()
    os.kill(a.guard, signal.SIGKILL)
    a.wait_for(r"Claimed[\s\S]*Claimed")
    assert a.holds()
    a.say("pid")
    a.guard = int(a.wait_for(rf"guard (?!{a.guard})(\d+)")[1])
    b.say("probe")
    b.wait_for(r"Answered\(epoch=3, active=True\)")


def test_what_a_crash_has_left_is_cleared_away_at_the_next_start(
    places: tuple[Namespace, Namespace, Namespace],
) -> None:
    clean(places[0])
    places[0].ip(f"address add {VIP}/24 dev front", f"address add {VIP6}/64 dev front nodad")
    places[0].ip(f"address add {BACK}/24 dev back")
    stand = Stand(places[0], 0)
    try:
        until(lambda: not stand.holds())
    finally:
        stand.end()


def test_probes_are_answered_at_the_link_and_at_the_virtual_address(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    b.say("probe")
    b.wait_for(r"Answered\(epoch=3, active=False\)")
    a.claim()
    b.namespace.ip("link set cluster down")
    try:
        b.say("probe")
        b.wait_for(r"Answered\(epoch=3, active=True\)")
    finally:
        b.namespace.ip("link set cluster up", "address replace 198.19.0.2/24 dev cluster")


def test_a_machine_where_nobody_listens_refuses(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    a.end()
    until(lambda: not Path(f"/proc/{a.guard}").exists())
    b.say("probe")
    b.say("probe")
    b.wait_for("Refused")


def test_neighbours_follow_the_address(
    stands: tuple[Stand, Stand], places: tuple[Namespace, Namespace, Namespace]
) -> None:
    a, b = stands
    client = places[2]
    for stand in (a, b):
        stand.claim()
        for address in (VIP, VIP6):
            done = subprocess.run(
                client.inside("ping", "-q", "-c", "2", "-i", "0.05", "-W", "1", address),
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, f"{address} after the claim of {stand.guard}"
        shown = subprocess.run(
            client.inside("ip", "neigh"), capture_output=True, text=True, check=True
        ).stdout
        mac = re.search(
            r"link/ether (\S+)",
            subprocess.run(
                stand.namespace.inside("ip", "link", "show", "front"),
                capture_output=True,
                text=True,
                check=True,
            ).stdout,
        )
        assert mac is not None
        assert re.search(rf"^{VIP} .*{mac[1]}", shown, re.MULTILINE), shown
        stand.say("release")
        stand.wait_for("Released")


def test_an_address_that_somebody_removes_is_put_back(stands: tuple[Stand, Stand]) -> None:
    a, _ = stands
    a.claim()
    a.namespace.ip(f"address del {VIP}/24 dev front")
    until(lambda: f" {VIP}/" in subprocess.run(
        a.namespace.inside("ip", "-o", "address"), capture_output=True, text=True, check=True
    ).stdout)  # fmt: skip


def test_strangers_and_old_answers_mean_nothing(
    stands: tuple[Stand, Stand], places: tuple[Namespace, Namespace, Namespace]
) -> None:
    a, b = stands
    a.claim()
    forged = [
        b"x" * 200,
        Codec(CLUSTER, b"?" * 32, "lb-b").encode(Beacon(Kind.FAREWELL, False, "lb-a", 70, 3, bytes(8))),
        Codec(CLUSTER, bytes.fromhex(SECRET), "lb-b").encode(
            Beacon(Kind.ANSWER, True, "lb-a", 70, 3, bytes(8))
        ),
    ]
    send = (
        "import socket,sys\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        f"[s.sendto(bytes.fromhex(d),('198.19.0.2',4510)) for d in {[each.hex() for each in forged]!r}]"
    )
    subprocess.run(places[0].inside(sys.executable, "-c", send), check=True)
    b.say("probe")
    b.wait_for("Answered")
    time.sleep(0.05)
    assert "Farewell" not in b.read()
    assert b.read().count("Answered") <= 4  # of one probe to the link, and to each of the virtual addresses
    until(lambda: _strange(b) >= len(forged))


def _strange(stand: Stand) -> int:
    stand.say("strange")
    time.sleep(0.02)
    return max((int(each) for each in re.findall(r"strange (\d+)", stand.read())), default=0)


def test_an_answer_counts_once_however_often_it_comes(
    stands: tuple[Stand, Stand], places: tuple[Namespace, Namespace, Namespace]
) -> None:
    """Somebody on the wire repeats the peer's answers, from the peer's address: they keep nobody from taking over."""
    _, b = stands
    b.say("probe")
    b.wait_for("Answered")
    before = b.read().count("Answered")
    old = Codec(CLUSTER, bytes.fromhex(SECRET), "lb-b").encode(
        Beacon(Kind.ANSWER, False, "lb-a", 70, 3, b"replayed")
    )
    send = (
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        f"[s.sendto(bytes.fromhex({old.hex()!r}),('198.19.0.2',4510)) for _ in range(20)]"
    )
    subprocess.run(places[0].inside(sys.executable, "-c", send), check=True)
    until(lambda: _strange(b) >= 20)
    assert b.read().count("Answered") == before
    seen = Codec(CLUSTER, bytes.fromhex(SECRET), "lb-b").encode(
        Beacon(Kind.PROBE, False, "lb-a", 70, 3, b"replayed")
    )
    subprocess.run(places[0].inside(sys.executable, "-c", send.replace(old.hex(), seen.hex())), check=True)
    until(lambda: _strange(b) >= 39)  # once it is answered


def test_a_paused_machine_lets_go_when_it_comes_back(stands: tuple[Stand, Stand]) -> None:
    """Daemon and guard stand still together, and the daemon feeds as soon as it can: that is no proof of anything."""
    a, b = stands
    a.claim()
    for pid in (a.guard, a.process.pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(0.8)
    os.kill(a.process.pid, signal.SIGCONT)
    time.sleep(0.1)  # it feeds a guard that is still away
    assert a.holds()
    os.kill(a.guard, signal.SIGCONT)
    b.wait_for(r"Farewell\(boot=70, epoch=3\)")
    a.wait_for("Lost")
    assert not a.holds()


def test_a_guard_that_was_away_for_a_moment_keeps_the_addresses(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    a.claim()
    os.kill(a.guard, signal.SIGSTOP)
    time.sleep(0.15)
    os.kill(a.guard, signal.SIGCONT)
    time.sleep(0.4)
    assert a.holds()
    assert "Farewell" not in b.read()


def test_the_farewell_finds_another_way_when_the_link_is_cut(stands: tuple[Stand, Stand]) -> None:
    """It leaves from the virtual address, which is removed already, to where the last probe came from."""
    a, b = stands
    a.claim()
    b.namespace.ip("link set cluster down")
    try:
        b.say("probe")
        b.wait_for(r"Answered\(epoch=3, active=True\)")
        a.process.kill()
        b.wait_for(r"Farewell\(boot=70, epoch=3\)")
    finally:
        b.namespace.ip("link set cluster up", "address replace 198.19.0.2/24 dev cluster")


def test_the_node_keeps_its_own_address_in_the_network_of_a_virtual_one(
    places: tuple[Namespace, Namespace, Namespace],
) -> None:
    """Also where the virtual one was there first: the kernel takes a network's other addresses away with the first."""
    place = places[0]
    clean(place)
    place.sysctl("net.ipv4.conf.front.promote_secondaries", 0)
    place.sysctl("net.ipv4.conf.all.promote_secondaries", 0)
    place.ip("address del 198.18.0.2/24 dev front", f"address add {VIP}/24 dev front")
    place.ip("address add 198.18.0.2/24 dev front")
    stand = Stand(place, 0)
    try:
        until(lambda: not stand.holds())
        shown = subprocess.run(
            place.inside("ip", "-o", "address", "show", "front"), capture_output=True, text=True, check=True
        ).stdout
        assert " 198.18.0.2/24 " in shown, shown
    finally:
        stand.end()
        clean(place)
        place.ip("address replace 198.18.0.2/24 dev front")


def test_answers_come_in_time_from_a_busy_machine(stands: tuple[Stand, Stand]) -> None:
    a, b = stands
    a.claim()
    spin = "import time\nuntil=time.monotonic()+4\nwhile time.monotonic()<until: pass"
    busy = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        time.sleep(0.2)
        late = []
        for _ in range(50):
            seen = b.read().count("Answered")
            asked = time.monotonic()
            b.say("probe")
            until(lambda seen=seen: b.read().count("Answered") > seen)  # type: ignore[misc]
            late.append(time.monotonic() - asked)
        print(f"answers within {max(late) * 1000:.1f} ms, the middle one {sorted(late)[25] * 1000:.1f} ms")
        assert sorted(late)[25] < 0.075
        assert a.holds()
        assert "Farewell" not in b.read()
    finally:
        for process in busy:
            process.kill()
            process.wait(5)


def test_where_something_else_moves_the_addresses_the_guard_watches(
    places: tuple[Namespace, Namespace, Namespace],
) -> None:
    clean(places[0])
    stand = Stand(places[0], 0, moves=False)
    try:
        places[0].ip(f"address add {VIP}/24 dev front", f"address add {VIP6}/64 dev front nodad")
        places[0].ip(f"address add {BACK}/24 dev back")
        stand.wait_for("Gained")
        places[0].ip(f"address del {VIP}/24 dev front")
        stand.wait_for(r"Gained[\s\S]*Lost")
    finally:
        stand.end()
        clean(places[0])


@pytest.mark.programs("keepalived")
def test_keepalived_moves_the_addresses_and_both_nodes_see_it(
    places: tuple[Namespace, Namespace, Namespace], tmp_path: Path
) -> None:
    """The generated configuration, the real keepalived, and guards that only watch."""
    for place in places[:2]:
        clean(place)
    stands = [Stand(places[0], 0, moves=False), Stand(places[1], 1, moves=False)]
    running = [_keepalived(places[number], number, tmp_path) for number in range(2)]
    try:
        # With no pre-emption it may be either of them.
        until(lambda: sorted(map(_watched, stands)) == [False, True], 15)
        first, other = stands if _watched(stands[0]) else reversed(stands)
        assert first.holds()
        running[stands.index(first)].terminate()
        until(lambda: (_watched(first), _watched(other)) == (False, True), 15)
        assert (first.holds(), other.holds()) == (False, True)
    finally:
        for process in running:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        for stand in stands:
            stand.end()
        for place in places[:2]:
            clean(place)


def _watched(stand: Stand) -> bool:
    """Whether the addresses are there, by what the guard told last."""
    return "Gained" in stand.read()[max(stand.output.rfind("Lost"), 0) :]


def _keepalived(place: Namespace, number: int, folder: Path) -> subprocess.Popen[bytes]:
    """keepalived on a node, with what ``sapin cluster keepalived`` prints."""
    cluster = Cluster(
        (ip_address(f"198.19.0.{number + 1}"),),
        (
            VirtualAddress(ip_interface(f"{VIP}/24"), "front"),
            VirtualAddress(ip_interface(f"{VIP6}/64"), "front"),
            VirtualAddress(ip_interface(f"{BACK}/24"), "back", Side.SERVERS),
        ),
        priority=150 - number,
        takeover=Takeover.KEEPALIVED,
    )
    node = NODES[number]
    path = folder / f"{node}.conf"
    path.write_text(keepalived_conf(cluster, node, CLUSTER, "/usr/bin/true"))
    path.chmod(0o600)
    pids = (f"--pid={folder / node}.pid", f"--vrrp_pid={folder / node}.vrrp.pid")
    with (folder / f"{node}.log").open("wb") as log:
        return subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "TERM"),
                *place.inside("keepalived", "--dont-fork", "--log-console", "--vrrp", f"--use-file={path}"),
                *pids,
            ],
            stdout=log,
            stderr=log,
        )
