"""Trees: a prompt and its answers, laid end to end in a row with every shared token once.

In: token ids. Out: a `Tree` per prompt, and a `Layout` of many trees as one row of tensors: what the model reads, what
each token may attend to, which positions predict which answer tokens, and which of those make up each answer. Nothing
here runs a model.

    trunk     the prompt and the first answer, whole
    branch    the rest of another answer, from where it leaves the first; its positions go on from there
    row       trunk, branch, branch, trunk, branch, branch ...: no padding
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its answers."""

    prompt: tuple[int, ...]
    """Read but not scored."""
    answers: tuple[tuple[int, ...], ...]
    """Each whole; the others branch off the first."""
    depths: tuple[int, ...]
    """How many tokens each answer begins with as the first does; for the first, all of its own."""

    @property
    def branches(self) -> tuple[tuple[int, ...], ...]:
        """What the first answer does not hold of each answer; of itself nothing is left."""
        return tuple(answer[depth:] for answer, depth in zip(self.answers, self.depths, strict=True))

    @property
    def size(self) -> int:
        """Tokens in the row."""
        return len(self.prompt) + self.depths[0] + sum(map(len, self.answers)) - sum(self.depths)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring queries of a row and their keys: `before`, then themselves up to each query.

    A tree's first segment is its trunk; before a branch comes what its answer shares with the trunk. The keys of a
    segment are so many tokens in a row of one answer with its prompt.
    """

    start: int
    stop: int
    before: tuple[int, int] = (0, 0)

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def shared(self) -> int:
        return self.before[1] - self.before[0]

    @property
    def keys(self) -> int:
        return self.shared + self.queries


@dataclass(frozen=True, slots=True)
class Layout:
    """One row. What is scored is ordered by tree, and in a tree: the first answer's tokens, then each branch's."""

    ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    predictors: Int[Tensor, " scored"]
    """Positions in the row whose hidden states predict the targets; where branches leave, one serves several."""
    targets: Int[Tensor, " scored"]
    """Answer tokens."""
    paths: Int[Tensor, " answer_tokens"]
    """Which of the scored tokens make up the answers, one answer after the other, each whole."""
    answer_lengths: Int[Tensor, "trees answers"]
    """How many tokens of `paths` are each answer's."""
    segments: tuple[Segment, ...]
    """What attends to what."""

    def to(self, device: torch.device | str) -> Layout:
        """The same row with its tensors on `device`."""
        names = ("ids", "position_ids", "predictors", "targets", "paths", "answer_lengths")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def plant(prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> Tree:
    """The tree of a prompt (one token at least) and its answers (any number, equal and empty ones included)."""
    assert prompt_ids, "a prompt without tokens predicts nothing"
    assert answers, "a tree needs an answer"
    first, *_ = answers
    return Tree(tuple(prompt_ids), tuple(map(tuple, answers)), tuple(_depth(first, answer) for answer in answers))


def lay(trees: Sequence[Tree]) -> Layout:
    """Trees end to end in one row; all have the same number of answers."""
    assert len({len(tree.answers) for tree in trees}) == 1, "trees of one row have equally many answers"
    ids: list[int] = []
    targets: list[int] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    paths: list[np.ndarray] = []
    segments: list[Segment] = []
    for tree in trees:
        segments += _segments(tree, len(ids))
        positions += _positions(tree)
        predictors += _predictors(tree, len(ids))
        paths += _paths(tree, len(targets))
        scored = [*tree.answers[0], *(token for branch in tree.branches for token in branch)]
        ids += [*tree.prompt, *scored]
        targets += scored
    return Layout(
        ids=torch.tensor([ids]),
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.tensor(targets, dtype=torch.long),
        paths=torch.from_numpy(np.concatenate(paths)),
        answer_lengths=torch.tensor([[len(answer) for answer in tree.answers] for tree in trees]),
        segments=tuple(segments),
    )


def _depth(first: Sequence[int], answer: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, answer, strict=False)))


def _branch_starts(tree: Tree) -> Iterator[int]:
    """Where each branch begins, counted from the first answer's first token."""
    start = tree.depths[0]
    for branch in tree.branches:
        yield start
        start += len(branch)


def _segments(tree: Tree, start: int) -> Iterator[Segment]:
    answers = start + len(tree.prompt)
    yield Segment(start, answers + tree.depths[0])
    for branch, depth, offset in zip(tree.branches, tree.depths, _branch_starts(tree), strict=True):
        if branch:
            yield Segment(answers + offset, answers + offset + len(branch), before=(start, answers + depth))


def _positions(tree: Tree) -> Iterator[np.ndarray]:
    prompt = len(tree.prompt)
    yield np.arange(prompt + tree.depths[0])
    for answer, depth in zip(tree.answers, tree.depths, strict=True):
        yield np.arange(prompt + depth, prompt + len(answer))


def _predictors(tree: Tree, start: int) -> Iterator[np.ndarray]:
    """Row positions before each scored token; before a branch's first it is the token that it leaves the trunk at."""
    last = start + len(tree.prompt) - 1
    yield np.arange(last, last + tree.depths[0])
    for branch, depth, offset in zip(tree.branches, tree.depths, _branch_starts(tree), strict=True):
        before = np.arange(last + offset, last + offset + len(branch))
        before[:1] = last + depth
        yield before


def _paths(tree: Tree, start: int) -> Iterator[np.ndarray]:
    for branch, depth, offset in zip(tree.branches, tree.depths, _branch_starts(tree), strict=True):
        yield np.arange(start, start + depth)
        yield np.arange(start + offset, start + offset + len(branch))
