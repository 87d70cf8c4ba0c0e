"""Tree rows against the plain forward pass, which is computed here by itself: logps and every parameter's gradient."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tiny_models import Family, make_model
from torch import Tensor
from transformers import PreTrainedModel

from anchored.batches.answer_logps import answer_logps, answer_logps_plain
from anchored.batches.tree import Tree, plant

CPU = torch.device("cpu")
VOCAB = 67


def norms_in_fp64(model: PreTrainedModel) -> None:
    """transformers' norms round fp64 to fp32 inside, which would hide everything below 1e-7; torch's do not."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def random_ids(rng: random.Random, most: int, least: int = 0) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(least, most))]


def random_trees(rng: random.Random, count: int, answers: int) -> list[Tree]:
    """Prompts and answers of all shapes: long and one-token, shared prefixes or none, empty, equal, nested answers."""
    trees = []
    for index in range(count):
        # the first has something to score, or there would be no gradient to compare
        shared = random_ids(rng, 6, least=index == 0) if index == 0 or rng.random() < 0.7 else []
        drawn = [shared + random_ids(rng, rng.choice([0, 1, 9])) for _ in range(answers)]
        if rng.random() < 0.2:
            drawn[-1] = drawn[0]
        trees.append(plant(random_ids(rng, rng.choice([1, 12]), 1), drawn))
    return trees


def forward_logps(model: PreTrainedModel, trees: Sequence[Tree]) -> Tensor:
    """Independent of the package: full logits of prompt + answer, one by one."""
    rows = []
    for tree in trees:
        for answer in tree.answers:
            ids = torch.tensor([tree.prompt + answer])
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits, -1)[0]
            steps = range(len(tree.prompt), ids.shape[1])
            rows.append(sum((logps[step - 1, ids[0, step]] for step in steps), torch.zeros((), dtype=logps.dtype)))
    return torch.stack(rows).view(len(trees), -1)


def gradients(model: PreTrainedModel, logps: Tensor, weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def assert_equal(model: PreTrainedModel, trees: Sequence[Tree], tolerance: float, score=answer_logps) -> None:
    weights = torch.randn(len(trees), len(trees[0].branches), generator=torch.Generator().manual_seed(0)).to(model.dtype)
    expected = forward_logps(model, trees)
    expected_gradients = gradients(model, expected, weights)
    found = score(model, trees, CPU)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert relative(found.detach(), expected.detach()) < tolerance
    found_gradients = gradients(model, found, weights)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative(found_gradients[name], gradient) < tolerance, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_row_of_trees_scores_like_each_answer_alone(
    family: Family, dtype: torch.dtype, tolerance: float, tied: bool
) -> None:
    rng = random.Random(f"{family}{tied}")
    model = make_model(family, VOCAB, dtype=dtype, tied=tied)
    if dtype == torch.float64:
        norms_in_fp64(model)
    for answers in (1, 2, 2, 2, 3, 4):
        assert_equal(model, random_trees(rng, rng.randint(1, 5), answers), tolerance)
