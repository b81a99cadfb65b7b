"""The simulation finds bugs that were planted, each within so many seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sapin.cluster.pair import Pair
from tests.sim.pair.mutants import MUTANTS
from tests.sim.pair.world import World


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_planted_bug_is_found(mutant: Callable[..., Pair]) -> None:
    for seed in range(MUTANTS[mutant]):
        world = World(seed, mutant)
        if world.run().failure:
            assert world.error is None, "it was not an invariant that found it"
            return
    pytest.fail(f"not found within {MUTANTS[mutant]} seeds")
