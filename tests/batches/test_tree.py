"""Trees and rows: what is shared, what attends to what, what predicts what."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from plain_scores import random_trees, row_paths

from anchored.batches.tree import lay, plant


@pytest.mark.parametrize(
    ("answers", "depths", "branches"),
    [
        ([[5, 6, 7], [5, 8]], (3, 1), ((), (8,))),
        ([[5, 6], [5, 6, 7]], (2, 2), ((), (7,))),
        ([[5, 6, 7], [5, 6]], (3, 2), ((), ())),
        ([[5, 6], [5, 6]], (2, 2), ((), ())),
        ([[5], [6]], (1, 0), ((), (6,))),
        ([[], [6]], (0, 0), ((), (6,))),
        ([[6], []], (1, 0), ((), ())),
        ([[5, 6]], (2,), ((),)),
        ([[5, 6, 7], [5, 6, 8], [9]], (3, 2, 0), ((), (8,), (9,))),
    ],
)
def test_each_answer_leaves_the_first_where_it_differs(answers, depths, branches) -> None:
    tree = plant([1, 2], answers)
    assert (tree.depths, tree.branches) == (depths, branches)
    assert tree.prompt == (1, 2)
    assert tree.answers == tuple(map(tuple, answers))
    assert tree.size == 2 + len(answers[0]) + sum(map(len, branches)) == lay([tree]).ids.shape[1]
    assert tree.longest == 2 + max(map(len, answers))


def test_a_third_answer_takes_nothing_from_what_two_share() -> None:
    shared, mismatched = [5] * 20, [7] * 3
    pair, with_third = plant([1], [[*shared, 2], [*shared, 3]]), plant([1], [[*shared, 2], [*shared, 3], mismatched])
    assert with_third.size == pair.size + len(mismatched)


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_a_row_holds_each_answer_at_its_positions_with_its_predictors(answers: int) -> None:
    rng = random.Random(answers)
    for _ in range(50):
        trees = random_trees(rng, rng.randint(1, 4), answers)
        row = lay(trees)
        ids, positions = row.ids[0], row.position_ids[0]
        assert len(ids) == len(positions) == sum(tree.size for tree in trees)
        wholes = [(tree.prompt, answer) for tree in trees for answer in tree.answers]
        scored = iter(row.paths.tolist())
        assert row.answer_lengths.flatten().tolist() == [len(answer) for _, answer in wholes]
        for (prompt, answer), path in zip(wholes, row_paths(trees), strict=True):
            assert ids[path].tolist() == [*prompt, *answer]
            assert positions[path].tolist() == list(range(len(path)))
            own = list(itertools.islice(scored, len(answer)))
            assert row.targets[own].tolist() == list(answer)
            assert row.predictors[own].tolist() == path[len(prompt) - 1 : -1]
        assert next(scored, None) is None


def test_every_scored_token_is_scored_once() -> None:
    for seed in range(20):
        trees = random_trees(random.Random(seed), 3, 3)
        row = lay(trees)
        assert len(row.targets) == len(row.predictors) == sum(tree.size - len(tree.prompt) for tree in trees)
        assert set(row.paths.tolist()) == set(range(len(row.targets)))


def test_segments_let_each_token_see_exactly_the_tokens_before_it_in_its_answer() -> None:
    rng = random.Random(1)
    for _ in range(50):
        trees = random_trees(rng, 3, 3)
        row = lay(trees)
        seen = torch.zeros(row.ids.shape[1], row.ids.shape[1], dtype=torch.bool)
        for segment in row.segments:
            for query in range(segment.start, segment.stop):
                assert not seen[query].any(), "a query lies in one segment"
                seen[query, slice(*segment.before)] = True
                seen[query, segment.start : query + 1] = True
        assert seen.any(1).all()
        for path in row_paths(trees):
            for depth, query in enumerate(path):
                assert seen[query].nonzero().flatten().tolist() == path[: depth + 1]


def test_a_row_moves_to_a_device_whole() -> None:
    row = lay([plant([1], [[2], [3]])]).to("meta")
    tensors = (row.ids, row.position_ids, row.predictors, row.targets, row.paths, row.answer_lengths)
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_a_prompt_without_tokens_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        plant([], [[1], [2]])


def test_trees_of_one_row_have_equally_many_answers() -> None:
    with pytest.raises(AssertionError, match="equally many"):
        lay([plant([1], [[2]]), plant([1], [[2], [3]])])
