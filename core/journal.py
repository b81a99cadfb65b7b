"""What a restart must not lose, as records: their encoding, and the state that they add up to.

Pure: bytes in, bytes out; the files are in :mod:`sapin.core.dataplane.store`.

A record is the *absolute* state of one thing (these keys have this pin), never a difference. So a
record may be applied twice, and the records that follow a checkpoint may be applied to one that already
shows some of them: every key and every flow ends as its last record says. That is what makes a fuzzy
checkpoint sound, one that is written piece by piece while the state changes (Hagmann, A Crash Recovery
Scheme for a Memory-Resident Database System, IEEE Trans. Comput. C-35(9), 1986). The records of pins
are the change feed of :mod:`sapin.core.affinity` as it comes, and mean what it means to a mapping of keys:

* :class:`~sapin.core.affinity.Put`: these keys have this pin; a pin that had some of them has lost them;
* :class:`~sapin.core.affinity.Removed`: these keys have none;
* :class:`~sapin.core.affinity.Cleared`: no key has a pin of that server.

On disk, a file is a header line and then frames. One frame holds the records of one flush::

    mark (4 bytes) · payload length (4) · CRC-32 of the payload (4) · payload, msgpack
    payload = [kinds, [record, …]]      kinds: one byte for each record; record: its fields

The kinds stand apart so that a record is packed as the tuple that it is, without building another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, NamedTuple, get_origin, get_type_hints
from zlib import crc32

import msgpack  # type: ignore[import-untyped]

from sapin.core.affinity import Cleared, Put, Removed

VERSION = 1
MAX_FRAME = 16 * 1024 * 1024
"""Bytes of payload; a longer frame is damage, so that a damaged length costs no memory."""
MAX_RECORDS = 65_536
"""Records in one frame."""

_FRAME = Struct(">4sII")
_MARK = b"\xf5\xf6\xf7\x01"
_HEADER = re.compile(rb"sapin (journal|checkpoint) (\d{1,9})\n")


class FlowOpened(NamedTuple):
    """A flow as it is now. Its identity is service, client, client port and local address."""

    service: str
    client: bytes
    """The client's packed address."""
    client_port: int
    local: bytes
    """The packed address that the client sent to; empty unless the service listens on a wildcard."""
    server: str
    upstream: bytes
    """The packed address of our own end of the upstream socket."""
    upstream_port: int
    """The port of that end: the server knows the client's tunnel by it."""
    key: bytes
    """A key of the flow's pin; empty if it has none."""
    opened: int
    """Wall-clock seconds."""


class FlowClosed(NamedTuple):
    """A flow is gone."""

    service: str
    client: bytes
    client_port: int
    local: bytes


class Touched(NamedTuple):
    """Pins whose clients were heard of lately. For a peer alone: a file has no use for it."""

    group: str
    keys: tuple[bytes, ...]
    """The primary key of each pin."""


class ServerHealth(NamedTuple):
    """What is found of a server now. For a peer alone."""

    group: str
    server: str
    health: str
    """A :class:`~sapin.core.model.Health`."""
    asked: str
    """The :class:`~sapin.core.model.AdminState` that its agent asks for."""
    share: int
    """Percent of its weight, as its agent asks for."""


class ServerAdmin(NamedTuple):
    """What the operator wants of a server now. For a peer alone: a node keeps it in a file of its own."""

    group: str
    server: str
    state: str
    """A :class:`~sapin.core.model.AdminState`."""


class Tick(NamedTuple):
    """The daemon was alive at this time: what tells a restart how long it was away."""

    now: int
    """Wall-clock seconds."""


class End(NamedTuple):
    """The last record of a whole checkpoint."""

    records: int
    """How many records came before this one."""


Record = Put | Removed | Cleared | FlowOpened | FlowClosed | Tick | End
Replicated = Put | Removed | Cleared | FlowOpened | FlowClosed | Touched | ServerHealth | ServerAdmin
"""What one node tells its peer: absolute like the records on disk, and sound for the same reason."""

KINDS: Mapping[int, type[Record]] = {
    0: End,
    1: Put,
    2: Removed,
    3: Cleared,
    4: FlowOpened,
    5: FlowClosed,
    6: Tick,
}
"""The byte on disk of each kind of record. A number is never given to another kind."""

_KIND_OF = {record: kind for kind, record in KINDS.items()}
_WITH_KEYS = {_KIND_OF[Put], _KIND_OF[Removed]}
_BYTES = {bytes}


def _plain(hint: Any) -> type:
    """What a field of that type is decoded to; an enumeration of words stays a plain string."""
    found = get_origin(hint) or hint
    return str if issubclass(found, str) else found


_FIELDS = {kind: tuple(map(_plain, get_type_hints(record).values())) for kind, record in KINDS.items()}


class FormatError(Exception):
    """Whole and undamaged, but written by a newer version.

    To go on would lose silently what the records say, so nobody goes on.
    """

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class Damage(Exception):
    """No whole frame begins here. ``torn``: no other one follows either, so this is where writing stopped."""

    def __init__(self, offset: int, reason: str, torn: bool) -> None:
        super().__init__(f"at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason
        self.torn = torn


def header(name: str) -> bytes:
    """The first line of a file: ``header("journal")`` or ``header("checkpoint")``."""
    return f"sapin {name} {VERSION}\n".encode()


class Encoder:
    """Makes frames, one after another, with one buffer."""

    def __init__(self) -> None:
        self._pack = msgpack.Packer().pack

    def encode(self, records: Sequence[Record]) -> bytes:
        """One frame with these records.

        Raises:
            ValueError, TypeError, OverflowError, KeyError: something in them cannot be written, or
                there are too many of them (:data:`MAX_RECORDS`, :data:`MAX_FRAME`).
        """
        if len(records) > MAX_RECORDS:
            raise ValueError(f"{len(records)} records in one frame, of at most {MAX_RECORDS}")
        kinds = bytes([_KIND_OF[type(record)] for record in records])
        payload: bytes = self._pack((kinds, records))
        if len(payload) > MAX_FRAME:
            raise ValueError(f"a frame of {len(payload)} bytes, of at most {MAX_FRAME}")
        return _FRAME.pack(_MARK, len(payload), crc32(payload)) + payload


class Frame(NamedTuple):
    """One frame of a file."""

    end: int
    """The offset of the byte after it."""
    records: list[Record]
    refused: int
    """Records with fields that their kind does not have: the fault of whoever wrote them."""


def frames(data: bytes, name: str) -> Iterator[Frame]:
    """The frames of a file that begins with ``header(name)``, which comes first, as an empty one.

    Raises:
        Damage: there is no whole frame where one should begin; what came before it is good.
        FormatError: a newer version wrote this.
    """
    end = _end_of_header(data, name)
    yield Frame(end, [], 0)
    while end < len(data):
        start, end = end, _end_of_frame(data, end)
        yield _decode(data, start, end)


def _end_of_header(data: bytes, name: str) -> int:
    found = _HEADER.match(data)
    if found is None or found[1] != name.encode():
        torn = header(name).startswith(data) or not data.strip(b"\0")
        raise Damage(0, f"this is not the beginning of a {name}", torn)
    if int(found[2]) != VERSION:
        raise FormatError(0, f"format version {int(found[2])}, where this version knows {VERSION}")
    return found.end()


def _end_of_frame(data: bytes, start: int) -> int:
    """Where the frame that begins at ``start`` ends."""

    def damage(reason: str) -> Damage:
        return Damage(start, reason, torn=data.find(_MARK, start + 1) < 0)

    if len(data) - start < _FRAME.size:
        raise damage("the head of a frame is cut off")
    mark, length, checksum = _FRAME.unpack_from(data, start)
    end: int = start + _FRAME.size + length
    if mark != _MARK:
        raise damage("no frame begins here")
    if length > MAX_FRAME:
        raise damage(f"a frame of {length} bytes")
    if end > len(data):
        raise damage("a frame is cut off")
    if crc32(memoryview(data)[start + _FRAME.size : end]) != checksum:
        raise damage("the checksum of a frame is wrong")
    return end


def _decode(data: bytes, start: int, end: int) -> Frame:
    try:
        kinds, fields = _unpack(memoryview(data)[start + _FRAME.size : end])
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise Damage(start, f"a frame that was never written so ({error})", torn=False) from error
    newer = set(kinds) - KINDS.keys()
    if newer:
        raise FormatError(start, f"records of the unknown kind {min(newer)}")
    records = [
        # What _make does, without counting the fields again.
        tuple.__new__(KINDS[kind], record)
        for kind, record in zip(kinds, fields, strict=True)
        if tuple(map(type, record)) == _FIELDS[kind]
        and (kind not in _WITH_KEYS or set(map(type, record[1])) <= _BYTES)
    ]
    return Frame(end, records, len(kinds) - len(records))


def _unpack(payload: memoryview) -> tuple[bytes, tuple[tuple[Any, ...], ...]]:
    kinds, records = msgpack.unpackb(
        payload, use_list=False, max_array_len=MAX_RECORDS, max_map_len=0, max_ext_len=0
    )
    if type(kinds) is not bytes or set(map(type, records)) - {tuple} or len(kinds) != len(records):
        raise ValueError("kinds and records do not match")
    return kinds, records


class _Tenure:
    """The time between two clearings of a server: to end it ends all its pins in one step."""

    __slots__ = ("ended", "server")

    def __init__(self, server: str) -> None:
        self.server = server
        self.ended = False


class _Group:
    """The pins of one affinity group."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pins: dict[bytes, tuple[tuple[bytes, ...], _Tenure, int]] = {}
        self._tenures: dict[str, _Tenure] = {}

    def put(self, keys: tuple[bytes, ...], server: str, since: int) -> None:
        tenure = self._tenures.get(server)
        if tenure is None:
            tenure = self._tenures[server] = _Tenure(server)
        pin = keys, tenure, since
        for key in keys:
            self._pins[key] = pin

    def remove(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._pins.pop(key, None)

    def clear(self, server: str) -> None:
        tenure = self._tenures.pop(server, None)
        if tenure is not None:
            tenure.ended = True

    def pins(self) -> Iterator[Put]:
        for key, pin in self._pins.items():
            keys, tenure, since = pin
            if len(keys) > 1:
                keys = tuple(each for each in keys if self._pins.get(each) is pin)
            if key == keys[0] and not tenure.ended:
                yield Put(self._name, keys, tenure.server, since)


class State:
    """What records add up to."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._flows: dict[tuple[str, bytes, int, bytes], FlowOpened] = {}
        self._apply: Mapping[type[Record], Callable[[Any], None]] = {
            Put: self._put,
            Removed: self._remove,
            Cleared: self._clear,
            FlowOpened: self._open,
            FlowClosed: self._close,
            Tick: self._tick,
            End: self._end,
        }
        self.tick = 0
        """The last :class:`Tick`; 0 before the first."""

    def apply(self, records: Iterable[Record]) -> None:
        """Applies the records in their order."""
        apply = self._apply
        for record in records:
            apply[type(record)](record)

    def pins(self) -> dict[str, list[Put]]:
        """The pins of each affinity group, each with the keys that it still has."""
        return {name: list(group.pins()) for name, group in self._groups.items()}

    def flows(self) -> list[FlowOpened]:
        """The open flows."""
        return list(self._flows.values())

    def _group(self, name: str) -> _Group:
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(name)
        return group

    def _put(self, record: Put) -> None:
        self._group(record.group).put(record.keys, record.server, record.since)

    def _remove(self, record: Removed) -> None:
        self._group(record.group).remove(record.keys)

    def _clear(self, record: Cleared) -> None:
        self._group(record.group).clear(record.server)

    def _open(self, record: FlowOpened) -> None:
        self._flows[record[:4]] = record

    def _close(self, record: FlowClosed) -> None:
        self._flows.pop(record, None)

    def _tick(self, record: Tick) -> None:
        self.tick = record.now

    def _end(self, record: End) -> None:
        """Says nothing about the state: it is for whoever reads the checkpoint."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was read of one file."""

    end: int
    """Bytes that are good, from the beginning."""
    records: int
    refused: int
    last: Record | None
    damage: Damage | None

    @property
    def whole_checkpoint(self) -> bool:
        """Whether it ends as a checkpoint that was written to its end."""
        before = self.records + self.refused - 1
        return self.damage is None and isinstance(self.last, End) and self.last.records == before


def replay(data: bytes, name: str, state: State) -> Replayed:
    """Applies to ``state`` what is good of a file's bytes.

    Raises:
        FormatError: a newer version wrote the file.
    """
    end, records, refused = 0, 0, 0
    last: Record | None = None
    damage: Damage | None = None
    try:
        for frame in frames(data, name):
            state.apply(frame.records)
            end = frame.end
            records += len(frame.records)
            refused += frame.refused
            last = frame.records[-1] if frame.records else last
    except Damage as found:
        damage = found
    return Replayed(end, records, refused, last, damage)
