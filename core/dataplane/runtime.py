"""The running dataplane: joins the writer, the forwarder, the checks and the store, and keeps the time.

The order of a start is the point of it: lock the state directory, read it, bind, restore pins and flows, and
only then read the first datagram. So tunnels go on through any restart.
"""

from __future__ import annotations

import gc
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from random import Random

import structlog
import trio

from sapin.core.affinity import AffinityTable, Cause, Change, Pin, Removed
from sapin.core.contracts import Key
from sapin.core.dataplane.binding import Binder
from sapin.core.dataplane.flows import Counters
from sapin.core.dataplane.limits import ephemeral_ports, flows_that_fit
from sapin.core.dataplane.listeners import Listener
from sapin.core.dataplane.outlet import Outlet
from sapin.core.dataplane.overrides import load_overrides, save_overrides
from sapin.core.dataplane.pairing import Pairing
from sapin.core.dataplane.ports import upstream_ranges
from sapin.core.dataplane.prober import Prober
from sapin.core.dataplane.recovery import Restored
from sapin.core.dataplane.reopening import Reopener
from sapin.core.dataplane.store import Store
from sapin.core.dataplane.udp import Forwarder
from sapin.core.journal import FlowClosed, Record, Tick
from sapin.core.model import AdminState, Config, IPAddress, VirtualService
from sapin.core.registry import Registry, told
from sapin.core.replicated import ReplicatedTable
from sapin.core.snapshot import Group, Snapshot
from sapin.core.writer import Writer, plugins_of

UPSTREAM_PORTS = (16_384, 65_535)
"""Where upstream ports are taken from; each real server's endpoint has the whole range to itself."""
STEP = 128
"""Pins or flows that one step of expiry looks at: some 0.5 ms."""
PAGE = 250
"""Pins or flows that one step of a checkpoint looks at: some 0.5 ms."""
TICK = 10
"""Seconds between the journal's notes that the daemon is alive."""
REPORT = 60
"""Seconds between two reports of drops or plugin faults."""
RESTART = (0.01, 5.0)
"""Seconds until a part that failed is started again: at first, and at most. One that has run for longer than the
most before it failed counts as failing for the first time."""
PREPARATION = (1.0, 10.0)
"""Seconds that a start waits for the schedulers' tables, and that one scheduler may take at any time."""
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
THAW = 3600
"""Seconds between full garbage collections; one takes some 20 ms per 100,000 flows."""

log = structlog.get_logger("sapin.dataplane")


def steady_wall_clock() -> Callable[[], float]:
    """Wall-clock seconds as of now, that go on evenly even if somebody sets the clock.

    One clock serves expiry, which must not jump, and the disk, which must mean something after a restart.
    """
    ahead = time.time() - time.monotonic()
    return lambda: time.monotonic() + ahead


def _collect_everything() -> None:
    """A full garbage collection, of what was frozen too.

    From 3.14 on it would look into every pin (python/cpython#127010); there, what is frozen stays so.
    """
    if sys.version_info < (3, 14):
        gc.unfreeze()
    gc.collect()


class Dataplane:
    """One node's dataplane.

    Args:
        config: a valid configuration.
        registry: where plugins come from.
        descriptors: the limit of file descriptors in force.
        floating: on a node that has a peer, the source of what goes to real servers, by address family. Such a node
            begins as a standby: everything is bound, to addresses that it may not have, and it forwards what
            comes, but it runs no check, and lets nothing expire (:meth:`activate`). ``None``: there is no peer.

    Raises:
        StoreError: the state directory cannot be used, or another daemon has it.
        ListenError: a virtual service cannot be bound.
        PluginError: a plugin cannot be used.
        ValueError: the saved admin states cannot be read.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        descriptors: int,
        random: Random | None = None,
        floating: Mapping[int, IPAddress] | None = None,
    ) -> None:
        self._wall = time.time
        """For the ticks on disk: a clock that was set right after the start must not age the pins at the next one."""
        self.clock = steady_wall_clock()
        self.started = int(self.clock())
        self._random = random or Random()
        self._deleted: defaultdict[str, set[Key]] = defaultdict(set)
        """Keys of pins that are being deleted, by group."""
        self._stale = trio.Event()
        self._unprepared = trio.Event()
        self._preparing = trio.CapacityLimiter(4)
        """Threads for plugins, which may hang, apart from those that the disk needs."""
        self._reported: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        """How often a part of the dataplane had to be started again."""
        self.store = Store(config.node.state_dir)
        self.store.open()
        with ExitStack() as undo:
            undo.callback(self.store.close)
            restored = self.store.load()
            self._outlet = None if floating is None else Outlet(self.store, self.clock)
            self._append = self._outlet.append if self._outlet else self.store.append
            self._flush = self._outlet.flush if self._outlet else self.store.flush
            self.writer = Writer(
                registry,
                self._feed,
                config,
                load_overrides(config.node.state_dir),
                table=AffinityTable if floating is None else ReplicatedTable,
                told=self._outlet.tell_now if self._outlet else None,
            )
            undo.callback(self.writer.close)
            self.prober = Prober(self.writer, registry, self._random)
            self.forwarder = Forwarder(
                journal=self._append,
                flush=self._flush,
                suspect=self.prober.suspect,
                random=self._random,
                clock=self.clock,
                descriptors=descriptors,
                ports=upstream_ranges(*UPSTREAM_PORTS, ephemeral_ports()),
                outlet=self._outlet,
                sources={FAMILIES[version]: source for version, source in (floating or {}).items()},
            )
            undo.callback(self.forwarder.close)
            self._binder = Binder(lambda: self.snapshot.config.node.receive_buffer, floating is not None)
            self.forwarder.apply(self.writer.snapshot)
            self.reopener = Reopener(
                self.forwarder,
                lambda: self.snapshot,
                self._binder.bind_local,
                self._append,
                self._flush,
                self.clock,
            )
            self.pairing: Pairing | None = None
            """What the peer is kept like this node by; ``None`` if there is none."""
            if self._outlet:
                self.pairing = Pairing(
                    self.writer,
                    self.forwarder,
                    self.reopener,
                    self.prober,
                    self._outlet,
                    self.store,
                    self._save_overrides,
                    self.clock,
                )
            for service in config.virtual_services:
                for listener in self._binder.bind(service):
                    self.forwarder.add_listener(listener)
            self._restore(restored)
            undo.pop_all()
        self.writer.subscribe(self._follow)
        self._warn_of_limits(descriptors)

    @property
    def snapshot(self) -> Snapshot:
        """The running snapshot."""
        return self.writer.snapshot

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Forward, check and keep house until cancelled; then leave everything on disk."""
        try:
            with trio.move_on_after(PREPARATION[0]):
                await self._prepare(self.snapshot)
            gc.collect()
            gc.freeze()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._supervise, "forwarder", self.forwarder.run)
                nursery.start_soon(self._supervise, "checks", self.prober.run)
                nursery.start_soon(self._supervise, "time", self._keep_time)
                nursery.start_soon(self._supervise, "housekeeping", self._keep_house)
                nursery.start_soon(self._supervise, "stale flows", self._drop_stale)
                nursery.start_soon(self._supervise, "preparation", self._keep_prepared)
                if self.pairing:
                    nursery.start_soon(self._supervise, "dormant flows", self.reopener.run)
                    nursery.start_soon(self._supervise, "touches", self.pairing.keep_touching)
                task_status.started()
        finally:
            self.forwarder.close()
            self.store.append(Tick(int(self._wall())))
            self.store.close()
            self.writer.close()

    async def _supervise(self, name: str, task: Callable[[], Awaitable[None]]) -> None:
        """Run a part that must not take the others with it: what fails is logged, counted and started again."""
        shortest, longest = RESTART
        pause = shortest
        while True:
            began = trio.current_time()
            try:
                await task()
            except Exception:
                pause = pause if trio.current_time() - began < longest else shortest
                self.failures[name] += 1
                log.exception("a part of the dataplane failed and is started again", part=name, seconds=pause)
            await trio.sleep(pause)
            pause = min(2 * pause, longest)

    def reload(self, config: Config) -> None:
        """Make the configuration the running one, or raise and change nothing.

        Flows that it does not concern are not touched.

        Raises:
            ListenError: a new virtual service cannot be bound.
            PluginError: a plugin cannot be used.
            OSError: it is in force, but the admin states that it changes could not be saved.
        """
        wanted = {service.name: service for service in config.virtual_services}
        leaving = [each for each in self.forwarder.listeners if not _serves(each, wanted)]
        staying = {each.service.name for each in self.forwarder.listeners if _serves(each, wanted)}
        new = [service for service in config.virtual_services if service.name not in staying]
        with self._binder.bound(new, leaving) as fresh:
            self.writer.load(config)
        for listener in leaving:
            self.forwarder.remove_listener(listener)
        for listener in self.forwarder.listeners:
            listener.update(wanted[listener.service.name])
        for listener in fresh:
            listener.share(False)
            self.forwarder.add_listener(listener)
        for name in self._binder.counters.keys() - wanted.keys():
            del self._binder.counters[name]
        self._flush()
        self._save_overrides()

    def set_admin(self, service: str, server: str, state: AdminState) -> None:
        """Set what the operator wants of a server, in the whole affinity group, and keep it over restarts.

        Raises:
            UnknownObject: there is no such service or server.
            OSError: it is in force, but could not be saved.
        """
        self.writer.set_admin(service, server, state)
        self._flush()
        self._save_overrides()

    def _save_overrides(self) -> None:
        save_overrides(self.store.directory, self.writer.overrides)

    def delete_pins(self, pins: Iterable[tuple[Group, Key]]) -> int:
        """Delete the pins that have these keys, and their flows; how many there were."""
        deleted = sum(group.table.remove(key) for group, key in pins)
        for name, keys in self._deleted.items():
            self.forwarder.flows.forget(name, keys)
        self._deleted.clear()
        self._flush()
        return deleted

    def counters(self, service: str) -> Mapping[str, Counters]:
        """What has passed for a service, by server."""
        return self._binder.counters[service]

    # the pair

    @property
    def active(self) -> bool:
        """Whether this node is the one that checks servers and lets things expire."""
        return self.pairing is None or self.pairing.active

    def activate(self) -> None:
        """This node is the active one: it checks servers, lets things expire, and tells the peer its changes."""
        if self.pairing:
            self.pairing.activate()
        self._stale.set()

    def deactivate(self) -> None:
        """The peer is the active one, and says what changes. Pins and flows stay as they are until it does."""
        if self.pairing:
            self.pairing.deactivate()

    # starting

    def _restore(self, restored: Restored) -> None:
        log.info("state restored", found=str(restored.report))
        for damage in restored.report.damaged:
            log.error("a state file is damaged; what it held since then is lost", file=str(damage))
        if restored.report.refused:
            log.error("records of the state make no sense and were left out", records=restored.report.refused)
        now = int(self.clock())
        for name, pins in restored.pins.items():
            group = self.snapshot.groups.get(name)
            if group is None:
                continue
            members = {name: member for name, member in group.members.items() if member.keeps}
            timeout = group.table.timeout
            group.table.restore(
                (Pin(p.keys, p.server, p.since, max(p.since, restored.tick) + timeout) for p in pins),
                members,
                now,
            )
        lost = [flow for flow in restored.flows if self.reopener.open(flow) is None]
        for flow in lost:
            if self.pairing:
                self.reopener.remember(flow)
            else:
                self.store.append(FlowClosed(flow.service, flow.client, flow.client_port, flow.local))
        if lost and not self.pairing:
            log.warning("flows could not be restored; their clients will be decided anew", flows=len(lost))
        self.store.flush()

    def _warn_of_limits(self, descriptors: int) -> None:
        wanted = self.snapshot.config.node.max_flows
        fit = flows_that_fit(descriptors, len(self.forwarder.listeners))
        if fit < wanted:
            log.warning(
                "too few file descriptors for max_flows; further flows are refused",
                max_flows=wanted,
                flows_that_fit=fit,
                remedy="raise the hard limit of open files (LimitNOFILE= in the systemd unit), or lower max_flows",
            )

    # changes

    def _feed(self, change: Change) -> None:
        """Every change of an affinity table, to the journal."""
        self._append(change)
        if isinstance(change, Removed) and change.cause is Cause.DELETED:
            self._deleted[change.group].update(change.keys)

    def _follow(self, old: Snapshot, new: Snapshot) -> None:
        """A new snapshot is out."""
        self.forwarder.apply(new)
        self.prober.apply(old, new)
        self._stale.set()
        self._unprepared.set()

    async def _drop_stale(self) -> None:
        """Close the flows of servers that lost their clients, a few at a time."""
        while True:
            self._stale = trio.Event()
            belongs, flows = self.forwarder.admission.belongs, list(self.forwarder.flows)
            for at in range(0, len(flows), STEP):
                if self.active:
                    self.forwarder.flows.close_some(flows[at : at + STEP], belongs)
                    self._flush()
                await trio.lowlevel.checkpoint()
            self._forget_gone()
            await self._stale.wait()

    def _forget_gone(self) -> None:
        """Give up what was kept for servers that are gone, now that their flows are."""
        self.forwarder.forget_ports()
        for name, view in self.snapshot.services.items():
            counters = self._binder.counters[name]
            for server in counters.keys() - view.group.members.keys():
                if not counters[server].flows:
                    del counters[server]

    async def _keep_prepared(self) -> None:
        while True:
            self._unprepared = trio.Event()
            await self._prepare(self.snapshot)
            await self._unprepared.wait()

    async def _prepare(self, snapshot: Snapshot) -> None:
        """Let schedulers that have tables build them, in a thread, for the current candidates."""
        for group in snapshot.groups.values():
            for pool in group.pools.values():
                prepare = getattr(pool.scheduler.plugin, "prepare", None)
                if prepare is None or not pool.candidates:
                    continue
                try:
                    with trio.fail_after(PREPARATION[1]):
                        await trio.to_thread.run_sync(
                            prepare, pool.candidates, abandon_on_cancel=True, limiter=self._preparing
                        )
                except Exception as error:
                    pool.scheduler.fault(f"prepare: {told(error)}", self.clock())

    # housekeeping

    async def _keep_time(self) -> None:
        """Once a second, whatever the disk does: what is due."""
        while True:
            await trio.sleep(1)
            self.forwarder.tick()
            await self._expire(int(self.clock()))
            if self._outlet:
                self._outlet.release_overdue()
            self._flush()

    async def _keep_house(self) -> None:
        """Once a second: disk, garbage, and what there is to report."""
        noted = reported = thawed = self.clock()
        while True:
            await trio.sleep(1)
            now = self.clock()
            if now - noted >= TICK:
                noted = now
                self.store.append(Tick(int(self._wall())))
            if self.pairing and self.pairing.replica.receiving:
                await self.store.sync()
            else:
                await self.store.maintain(self._live, int(self._wall()))
            if now - reported >= REPORT:
                reported = now
                self._report()
            if now - thawed >= THAW:
                thawed = now
                _collect_everything()
            gc.freeze()

    async def _expire(self, now: int) -> None:
        """End what is due; on a standby, whose peer says what ends, put it off."""
        flows = self.forwarder.flows
        while flows.expire(now, STEP) if self.active else flows.postpone(now, STEP):
            await self._rest()
        for group in self.snapshot.groups.values():
            table = group.table
            while table.expire(now, STEP) if self.active else table.postpone(now, STEP):
                await self._rest()
            while table.sweep(STEP):
                await self._rest()

    async def _rest(self) -> None:
        if self._outlet:
            self._outlet.flush()  # the peer compares digests whenever other tasks run
        await trio.lowlevel.checkpoint()

    def _live(self) -> Iterator[Sequence[Record]]:
        """The state for a checkpoint, in chunks, each as it is when it is asked for."""
        for group in self.snapshot.groups.values():
            start: int | None = 0
            while start is not None:
                puts, start = group.table.puts(start, PAGE)
                yield puts
        flows, by_fd = list(self.forwarder.flows), self.forwarder.flows.by_fd
        for at in range(0, len(flows), PAGE):
            part = flows[at : at + PAGE]
            yield [self.forwarder.flows.record(flow) for flow in part if by_fd.get(flow.fd) is flow]
        dormant = self.reopener.records()
        while chunk := list(islice(dormant, PAGE)):
            yield chunk

    def _report(self) -> None:
        """What went wrong since the last report, if anything did."""
        wrong = Counter({f"dropped: {cause}": n for cause, n in self.forwarder.drops.items()})
        wrong.update({f"ICMP from servers: {name}": n for name, n in self.forwarder.errors.items()})
        for group in self.snapshot.groups.values():
            for hosted in plugins_of(group):
                wrong[f"faults of {hosted.kind} {hosted.name} in {group.name}"] += hosted.faults.total
        if self.pairing:
            wrong.update(self.pairing.faults())
        news = {what: n - self._reported[what] for what, n in wrong.items() if n > self._reported[what]}
        self._reported = wrong
        if news:
            log.warning("in the last minute", **news)
        if self.store.failed:
            log.error(
                "pins and flows are not on disk: a restart now would lose them", reason=self.store.failed
            )


def _serves(listener: Listener, wanted: Mapping[str, VirtualService]) -> bool:
    """Whether the listener's service is wanted, and where it is."""
    service = wanted.get(listener.service.name)
    return service is not None and service.endpoint == listener.service.endpoint
