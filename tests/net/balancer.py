"""Sapin in the lab: a process of its own in the balancer's namespace, told things as an operator would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Self

from tests.net.lab import VIP, VIP6, Gateway, Lab
from tests.net.namespaces import Daemon, LabError, run, until

SAPIN = str(Path(sys.executable).with_name("sapin"))
"""The program that was installed with the package under test."""
START = 20.0
"""Seconds that a start may take on a busy machine."""


CHECK = '{ plugin = "ike", interval = "300ms", timeout = "250ms", rise = 2, fall = 2 }'
"""Quick, for tests in which gateways fail."""
PATIENT_CHECK = '{ plugin = "ike", interval = "1s", timeout = "1s", rise = 1, fall = 10 }'
"""For tests in which no gateway fails, though the machine is so busy that one may be late: that would end its pins."""


def configuration(
    gateways: Sequence[Gateway], persistence: str, scheduler: str, follows: bool, check: str = CHECK
) -> str:
    """The services of UDP 500 and 4500 at both virtual addresses, as TOML."""
    pairs = [
        ("ike", VIP, [(gateway.name, gateway.address) for gateway in gateways]),
        ("ike6", VIP6, [(gateway.name, gateway.address6) for gateway in gateways]),
    ]
    text = ""
    for name, vip, servers in pairs:
        independent = f"""
            scheduler = "{scheduler}"
            persistence = "{persistence}"
            checks = [{check}]
            real_servers = [{", ".join(f'{{ name = "{n}", address = "{a}" }}' for n, a in servers)}]
        """
        text += _service(name, vip, 500, independent)
        text += _service(f"{name}-natt", vip, 4500, f'follows = "{name}"' if follows else independent)
    return text


def _service(name: str, vip: str, port: int, rest: str) -> str:
    return f"""
        [[virtual_services]]
        name = "{name}"
        address = "{vip}"
        port = {port}
        {rest}
    """


class Balancer:
    """Runs Sapin while the context lasts. Its log is printed at the end, for pytest to show with a failure.

    Args:
        follows: whether UDP 4500 follows UDP 500; otherwise it chooses gateways of its own.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        persistence: str = "source-address",
        scheduler: str = "least-connections",
        follows: bool = True,
    ) -> None:
        folder = Path(mkdtemp(prefix="sapin-", dir=lab.folder))
        self._state = folder / "state"
        self._state.mkdir()
        config = folder / "sapin.toml"
        config.write_text(f'[node]\nname = "lb"\nstate_dir = "{self._state}"\n')
        with config.open("a") as file:
            file.write(configuration(lab.gateways, persistence, scheduler, follows))
        self._daemon = Daemon(lab.balancer, [SAPIN, "run", str(config)], folder / "sapin.log", {})

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = self._daemon.stop()
        log = self._daemon.log.read_text()
        print(log)
        if kind is None and (status != 0 or "Traceback" in log or "[error" in log):
            raise LabError(f"Sapin had errors, or did not end well (exit status {status}): see its log")

    async def start(self) -> None:
        """Start it, and wait until it forwards."""
        self._daemon.start()
        await until(self._answers, "Sapin answers", START)

    def kill(self) -> None:
        """End it as a crash would."""
        self._daemon.kill()

    async def command(self, *arguments: str) -> str:
        """A command of Sapin's command line, as an operator gives it; what it printed.

        Raises:
            LabError: it failed.
        """
        done = await self._sapin(*arguments)
        if done.returncode:
            raise LabError(f"sapin {' '.join(arguments)} ended with {done.returncode}: {done.stdout}")
        return done.stdout

    async def health(self) -> dict[str, str]:
        """What the checks say of each gateway, by its name."""
        status = json.loads(await self.command("status", "--json"))
        return {server["name"]: server["health"] for server in status["groups"][0]["servers"]}

    async def flows(self, address: str) -> set[tuple[str, str]]:
        """Which service's flows of a client's address go to which gateway."""
        told = json.loads(await self.command("explain", address, "--json"))
        return {(flow["service"], flow["server"]) for flow in told["flows"]}

    async def pins(self) -> dict[str, str]:
        """The gateway that each key is pinned to."""
        told = json.loads(await self.command("pins", "--json"))
        return {key: pin["server"] for pin in told["pins"] for key in pin["keys"]}

    async def _answers(self) -> bool:
        if not self._daemon.running:
            raise LabError(f"Sapin ended at its start: {self._daemon.log.read_text()}")
        return (await self._sapin("status")).returncode == 0

    async def _sapin(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return await run(SAPIN, *arguments, env={"SAPIN_STATE_DIR": str(self._state)})
