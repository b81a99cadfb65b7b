"""The lab of two balancers is built once for a module, and so is Sapin's pair, which every scenario finds whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from tests.net.pair.lab import PairLab, open_lab
from tests.net.pair.nodes import SapinPair


@pytest.fixture(scope="module")
def pair_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PairLab]:
    """Clients, gateways and two nodes; nothing runs on the nodes."""
    with open_lab(tmp_path_factory.mktemp("pair")) as lab:
        yield lab


@pytest.fixture(scope="module")
def whole_pair(pair_lab: PairLab) -> Iterator[SapinPair]:
    """Sapin's pair, running."""
    pair = SapinPair(pair_lab)
    try:
        yield pair
    finally:
        trio.run(pair.stop)


@pytest.fixture
async def pair(whole_pair: SapinPair) -> SapinPair:
    """Sapin's pair, whole, with all tunnels up."""
    await whole_pair.mend()
    await whole_pair.settled()
    await whole_pair.lab.connect_all(whole_pair.addresses)
    return whole_pair
