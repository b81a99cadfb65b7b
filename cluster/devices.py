"""Listens to what the kernel says of network devices; what it means is in :mod:`sapin.cluster.carrier`."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import suppress
from errno import ENOBUFS

import trio

from sapin.cluster.carrier import ask, parse

RTMGRP_LINK = 1
"""linux/rtnetlink.h."""
_MESSAGE = 65_536
"""Bytes that the kernel says at once, at most: NLMSG_GOODSIZE is less."""


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
