"""Any sequence of changes: after each, the snapshot is consistent, and what was told adds up to it."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sapin.core.model import AdminState, Config, Health, RealServer
from sapin.core.registry import PluginError
from sapin.core.snapshot import Member, Snapshot
from sapin.core.writer import UnknownObject, Writer, plugins_of
from tests.fakes import Lives, config, follower, living, own

NOW = 1_000
STATES = st.sampled_from(AdminState)
NAMES = st.sampled_from(["gw1", "gw2", "gw3"])
SERVERS = st.builds(
    RealServer,
    NAMES,
    st.sampled_from([ip_address("10.60.0.1"), ip_address("10.60.0.2"), ip_address("2001:db8::1")]),
    weight=st.integers(0, 2),
    state=STATES,
)
SCHEDULERS = st.builds(own, size=st.integers(0, 1), unopenable=st.sampled_from([False] * 9 + [True]))
LISTS = st.lists(SERVERS, min_size=1, max_size=3, unique_by=lambda server: server.name)
GROUPS = st.sampled_from(["ike", "other"])


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """One or two groups, perhaps with a follower."""
    services = [
        living(*draw(LISTS), name=name, port=port, scheduler=draw(SCHEDULERS))
        for name, port in (("ike", 500), ("other", 9))[: draw(st.integers(1, 2))]
    ]
    if draw(st.booleans()):
        services.append(follower(services[0]))
    return config(*services)


class WriterMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.lives = Lives()
        self.told: list[tuple[Snapshot, Snapshot]] = []
        self.writer = Writer(self.lives.registry, lambda change: None, config(living()))
        self.writer.subscribe(lambda old, new: self.told.append((old, new)))

    @property
    def snapshot(self) -> Snapshot:
        return self.writer.snapshot

    def candidates(self) -> list[tuple[Member, ...]]:
        return [pool.candidates for group in self.snapshot.groups.values() for pool in group.pools.values()]

    @rule(new=configs())
    def load(self, new: Config) -> None:
        before = self.snapshot
        try:
            self.writer.load(new)
        except PluginError:
            assert self.snapshot is before

    @rule()
    def load_again(self) -> None:
        before = self.candidates()
        self.writer.load(self.snapshot.config)
        assert list(map(id, self.candidates())) == list(map(id, before))

    @rule(server=NAMES, group=GROUPS, state=STATES)
    def set_admin(self, server: str, group: str, state: AdminState) -> None:
        try:
            self.writer.set_admin(group, server, state)
        except UnknownObject:
            return
        assert self.snapshot.groups[group].members[server].admin is state

    @rule(server=NAMES, group=GROUPS, health=st.sampled_from(Health), asked=STATES)
    def set_health(self, server: str, group: str, health: Health, asked: AdminState) -> None:
        self.writer.set_health(group, server, health, asked, 100)

    @rule(group=GROUPS, client=st.binary(min_size=1, max_size=1), data=st.data())
    def pin(self, group: str, client: bytes, data: st.DataObject) -> None:
        found = self.snapshot.groups.get(group)
        keeping = [member for member in found.members.values() if member.keeps] if found else []
        if found is not None and keeping:
            found.table.put((client,), data.draw(st.sampled_from(keeping)), NOW)

    @invariant()
    def pools_have_who_takes_new_clients(self) -> None:
        for group in self.snapshot.groups.values():
            for version in (4, 6):
                pool = group.pools.get(version)
                taking = [m for m in group.members.values() if m.version == version and m.takes]
                assert list(pool.candidates if pool else ()) == taking

    @invariant()
    def states_are_settled(self) -> None:
        for group in self.snapshot.groups.values():
            for member in group.members.values():
                before = (member.keeps, member.takes)
                member.settle()
                assert (member.keeps, member.takes) == before

    @invariant()
    def pins_are_those_of_servers_that_keep_them(self) -> None:
        for group in self.snapshot.groups.values():
            keeping = {name for name, member in group.members.items() if member.keeps}
            counts = group.table.counts()
            assert set(counts) <= keeping
            assert {n: m.pinned for n, m in group.members.items() if m.pinned} == counts
            for page in group.table.pins(limit=1_000).pins:
                assert group.table.get(page.keys[0]) is group.members[page.server]

    @invariant()
    def admin_states_are_the_files_unless_overridden(self) -> None:
        for name, group in self.snapshot.groups.items():
            assert {s.name for s in group.leader.real_servers} == set(group.members)
            for server in group.leader.real_servers:
                wanted = self.writer.overrides[name].get(server.name, server.state)
                assert group.members[server.name].admin is wanted

    @invariant()
    def what_is_open_is_what_is_used(self) -> None:
        used = [h.plugin for g in self.snapshot.groups.values() for h in plugins_of(g)]
        assert sorted(map(id, self.lives.open)) == sorted(map(id, used))

    @invariant()
    def versions_follow_each_other(self) -> None:
        assert [new.version for _, new in self.told] == list(range(2, len(self.told) + 2))
        assert all(new is old for (_, new), (old, _) in pairwise(self.told))


TestWriter = WriterMachine.TestCase
TestWriter.settings = settings(max_examples=50, stateful_step_count=15)
