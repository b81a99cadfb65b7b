"""What two nodes say to one another: messages, and their encoding with a limit on every length.

Pure. A message is a msgpack array, ``[kind, field, …]``. Bytes of a peer never raise: :func:`decode` answers
:class:`Refused` with the reason, for whoever counts refusals.

Two versions are spoken, this release's and the one before; a :class:`Hello` is the same in all of them and says which a
node knows (:func:`agreed`). They differ in how records are packed:

1. one after another, each with all of its fields, under a string of their kinds;
2. pins that stand together and have the same group and server as columns, which halves the time of a snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby, repeat
from typing import Any, Final, NamedTuple, get_origin, get_type_hints

import msgpack  # type: ignore[import-untyped]

from sapin.core.journal import FlowClosed, FlowOpened, ServerAdmin, ServerHealth, Touched
from sapin.core.pins import MAX_KEY_LENGTH, MAX_KEYS, Cleared, Put, Removed

OLDEST, NEWEST = 1, 2
"""The versions that this release speaks."""
MAX_MESSAGE = 4 * 1024 * 1024
"""Bytes; :data:`MAX_RECORDS` pins with the most and longest keys fit, and so does a configuration."""
MAX_RECORDS = 1_000
"""Records in one message."""
MAX_TOUCHED = 1_000
"""Keys in one :class:`~sapin.core.journal.Touched`."""
MAX_NAME = 255
"""Characters of a name."""
MAX_TEXT = 2**20
"""Characters of a configuration, as :data:`sapin.core.config.MAX_SIZE`."""
_MAX_INTEGER = 2**64
_MAX_IN_RECORD = 2**53
"""Records have seconds, ports and counts, which are kept in columns of 64 bits with a sign."""


class Revision(NamedTuple):
    """The shared part of the configuration, as it is now."""

    epoch: int
    """Of the node that made it, when it did."""
    number: int
    digest: str
    """Of the text, in hexadecimal."""
    text: str


Record = Put | Removed | Cleared | FlowOpened | FlowClosed | Touched | ServerHealth | ServerAdmin | Revision

RECORDS: Final[Mapping[int, type[Any]]] = {
    1: Put,
    2: Removed,
    3: Cleared,
    4: FlowOpened,
    5: FlowClosed,
    7: Touched,
    8: ServerHealth,
    9: ServerAdmin,
    10: Revision,
}
"""The number of each kind of record, as :data:`sapin.core.journal.KINDS` where that has it."""


class Hello(NamedTuple):
    """The first message of each side on a new connection."""

    oldest: int
    newest: int
    """The versions that the node speaks."""
    cluster: str
    node: str
    boot: int
    """A number by chance for each run of a daemon; names its stream."""
    beat: int
    """Counts what the node has said of itself: what is older than the newest is ignored."""
    epoch: int
    role: str
    priority: int
    rank: int
    """How good the node's data are at a start, see :mod:`sapin.cluster.role`; more is better."""
    seen: int
    """The boot whose stream the node has applied last; 0 for none."""
    applied: int
    """How far it has."""
    whole: bool
    """Whether it has all of that stream's state, rather than half of a snapshot."""
    digest: int
    """Of its pins and flows."""
    clock: float
    """Wall-clock seconds."""


class Heartbeat(NamedTuple):
    """The node is alive, and this is what it is."""

    beat: int
    epoch: int
    role: str
    synced: bool
    """Whether the receiver has everything that the sender has, as far as the sender knows."""
    seen: int
    applied: int
    whole: bool
    """The three as in :class:`Hello`."""
    clock: float


class Handover(NamedTuple):
    """The active node asks the standby to take over, with this epoch."""

    epoch: int


class Claimed(NamedTuple):
    """The node has the virtual addresses, with this epoch."""

    epoch: int


class Released(NamedTuple):
    """The node has given the virtual addresses up; nothing of its own comes after what came before."""

    epoch: int


class Request(NamedTuple):
    """The standby asks the active node to step down in its favour (pre-emption)."""

    epoch: int


class Delta(NamedTuple):
    """Numbered: changes, or a chunk of a snapshot; both are absolute."""

    sequence: int
    records: Sequence[Record]


class Begin(NamedTuple):
    """Numbered: a snapshot begins. What came before does not matter any more."""

    sequence: int


class End(NamedTuple):
    """Numbered: the snapshot is complete. What was not said since its beginning is not there."""

    sequence: int


class Mark(NamedTuple):
    """Numbered: at this place of the stream, this is the digest of the sender's pins and flows."""

    sequence: int
    digest: int


class Join(NamedTuple):
    """The receiver has already what the stream has said up to this sequence."""

    sequence: int
    digest: int
    """What the receiver must have for that to be true; 0 where a later :class:`Mark` has to tell."""


class Ack(NamedTuple):
    """Everything up to this sequence is applied and journaled."""

    sequence: int
    whole: bool
    """False in the middle of a snapshot."""


class Nak(NamedTuple):
    """This sequence is missing, though a later one came."""

    sequence: int


class Resync(NamedTuple):
    """The receiver's state is not what it should be: a snapshot is needed."""

    reason: str


Message = (
    Hello
    | Heartbeat
    | Handover
    | Claimed
    | Released
    | Request
    | Delta
    | Begin
    | End
    | Mark
    | Join
    | Ack
    | Nak
    | Resync
)
Numbered = Delta | Begin | End | Mark

MESSAGES: Final[Mapping[int, type[Any]]] = {
    1: Hello,
    2: Heartbeat,
    3: Handover,
    4: Claimed,
    5: Released,
    6: Request,
    7: Delta,
    8: Begin,
    9: End,
    10: Mark,
    11: Join,
    12: Ack,
    13: Nak,
    14: Resync,
}


class Refused(NamedTuple):
    """Bytes that are no message."""

    reason: str


class _Bad(Exception):
    pass


def agreed(ours: tuple[int, int], theirs: Hello) -> int | None:
    """The newest version that both sides speak; ``None`` if there is none."""
    version = min(ours[1], theirs.newest)
    return version if version >= max(ours[0], theirs.oldest) else None


def encode(message: Message, version: int = NEWEST) -> bytes:
    """The bytes of a message.

    Raises:
        ValueError, OverflowError: it is beyond a limit.
    """
    kind = _KIND_OF[type(message)]
    fields: Sequence[Any] = message
    if isinstance(message, Delta):
        if len(message.records) > MAX_RECORDS:
            raise ValueError(f"{len(message.records)} records in one message, of at most {MAX_RECORDS}")
        pack = _pack_columns if version > 1 else _pack_rows
        fields = (message.sequence, pack(message.records))
    data: bytes = msgpack.packb((kind, *fields))
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(data)} bytes, of at most {MAX_MESSAGE}")
    return data


def decode(data: bytes, version: int = NEWEST) -> Message | Refused:
    """The message that the bytes are, or why they are none."""
    if len(data) > MAX_MESSAGE:
        return Refused("too long")
    try:
        found = msgpack.unpackb(
            data,
            use_list=False,
            max_array_len=4 * MAX_RECORDS,
            max_str_len=MAX_TEXT,
            max_bin_len=MAX_RECORDS,
            max_map_len=0,
            max_ext_len=0,
        )
        return _message(found, version)
    except _Bad as error:
        return Refused(str(error))
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        return Refused("not msgpack")


def _message(found: Any, version: int) -> Message:
    if type(found) is not tuple or not found or type(found[0]) is not int or found[0] not in MESSAGES:
        raise _Bad("unknown kind of message")
    kind, *fields = found
    if kind == _KIND_OF[Delta]:
        if len(fields) != 2 or type(fields[0]) is not int:
            raise _Bad("wrong fields of Delta")
        records = (_unpack_columns if version > 1 else _unpack_rows)(fields[1])
        if len(records) > MAX_RECORDS:
            raise _Bad("too many records")
        fields[1] = records
    elif tuple(map(type, fields)) != _FIELDS[MESSAGES[kind]]:
        raise _Bad(f"wrong fields of {MESSAGES[kind].__name__}")
    _check_sizes(fields)
    message: Message = MESSAGES[kind](*fields)
    return message


def _check_sizes(fields: Sequence[Any], end: int = _MAX_INTEGER) -> None:
    for field in fields:
        if type(field) is int and not 0 <= field < end:
            raise _Bad("a number out of range")
        if type(field) is bytes and len(field) > MAX_KEY_LENGTH:
            raise _Bad("bytes are too long")
        if type(field) is str and len(field) > MAX_NAME:
            raise _Bad("a name is too long")
        if type(field) is float and not abs(field) < 1e12:
            raise _Bad("a time out of range")


# records


def _pack_rows(records: Sequence[Record]) -> tuple[bytes, Sequence[Record]]:
    return bytes([_NUMBER_OF[type(record)] for record in records]), records


def _unpack_rows(packed: Any) -> Sequence[Record]:
    if type(packed) is not tuple or tuple(map(type, packed)) != (bytes, tuple):
        raise _Bad("wrong shape of records")
    kinds, rows = packed
    if len(kinds) != len(rows):
        raise _Bad("wrong shape of records")
    return [_record(kind, row) for kind, row in zip(kinds, rows, strict=True)]


def _record(kind: int, row: Any) -> Record:
    record = RECORDS.get(kind)
    if record is None:
        raise _Bad("unknown kind of record")
    if type(row) is not tuple or tuple(map(type, row)) != _FIELDS[record]:
        raise _Bad(f"wrong fields of {record.__name__}")
    if record is Put or record is Removed:
        _check_keys(row[1])
    elif record is Touched:
        _check_touched(row[1])
    _check_sizes(row[:3] if record is Revision else row, _MAX_IN_RECORD)
    made: Record = tuple.__new__(record, row)
    return made


def _check_keys(keys: Any) -> None:
    if not 0 < len(keys) <= MAX_KEYS:
        raise _Bad("too many keys, or none")
    for key in keys:
        if type(key) is not bytes or not 0 < len(key) <= MAX_KEY_LENGTH:
            raise _Bad("an impossible key")


def _check_touched(keys: Any) -> None:
    if len(keys) > MAX_TOUCHED:
        raise _Bad("too many keys")
    for key in keys:
        if type(key) is not bytes or not 0 < len(key) <= MAX_KEY_LENGTH:
            raise _Bad("an impossible key")


def _group_and_server(record: Any) -> tuple[str, str] | None:
    return (record.group, record.server) if type(record) is Put else None


def _pack_columns(records: Sequence[Record]) -> Sequence[Any]:
    """Runs: ``(0, kinds, rows)``, or ``(1, group, server, all keys, all since)``."""
    runs: list[Any] = []
    for common, each in groupby(records, _group_and_server):
        run: Any = list(each)
        if common is None:
            runs.append((0, *_pack_rows(run)))
        else:
            runs.append((1, *common, [put.keys for put in run], [put.since for put in run]))
    return runs


def _unpack_columns(packed: Any) -> Sequence[Record]:
    if type(packed) is not tuple:
        raise _Bad("wrong shape of records")
    records: list[Record] = []
    for run in packed:
        records.extend(_unpack_run(run))
    return records


def _unpack_run(run: Any) -> Iterator[Record] | Sequence[Record]:
    shape = tuple(map(type, run)) if type(run) is tuple else ()
    if shape == (int, bytes, tuple) and run[0] == 0:
        return _unpack_rows(run[1:])
    if shape != (int, str, str, tuple, tuple) or run[0] != 1 or len(run[3]) != len(run[4]):
        raise _Bad("wrong shape of records")
    _, group, server, all_keys, all_since = run
    _check_sizes((group, server))
    _check_columns(all_keys, all_since)
    # What Put._make does for each, without counting the fields again.
    return list(map(partial(tuple.__new__, Put), zip(repeat(group), all_keys, repeat(server), all_since)))


def _check_columns(all_keys: tuple[Any, ...], all_since: tuple[Any, ...]) -> None:
    """As for one pin after another, but a million of them in half the time."""
    if set(map(type, all_keys)) - {tuple} or set(map(type, all_since)) - {int}:
        raise _Bad("wrong fields of Put")
    if not all_keys:
        return
    if min(all_since) < 0 or max(all_since) >= _MAX_IN_RECORD:
        raise _Bad("a number out of range")
    counts = set(map(len, all_keys))
    keys = tuple(chain.from_iterable(all_keys))
    if 0 in counts or max(counts) > MAX_KEYS:
        raise _Bad("too many keys, or none")
    if (
        set(map(type, keys)) != {bytes}
        or not 0 < min(map(len, keys)) <= max(map(len, keys)) <= MAX_KEY_LENGTH
    ):
        raise _Bad("an impossible key")


def _plain(hint: Any) -> type:
    """What a field of that type is decoded to; an enumeration of words stays a plain string."""
    found = get_origin(hint) or hint
    return str if issubclass(found, str) else found


_KIND_OF = {message: kind for kind, message in MESSAGES.items()}
_NUMBER_OF = {record: number for number, record in RECORDS.items()}
_FIELDS = {
    each: tuple(map(_plain, get_type_hints(each).values()))
    for each in (*MESSAGES.values(), *RECORDS.values())
    if each is not Delta
}
