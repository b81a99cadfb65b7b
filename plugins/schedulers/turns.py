"""Smooth weighted turns, shared by the schedulers that deal out turns by weight.

Each candidate has a balance. A turn adds to every balance its candidate's gain, goes to the highest
balance, and costs it the sum of all gains. Over a period each candidate gets turns in proportion to its
gain, and they lie as far apart as they can: gains of 5, 1, 1 give a a b a c a a, not a a a a a b c. The
method is known as nginx's smooth weighted round robin.

Only differences of balances matter, and they stay within the sum of the gains; so balances may be carried
over when a candidate comes or goes, scaled to the new sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Amount = TypeVar("Amount", int, float)


def take_turn(balances: list[Amount], gains: Sequence[Amount], total: Amount) -> int:
    """The index of the candidate whose turn it is; writes the new ``balances``.

    Args:
        balances: one per candidate, all zero at first.
        gains: one per candidate, in the same order.
        total: the sum of the gains.
    """
    best = 0
    highest = balances[0] + gains[0]
    for index, gain in enumerate(gains):
        balances[index] = balance = balances[index] + gain
        if balance > highest:
            best, highest = index, balance
    balances[best] = highest - total
    return best
