"""Few of all combinations, in which each two choices meet."""
from __future__ import annotations

import itertools
from typing import Any


def pairs(*choices: Any) -> list[tuple]:
    """Rows in which each pair of values of any two of the choices stands together at least once.

    Greedy: as many as the two longest choices have pairs, or a few more.
    """
    def pairs_of(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    rows = list(itertools.product(*map(range, map(len, choices))))
    missing: set = set().union(*map(pairs_of, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        chosen.append(tuple(choice[i] for choice, i in zip(choices, best)))
    return chosen
