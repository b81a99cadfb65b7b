"""The lab is built once; every test finds it without a tunnel and without a balancer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.net.lab import Lab
from tests.net.namespaces import clear, sweep


@pytest.fixture(scope="session")
def whole_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The lab, with its IKE daemons running."""
    sweep()
    try:
        lab = Lab(tmp_path_factory.mktemp("lab"))
        try:
            lab.start()
            yield lab
        finally:
            lab.stop()
    finally:
        clear()


@pytest.fixture
async def lab(whole_lab: Lab) -> Lab:
    """The lab, all of whose gateways run and nobody is connected to."""
    await whole_lab.reset()
    return whole_lab
