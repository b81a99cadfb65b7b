"""Listens to what the kernel says of network devices, and hands over when it is time to.

What it means is in :mod:`sapin.cluster.carrier`.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from errno import ENOBUFS

import structlog
import trio

from sapin.cluster.carrier import Carriers, ask, parse

RTMGRP_LINK = 1
"""linux/rtnetlink.h."""
_MESSAGE = 65_536
"""Bytes that the kernel says at once, at most: NLMSG_GOODSIZE is less."""
_LOOK = 0.1
"""Seconds between two looks whether a node that lacks a carrier has become active."""

log = structlog.get_logger("sapin.cluster")


class Devices:
    """The state of this machine's network devices, and every change of it."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, RTMGRP_LINK))

    async def changes(self) -> AsyncGenerator[tuple[str, bool], None]:
        """Devices and whether they have a carrier: first all of them, then each that changes.

        What the kernel had to drop is made good by asking for all of them again.
        """
        self._socket.send(ask())
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data = self._socket.recv(_MESSAGE)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != ENOBUFS:
                    raise
                with suppress(BlockingIOError):
                    self._socket.send(ask())
                continue
            for change in parse(data):
                yield change

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


async def hand_over_when_deaf(
    names: Iterable[str], active: Callable[[], bool], step_down: Callable[[], str | None]
) -> None:
    """Step down whenever this node is active and one of its networks is out of reach; until cancelled.

    Args:
        names: the devices that have a virtual address.
        active: whether this node is.
        step_down: hands over; why not, if that cannot be.
    """
    carriers, devices = Carriers(names), Devices()
    changed = trio.Event()

    async def listen() -> None:
        nonlocal changed
        async with aclosing(devices.changes()) as changes:
            async for device, carrier in changes:
                if carriers.told(device, carrier, trio.current_time()):
                    log.warning(
                        "a device has a carrier again" if carrier else "a device has no carrier",
                        device=device,
                    )
                    changed.set()
                    changed = trio.Event()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            while True:
                due = carriers.deadline(trio.current_time())
                with trio.move_on_at(float("inf") if due is None else due):
                    await changed.wait()
                if not active():
                    await trio.sleep(_LOOK if carriers.down else 0)
                elif carriers.leave(trio.current_time()):
                    _report(carriers.down, step_down())
    finally:
        devices.close()


def _report(down: Iterable[str], refused: str | None) -> None:
    if refused is None:
        log.warning("this node cannot hear all its networks, and hands over", devices=sorted(down))
    else:
        log.error(
            "this node cannot hear all its networks, and stays active", devices=sorted(down), reason=refused
        )
