"""The shared part of the configuration file: what both nodes have alike, and how it gets from one file to the other.

Pure. ``[node]`` and ``[cluster]``, with what is below them, are a node's own; everything else is shared. A file is taken apart
and put together as text, so that comments survive: a comment belongs to the table that it stands above. That no
meaning is lost on the way is checked each time against the parsed document.

Whose text counts: the active node's. A :class:`~sapin.cluster.wire.Revision` is made there by a reload that changes the shared part;
the standby writes it into its own file. If that file was edited meanwhile, both have changed: a *conflict*. The revision of the
higher epoch wins, then that of the higher number, and the other text is kept beside the file.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from enum import Enum
from hashlib import sha256
from typing import Any, Final, NamedTuple

from sapin.cluster.wire import Revision

OWN: Final = frozenset({"node", "cluster"})
"""The tables that a node does not share."""

_TOKEN = re.compile(
    r"""
      "{3} (?: \\. | [^"\\] | "(?!"") )*+ (?:"{3,5})?
    | \'{3} (?: [^'] | '(?!\'\') )*+ (?:'{3,5})?
    | " (?: \\. | [^"\\\n] )*+ "?
    | ' [^'\n]*+ '?
    | \# [^\n]*+
    | [\[\]{}\n]
    | [^"'\#\[\]{}\n]++
    """,
    re.DOTALL | re.VERBOSE,
)
_HEADER = re.compile(r"""[ \t]*\[\[?[ \t]*(?:"([^"\n]*)"|'([^'\n]*)'|([\w-]+))""", re.ASCII)


class SplitError(ValueError):
    """A file cannot be taken apart or put together; the text says what to change in it."""


class Parts(NamedTuple):
    """A configuration file in two."""

    own: str
    shared: str


class Verdict(Enum):
    """What becomes of a peer's revision."""

    SAME = "both have it already"
    TAKE = "it replaces this node's"
    CONFLICT = "it replaces this node's, which was edited: that is kept aside"
    KEEP = "this node's is newer"


class Agreed(NamedTuple):
    """The last revision that this node took from its peer or gave to it, as its disk has it."""

    epoch: int = 0
    number: int = 0
    digest: str = ""


def digest(shared: str) -> str:
    """Names a shared part; the same on two nodes that have the same text."""
    return sha256(shared.encode()).hexdigest()


def next_revision(agreed: Agreed, epoch: int, shared: str) -> Revision:
    """The revision of a shared part, on the active node: the agreed one if that is still its text, else a new one."""
    found = digest(shared)
    if found == agreed.digest:
        return Revision(agreed.epoch, agreed.number, found, shared)
    return Revision(max(epoch, agreed.epoch), agreed.number + 1, found, shared)


def judge(agreed: Agreed, shared: str, theirs: Revision) -> Verdict:
    """What a standby is to do about the revision of its active peer.

    Args:
        agreed: what its disk says was agreed on last.
        shared: the shared part of its file, as it is now.
        theirs: what the peer said.
    """
    ours = digest(shared)
    if theirs.digest == ours:
        return Verdict.SAME
    if (theirs.epoch, theirs.number) < (agreed.epoch, agreed.number):
        return Verdict.KEEP
    edited = bool(shared.strip()) and ours != agreed.digest
    return Verdict.CONFLICT if edited else Verdict.TAKE


def split(text: str) -> Parts:
    """The node's own part of a configuration file, and the shared one; both are documents of their own.

    Raises:
        SplitError: it is no TOML, or has ``node`` or ``cluster`` other than as tables with a header.
    """
    whole = _load(text)
    own, shared = _divide(text.replace("\r\n", "\n"))
    parts = Parts(_text(own), _text(shared))
    mine = {name: value for name, value in whole.items() if name in OWN}
    rest = {name: value for name, value in whole.items() if name not in OWN}
    if not (_same(parts.own, mine) and _same(parts.shared, rest)):
        raise SplitError(
            "the parts of the file that the nodes share cannot be told from the node's own ones: write [node] and "
            "[cluster] as tables, each under its own header"
        )
    return parts


def join(local: str, shared: str) -> str:
    """The file of a node with another shared part.

    Args:
        local: the file's present text.
        shared: as :func:`split` gave it, on any node.

    Raises:
        SplitError: either is no TOML, or they do not fit together.
    """
    own = split(local).own
    mine, theirs = _divide(own)[0], _divide(shared)
    if _headed(theirs[0]):
        raise SplitError("the shared part has [node] or [cluster], which belong to one node")
    # Keys come before everything: comments above them would become theirs. Comments alone belong to the table after
    # them, and stay before that.
    keys, comments = _leading(theirs[1]), _leading(theirs[0])
    rest = [*comments, *_headed(theirs[1])]
    joined = _text([*keys, *_leading(mine), *_headed(mine), *rest])
    if _load(joined) != {**_load(own), **_load(shared)} or split(joined).shared != _text([*keys, *rest]):
        raise SplitError("the shared part does not fit into this node's file")
    return joined


class _Piece(NamedTuple):
    headed: bool
    """Whether it begins with a header, after its comments; else it is what comes before the first one."""
    text: str


def _divide(text: str) -> tuple[list[_Piece], list[_Piece]]:
    """Own and shared pieces, in order. What comes before the first header is shared if it says anything."""
    own: list[_Piece] = []
    shared: list[_Piece] = []
    starts = list(_starts(text))
    first = starts[0][0] if starts else len(text)
    head = text[:first]
    says = any(line.strip() and not line.lstrip().startswith("#") for line in head.splitlines())
    (shared if says else own).append(_Piece(False, head))
    for n, (start, name) in enumerate(starts):
        end = starts[n + 1][0] if n + 1 < len(starts) else len(text)
        (own if name in OWN else shared).append(_Piece(True, text[start:end]))
    return own, shared


def _starts(text: str) -> Iterator[tuple[int, str]]:
    """Where the pieces begin that have a header, and the first part of its name."""
    end = 0
    for header, name in _headers(text):
        yield end + _comments(text[end:header]), name
        end = header + 1


def _comments(before: str) -> int:
    """Where, in what precedes a header, the comments begin that belong to it.

    Those above it do; those right below a line that says something belong to that line, if there is an empty line after them.
    """
    lines = before.splitlines(keepends=True)
    said = max((n for n, line in enumerate(lines) if line.strip() and line.lstrip()[0] != "#"), default=-1)
    trailing = lines[said + 1 :]
    blank = next((n for n, line in enumerate(trailing) if not line.strip()), 0)
    return sum(map(len, lines[: said + 1 + blank]))


def _headers(text: str) -> Iterator[tuple[int, str]]:
    """Where lines begin that are headers of tables, and the first part of their names."""
    depth, at = 0, 0
    line = True
    for token in _TOKEN.finditer(text):
        found = token[0]
        if found == "[" and depth == 0 and line and (header := _HEADER.match(text, at)):
            yield at, next(name for name in header.groups() if name is not None)
        if found == "\n":
            at = token.end()
        depth += (found in ("[", "{")) - (found in ("]", "}"))
        line = found == "\n" or (line and not found.strip(" \t"))


def _leading(pieces: list[_Piece]) -> list[_Piece]:
    return [piece for piece in pieces if not piece.headed]


def _headed(pieces: list[_Piece]) -> list[_Piece]:
    return [piece for piece in pieces if piece.headed]


def _text(pieces: list[_Piece]) -> str:
    """The pieces with one empty line between them, so that taking apart and putting together changes nothing more."""
    texts = [text for piece in pieces if (text := _trim(piece.text))]
    return "\n\n".join(texts) + "\n" if texts else ""


def _trim(text: str) -> str:
    """Without empty lines at its beginning and end."""
    return re.sub(r"\A(?:[ \t]*\n)+", "", text).rstrip()


def _load(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SplitError(f"it is no TOML: {error}") from None


def _same(text: str, document: dict[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == document
    except (tomllib.TOMLDecodeError, RecursionError):
        return False
