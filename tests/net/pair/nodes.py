"""Sapin's pair in the lab: a daemon on each node, set up and told things as an operator would."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM
from tempfile import mkdtemp
from typing import Any

import trio

from tests.net.balancer import PATIENT_CHECK, SAPIN, START, configuration
from tests.net.lab import FLOATING, FLOATING6, VIP, VIP6
from tests.net.namespaces import Daemon, LabError, until
from tests.net.pair.lab import VIRTUAL, Node, PairLab


class SapinPair:
    """Two nodes with a daemon each, members of one cluster from the first start on."""

    addresses = (VIP, FLOATING, VIP6, FLOATING6)

    def __init__(
        self, lab: PairLab, *, persistence: str = "ike-spi", scheduler: str = "least-connections"
    ) -> None:
        self.lab = lab
        self._members = False
        self._states: dict[str, Path] = {}
        self._daemons: dict[str, Daemon] = {}
        for node in lab.nodes:
            folder = Path(mkdtemp(prefix=f"{node.name}-", dir=lab.folder))
            self._states[node.name] = state = folder / "state"
            state.mkdir()
            config = folder / "sapin.toml"
            services = configuration(lab.gateways, persistence, scheduler, True, PATIENT_CHECK)
            config.write_text(_config(node, state) + services)
            argv = [SAPIN, "run", str(config)]
            self._daemons[node.name] = Daemon(node.namespace, argv, folder / "sapin.log", {})

    async def start(self, node: Node) -> None:
        """Start it on a node, unless it runs there."""
        if not self._members:
            self._members = True
            await self._found_cluster()
        daemon = self._daemons[node.name]
        if not daemon.running:
            daemon.start()
            await until(lambda: self._answers(node), f"Sapin answers on {node.name}", START)

    def kill(self, node: Node) -> None:
        """End its daemon as a crash would."""
        self._daemons[node.name].kill()

    def terminate(self, node: Node) -> None:
        """Ask its daemon to end."""
        self._daemons[node.name].signal(SIGTERM)

    def pause(self, node: Node) -> None:
        """Have its daemon hang."""
        self._daemons[node.name].signal(SIGSTOP)

    def resume(self, node: Node) -> None:
        """Let its daemon go on."""
        self._daemons[node.name].signal(SIGCONT)

    async def ended(self, node: Node) -> None:
        """Wait until its daemon has ended."""

        async def over() -> bool:
            return not self._daemons[node.name].running

        await until(over, f"Sapin ends on {node.name}", 10)

    async def mend(self) -> None:
        """Put all cables back, and start it on both nodes unless it runs there."""
        for node in self.lab.nodes:
            node.plug()
            await self.start(node)

    async def settled(self) -> Node:
        """Wait until one node is active and the other is in sync with it; the active one."""
        told: dict[str, Any] = {}

        async def whole() -> bool:
            for node in self.lab.nodes:
                told[node.name] = await self.status(node)
            roles = sorted(each.get("role", "") for each in told.values())
            synced = [each.get("replication", {}).get("in_sync", False) for each in told.values()]
            return roles == ["active", "standby"] and all(synced)

        try:
            await until(whole, "one node is active, and the other in sync", 30)
        except LabError as error:
            raise LabError(f"{error}: {json.dumps(told)}") from None
        return next(node for node in self.lab.nodes if told[node.name]["role"] == "active")

    async def status(self, node: Node) -> dict[str, Any]:
        """What a node says of the pair; nothing while it does not answer."""
        done = await self._sapin(node, "cluster", "status", "--json")
        try:
            found: dict[str, Any] = json.loads(done.stdout)  # its exit status tells of alarms
        except ValueError:
            return {}
        return found

    async def pins(self, node: Node) -> Mapping[str, str]:
        """The server of each key, as a node knows them."""
        told = json.loads(await self.command(node, "pins", "--json"))
        return {key: pin["server"] for pin in told["pins"] for key in pin["keys"]}

    async def step_down(self, node: Node) -> None:
        """Have the active node hand over."""
        await self.command(node, "cluster", "step-down")

    async def stop(self) -> None:
        """End both daemons; their logs are printed, for pytest to show with a failure."""
        for node in self.lab.nodes:
            self.resume(node)
            node.plug()
            await trio.to_thread.run_sync(self._daemons[node.name].stop)
            node.forget()
            print(f"--- {node.name} ---\n{self.log(node)}")

    def log(self, node: Node) -> str:
        """What a daemon logged so far."""
        log = self._daemons[node.name].log
        return log.read_text(errors="replace") if log.exists() else ""

    async def command(self, node: Node, *arguments: str) -> str:
        """A command of Sapin's command line on a node; what it printed.

        Raises:
            LabError: it failed.
        """
        done = await self._sapin(node, *arguments)
        if done.returncode:
            told = f"sapin {' '.join(arguments)} on {node.name} ended with {done.returncode}"
            raise LabError(f"{told}: {done.stdout}")
        return done.stdout

    async def _answers(self, node: Node) -> bool:
        if not self._daemons[node.name].running:
            raise LabError(f"Sapin ended at its start on {node.name}: {self.log(node)}")
        return (await self._sapin(node, "status")).returncode == 0

    async def _sapin(self, node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {"SAPIN_STATE_DIR": str(self._states[node.name])}
        return await node.namespace.run(SAPIN, *arguments, env=env)

    async def _found_cluster(self) -> None:
        """As an operator: init on the first node, join on the second with the token that was shown."""
        first, second = self.lab.nodes
        told = await self.command(first, "cluster", "init", "--node", first.name, "--link", first.link)
        (token,) = re.findall(r"^[\w-]{80,}$", told, re.MULTILINE)
        place = self._states[second.name].parent / "token"
        place.write_text(token)
        await self.start(first)
        join = ["cluster", "join", "--node", second.name, "--link", second.link, "--token", str(place)]
        await self.command(second, *join)


def _config(node: Node, state: Path) -> str:
    addresses = "".join(
        f"""
            {{ address = "{address}", device = "{device}", side = "{_SIDES[device]}" }},"""
        for device, each in VIRTUAL.items()
        for address in each
    )
    return f"""
        [node]
        name = "{node.name}"
        state_dir = "{state}"

        [cluster]
        links = ["{node.link}"]
        virtual_addresses = [{addresses}
        ]
    """


_SIDES = {"front": "clients", "back": "servers"}
