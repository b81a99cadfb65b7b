"""The demonstration: Sapin on loopback with three small IKE responders and a crowd of initiators.

It uses Sapin as an operator would: a configuration file, the daemon as a process, the control socket.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import trio

from sapin.api.demo.balancer import DemoError
from sapin.api.demo.screen import Result, Screen
from sapin.api.demo.stage import CALM, FAST, GATEWAYS, IKE_PORT, NATT_PORT, Network
from sapin.api.demo.story import Story

USUAL = 73
"""The second byte of the loopback addresses, unless something uses them already."""
INTERRUPTED = 130
NEXT = """
Next, with addresses of your own:
   sapin init ikev2 --vip ADDRESS --server GATEWAY --server GATEWAY > sapin.toml
   sapin check sapin.toml
   sapin run sapin.toml
The README and docs/cli.md say more."""


def run(*, keep: bool, fast: bool) -> int:
    """Play it on standard output; the exit code: 0, 1 if something did not do as it should, 130 if interrupted.

    Args:
        keep: go on after the summary, until interrupted.
        fast: leave out the pauses.
    """
    screen = Screen()
    screen.say("Sapin on loopback: three VPN gateways behind one address. No root is needed.")
    results: Sequence[Result] | None = ()
    try:
        with TemporaryDirectory(prefix="sapin-demo-") as folder, screen:
            results = trio.run(partial(_main, screen, Path(folder), keep=keep, fast=fast))
    except* DemoError as group:
        for error in group.exceptions:
            screen.event(str(error), "bold red")
    if results is None:
        return INTERRUPTED
    if not results or not all(result.ok for result in results):
        return 1
    screen.say(NEXT)
    return 0


async def _main(screen: Screen, folder: Path, *, keep: bool, fast: bool) -> Sequence[Result] | None:
    """The results, ``None`` if it was interrupted before there were all."""
    random = Random()
    network = find_network(random)
    results = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            story = Story(folder, network, FAST if fast else CALM, screen, random, nursery)
            nursery.start_soon(_end_on, signals, nursery.cancel_scope)
            try:
                await story.play()
                results = story.results
                screen.summary(results)
                if keep:
                    _say_how_to_look(screen, story)
                    await trio.sleep_forever()
            finally:
                await story.close()
            nursery.cancel_scope.cancel()
    return results


def _say_how_to_look(screen: Screen, story: Story) -> None:
    screen.say(
        f"\nIt goes on until ctrl-c. In another terminal: sapin top --state-dir {story.state_dir} "
        f"(or status, pins, explain, server)"
    )


async def _end_on(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


def find_network(random: Random) -> Network:
    """Loopback addresses of which nobody uses the ports.

    Raises:
        DemoError: none were found.
    """
    for number in (USUAL, *random.sample(range(74, 127), 20)):
        network = Network(number)
        ours = [network.balancer, *(network.gateway(n + 1) for n in range(GATEWAYS))]
        if all(_free(str(address), port) for address in ours for port in (IKE_PORT, NATT_PORT)):
            return network
    raise DemoError(
        f"UDP ports {IKE_PORT} and {NATT_PORT} are in use on every loopback address that was tried"
    )


def _free(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((address, port))
        except OSError:
            return False
    return True
