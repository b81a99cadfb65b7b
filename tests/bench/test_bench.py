"""The benchmark itself: it runs without root, its packets are what they claim to be, and its counts add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).with_name("run.py")


def test_a_short_run_on_loopback_gives_plausible_figures(tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    options = [
        "--loopback",
        "--rounds=1",
        "--seconds=0.05",
        "--flows=200",
        "--only=drain",
        f"--json={target}",
    ]
    done = subprocess.run(
        [sys.executable, str(RUN), *options], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {name: values["drain"][0] for name, values in json.loads(target.read_text())["figures"].items()}
    assert 0.5 < figures["interleaved_cpu"] < 500
    assert figures["bulk_rate"] > 0
    assert figures["down_rate"] > 0
    assert figures["gso1400_rate"] > 0
    assert 10 < figures["trip_p50"] < 100_000
    assert figures["reply_rate"] > 0
    assert figures["paced_disorder"] == 0


CLASSIFIED = """
from random import Random
from sapin.core import ike
from sapin.core.model import Framing
from traffic import esp, framed_ike_auth, ike_sa_init

random = Random(1)
init = ike_sa_init(b"initiatr", random)
auth = framed_ike_auth(b"initiatr", b"respondr", random)
print(ike.classify(init, Framing.IKE)[0].name, ike.classify(auth, Framing.NATT)[0].name)
print(ike.classify(esp(256, 200, random), Framing.NATT)[0].name, init[:8] == auth[4:12])
"""


def test_the_load_is_what_the_forwarder_knows_as_ike_and_esp() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLASSIFIED],
        cwd=RUN.parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.split() == ["IKE", "IKE", "ESP", "True"], done.stderr
