"""The objectives against closed forms in numpy, the paper's gradients, and numbers far out."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from anchored.objectives import ObjectiveName
from anchored.objectives.losses import OBJECTIVES, LossOutput, PairLogps

BETA = 0.3


def draw(pairs: int = 200, spread: float = 20.0) -> PairLogps:
    rng = np.random.default_rng(0)
    logps = [torch.tensor(-rng.uniform(1, 4 * spread, pairs), requires_grad=True) for _ in range(4)]
    tokens = [torch.tensor(rng.integers(1, 512, pairs)) for _ in range(2)]
    return PairLogps(*logps, *tokens)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def slope(x: np.ndarray) -> np.ndarray:
    """d(x) of Figure 3."""
    return sigmoid(x) * (1 - sigmoid(x))


def rewards(logps: PairLogps) -> tuple[np.ndarray, np.ndarray]:
    chosen = BETA * (logps.policy_chosen - logps.reference_chosen).detach().numpy()
    return chosen, BETA * (logps.policy_rejected - logps.reference_rejected).detach().numpy()


def gradients(name: ObjectiveName, logps: PairLogps) -> tuple[np.ndarray, np.ndarray]:
    """d sum(losses) / d policy logps, of the winners and of the losers."""
    losses = OBJECTIVES[name].function(logps, BETA).losses
    found = torch.autograd.grad(losses.sum(), (logps.policy_chosen, logps.policy_rejected), allow_unused=True)
    chosen, rejected = (torch.zeros_like(losses) if gradient is None else gradient for gradient in found)
    return chosen.numpy(), rejected.numpy()


def test_the_table_holds_exactly_the_names_that_recipes_may_use() -> None:
    assert set(OBJECTIVES) == set(get_args(ObjectiveName))


def test_the_names_need_no_torch() -> None:
    code = "import sys, anchored.objectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_loss_is_its_closed_form(name: ObjectiveName) -> None:
    logps = draw()
    w, r = rewards(logps)
    expected = {
        "apo-zero": 1 - sigmoid(w) + sigmoid(r),
        "apo-down": sigmoid(w) + 1 - sigmoid(w - r),
        "dpo": np.log1p(np.exp(-np.abs(w - r))) + np.maximum(r - w, 0),
        "sft": -logps.policy_chosen.detach().numpy(),
    }[name]
    found = OBJECTIVES[name].function(logps, BETA).losses
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10, atol=1e-14)
    assert (found >= 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_gradient_is_the_papers_in_direction_and_size(name: ObjectiveName) -> None:
    logps = draw()
    w, r = rewards(logps)
    zero = np.zeros_like(w)
    expected_chosen, expected_rejected = {
        # winner up by beta d(r_w), loser down by beta d(r_l)
        "apo-zero": (-BETA * slope(w), BETA * slope(r)),
        # winner down by beta d(r_w), the difference up by beta d(r_w - r_l)
        "apo-down": (BETA * slope(w) - BETA * slope(w - r), BETA * slope(w - r)),
        "dpo": (-BETA * sigmoid(r - w), BETA * sigmoid(r - w)),
        "sft": (zero - 1, zero),
    }[name]
    chosen, rejected = gradients(name, logps)
    np.testing.assert_allclose(chosen, expected_chosen, rtol=1e-9, atol=1e-16)
    np.testing.assert_allclose(rejected, expected_rejected, rtol=1e-9, atol=1e-16)


def test_apo_moves_winners_the_way_its_name_says_at_the_start() -> None:
    """Where policy and reference agree, minimizing apo-zero raises winners; apo-down leaves them and lowers losers."""
    same = torch.full((3,), -50.0, dtype=torch.float64)
    tokens = torch.tensor([1, 2, 3])
    logps = PairLogps(same.clone().requires_grad_(), same.clone().requires_grad_(), same, same, tokens, tokens)
    zero_chosen, zero_rejected = gradients("apo-zero", logps)
    assert (zero_chosen == -BETA / 4).all()
    assert (zero_rejected == BETA / 4).all()
    down_chosen, down_rejected = gradients("apo-down", logps)
    assert (down_chosen == 0).all()
    assert (down_rejected == BETA / 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_stay_finite_far_out(name: ObjectiveName, dtype: torch.dtype) -> None:
    far = torch.tensor([0.0, -1e-30, -1e3, -1e6, -1e12], dtype=dtype)
    grid = torch.cartesian_prod(far, far, far, far).unbind(1)
    policy = [logps.clone().requires_grad_() for logps in grid[:2]]
    tokens = torch.ones(len(grid[0]), dtype=torch.long)
    logps = PairLogps(policy[0], policy[1], grid[2], grid[3], tokens, tokens)
    output = OBJECTIVES[name].function(logps, BETA)
    output.losses.sum().backward()
    for tensor in (output.losses, policy[0].grad, *output.metrics.values()):
        assert tensor is not None
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_are_per_pair_and_without_graph(name: ObjectiveName) -> None:
    logps = draw()
    w, r = rewards(logps)
    metrics = OBJECTIVES[name].function(logps, BETA).metrics
    expected = {
        "reward_chosen": w,
        "reward_rejected": r,
        "reward_margin": w - r,
        "reward_accuracy": (w > r).astype(float),
        "logp_chosen": logps.policy_chosen.detach().numpy(),
        "logp_rejected": logps.policy_rejected.detach().numpy(),
    }
    assert metrics.keys() == expected.keys()
    for key, values in expected.items():
        assert not metrics[key].requires_grad
        np.testing.assert_allclose(metrics[key].numpy(), values, rtol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shapes_are_what_the_signatures_say(name: ObjectiveName) -> None:
    logps = draw(pairs=7)
    checked = jaxtyped(typechecker=beartype)(OBJECTIVES[name].function)
    output = checked(logps, BETA)
    assert isinstance(output, LossOutput)
    assert all(
        isinstance(values, Tensor) and values.shape == (7,) for values in (output.losses, *output.metrics.values())
    )


def test_only_sft_counts_tokens_and_needs_no_reference() -> None:
    for name, objective in OBJECTIVES.items():
        assert (objective.unit == "chosen_tokens") == (name == "sft")
        logps = draw()
        losses = objective.function(logps, BETA).losses
        used = torch.autograd.grad(losses.sum(), logps.reference_chosen, allow_unused=True)[0] is not None
        assert objective.needs_reference == used
