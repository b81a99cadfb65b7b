"""What ``sapin explain`` says: where a client is and why, as sentences made of the daemon's answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sapin.api.cli.figures import clock_time, duration

Answer = Mapping[str, Any]


def sentences(answer: Answer, pins: Sequence[Answer], now: float) -> Iterator[str]:
    """The sentences, the most important first.

    Args:
        answer: what the operation ``explain`` answered.
        pins: the client's pins, where the answer itself has none of them.
        now: seconds since the epoch.
    """
    flows = answer["flows"]
    if flows:
        yield from _by_flows(answer, now)
    elif any(service["reason"] == "pinned" for service in answer["services"]):
        yield from _by_pin(answer, now)
    elif pins:
        yield from _by_pins(answer["client"], pins, now)
    else:
        yield f"{_who(answer)} has neither a pin nor a flow."
    if not flows and not pins:
        yield from _would(answer["services"])


def _who(answer: Answer) -> str:
    return answer["client"] if answer["port"] is None else f"{answer['client']} port {answer['port']}"


def _since(moment: float, now: float) -> str:
    return f"since {clock_time(moment, now)} ({duration(now - moment)})"


def _by_flows(answer: Answer, now: float) -> Iterator[str]:
    flows = answer["flows"]
    keys = {flow["key"] for flow in flows}
    servers = Counter(flow["server"] for flow in flows)
    if len(keys) == 1 and len(servers) == 1:
        yield f"{_who(answer)} is on {flows[0]['server']} {_because(flows[0], now)}."
        return
    spread = ", ".join(f"{server} ({count})" for server, count in sorted(servers.items()))
    yield f"{_who(answer)} has {len(flows)} flows with {len(keys)} keys, on {spread}; each key is pinned by itself."


def _because(flow: Answer, now: float) -> str:
    if not flow["key"]:
        return f"because its flow is there {_since(flow['opened'], now)}; its service pins nobody"
    if flow["pinned_since"] is None:
        return (
            f"because its flow is there {_since(flow['opened'], now)}; key {flow['key']} is no longer pinned"
        )
    return f"because key {flow['key']} is pinned there {_since(flow['pinned_since'], now)}"


def _by_pin(answer: Answer, now: float) -> Iterator[str]:
    seen = set()
    for service in answer["services"]:
        if service["reason"] == "pinned" and service["key"] not in seen:
            seen.add(service["key"])
            yield (
                f"{_who(answer)} is on {service['server']} because key {service['key']} is pinned there "
                f"{_since(service['pinned_since'], now)}; it has no open flow."
            )


def _by_pins(client: str, pins: Sequence[Answer], now: float) -> Iterator[str]:
    for pin in pins:
        yield (
            f"{client} is on {pin['server']} because key {pin['keys'][0]} is pinned there "
            f"{_since(pin['since'], now)}; it has no open flow."
        )


def _would(services: Sequence[Answer]) -> Iterator[str]:
    """What a new client would get, told once for services that would do the same."""
    alike: dict[str, list[str]] = {}
    for service in services:
        if service["reason"] != "pinned":
            alike.setdefault(_choice(service), []).append(service["service"])
    for choice, names in alike.items():
        yield f"A new client from there would get {choice} on {' and '.join(names)}."


def _choice(service: Answer) -> str:
    out = ", ".join(f"{server} is {why}" for server, why in service["left_out"].items())
    but = f" ({out})" if out else ""
    if service["server"] is None:
        return f"no server{but}"
    if service["reason"] == "fallback":
        how = f"{service['scheduler']} is at fault, so the server with the fewest clients is taken"
    else:
        how = f"picked by {service['scheduler']}"
    return f"{service['server']}, {how}{but},"
