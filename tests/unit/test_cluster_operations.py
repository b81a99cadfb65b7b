"""What a node without a [cluster] table answers about the pair, and that a reload neither makes nor ends a pair."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sapin.api.cluster_operations import ClusterOperations
from sapin.api.refused import Refused
from sapin.api.reloading import ReloadError, _check_cluster
from sapin.cluster.config import Cluster, Side, VirtualAddress, _interface
from sapin.core.model import Config


def test_a_node_alone_says_that_it_is() -> None:
    operations = ClusterOperations(None)
    assert operations.status() == {"enabled": False, "why": "the configuration has no [cluster] table"}
    assert operations.events() == []


def test_a_node_alone_has_nobody_to_hand_over_to() -> None:
    operations = ClusterOperations(None)
    with pytest.raises(Refused, match="no \\[cluster\\] table"):
        operations.step_down()
    with pytest.raises(Refused, match="no \\[cluster\\] table"):
        operations.notify("active")


def test_a_reload_neither_makes_nor_ends_a_pair() -> None:
    alone = Config.__new__(Config)
    object.__setattr__(alone, "sections", {})
    cluster = Cluster((), (VirtualAddress(_interface("10.60.0.1/24"), "back", Side.SERVERS),))
    pair = Config.__new__(Config)
    object.__setattr__(pair, "sections", {"cluster": cluster})
    for old, new in ((alone, pair), (pair, alone)):
        with pytest.raises(ReloadError, match="restart the daemon"):
            _check_cluster(old, new)
    moved = Config.__new__(Config)
    other = replace(cluster, virtual_addresses=())
    object.__setattr__(moved, "sections", {"cluster": other})
    with pytest.raises(ReloadError, match="servers"):
        _check_cluster(pair, moved)
    _check_cluster(pair, pair)
