"""A pair at work: one :class:`~sapin.cluster.pair.Pair` joined to the link, the guard, the dataplane, the disk and the clock.

Everything that happens is an input of the pair, and what it answers is carried out in that order. A claim waits until its epoch
is on disk, which it is beforehand unless the node has just started; nothing else waits for the disk. An input that fails costs the connection, which is then made anew and the peer brought up to date;
it never costs the forwarding.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
import trio

from sapin.cluster import guarding
from sapin.cluster.guarding import Guard
from sapin.cluster.keeper import Keeper
from sapin.cluster.link import Connected, Disconnected, Link, LinkError
from sapin.cluster.pair import Pair
from sapin.cluster.role import State
from sapin.cluster.settings import (
    Acked,
    Activate,
    Claim,
    CloseLink,
    Deactivate,
    Effect,
    Event,
    Persist,
    Probe,
    Release,
    Send,
    Stopped,
)
from sapin.cluster.wire import Record
from sapin.core.dataplane.outlet import Outlet

SLICE = 0.0008
"""Seconds that what has come over the link may be looked at before others get their turn."""
OUTBOX = 8 * 1024 * 1024
"""Bytes that may wait for the link; the window of what is not acknowledged is far less."""

log = structlog.get_logger("sapin.cluster")


class Plane(NamedTuple):
    """What a session does with the dataplane."""

    outlet: Outlet
    activate: Callable[[], None]
    deactivate: Callable[[], None]
    watch: Callable[[int], None]
    unwatch: Callable[[int], None]
    pins: Callable[[], int]
    """How many there are."""


class Session:
    """One pair at work.

    Args:
        pair: the machine, just made.
        link: the connection to the peer; ``None`` while no other node has joined.
        guard: whoever moves the addresses.
        clock: seconds, never going back; the pair's.
    """

    def __init__(
        self,
        pair: Pair,
        link: Link | None,
        guard: Guard,
        plane: Plane,
        keeper: Keeper,
        event: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pair = pair
        self.link = link
        self.failures = 0
        """Inputs that failed: faults of the program."""
        self.slowest = 0.0
        """Seconds that one turn of this session took at most."""
        self.longest_wait = 0.0
        """Seconds that a deadline was missed by at most."""
        self.here = False
        """Whether the virtual addresses are this node's."""
        self._guard = guard
        self._plane = plane
        self._keeper = keeper
        self._event = event
        self._clock = clock
        self._pending: deque[Effect] = deque()
        self._working = self._blocked = self._taken = self._inherits = False
        self._durable = trio.Event()
        self._awaited: int | None = None
        self._floor = self._floor_put = 0
        """The highest floor that was to be kept, and which write that was."""
        self._outbox: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._to_send = trio.Event()
        self._sleep = trio.CancelScope()
        self._stopped = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the pair going until cancelled."""
        outlet = self._plane.outlet
        watched: int | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._persist_first)
                nursery.start_soon(self._hear_guard)
                if self.link is not None:
                    await nursery.start(self.link.run)
                    watched = self.link.fd
                    self._plane.watch(watched)
                    nursery.start_soon(self._hear_link, self.link)
                    nursery.start_soon(self._send_what_waits, self.link)
                outlet.replicate = self._changed
                nursery.start_soon(self._keep_time)
                task_status.started()
        finally:
            outlet.replicate = None
            if watched is not None:
                self._plane.unwatch(watched)
            if self.link is not None:
                self.link.close()

    def inherit(self) -> None:
        """The addresses are here since before this session: they stay, unless somebody else is found to be active."""
        self.here = self._inherits = True

    def _settle(self) -> None:
        if self._inherits and self.pair.role.state is not State.STARTING:
            self._inherits = False
            if not self.pair.active:
                self._guard.release()

    def tell(self, told: Callable[[float], object]) -> None:
        """Give the pair an input, and carry out what it answers."""
        began = now = self._clock()
        try:
            told(now)
        except Exception:
            self.failures += 1
            log.exception("a fault in the pair: the connection is made anew")
            if self.link is not None:
                self.link.close_pipe()
        self._carry_out()
        self._settle()
        self.slowest = max(self.slowest, self._clock() - began)

    def _changed(self, records: Sequence[Record]) -> int:
        """The dataplane has made changes."""
        sequence = 0

        def told(now: float) -> None:
            nonlocal sequence
            sequence = self.pair.changed(records, now)

        self.tell(told)
        return sequence

    def say(self, record: Record) -> None:
        """Tell the peer something that is not the dataplane's."""
        self._changed([record])

    # effects

    def _carry_out(self) -> None:
        self._pending.extend(self.pair.effects())
        if self._working:
            return  # an effect was an input, too: what it leads to comes after what came before
        self._working = True
        try:
            while self._pending and not self._waits_for_disk():
                effect = self._pending.popleft()
                try:
                    self._do(effect)
                except Exception:
                    self.failures += 1
                    log.exception("what the pair asked for failed", effect=type(effect).__name__)
        finally:
            self._working = False
        if self._taken and not self._outbox:
            self._taken = False
            self.pair.writable(self._clock())  # what it has to say then, it says in its next turn
        self._set_alarm()

    def _waits_for_disk(self) -> bool:
        """Whether what is next has to wait: no epoch is claimed that the disk does not know of."""
        if isinstance(self._pending[0], Claim) and not self._keeper.is_durable(self._floor_put):
            self._awaited, self._blocked = self._floor_put, True
            self._durable.set()
        return self._blocked

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect.data)
            case Acked():
                self._plane.outlet.release(effect.sequence)
            case Persist():
                number = self._keeper.put(effect.saved)
                if effect.saved.floor > self._floor:
                    self._floor, self._floor_put = effect.saved.floor, number
            case CloseLink():
                self._close(effect.reason)
            case Event():
                self._event(effect)
            case Stopped():
                self._stopped.set()
            case _:
                self._move(effect)

    def _move(self, effect: Claim | Release | Probe | Activate | Deactivate) -> None:
        """The part of the role."""
        match effect:
            case Claim():
                self._guard.claim(effect.epoch)
            case Release():
                self._guard.release()
            case Probe():
                self._guard.probe()
            case Activate():
                self._plane.activate()
            case Deactivate():
                self._plane.deactivate()

    def _close(self, reason: str) -> None:
        log.warning("the connection to the peer is closed", reason=reason)
        if self.link is not None:
            self.link.close_pipe()

    async def _persist_first(self) -> None:
        """Go on with a claim once its epoch is on disk."""
        while True:
            await self._durable.wait()
            self._durable = trio.Event()
            number, self._awaited = self._awaited, None
            if number is not None:
                await self._keeper.durable(number)
            self._blocked = False
            self._carry_out()

    # the link

    def _send(self, data: bytes) -> None:
        if self.link is None:
            return
        if not self._outbox and self.link.send(data):
            self._taken = True
            return
        if self._waiting_bytes + len(data) > OUTBOX:
            self._forget_outbox()
            self._close("more waits for the link than it may")
            return
        self._outbox.append(data)
        self._waiting_bytes += len(data)
        self._to_send.set()

    def _forget_outbox(self) -> None:
        self._outbox.clear()
        self._waiting_bytes = 0

    async def _send_what_waits(self, link: Link) -> None:
        while True:
            await self._to_send.wait()
            self._to_send = trio.Event()
            while self._outbox:
                await link.writable()
                try:
                    while self._outbox and link.send(self._outbox[0]):
                        self._waiting_bytes -= len(self._outbox.popleft())
                    if not self._outbox:
                        self.tell(self.pair.writable)
                except LinkError as error:
                    self._forget_outbox()
                    self._close(str(error))

    async def _hear_link(self, link: Link) -> None:
        while True:
            await link.readable()
            while not self._drain(link):
                await trio.lowlevel.checkpoint()

    def _drain(self, link: Link) -> bool:
        """Take in what has come, for a short time; whether that was all."""
        until = self._clock() + SLICE
        while (received := link.receive()) is not None:
            if isinstance(received, bytes):
                data = received
                self.tell(lambda now, data=data: self.pair.received(data, now))  # type: ignore[misc]
            elif isinstance(received, Connected):
                log.info("the peer is connected", peer=received.peer, link=received.link)
                self._forget_outbox()
                self.tell(self.pair.connected)
            elif isinstance(received, Disconnected):
                self._forget_outbox()
                self.tell(self.pair.disconnected)
            if self._clock() >= until:
                return False
        return True

    # the guard

    async def _hear_guard(self) -> None:
        while True:
            self.tell(self._input(await self._guard.told()))

    def _input(self, told: guarding.Told) -> Callable[[float], object]:
        pair = self.pair
        if isinstance(told, guarding.Claimed | guarding.Gained):
            self.here = True
        elif isinstance(told, guarding.Released | guarding.Lost):
            self.here = False
        match told:
            case guarding.Farewell():
                return lambda now: pair.farewell(told.boot, told.epoch, now)
            case guarding.Claimed():
                return lambda now: pair.claimed(now, self._plane.pins())
            case guarding.Released():
                return pair.released
            case guarding.Answered():
                return lambda now: pair.answered(told.epoch, told.active, now)
            case guarding.Refused():
                return pair.refused
            case guarding.Gained():
                return pair.address_gained
            case guarding.Lost():
                return pair.address_lost

    def found(self, *, here: bool) -> None:
        """The addresses were moved by somebody else."""
        self.tell(self._input(guarding.Gained() if here else guarding.Lost()))

    # time

    async def _keep_time(self) -> None:
        """Wake the pair when it wants to be, after what has come in until then."""
        fed = 0.0
        while True:
            await self._sleep_until_due()
            if self.link is not None and not self._drain(self.link):
                await trio.lowlevel.checkpoint()
                if self._clock() - self.pair.deadline < self.pair.settings.heartbeat:
                    continue
            now = self._clock()
            self.longest_wait = max(self.longest_wait, now - self.pair.deadline)
            if now >= self.pair.deadline:
                self.tell(self.pair.wake)
            if now - fed >= self.pair.settings.heartbeat / 2:
                fed = now
                self._guard.feed(self.pair.epoch)

    async def _sleep_until_due(self) -> None:
        delay = self.pair.deadline - self._clock()
        if delay <= 0:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(deadline=trio.current_time() + delay) as self._sleep:
            await trio.sleep_forever()

    def _set_alarm(self) -> None:
        """The deadline may have moved."""
        self._sleep.deadline = trio.current_time() + self.pair.deadline - self._clock()

    # ending

    async def stop(self) -> None:
        """Hand over to the peer, if it can take over, and give the addresses up; returns when that is done."""
        self.tell(self.pair.stop)
        await self._stopped.wait()
