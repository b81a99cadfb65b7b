"""The tables of ``sapin cluster``, made of the daemon's answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from sapin.api.cli.figures import clock_time, duration, milliseconds
from sapin.api.cli.render import table

Answer = Mapping[str, Any]

_STYLES = {"active": "green", "standby": "cyan", "in sync": "green", "in-sync": "green"}


def status(answer: Answer, now: float) -> RenderableType:
    """Roles, replication, the last failover, addresses, alarms."""
    if not answer["enabled"]:
        return Text(f"This node is not one of a pair: {answer.get('why', 'it belongs to no cluster')}")
    parts: list[RenderableType] = [*_alarms(answer["alarms"], now), _nodes(answer), ""]
    parts += [_replication(answer["replication"]), _failover(answer["last_failover"], now), ""]
    parts.append(_addresses(answer["virtual_addresses"]))
    refused = {cause: count for cause, count in answer["refused"].items() if count}
    if refused:
        shown = ", ".join(f"{cause} {count:,}" for cause, count in refused.items())
        parts += ["", Text(f"Refused on the link since the start: {shown}", "yellow")]
    return Group(*parts)


def _alarms(alarms: Iterable[Answer], now: float) -> Iterator[RenderableType]:
    for alarm in alarms:
        since = clock_time(alarm["since"], now)
        yield Text.assemble(
            ("ALARM ", "bold red"), (alarm["name"], "red"), f" since {since}: {alarm['text']}"
        )
    if alarms:
        yield ""


def _nodes(answer: Answer) -> RenderableType:
    peer = answer["peer"]
    made = table("Node", "Role", "State", "Epoch", "Link", "Heard", right=("Epoch",))
    made.add_row(
        f"{answer['node']} (this one)",
        _word(answer["role"]),
        answer["state"],
        str(answer["epoch"]),
        "",
        "",
    )
    if peer["name"]:
        heard = peer["last_heard"]
        made.add_row(
            peer["name"],
            _word(peer["role"] or "unknown"),
            Text("connected") if peer["connected"] else Text("not connected", "red"),
            "",
            peer["link"] or "-",
            "never" if heard is None else _ago(heard),
        )
    return made


def _ago(seconds: float) -> str:
    return f"{milliseconds(seconds)} ago" if seconds < 1 else f"{duration(seconds)} ago"


def _replication(row: Answer) -> Text:
    text = Text.assemble("Replication: ", (row["state"], _STYLES.get(row["state"], "yellow")))
    text.append(f", sequence {row['sequence']:,}, acked {row['acked']:,}, lag {row['lag']:,}")
    text.append(f", ack p50 {milliseconds(row['ack_p50'])}")
    text.append(f", digest {row['digest']}")
    counts = {name: row[name] for name in ("resyncs", "divergences", "desyncs") if row[name]}
    if counts:
        text.append("; " + ", ".join(f"{name} {count:,}" for name, count in counts.items()), "yellow")
    return text


def _failover(row: Answer | None, now: float) -> Text:
    if row is None:
        return Text("Last failover: this node has taken nothing over since it started")
    took = milliseconds(row["duration"])
    text = f"Last failover: {row['cause']} at {clock_time(row['at'], now)}, took {took}"
    if not row.get("in_sync", True):
        text += ", without being in sync"
    if row["pins"]:
        part = row["answered"] / row["pins"]
        text += f"; {row['answered']:,} of {row['pins']:,} pins answered again ({part:.1%})"
    return Text(text)


def _addresses(rows: Iterable[Answer]) -> RenderableType:
    made = table("Virtual address", "Device", "Here")
    for row in rows:
        here = Text("yes", "green") if row["here"] else Text("no")
        made.add_row(row["address"], row["device"], here)
    return made


def _word(role: str) -> Text:
    return Text(role, _STYLES.get(role, "yellow"))


def events(rows: Iterable[Answer], now: float) -> RenderableType:
    """What happened, one event a row."""
    made = table("Time", "Event", "")
    for row in rows:
        more = " ".join(f"{key}={value}" for key, value in row["fields"].items())
        made.add_row(clock_time(row["at"], now), row["name"], more)
    return made
