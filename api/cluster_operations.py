"""What an operator can ask of a node's part of the pair, as plain data; see :mod:`sapin.api.operations`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sapin.api.refused import Refused
from sapin.cluster.node import Node

MAX_EVENTS = 1_000

Row = dict[str, Any]


class ClusterOperations:
    """The operations of one node.

    Args:
        node: its part of the pair; ``None`` if the configuration has no ``[cluster]``.
    """

    def __init__(self, node: Node | None) -> None:
        self._node = node

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """The operations by the names that the control socket knows them by."""
        return {
            "cluster-status": self.status,
            "cluster-step-down": self.step_down,
            "cluster-events": self.events,
            "cluster-notify": self.notify,
        }

    def status(self) -> Row:
        """Roles, replication, addresses, alarms: the pair as this node sees it."""
        if self._node is None:
            return {"enabled": False, "why": "the configuration has no [cluster] table"}
        return self._node.describe()

    def step_down(self, force: bool = False) -> Row:
        """Hand over to the peer. Returns when that has begun.

        Args:
            force: release the addresses even if the peer has not everything, or is not there.

        Raises:
            Refused: it cannot be done; the text says why.
        """
        reason = self._with_node().step_down(force=force)
        if reason is not None:
            raise Refused(f"this node does not step down: {reason}")
        return {"stepping_down": True}

    def events(self, limit: int = 100) -> list[Row]:
        """What has happened lately, the newest last."""
        if self._node is None:
            return []
        return self._node.events(max(1, min(limit, MAX_EVENTS)))

    def notify(self, state: str) -> Row:
        """Hear from whoever moves the virtual addresses that they are here (``active``) or not (``standby``).

        Raises:
            Refused: the node moves them itself, or the state is none.
        """
        reason = self._with_node().notify(state)
        if reason is not None:
            raise Refused(reason)
        return {"state": state}

    def _with_node(self) -> Node:
        if self._node is None:
            raise Refused("the configuration has no [cluster] table")
        return self._node
