"""Two nodes with everything but the addresses: pins cross the link, roles move, configurations follow."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from sapin.api.operations import Operations
from sapin.api.refused import Refused
from sapin.cluster.membership import Folder
from sapin.core.registry import Registry
from tests.cluster.nodes import SHARED, Couple, couple
from tests.cluster.pairs import until
from tests.dataplane.farm import IKE, Farm, gateways, ike_message
from tests.dataplane.twins import VIPS, again, same

GATEWAYS = {f"gw{number}": f"127.9.1.{number}" for number in (1, 2, 3)}


@pytest.fixture
async def farm(tmp_path: Path) -> AsyncIterator[Farm]:
    async with gateways(tmp_path / "state", GATEWAYS) as farm:
        yield farm


async def test_a_client_goes_on_when_the_active_node_dies(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, _):
        active, standby = pair.active, pair.standby
        assert active.name == "lb-a"
        client, spi = farm.client(host=VIPS[0]), os.urandom(8)
        home, port = await farm.route(client, ike_message(spi))
        await until(lambda: same(active.plane, standby.plane))
        assert not active.plane.pairing.outlet.held
        await active.kill()
        await until(lambda: standby.role == "active")
        await until(lambda: pair.network.guards["lb-b"].here)
        assert await farm.route(again(farm, client), ike_message(spi)) == (home, port)
        await until(lambda: standby.status["last_failover"]["answered"] == 1)
        failover = standby.status["last_failover"]
        assert failover["pins"] == 1
        assert failover["duration"] < 1
        assert [each["here"] for each in standby.status["virtual_addresses"]] == [True, True]


async def test_a_reply_waits_for_the_peer_s_acknowledgement(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, _):
        before = pair.active.status["replication"]["acked"]
        for number in range(5):
            await farm.route(
                farm.client(host=VIPS[0], source=f"127.0.1.{number + 1}"), ike_message(os.urandom(8))
            )
        assert pair.active.status["replication"]["acked"] >= before + 5
        assert pair.active.status["replication"]["ack_p50"] < 0.1
        assert pair.active.status["replication"]["desyncs"] == 0


async def test_pins_and_states_are_the_active_node_s_to_change(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, _):
        active, standby = (
            Operations(half.plane, Registry(), tmp_path / "sapin.toml", half.node)
            for half in (pair.active, pair.standby)
        )
        with pytest.raises(Refused, match="do it on lb-a"):
            standby.set_state("gw1", "draining")
        with pytest.raises(Refused, match="do it on lb-a"):
            await standby.delete_pins(server="gw1")
        active.set_state("gw1", "draining")
        members = pair.standby.plane.snapshot.groups[IKE].members
        await until(lambda: members["gw1"].admin == "draining")
        assert (await active.delete_pins(server="gw1"))["deleted"] == 0


async def test_a_planned_step_down_moves_the_role_and_back(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, _):
        one, other = pair.active, pair.standby
        assert other.node.step_down(force=False) is not None
        assert one.node.step_down(force=False) is None
        await until(lambda: other.role == "active" and one.role == "standby")
        await pair.settled()
        assert pair.active is other
        assert not pair.network.guards[one.name].here
        assert other.node.step_down(force=False) is None
        await until(lambda: one.role == "active" and other.role == "standby")
        await pair.settled()
        epochs = [half.status["epoch"] for half in pair.halves]
        assert epochs[0] == epochs[1] > 2


async def test_a_node_that_comes_back_is_the_standby_and_has_everything(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, nursery):
        first, second = pair.active, pair.standby
        await first.kill()
        await until(lambda: second.role == "active")
        for number in range(3):
            client = farm.client(host=VIPS[1], source=f"127.0.1.{number + 1}")
            await farm.route(client, ike_message(os.urandom(8)))
        await nursery.start(first.run)
        await pair.settled()
        assert pair.active is second
        await until(lambda: same(first.plane, second.plane))
        assert len(first.plane.snapshot.groups[IKE].table) == 3


async def test_a_stop_hands_over(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, _):
        active, standby = pair.active, pair.standby
        await active.node.leave()
        assert standby.role == "active"
        assert not pair.network.guards[active.name].here
        await active.kill()


async def test_the_active_node_s_configuration_comes_to_the_standby(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, _):
        active, standby = pair.active, pair.standby
        text = active.config.read_text() + "other = true  # a comment\n"
        active.config.write_text(text)
        assert active.node.refuses_reload(text) is None
        active.node.reloaded(text, active.node._cluster)
        await until(lambda: "# a comment" in standby.config.read_text())
        assert standby.config.read_text() == f'[node]\nname = "lb-b"\n\n{SHARED}other = true  # a comment\n'
        assert standby.used == [standby.config.read_text()]
        assert "this node is the standby" in str(
            standby.node.refuses_reload(text.replace("other", "another"))
        )
        assert not standby.node.sharing.aside.exists()


async def test_a_conflict_keeps_the_loser_s_text_aside_and_is_an_alarm(farm: Farm, tmp_path: Path) -> None:
    async with couple(farm, tmp_path) as (pair, _):
        active, standby = pair.active, pair.standby
        edited = standby.config.read_text() + "mine = 1\n"
        standby.config.write_text(edited)
        text = active.config.read_text() + "theirs = 2\n"
        active.node.reloaded(text, active.node._cluster)
        await until(lambda: "theirs" in standby.config.read_text())
        aside = standby.node.sharing.aside
        assert aside.read_text() == edited
        await until(lambda: [alarm["name"] for alarm in standby.status["alarms"]] == ["config-conflict"])
        aside.unlink()
        await until(lambda: not standby.status["alarms"])


async def test_a_node_that_is_no_member_forwards_and_says_what_to_do(farm: Farm, tmp_path: Path) -> None:
    pair = Couple(farm, tmp_path)
    half = pair.halves[0]
    Folder(tmp_path / "state-0").remove("members.json")
    async with trio.open_nursery() as nursery:
        await nursery.start(half.run)
        await until(lambda: half.plane.active)
        client, spi = farm.client(host=VIPS[0]), os.urandom(8)
        await farm.route(client, ike_message(spi))
        assert half.status["enabled"] is False
        assert "sapin cluster init" in half.status["why"]
        assert not pair.network.guards
        assert half.node.step_down(force=True) == "this node belongs to no cluster"
        nursery.cancel_scope.cancel()


async def test_a_cluster_that_cannot_be_used_is_tried_again_and_forwarding_goes_on(
    farm: Farm, tmp_path: Path
) -> None:
    pair = Couple(farm, tmp_path)
    half, folder = pair.halves[0], Folder(tmp_path / "state-0")
    whole = folder.read("members.json")
    folder.write("members.json", b"{")
    async with trio.open_nursery() as nursery:
        await nursery.start(half.run)
        await until(lambda: half.status["failures"] >= 2)
        await farm.route(farm.client(host=VIPS[0]), ike_message(os.urandom(8)))
        folder.write("members.json", whole)
        await until(lambda: half.role == "active")
        nursery.cancel_scope.cancel()
