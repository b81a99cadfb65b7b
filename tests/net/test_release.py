"""What is left of a daemon that ended badly is taken away by ``sapin cluster release``, and nothing else is."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.namespaces import Namespace, Wire, clear, sweep

pytestmark = [
    pytest.mark.root("network namespaces"),
    pytest.mark.programs("ip", "nsenter", "setpriv"),
    pytest.mark.net,
]

VIRTUAL = ("198.18.0.1/24", "2001:db8:18::1/64")
OWN = ("198.18.0.2/24", "2001:db8:18::2/64")


@pytest.fixture
def place() -> Iterator[Namespace]:
    sweep()
    try:
        namespace = Namespace("release")
        wire = Wire(namespace, "wire")
        # The virtual address first: the kernel would take the node's own away together with it.
        wire.attach(namespace, "front", *VIRTUAL, *OWN)
        namespace.sysctl("net.ipv4.conf.front.promote_secondaries", 0)
        namespace.sysctl("net.ipv4.conf.all.promote_secondaries", 0)
        yield namespace
    finally:
        clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    state.mkdir()
    path = tmp_path / "sapin.toml"
    path.write_text(
        f"""
        [node]
        name = "lb-a"
        state_dir = "{state}"

        [[virtual_services]]
        name = "ike"
        address = "198.18.0.1"
        port = 500
        real_servers = [{{ name = "gw1", address = "10.60.0.11" }}]

        [cluster]
        links = ["198.19.0.1"]
        takeover = "netlink"
        virtual_addresses = [
            {{ address = "{VIRTUAL[0]}", device = "front" }},
            {{ address = "{VIRTUAL[1]}", device = "front" }},
            {{ address = "10.60.0.1/24", device = "gone", side = "servers" }},
        ]
        """
    )
    return path


def release(place: Namespace, file: Path, *before: str) -> subprocess.CompletedProcess[str]:
    sapin = str(Path(sys.executable).with_name("sapin"))
    argv = place.inside(*before, sapin, "cluster", "release", str(file))
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)


def there(place: Namespace) -> set[str]:
    shown = subprocess.run(
        place.inside("ip", "-o", "address", "show", "front"), capture_output=True, text=True, check=True
    ).stdout
    return {each for each in (*VIRTUAL, *OWN) if f" {each} " in shown}


def test_virtual_addresses_go_and_the_nodes_own_stay(place: Namespace, file: Path) -> None:
    assert there(place) == {*VIRTUAL, *OWN}
    for _ in range(2):  # and there is nothing to do the second time
        done = release(place, file)
        assert done.returncode == 0, done.stderr
        assert there(place) == set(OWN)


def test_a_daemon_that_runs_keeps_them(place: Namespace, file: Path) -> None:
    with (file.parent / "state" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = release(place, file)
    assert done.returncode == 1
    assert "the daemon runs" in done.stderr
    assert there(place) == {*VIRTUAL, *OWN}


def test_who_may_not_is_told_what_is_missing(place: Namespace, file: Path) -> None:
    done = release(place, file, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    assert done.returncode == 1
    assert "CAP_NET_ADMIN" in done.stderr
    assert there(place) == {*VIRTUAL, *OWN}
