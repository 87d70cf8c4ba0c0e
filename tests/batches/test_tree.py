"""Trees and rows: what is shared, what attends to what, what predicts what."""

from __future__ import annotations

import random

import pytest
import torch

from anchored.batches.tree import Tree, lay, plant


def random_tree(rng: random.Random, answers: int) -> Tree:
    shared = [rng.randrange(9) for _ in range(rng.randrange(4))]
    drawn = [shared + [rng.randrange(9) for _ in range(rng.choice([0, 1, 5]))] for _ in range(answers)]
    return plant([rng.randrange(9) for _ in range(rng.randint(1, 6))], drawn)


@pytest.mark.parametrize(
    ("answers", "shared", "branches"),
    [
        ([[5, 6, 7], [5, 8]], (5,), ((6, 7), (8,))),
        ([[5, 6], [5, 6, 7]], (5, 6), ((), (7,))),
        ([[5, 6], [5, 6]], (5, 6), ((), ())),
        ([[5], [6]], (), ((5,), (6,))),
        ([[], [6]], (), ((), (6,))),
        ([[5, 6]], (5, 6), ((),)),
        ([[5, 6], [5, 6, 7], [5, 9]], (5,), ((6,), (6, 7), (9,))),
    ],
)
def test_the_trunk_is_the_prompt_and_what_all_answers_begin_with(answers, shared, branches) -> None:
    tree = plant([1, 2], answers)
    assert (tree.trunk, tree.prompt_tokens, tree.branches) == ((1, 2, *shared), 2, branches)
    assert tree.prompt == (1, 2)
    assert tree.answers == tuple(map(tuple, answers))
    assert tree.size == len(tree.trunk) + sum(map(len, branches))
    assert tree.longest == 2 + max(map(len, answers))


def test_a_row_holds_each_answer_at_its_positions_with_its_predictors() -> None:
    rng = random.Random(0)
    for _ in range(50):
        trees = [random_tree(rng, answers=3) for _ in range(rng.randint(1, 4))]
        row = lay(trees)
        ids, positions = row.ids[0].tolist(), row.position_ids[0].tolist()
        assert len(ids) == len(positions) == sum(tree.size for tree in trees)
        scored = iter(zip(row.predictors.tolist(), row.targets.tolist(), strict=True))
        for tree, lengths in zip(trees, row.scored_lengths.tolist(), strict=True):
            shared = tree.trunk[tree.prompt_tokens :]
            assert lengths == [len(shared), *map(len, tree.branches)]
            for part, first in [(shared, tree.prompt_tokens), *((branch, len(tree.trunk)) for branch in tree.branches)]:
                for offset, token in enumerate(part):
                    predictor, target = next(scored)
                    assert target == token
                    assert positions[predictor] == first + offset - 1
                    whole = tree.trunk if first < len(tree.trunk) else (*tree.trunk, *part)
                    assert ids[predictor] == whole[first + offset - 1]
        assert next(scored, None) is None


def test_segments_let_each_token_see_exactly_the_tokens_before_it_in_its_answer() -> None:
    rng = random.Random(1)
    for _ in range(50):
        trees = [random_tree(rng, answers=2) for _ in range(3)]
        row = lay(trees)
        ids, positions = row.ids[0], row.position_ids[0]
        seen = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        for segment in row.segments:
            for query in range(segment.start, segment.stop):
                assert not seen[query].any(), "a query lies in one segment"
                seen[query, slice(*segment.before)] = True
                seen[query, segment.start : query + 1] = True
        start = 0
        for tree in trees:
            end = start + len(tree.trunk)
            for branch in tree.branches:
                whole = [*range(start, start + len(tree.trunk)), *range(end, end + len(branch))]
                for depth, query in enumerate(whole):
                    assert seen[query].nonzero().flatten().tolist() == whole[: depth + 1]
                    assert positions[query] == depth
                end += len(branch)
            start = end


def test_a_row_moves_to_a_device_whole() -> None:
    row = lay([plant([1], [[2], [3]])]).to("meta")
    tensors = (row.ids, row.position_ids, row.predictors, row.targets, row.scored_lengths)
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_a_prompt_without_tokens_is_an_error_of_ours() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        plant([], [[1], [2]])
