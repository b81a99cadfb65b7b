"""The tables of the command line, made of the daemon's answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sapin.api.cli.figures import bits, clock_time, duration, milliseconds

Answer = Mapping[str, Any]

_STYLES = {
    "healthy": "green",
    "unhealthy": "red",
    "unknown": "yellow",
    "draining": "yellow",
    "disabled": "bright_black",
}


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the one style; what does not fit is folded, never cut."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        numeric = column in right
        made.add_column(
            column,
            justify="right" if numeric else "left",
            no_wrap=numeric or column == "State",
            overflow="fold",
        )
    return made


def state(word: str) -> Text:
    """A health or an admin state in its colour."""
    return Text(word, _STYLES.get(word, ""))


def status(answer: Answer) -> RenderableType:
    """Node, services, servers."""
    parts: list[RenderableType] = [*_node(answer), "", _services(answer)]
    for group in answer["groups"]:
        parts += ["", _group_line(group), _servers(group, "rates_over" in answer), *_checks(group)]
    if "rates_over" in answer:
        parts += ["", Text(f"Rates are those of the last {answer['rates_over']:.1f} s.", "dim")]
    return Group(*parts)


def _node(answer: Answer) -> Iterator[Text]:
    up = duration(answer["time"] - answer["started"])
    yield Text.assemble((answer["node"], "bold"), f"  Sapin {answer['version']}, up {up}")
    yield Text(f"{answer['flows']:,} of {answer['max_flows']:,} flows")
    for what, counts in (("dropped", answer["drops"]), ("ICMP errors from servers", answer["icmp_errors"])):
        if counts:
            shown = ", ".join(f"{cause} {count:,}" for cause, count in counts.items())
            yield Text(f"{what} since the start: {shown}", "yellow")
    if answer["store"]["failed"]:
        yield Text(
            f"Pins and flows are not on disk, a restart would lose them: {answer['store']['failed']}", "red"
        )


def _services(answer: Answer) -> Table:
    made = table("Service", "Address", "Follows", "Flows", "In", "Out", right=("Flows", "In", "Out"))
    for group in answer["groups"]:
        for row in group["services"]:
            host = f"[{row['address']}]" if ":" in row["address"] else row["address"]
            made.add_row(
                row["name"],
                f"{host}:{row['port']}/{row['protocol']}",
                row["follows"] or "",
                f"{row['flows']:,}",
                *_packets(row),
            )
    return made


def _packets(row: Answer) -> tuple[str, str]:
    """Datagrams each way: in a second, or ever if there are no rates."""
    if "rates" in row:
        return f"{row['rates']['packets_in']:,.0f}/s", f"{row['rates']['packets_out']:,.0f}/s"
    return f"{row['packets_in']:,}", f"{row['packets_out']:,}"


def _group_line(group: Answer) -> Text:
    names = " + ".join(row["name"] for row in group["services"])
    pins = group["pins"]
    return Text.assemble(
        (names, "bold"),
        f"  {group['scheduler']}, {group['persistence']}, {pins['size']:,} of {pins['limit']:,} pins",
    )


def _servers(group: Answer, rates: bool) -> Table:
    right = ["Weight", "Pins", "Flows", "In", "Out", "Trip"]
    made = table("Server", "Health", "State", *right, right=right)
    for row in group["servers"]:
        made.add_row(
            row["name"],
            state(row["health"]),
            _admin(row),
            _weight(row),
            f"{row['pinned']:,}",
            f"{row['flows']:,}",
            *(_bits(row) if rates else _packets(row)),
            milliseconds(row["response_time"]),
        )
    return made


def _admin(row: Answer) -> Text:
    """What the operator wants, and what the server itself asks for if that is something else."""
    text = state(row["state"])
    if row["asked"] != "enabled":
        text.append(f", asks {row['asked']}", "yellow")
    return text


def _weight(row: Answer) -> str:
    return str(row["weight"]) if row["share"] == 100 else f"{row['share']} % of {row['weight']}"


def _bits(row: Answer) -> tuple[str, str]:
    return bits(row["rates"]["bytes_in"]), bits(row["rates"]["bytes_out"])


def _checks(group: Answer) -> Iterator[Text]:
    """What the checks found, told once for servers of which they found the same."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for row in group["servers"]:
        for each in row["checks"]:
            key = (each["health"], each["check"], each["service"], each["reason"])
            found.setdefault(key, []).append(row["name"])
    for (health, name, service, reason), servers in found.items():
        yield Text.assemble(
            f"Check {name} of {service}: {', '.join(servers)} ", state(health), f", {reason}", style="dim"
        )


def flows(answer: Answer, now: float) -> Table:
    """The flows of an explained client."""
    made = table("Service", "Port", "Server", "Pinned since", "Key", right=("Port",))
    for row in answer["flows"]:
        since = "-" if row["pinned_since"] is None else clock_time(row["pinned_since"], now)
        made.add_row(row["service"], str(row["port"]), row["server"], since, row["key"] or "-")
    return made


def pins(rows: Iterable[Answer], now: float) -> Table:
    """Pins, one a row."""
    made = table("Service", "Server", "Since", "Expires in", "Keys", right=("Expires in",))
    for row in rows:
        made.add_row(
            row["service"],
            row["server"],
            clock_time(row["since"], now),
            duration(row["due"] - now),
            " ".join(row["keys"]),
        )
    return made


def plugins(rows: Iterable[Answer]) -> Table:
    """Plugins; how they are used is known only where a daemon was asked."""
    made = table("Kind", "Name", "From", "In use", "Faults", "", right=("In use", "Faults"))
    for row in rows:
        made.add_row(
            row["kind"],
            row["name"],
            row["origin"],
            str(row.get("instances", "-")),
            str(row.get("faults", "-")),
            _plugin_note(row),
        )
    return made


def _plugin_note(row: Answer) -> Text:
    if row.get("suspended"):
        return Text(f"suspended: {row['last_fault']}", "red")
    return Text(row.get("last_fault") or "", "yellow")
