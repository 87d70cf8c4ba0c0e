"""Packing: budgets hold, nothing is lost, rows are balanced, many sizes are quick."""

from __future__ import annotations

import random
import time

import pytest

from anchored.batches.packing import pack


def test_every_tree_is_in_one_row_and_no_row_passes_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.randint(1, rng.choice([10, 100, 1500])) for _ in range(rng.randint(1, 40))]
        budget = rng.choice([1, 50, 1000, 4096])
        rows = pack(sizes, budget)
        assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
        for row in rows:
            assert row
            assert sum(sizes[index] for index in row) <= max(budget, *sizes, 0)


def test_rows_are_few_and_about_equally_full() -> None:
    rng = random.Random(1)
    sizes = [rng.randint(100, 1200) for _ in range(400)]
    rows = pack(sizes, 8192)
    fills = [sum(sizes[index] for index in row) for row in rows]
    assert len(rows) <= 1.03 * sum(sizes) / 8192 + 1
    assert min(fills) > 0.9 * max(fills)


@pytest.mark.parametrize(
    ("sizes", "budget", "rows"),
    [
        ([], 10, []),
        ([25], 10, [[0]]),
        ([6, 6, 6], 10, [[0], [1], [2]]),
        ([5, 5, 5, 5], 10, [[0, 2], [1, 3]]),
        ([1, 2, 3], 100, [[0, 1, 2]]),
    ],
)
def test_small_cases(sizes: list[int], budget: int, rows: list[list[int]]) -> None:
    assert pack(sizes, budget) == rows


def test_a_whole_data_set_of_awkward_sizes_packs_in_seconds() -> None:
    for size, rows in [(51, 10_000), (34, 5_000)]:
        start = time.process_time()
        assert rows <= len(pack([size] * 10_000, 100)) <= 1.03 * rows
        assert time.process_time() - start < 5
