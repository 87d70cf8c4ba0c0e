"""Trees: a prompt and its answers as one shared trunk and one branch per answer, laid end to end in a row.

In: token ids. Out: a `Tree` per prompt, and a `Layout` of many trees as one row of tensors: what the model reads, what
each token may attend to, and which positions predict which answer tokens. Nothing here runs a model.

    trunk     the prompt and the answers' common token prefix
    branch    the rest of one answer; its positions continue from the trunk
    row       trunk, branch, branch, trunk, branch, branch ...: no padding, every shared token once
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its answers, shared tokens held once."""

    trunk: tuple[int, ...]
    prompt_tokens: int
    """The trunk's first tokens, which are read but not scored."""
    branches: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Tokens in the row."""
        return len(self.trunk) + sum(map(len, self.branches))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.trunk) + max(map(len, self.branches))

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.trunk[: self.prompt_tokens]

    @property
    def answers(self) -> tuple[tuple[int, ...], ...]:
        """Each answer whole."""
        shared = self.trunk[self.prompt_tokens :]
        return tuple(shared + branch for branch in self.branches)


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring queries of a row and their keys: `before`, then themselves up to each query.

    A tree's first segment is its trunk with its first branch; before every other branch comes the trunk.
    """

    start: int
    stop: int
    before: tuple[int, int] = (0, 0)

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.before[1] - self.before[0] + self.queries


@dataclass(frozen=True, slots=True)
class Layout:
    """One row. What is scored is ordered by tree, and in a tree: the trunk's answer tokens, then each branch's."""

    ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    predictors: Int[Tensor, " scored"]
    """Positions in the row whose hidden states predict the targets; a trunk's last one serves every branch."""
    targets: Int[Tensor, " scored"]
    """Answer tokens."""
    scored_lengths: Int[Tensor, "trees parts"]
    """How many of the scored tokens each trunk, then each branch, has."""
    segments: tuple[Segment, ...]
    """What attends to what."""

    def to(self, device: torch.device | str) -> Layout:
        """The same row with its tensors on `device`."""
        names = ("ids", "position_ids", "predictors", "targets", "scored_lengths")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def plant(prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> Tree:
    """The tree of a prompt (one token at least) and its answers (any number, equal and empty ones included)."""
    assert prompt_ids, "a prompt without tokens predicts nothing"
    assert answers, "a tree needs an answer"
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*answers, strict=False)))
    return Tree(
        trunk=(*prompt_ids, *answers[0][:shared]),
        prompt_tokens=len(prompt_ids),
        branches=tuple(tuple(answer[shared:]) for answer in answers),
    )


def lay(trees: Sequence[Tree]) -> Layout:
    """Trees end to end in one row; all have the same number of branches."""
    assert len({len(tree.branches) for tree in trees}) == 1, "trees of one row have equally many branches"
    ids: list[int] = []
    targets: list[int] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    lengths: list[list[int]] = []
    segments: list[Segment] = []
    for tree in trees:
        start = len(ids)
        segments += _segments(tree, start)
        positions += _positions(tree)
        predictors += _predictors(tree, start)
        ids += _flat((tree.trunk, *tree.branches))
        targets += _flat((tree.trunk[tree.prompt_tokens :], *tree.branches))
        lengths.append([len(tree.trunk) - tree.prompt_tokens, *map(len, tree.branches)])
    return Layout(
        ids=torch.tensor([ids]),
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.tensor(targets, dtype=torch.long),
        scored_lengths=torch.tensor(lengths),
        segments=tuple(segments),
    )


def _positions(tree: Tree) -> Iterator[np.ndarray]:
    trunk = len(tree.trunk)
    yield np.arange(trunk)
    yield from (np.arange(trunk, trunk + len(branch)) for branch in tree.branches)


def _predictors(tree: Tree, start: int) -> Iterator[np.ndarray]:
    """Row positions before each answer token: along the trunk, then for each branch the trunk's last and its own."""
    end = start + len(tree.trunk)
    yield np.arange(start + tree.prompt_tokens - 1, end - 1)
    for branch in tree.branches:
        before = np.arange(end - 1, end - 1 + len(branch))
        before[:1] = start + len(tree.trunk) - 1
        yield before
        end += len(branch)


def _segments(tree: Tree, start: int) -> Iterator[Segment]:
    first, *others = tree.branches
    trunk = (start, start + len(tree.trunk))
    end = trunk[1] + len(first)
    yield Segment(start, end)
    for branch in others:
        if branch:
            yield Segment(end, end + len(branch), before=trunk)
        end += len(branch)


def _flat(parts: Iterable[Sequence[int]]) -> list[int]:
    return [token for part in parts for token in part]
