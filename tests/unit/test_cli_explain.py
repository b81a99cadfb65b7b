"""What explain says, and the figures in it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sapin.api.cli.explain import sentences
from sapin.api.cli.figures import bits, clock_time, duration, milliseconds, with_rates

NOW = time.mktime((2026, 11, 24, 10, 44, 5, 0, 0, -1))
CLIENT = "192.0.2.7"


def flow(
    server: str = "gw2", key: str | None = "src:192.0.2.7", since: float | None = NOW - 720
) -> dict[str, Any]:
    return {
        "server": server,
        "key": key,
        "pinned_since": since,
        "opened": NOW - 60,
        "service": "ike",
        "port": 500,
    }


def service(name: str = "ike", **fields: Any) -> dict[str, Any]:
    return {
        "service": name,
        "server": "gw1",
        "reason": "scheduled",
        "key": None,
        "pinned_since": None,
        "scheduler": "maglev",
        "left_out": {},
        **fields,
    }


def said(
    flows: list[dict[str, Any]], services: list[dict[str, Any]], pins: list[dict[str, Any]] | None = None
) -> list[str]:
    answer = {"client": CLIENT, "port": None, "flows": flows, "services": services}
    return list(sentences(answer, pins or [], NOW))


PINNED = service(server="gw2", reason="pinned", key="src:192.0.2.7", pinned_since=NOW - 720)


def test_a_client_with_flows() -> None:
    assert said([flow(), flow()], [PINNED]) == [
        "192.0.2.7 is on gw2 because key src:192.0.2.7 is pinned there since 10:32:05 (12 min)."
    ]


def test_a_client_with_a_pin_alone() -> None:
    assert said([], [PINNED, {**PINNED, "service": "ike-natt"}]) == [
        "192.0.2.7 is on gw2 because key src:192.0.2.7 is pinned there since 10:32:05 (12 min); it has no open flow."
    ]


def test_a_pin_of_yesterday_has_a_date() -> None:
    (sentence,) = said([flow(since=NOW - 86_400 - 7200)], [PINNED])
    assert "since 2026-11-23 08:44:05 (1 d 2 h)" in sentence


def test_many_clients_behind_one_address() -> None:
    flows = [flow("gw1", "spi:01"), flow("gw1", "spi:01"), flow("gw2", "spi:02")]
    assert said(flows, [service()]) == [
        "192.0.2.7 has 3 flows with 2 keys, on gw1 (2), gw2 (1); each key is pinned by itself."
    ]


def test_pins_that_are_found_by_the_address_alone() -> None:
    pins = [{"server": "gw2", "keys": ["tuple:192.0.2.7/1/500"], "since": NOW - 5}]
    assert said([], [service()], pins) == [
        (
            "192.0.2.7 is on gw2 because key tuple:192.0.2.7/1/500 is pinned there since 10:44:00 (5 s); "
            "it has no open flow."
        )
    ]


def test_a_flow_that_nobody_pinned() -> None:
    (sentence,) = said([flow(key=None, since=None)], [service()])
    assert sentence == (
        "192.0.2.7 is on gw2 because its flow is there since 10:43:05 (1 min); its service pins nobody."
    )


def test_a_flow_whose_pin_is_gone() -> None:
    (sentence,) = said([flow(since=None)], [service()])
    assert sentence.endswith("key src:192.0.2.7 is no longer pinned.")


def test_a_new_client() -> None:
    assert said([], [service(), service("ike-natt")]) == [
        "192.0.2.7 has neither a pin nor a flow.",
        "A new client from there would get gw1, picked by maglev, on ike and ike-natt.",
    ]


def test_a_new_client_and_who_is_left_out() -> None:
    assert said([], [service(left_out={"gw2": "draining"})])[1] == (
        "A new client from there would get gw1, picked by maglev (gw2 is draining), on ike."
    )


def test_a_new_client_that_gets_nobody() -> None:
    nobody = service(server=None, reason="no-server", left_out={"gw1": "unhealthy", "gw2": "disabled"})
    assert said([], [nobody])[1] == (
        "A new client from there would get no server (gw1 is unhealthy, gw2 is disabled) on ike."
    )


def test_a_scheduler_at_fault() -> None:
    assert "maglev is at fault" in said([], [service(reason="fallback")])[1]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3_599, "59 min"),
        (3_600, "1 h"),
        (3_661, "1 h 1 min"),
        (86_400, "1 d"),
        (90_061, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_times_and_rates() -> None:
    assert clock_time(NOW, NOW) == "10:44:05"
    assert [milliseconds(t) for t in (None, 0.00021, 0.0123, 1.5)] == ["-", "0.21 ms", "12 ms", "1500 ms"]
    assert [bits(b) for b in (0, 100, 125, 1.25e6, 2.5e9)] == [
        "0 bit/s",
        "800 bit/s",
        "1.0 kbit/s",
        "10 Mbit/s",
        "20 Gbit/s",
    ]


def counted(moment: float, **packets: int) -> dict[str, Any]:
    servers = [
        {"name": name, "packets_in": count, "packets_out": 0, "bytes_in": 0, "bytes_out": 0}
        for name, count in packets.items()
    ]
    return {"time": moment, "groups": [{"name": "ike", "services": [], "servers": servers}]}


def test_rates_are_differences_by_time_and_never_negative() -> None:
    after = with_rates(counted(10.0, gw1=100, gw2=50), counted(12.0, gw1=300, gw2=10, gw3=70))
    assert after["rates_over"] == 2.0
    assert [row["rates"]["packets_in"] for row in after["groups"][0]["servers"]] == [100.0, 0.0, 0.0]


def test_no_time_between_two_looks_is_no_rate() -> None:
    after = with_rates(counted(10.0, gw1=1), counted(10.0, gw1=5))
    assert after["groups"][0]["servers"][0]["rates"]["packets_in"] == 0.0
