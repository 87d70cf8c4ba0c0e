"""Attention over a row against one dense softmax per answer: windows, caps, sinks, their gradients."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from plain_scores import random_trees, relative, row_paths
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anchored.batches import attention
from anchored.batches.attention import TreeRow, TreeUnsupportedError, tree_attention
from anchored.batches.tree import Tree, lay, plant

CPU = torch.device("cpu")


def long_trees(random: Random) -> list[Tree]:
    """Trunks and branches of several chunks of queries."""
    ids = [[random.randrange(9) for _ in range(length)] for length in (40, 150, 200, 131)]
    return [plant(ids[0], [ids[1] + ids[2], ids[1] + ids[3], ids[3]]), plant([1], [ids[1], [2], []])]


def dense(
    states: list[Tensor], path: list[int], *, sinks: Tensor | None, window: int | None, softcap: float | None
) -> Tensor:
    """One answer by itself: [heads, tokens, value_dim] from the definition (scale 0.3)."""
    q, k, v = (x[0][:, path] for x in states)
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = 0.3 * q @ k.transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(path))[:, None] - torch.arange(len(path))
    scores = scores.masked_fill((distance < 0) | (distance >= (window or len(path))), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(path), 1)), -1)
    return scores.softmax(-1)[..., : len(path)] @ v


def test_probabilities_that_are_kept_are_those_that_are_computed_again() -> None:
    row = lay(long_trees(Random(0)))
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn((1, heads, row.ids.shape[1], 6), generator=generator).requires_grad_() for heads in (4, 2, 2)]

    def found() -> tuple[int, list[Tensor]]:
        out, _ = tree_attention(nn.Module(), *states, None, scaling=0.3, tree_row=TreeRow(row.segments, CPU))
        return len(out.grad_fn.next_functions[0][0].saved_tensors), [
            out,
            *torch.autograd.grad(out.square().sum(), states),
        ]

    kept, with_kept = found()
    with attention.nothing_kept():
        computed, with_computed = found()
    assert kept > computed == 4
    assert found()[0] == kept
    assert all(torch.equal(one, other) for one, other in zip(with_kept, with_computed, strict=True))


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 127, 128, 129, 200, 1000])
def test_each_query_attends_as_in_its_answer_alone(window: int | None, softcap: float | None, sinks: bool) -> None:
    random = Random(f"{window}{softcap}{sinks}")
    generator = torch.Generator().manual_seed(0)
    for trees in (long_trees(random), random_trees(random, 4, 3)):
        row = lay(trees)
        tokens = row.ids.shape[1]
        shapes = ((1, 4, tokens, 6), (1, 2, tokens, 6), (1, 2, tokens, 5), (4,))
        given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
        *states, sink = given
        features: dict[str, Any] = {"sliding_window": window, "softcap": softcap, "s_aux": sink if sinks else None}
        found = tree_attention(
            nn.Module(), *states, None, scaling=0.3, tree_row=TreeRow(row.segments, CPU), **features
        )[0]
        expected = torch.zeros_like(found)
        for path in row_paths(trees):
            alone = dense(states, path, sinks=features["s_aux"], window=window, softcap=softcap)
            # shared tokens come out the same for every answer that holds them
            expected = expected.index_copy(1, torch.tensor(path), alone.transpose(0, 1)[None])
        assert relative(found, expected) < 1e-12
        weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        used = given if sinks else states
        found_gradients = torch.autograd.grad((found * weights).sum(), used)
        expected_gradients = torch.autograd.grad((expected * weights).sum(), used)
        for gradient, expected_gradient in zip(found_gradients, expected_gradients, strict=True):
            # of a window of one token no gradient reaches queries and keys: both are round-off
            assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "drops out"),
        ({"is_causal": False}, "ahead"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
    ],
)
def test_what_a_row_cannot_express_is_refused(options: dict[str, Any], reason: str) -> None:
    row = TreeRow(lay([plant([1], [[2], [3]])]).segments, CPU)
    with pytest.raises(TreeUnsupportedError, match=reason):
        tree_attention(nn.Module(), *torch.zeros(3, 1, 2, 3, 4), None, tree_row=row, **options)


def test_what_a_row_sends_to_the_device_waits_for_nothing_there() -> None:
    row = lay(long_trees(Random(0)))
    with _Copies() as copies:
        row.to("meta")
        assert TreeRow(row.segments, torch.device("meta")).varlen.keys.is_meta
    assert len(copies.blocking) == 9
    assert not any(copies.blocking)


class _Copies(TorchDispatchMode):
    """Whether each copy to another device blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            self.blocking.append(not kwargs.get("non_blocking"))
        return func(*args, **kwargs)
