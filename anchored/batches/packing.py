"""Packing: which trees share a row, so that no row passes the token budget and rows are about equally full.

In: sizes in tokens. Out: the indices of each row. Nothing is split and nothing is dropped: what is larger than the
budget gets a row of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(sizes: Sequence[int], budget: int, multiple_of: int = 1) -> list[list[int]]:
    """As few rows as longest-first placement allows, balanced; a function of the sizes alone.

    Their number is a multiple of `multiple_of`, as far as there is something to put into each.
    """
    assert budget > 0, f"a row's budget is at least one token, got {budget}"
    if not sizes:
        return []
    room = max(budget, *sizes)
    # too few rows never fit: all tokens need room, and no two trees of more than half a row share one
    rows = max(-(-sum(sizes) // room), sum(2 * size > room for size in sizes))
    while True:
        rows += -rows % multiple_of
        packed = _spread(sizes, rows)
        if all(sum(sizes[index] for index in row) <= room for row in packed):
            return packed
        # by 2 % at a time where there are many: a search by ones takes hours on a whole data set
        rows += 1 + rows // 50


def _spread(sizes: Sequence[int], rows: int) -> list[list[int]]:
    """Largest first, each into the emptiest row; within a row in the given order."""
    packed: list[list[int]] = [[] for _ in range(rows)]
    filled = [(0, row) for row in range(rows)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        tokens, row = filled[0]
        packed[row].append(index)
        heapq.heapreplace(filled, (tokens + sizes[index], row))
    return [sorted(row) for row in packed if row]
