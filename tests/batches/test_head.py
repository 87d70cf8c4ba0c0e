"""The output layer in tiles against torch's own log softmax over all logits: values, gradients, what is held."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_scores import MostRows, relative
from torch import Tensor

from anchored.batches import head as heads
from anchored.batches.head import Head, Shaping, target_logps

VOCAB, WIDTH, SCORED = 50, 8, 23


def make_inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states, weight, biases = (
        torch.randn(shape, generator=generator) for shape in ((SCORED, WIDTH), (VOCAB, WIDTH), VOCAB)
    )
    targets = torch.randint(VOCAB, (SCORED,), generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (states, weight, biases)]
    return leaves[0], leaves[1], leaves[2] if bias else None, targets


def all_logits(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shaping: Shaping) -> Tensor:
    logits = torch.nn.functional.linear(states, weight, bias) * shaping.scale
    if shaping.softcap is not None:
        logits = shaping.softcap * torch.tanh(logits / shaping.softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@pytest.mark.parametrize("shaping", [Shaping(), Shaping(scale=0.3), Shaping(softcap=2.0), Shaping(0.7, 1.5)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows_of_a_tile", [1, 7, 1000])
def test_tiles_give_the_logps_and_gradients_of_all_logits(
    shaping: Shaping, bias: bool, rows_of_a_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_TILE_BYTES", {False: 4 * VOCAB * rows_of_a_tile})
    # the elementwise work takes three rows at a time
    monkeypatch.setattr(heads, "_CACHED_BYTES", 4 * VOCAB * 3)
    states, weight, biases, targets = make_inputs(bias=bias)
    leaves = [leaf for leaf in (states, weight, biases) if leaf is not None]
    expected = all_logits(states, weight, biases, targets, shaping)
    found = target_logps(Head(weight, biases, shaping), states, targets)
    assert relative(found, expected) < 1e-12
    counts = torch.randn(SCORED, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_gradients = torch.autograd.grad((expected * counts).sum(), leaves)
    for gradient, other in zip(torch.autograd.grad((found * counts).sum(), leaves), expected_gradients, strict=True):
        assert relative(gradient, other) < 1e-12


@pytest.mark.parametrize("trained", range(3), ids=["states", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient_and_it_is_the_same(trained: int) -> None:
    states, weight, bias, targets = make_inputs()
    assert bias is not None
    leaves = [states, weight, bias]
    shaping = Shaping(0.7, 1.5)
    expected = torch.autograd.grad(target_logps(Head(weight, bias, shaping), states, targets).sum(), leaves)[trained]
    alone = [leaf.detach().requires_grad_(index == trained) for index, leaf in enumerate(leaves)]
    target_logps(Head(alone[1], alone[2], shaping), alone[0], targets).sum().backward()
    for index, leaf in enumerate(alone):
        assert leaf.grad is None if index != trained else torch.equal(leaf.grad, expected)


def test_a_frozen_head_multiplies_nothing_for_its_gradient() -> None:
    states, weight, _, targets = make_inputs()

    def products(weight: Tensor) -> int:
        logps = target_logps(Head(weight, None, Shaping()), states, targets)
        with torch.profiler.profile() as profile:
            logps.sum().backward()
        return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))

    assert (products(weight), products(weight.detach())) == (2, 1)


@pytest.mark.parametrize("rows_of_a_tile", [3, SCORED])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_single_tile_is_kept_for_a_backward_pass_and_of_more_none(
    with_gradient: bool, rows_of_a_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_TILE_BYTES", {False: 4 * VOCAB * rows_of_a_tile})
    states, weight, bias, targets = make_inputs(torch.float32)
    with torch.set_grad_enabled(with_gradient), MostRows(VOCAB) as held:
        logps = target_logps(Head(weight, bias, Shaping()), states, targets)
    assert held.most == rows_of_a_tile
    assert logps.requires_grad == with_gradient
    if with_gradient:
        with torch.profiler.profile() as profile:
            logps.sum().backward()
        again = sum(event.count for event in profile.key_averages() if event.key == "aten::linear")
        assert again == (0 if rows_of_a_tile == SCORED else -(-SCORED // rows_of_a_tile))


def test_in_16_bit_sums_over_tiles_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, bias, targets = make_inputs(torch.bfloat16)
    assert bias is not None
    head = Head(weight, bias, Shaping(softcap=3.0))
    whole = torch.autograd.grad(target_logps(head, states, targets).sum(), (weight, bias))
    monkeypatch.setattr(heads, "_TILE_BYTES", {False: 4 * VOCAB})
    logps = target_logps(replace(head), states, targets)
    assert logps.dtype == torch.float32
    for tiled, gradient in zip(torch.autograd.grad(logps.sum(), (weight, bias)), whole, strict=True):
        assert tiled.dtype == torch.bfloat16
        assert relative(tiled.float(), gradient.float()) < 2**-7
