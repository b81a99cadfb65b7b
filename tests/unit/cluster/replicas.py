"""A replica that is a mapping of keys to servers, in which a pin has one key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sapin.cluster.wire import Record
from sapin.core.pins import Cause, Cleared, Put, Removed
from sapin.core.replicated import mix


class MappingReplica:
    """Fulfils :class:`~sapin.cluster.replication.Replica`."""

    def __init__(self, chunk: int = 3) -> None:
        self.pins: dict[bytes, str] = {}
        self._chunk = chunk
        self._seen: set[bytes] = set()
        self.applied = 0

    def put(self, key: bytes, server: str) -> Sequence[Record]:
        self.pins[key] = server
        return [Put("ike", (key,), server, 1)]

    def remove(self, key: bytes) -> Sequence[Record]:
        server = self.pins.pop(key, None)
        return [] if server is None else [Removed("ike", (key,), server, Cause.DELETED)]

    def clear(self, server: str) -> Sequence[Record]:
        self.pins = {key: its for key, its in self.pins.items() if its != server}
        return [Cleared("ike", server)]

    def walk(self) -> Iterator[Sequence[Record]]:
        waiting = list(self.pins)
        for at in range(0, len(waiting), self._chunk):
            part = waiting[at : at + self._chunk]
            yield [Put("ike", (key,), self.pins[key], 1) for key in part if key in self.pins]

    def states(self) -> Sequence[Record]:
        return []

    def apply(self, records: Sequence[Record]) -> None:
        for record in records:
            self.applied += 1
            match record:
                case Put():
                    self.pins[record.keys[0]] = record.server
                    self._seen.add(record.keys[0])
                case Removed():
                    self.pins.pop(record.keys[0], None)
                case Cleared():
                    self.clear(record.server)

    def begin(self) -> None:
        self._seen = set()

    def finish(self) -> bool:
        for key in self.pins.keys() - self._seen:
            del self.pins[key]
            return False
        return True

    def digest(self) -> int:
        return sum(mix(key + server.encode()) for key, server in self.pins.items()) % 2**64
