"""A cable that is pulled out is told by the kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.net.namespaces import Namespace, Wire, clear, sweep

pytestmark = [
    pytest.mark.net,
    pytest.mark.root("network namespaces"),
    pytest.mark.programs("ip", "nsenter", "setpriv", "sysctl"),
]
PROGRAM = """
import trio
from sapin.cluster.devices import Devices

async def main():
    devices = Devices()
    async for device, carrier in devices.changes():
        if device == "front":
            print("carrier" if carrier else "none", flush=True)

trio.run(main)
"""
LABEL = "devices-"


@pytest.fixture
def namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    sweep()
    try:
        yield Namespace(f"{LABEL}wires"), Namespace(f"{LABEL}node")
    finally:
        clear(LABEL)


def test_a_cut_cable_is_told_at_once(namespaces: tuple[Namespace, Namespace]) -> None:
    wires, node = namespaces
    port = Wire(wires, "front").attach(node, "front", "198.18.0.2/24")
    argv = ["setpriv", "--pdeathsig", "KILL", *node.inside(sys.executable, "-c", PROGRAM)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        told = program.stdout
        try:
            assert told.readline() == "carrier\n"
            port.unplug()
            assert "none\n" in iter(told.readline, "")
            port.plug()
            assert "carrier\n" in iter(told.readline, "")
        finally:
            program.kill()
