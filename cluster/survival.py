"""How many clients lived through a failover: pins that were answered again, of those that were taken over."""

from __future__ import annotations

from collections.abc import Iterator

from sapin.core.dataplane.flows import Flow, FlowTable

STEP = 200
"""Flows that are looked at at once: some 0.1 ms."""


class Survival:
    """Counts after one takeover. A client is heard of when its server has answered it.

    Args:
        pins: how many there were.
        flows: those of the node.
        now: seconds of the dataplane's clock.
    """

    def __init__(self, pins: int, flows: FlowTable, now: int) -> None:
        self.pins = pins
        self.since = now
        self._flows = flows
        self._before = {flow.fd: flow.answers for flow in flows if flow.answers}
        self._answered: set[tuple[str, bytes]] = set()

    @property
    def answered(self) -> int:
        """Pins that were answered since, as far as was looked."""
        return min(len(self._answered), self.pins)

    def look(self) -> Iterator[None]:
        """Look at all flows, a few at each step."""
        for number, flow in enumerate(list(self._flows), start=1):
            if flow.key and flow.opened <= self.since and self._was_answered(flow):
                self._answered.add((flow.listener.service.group, flow.key))
            if number % STEP == 0:
                yield

    def _was_answered(self, flow: Flow) -> bool:
        if flow.answers:
            return flow.answers > self._before.get(flow.fd, 0)
        return flow.answered and flow.last >= self.since
