"""Trees of all shapes, and what plain forward passes of transformers give their answers; nothing of the package scores.

In: a model, trees. Out: logps and gradients to compare with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from anchored.batches.answer_logps import answer_logps
from anchored.batches.tree import Tree, plant

CPU = torch.device("cpu")
VOCAB = 67


def random_ids(random: Random, most: int, least: int = 0) -> list[int]:
    return [random.randrange(VOCAB) for _ in range(random.randint(least, most))]


def random_trees(random: Random, count: int, answers: int) -> list[Tree]:
    """Prompts and answers of all shapes: long and one-token, shared prefixes or none, empty, equal, nested answers."""
    trees = []
    for index in range(count):
        # the first has something to score, or there would be no gradient to compare
        shared = random_ids(random, 6, least=index == 0) if index == 0 or random.random() < 0.7 else []
        drawn = [shared + random_ids(random, random.choice([0, 1, 9])) for _ in range(answers)]
        if random.random() < 0.2:
            drawn[-1] = drawn[0]
        elif random.random() < 0.3:
            # as a mismatched answer, which shares nothing
            drawn[-1] = random_ids(random, 9)
        trees.append(plant(random_ids(random, random.choice([1, 12]), 1), drawn))
    return trees


def row_paths(trees: Sequence[Tree]) -> list[list[int]]:
    """Where in their row each answer's tokens lie, its prompt's before them."""
    paths, end = [], 0
    for tree in trees:
        first = range(end, end + len(tree.prompt) + len(tree.answers[0]))
        paths.append([*first])
        end = first.stop
        for answer, depth in zip(tree.answers[1:], tree.depths[1:], strict=True):
            branch = range(end, end + len(answer) - depth)
            paths.append([*first[: len(tree.prompt) + depth], *branch])
            end = branch.stop
    return paths


def plain_logps(model: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """Full logits of prompt and answer, one by one."""
    rows = []
    for tree in trees:
        for answer in tree.answers:
            ids = torch.tensor([tree.prompt + answer])
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits, -1)[0]
            steps = range(len(tree.prompt), ids.shape[1])
            rows.append(sum((logps[step - 1, ids[0, step]] for step in steps), torch.zeros((), dtype=logps.dtype)))
    return torch.stack(rows).view(len(trees), -1)


def random_weights(logps: Tensor) -> Tensor:
    """What each answer's logp counts in a loss, so that no gradient is symmetric."""
    return torch.randn(logps.shape, generator=torch.Generator().manual_seed(0)).to(logps.device, logps.dtype)


def gradients(model: PreTrainedModel, logps: Tensor) -> dict[str, Tensor]:
    """Of the weighted sum, by parameter."""
    model.zero_grad()
    (logps * random_weights(logps)).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in parts of the largest number expected."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def norms_in_fp64(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' norms round fp64 to fp32 inside, which would hide everything below 1e-7; torch's do not."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model


class MostRows(TorchDispatchMode):
    """How many rows of vocabulary size were held at once, in all tensors that operations made."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.most = 0
        self._vocab = vocab
        self._held = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        views = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in views:
                self._hold(leaf)
        return made

    def _hold(self, tensor: Tensor) -> None:
        if tensor.dim() < 2 or tensor.shape[-1] != self._vocab:
            return
        rows = tensor.numel() // self._vocab
        self._held += rows
        self.most = max(self.most, self._held)
        weakref.finalize(tensor.untyped_storage(), self._drop, rows)

    def _drop(self, rows: int) -> None:
        self._held -= rows


Score = Callable[[PreTrainedModel, Sequence[Tree], torch.device], Tensor]


def assert_scores_like(
    plain: PreTrainedModel,
    model: PreTrainedModel,
    trees: Sequence[Tree],
    tolerance: float,
    score: Score = answer_logps,
) -> None:
    """`model`, in trees, has the logps and the parameters' gradients of `plain`, a model of the same weights."""
    expected = plain_logps(plain, trees)
    expected_gradients = gradients(plain, expected)
    found = score(model, trees, CPU)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert relative(found, expected) < tolerance
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative(found_gradients[name], gradient) < tolerance, name
