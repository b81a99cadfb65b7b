"""The acts of the demonstration, in their order. Each does something to Sapin or its gateways and says what came of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import trio

from sapin.api.cli.explain import sentences
from sapin.api.cli.figures import with_rates
from sapin.api.client import ControlError
from sapin.api.demo.balancer import Balancer, DemoError
from sapin.api.demo.client import Client, State
from sapin.api.demo.gateway import Gateway
from sapin.api.demo.screen import GatewayView, Result, Screen
from sapin.api.demo.stage import GATEWAYS, IKE_PORT, NATT_PORT, Network, Pace, configuration

WAVE = 12
LATE = 6
"""Clients of the smaller waves."""
LIMIT = 30.0
"""Seconds until what does not happen is taken for a failure."""
POLL = 0.02
LOOK = 0.25
"""Seconds between two looks at Sapin."""
_SHOWN = 2


class Story:
    """Everybody on the stage, and what they do.

    Args:
        folder: for Sapin's configuration and state.
        nursery: where gateways and clients live.
    """

    def __init__(
        self,
        folder: Path,
        network: Network,
        pace: Pace,
        screen: Screen,
        random: Random,
        nursery: trio.Nursery,
    ) -> None:
        self.results: list[Result] = []
        self._network = network
        self._balancer = Balancer(folder, self._heed)
        self._pace = pace
        self._screen = screen
        self._random = random
        self._nursery = nursery
        self._gateways = [Gateway(n, network.gateway(n), random) for n in range(1, GATEWAYS + 1)]
        self._clients: list[Client] = []
        self._addresses = 0
        self._status: Mapping[str, Any] | None = None
        self._health: dict[str, str] = {}
        """What the log said last of each gateway."""

    async def play(self) -> None:
        """All acts.

        Raises:
            DemoError: one cannot go on.
        """
        acts: list[Callable[[], Awaitable[None]]] = [
            self._without_following,
            self._with_following,
            self._gateway_dies,
            self._gateway_drained,
            self._killed,
            self._behind_nat,
        ]
        for gateway in self._gateways:
            await self._nursery.start(gateway.run)
        self._configure(follows=False, persistence="source-address")
        self._screen.draw(self._views(), "Sapin is starting")
        await self._balancer.start(self._nursery)
        self._nursery.start_soon(self._look)
        await self._until(lambda: len(self._healthy()) == GATEWAYS, "the health checks find all gateways")
        for act in acts:
            await act()
            await trio.sleep(self._pace.pause)
        explained = await self._explain(self._clients[WAVE])
        self.results.append(Result("one client", explained, "is pinned there" in explained))

    def _heed(self, told: Mapping[str, Any]) -> None:
        """A line of Sapin's log."""
        if told.get("event") == "check changed" and told["service"] == "ike":
            server, health = told["server"], told["health"]
            if self._health.get(server, "unknown") != health and self._clients:
                style = "yellow" if health == "unhealthy" else ""
                self._screen.event(f"Sapin: {server} is {health}: {told['reason']}", style)
            self._health[server] = health
        elif told.get("level") in ("error", "critical"):
            self._screen.event(f"Sapin: {told}", "red")

    @property
    def state_dir(self) -> Path:
        """Sapin's state directory."""
        return self._balancer.state_dir

    async def close(self) -> None:
        """End Sapin."""
        await self._balancer.stop()

    # the acts

    async def _without_following(self) -> None:
        self._screen.act(
            "1  Two services that know nothing of each other",
            f"Port {IKE_PORT} stands for UDP 500, {NATT_PORT} for 4500. Each is balanced by itself, in turns, as by any "
            "balancer that sees nothing but UDP.",
            f"{WAVE} VPN clients connect: IKE_SA_INIT on the first port, IKE_AUTH on the second.",
        )
        await trio.sleep(self._pace.pause)
        clients = await self._wave(self._new_addresses(WAVE))
        refused = [client for client in clients if client.state is State.REFUSED]
        for client in refused[:_SHOWN]:
            self._screen.event(
                f"{client.address}: IKE_SA_INIT went to gw{client.gateway}, IKE_AUTH to {self._refuser(client)}, "
                "which never saw it: INVALID_IKE_SPI",
                "red",
            )
        if len(refused) > _SHOWN:
            self._screen.event(f"and {len(refused) - _SHOWN} more like these", "red")
        connected = self._count(clients)
        self._conclude(
            "without following",
            f"{len(refused)} of {WAVE} failed; {connected} connected, whose two ports happened to meet",
            len(refused) > 0 and connected + len(refused) == WAVE,
            warns=True,
        )

    async def _with_following(self) -> None:
        self._screen.act(
            "2  One service follows the other",
            'The second service gets the line  follows = "ike"  and the file is reloaded. Now both have one table of '
            "pins: whoever is pinned by the first port is found on the second.",
        )
        await trio.sleep(self._pace.pause)
        await self._reload(follows=True, persistence="source-address")
        refused = [client for client in self._clients if client.state is State.REFUSED]
        clients = await self._wave(self._new_addresses(WAVE))
        again = await self._again(refused)
        self._conclude(
            "with following",
            f"{self._count(clients)} of {WAVE} new clients connected"
            + (f", and {again} of the {len(refused)} that had been refused" if refused else ""),
            self._count(clients) == WAVE and again == len(refused),
        )
        self._screen.event(f"sapin explain {clients[0].address}")
        self._screen.event(await self._explain(clients[0]))

    async def _gateway_dies(self) -> None:
        gateway = self._gateways[1]
        self._screen.act(
            "3  A gateway dies",
            f"{gateway.name} is stopped. Its health check falls, which clears its pins on both ports at once, and its "
            "clients connect again, elsewhere.",
        )
        await trio.sleep(self._pace.pause)
        victims = [client for client in self._up() if client.gateway == gateway.number]
        died = trio.current_time()
        gateway.stop()
        self._screen.event(f"{gateway.name} is gone, with {len(victims)} tunnels")
        await self._until(lambda: self._health[gateway.name] == "unhealthy", "the check notices")
        noticed = trio.current_time() - died
        await self._until(
            lambda: all(self._moved(c, gateway) for c in victims), "its clients are back", strict=False
        )
        back = [client for client in victims if self._moved(client, gateway)]
        self._conclude(
            "a gateway dies",
            f"noticed after {noticed:.1f} s; {len(back)} of its {len(victims)} clients were back after "
            f"{trio.current_time() - died:.1f} s: {self._spread(back)}",
            len(back) == len(victims) > 0,
        )
        await self._nursery.start(gateway.run)
        await self._until(lambda: self._health[gateway.name] == "healthy", "the check finds it again")

    async def _gateway_drained(self) -> None:
        gateway = self._gateways[2]
        self._screen.act(
            "4  A gateway is drained, to be worked on",
            f"sapin server drain {gateway.name}: it keeps its clients and gets no new ones. {LATE} new clients connect.",
        )
        await trio.sleep(self._pace.pause)
        before = {client: client.connects for client in self._up() if client.gateway == gateway.number}
        await self._balancer.call("set-state", server=gateway.name, state="draining")
        late = await self._wave(self._new_addresses(LATE))
        await trio.sleep(self._pace.esp + self._pace.pause)
        kept = [client for client, connects in before.items() if self._stayed(client, connects)]
        self._conclude(
            "a gateway is drained",
            f"{gateway.name} kept {len(kept)} of its {len(before)} clients; the new ones: {self._spread(late)}",
            len(kept) == len(before) > 0
            and self._count(late) == LATE
            and all(client.gateway != gateway.number for client in late),
        )
        await self._balancer.call("set-state", server=gateway.name, state="enabled")

    async def _killed(self) -> None:
        self._screen.act(
            "5  Sapin itself is killed",
            "kill -9, in the middle of the traffic. Pins and flows are on disk before a client can depend on them.",
        )
        await trio.sleep(self._pace.pause)
        before = {client: client.connects for client in self._up()}
        for client in before:
            client.patience = LIMIT
        died = trio.current_time()
        await self._balancer.kill()
        self._screen.event("Sapin is dead")
        await self._balancer.start(self._nursery)
        outage = trio.current_time() - died
        self._screen.event(f"Sapin is back after {outage:.1f} s")
        heard = trio.current_time()
        await self._until(lambda: all(c.heard > heard for c in before), "every tunnel goes on", strict=False)
        on = [c for c, connects in before.items() if self._stayed(c, connects) and c.heard > heard]
        self._conclude(
            "Sapin is killed",
            f"back after {outage:.1f} s; {len(on)} of {len(before)} tunnels went on, none of them connected anew",
            len(on) == len(before) > 0,
        )
        for client in before:
            client.patience = self._pace.patience

    async def _behind_nat(self) -> None:
        self._screen.act(
            "6  Clients behind one NAT",
            f"{LATE} clients share an address. Where the source address is the key, they are one client to Sapin. "
            f"Then {LATE} more, with the IKE SPI as the key.",
        )
        await trio.sleep(self._pace.pause)
        together = await self._wave(self._new_addresses(1) * LATE)
        self._screen.event(f"by source address: {self._spread(together)}")
        await self._reload(follows=True, persistence="ike-spi")
        spread = await self._wave(self._new_addresses(1) * LATE)
        self._conclude(
            "clients behind one NAT",
            f"by source address {self._spread(together)}; by IKE SPI {self._spread(spread)}",
            self._count(together) == self._count(spread) == LATE
            and len({client.gateway for client in together}) == 1
            and len({client.gateway for client in spread}) == GATEWAYS,
        )

    # what the acts are made of

    async def _wave(self, addresses: Sequence[Any]) -> list[Client]:
        """New clients, until each has a tunnel or was refused."""
        clients = [Client(address, self._network, self._pace, self._random) for address in addresses]
        self._clients += clients
        for client in clients:
            self._nursery.start_soon(client.live)
        await self._until(
            lambda: all(client.settled for client in clients), "all clients are through", strict=False
        )
        return clients

    async def _again(self, refused: Sequence[Client]) -> int:
        """How many of those that were refused get a tunnel now, from the same ports."""
        for client in refused:
            client.retry()
        await self._until(lambda: all(client.settled for client in refused), "they are through", strict=False)
        return self._count(refused)

    def _new_addresses(self, count: int) -> list[Any]:
        first, self._addresses = self._addresses, self._addresses + count
        return [self._network.client(number) for number in range(first, first + count)]

    def _configure(self, *, follows: bool, persistence: str) -> None:
        text = configuration(
            self._network,
            self._balancer.state_dir,
            self._pace.check,
            follows=follows,
            persistence=persistence,
        )
        self._balancer.config.write_text(text)

    async def _reload(self, *, follows: bool, persistence: str) -> None:
        self._configure(follows=follows, persistence=persistence)
        answer = await self._balancer.call("reload")
        self._screen.event(f"sapin reload: {'; '.join(answer['changes'])}")

    async def _explain(self, client: Client) -> str:
        answer = await self._balancer.call("explain", client=str(client.address))
        return next(sentences(answer, [], time.time()))

    async def _until(self, true: Callable[[], bool], what: str, *, strict: bool = True) -> None:
        with trio.move_on_after(LIMIT):
            while not true():  # noqa: ASYNC110 (what is waited for is spread over many clients)
                await trio.sleep(POLL)
            return
        if strict:
            raise DemoError(f"in {LIMIT:g} s it did not happen that {what}")

    def _conclude(self, what: str, found: str, ok: bool, *, warns: bool = False) -> None:
        result = Result(what, found, ok, warns)
        self.results.append(result)
        self._screen.result(result)

    def _up(self) -> list[Client]:
        return [client for client in self._clients if client.state is State.UP]

    def _count(self, clients: Sequence[Client]) -> int:
        return sum(client.state is State.UP for client in clients)

    def _spread(self, clients: Sequence[Client]) -> str:
        counts = Counter(f"gw{client.gateway}" for client in clients if client.state is State.UP)
        return ", ".join(f"{count} on {name}" for name, count in sorted(counts.items())) or "nowhere"

    def _refuser(self, client: Client) -> str:
        return next((g.name for g in self._gateways if client.spi in g.refused), "another")

    @staticmethod
    def _moved(client: Client, gateway: Gateway) -> bool:
        return client.state is State.UP and client.gateway != gateway.number

    @staticmethod
    def _stayed(client: Client, connects: int) -> bool:
        return client.state is State.UP and client.connects == connects

    # looking

    async def _look(self) -> None:
        """Keep an eye on Sapin, and draw."""
        while True:
            try:
                answer = await self._balancer.call("status")
            except ControlError:
                self._status = None
            else:
                self._status = with_rates(self._status or answer, answer)
            self._screen.draw(self._views(), self._crowd())
            await trio.sleep(LOOK)

    def _healthy(self) -> set[str]:
        return {row["name"] for row in self._rows() if row["health"] == "healthy"}

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        if self._status is not None:
            yield from self._status["groups"][0]["servers"]

    def _views(self) -> Iterator[GatewayView]:
        tunnels = Counter(f"gw{client.gateway}" for client in self._up())
        known = {row["name"]: row for row in self._rows()}
        for gateway in self._gateways:
            row = known.get(gateway.name)
            if row is None:
                yield GatewayView(gateway.name, "-", "-", 0, tunnels[gateway.name], 0.0)
                continue
            rate = row["rates"]["packets_in"] + row["rates"]["packets_out"]
            yield GatewayView(
                gateway.name, row["health"], row["state"], row["pinned"], tunnels[gateway.name], rate
            )

    def _crowd(self) -> str:
        counts = Counter(client.state for client in self._clients)
        parts = [f"{counts[state]} {state.value}" for state in State if counts[state]]
        clients = f"{len(self._clients)} clients" + (f": {', '.join(parts)}" if parts else "")
        return clients if self._status else f"Sapin is down; {clients}"
