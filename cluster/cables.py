"""Has an active node that cannot hear its networks hand over; when, is for :mod:`sapin.cluster.carrier` to say."""

from __future__ import annotations

import time
from collections.abc import Iterable

import structlog
import trio

from sapin.cluster.carrier import Carriers
from sapin.cluster.devices import Devices
from sapin.cluster.session import Session

LOOK = 0.25
"""Seconds between two looks at whether the node may hand over, while a carrier is away or the role may change."""

log = structlog.get_logger("sapin.cluster")


async def keep_cables(session: Session, devices: Iterable[str]) -> None:
    """Watch the devices that have a virtual address, until cancelled.

    Raises:
        OSError: the kernel cannot be asked.
    """
    carriers = Carriers(devices)
    kernel = Devices()
    news = trio.Event()

    async def listen() -> None:
        async for device, carrier in kernel.changes():
            if carriers.told(device, carrier, time.monotonic()):
                log.log(
                    20 if carrier else 40,
                    "a device has a carrier" if carrier else "no carrier",
                    device=device,
                )
                news.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            while True:
                deadline = carriers.deadline(time.monotonic())
                wait = LOOK if deadline is None else max(deadline - time.monotonic(), 0.001)
                with trio.move_on_after(min(wait, LOOK)):
                    await news.wait()
                news = trio.Event()
                _leave_if_due(session, carriers)
    finally:
        kernel.close()


def _leave_if_due(session: Session, carriers: Carriers) -> None:
    if not carriers.down or not session.pair.active or not session.pair.in_sync:
        return
    if not carriers.leave(time.monotonic()):
        return
    log.warning("this node hands over: it has no carrier", devices=sorted(carriers.down))
    refused: list[str | None] = []
    session.tell(lambda now: refused.append(session.pair.step_down(now)))
    if refused != [None]:
        log.warning("this node does not hand over", reason=next(iter(refused), "it failed"))
