"""The paper's objectives as pure functions of logps (equation numbers are the paper's).

In: the summed logps of each pair's answers under policy and reference. Out: one loss and a few metrics per pair; the
caller divides the sum of a step's losses by the step's `unit`s, so a step may be split into micro-batches at will.
Nothing here runs a model, averages or logs. Losses carry the constants that make them non-negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from anchored.objectives import ObjectiveName


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss may depend on: logps (natural log, summed over an answer's tokens) and the answers' token counts."""

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_tokens: Int[Tensor, " pairs"]
    rejected_tokens: Int[Tensor, " pairs"]


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss per pair, with its graph, and metrics per pair, without."""

    losses: Float[Tensor, " pairs"]
    metrics: dict[str, Float[Tensor, " pairs"]]


@dataclass(frozen=True, slots=True)
class Objective:
    """A row of the table: the function and how a step uses it."""

    function: Callable[[PairLogps, float], LossOutput]
    unit: Literal["pairs", "chosen_tokens"]
    """What a step's summed losses are divided by."""
    needs_reference: bool
    """Whether the loss depends on the reference logps; the reward metrics always do."""


def dpo(logps: PairLogps, beta: float) -> LossOutput:
    """Eq. 6: -log s(r_w - r_l)."""
    rewards = _rewards(logps, beta)
    return LossOutput(-logsigmoid(rewards.chosen - rewards.rejected), _metrics(logps, rewards))


def apo_zero(logps: PairLogps, beta: float) -> LossOutput:
    """Eq. 7: -s(r_w) + s(r_l), plus 1. The winner becomes likelier and the loser less likely, each by itself."""
    rewards = _rewards(logps, beta)
    # 1 - s(x) = s(-x) keeps the digits that the subtraction would lose
    losses = torch.sigmoid(-rewards.chosen) + torch.sigmoid(rewards.rejected)
    return LossOutput(losses, _metrics(logps, rewards))


def apo_down(logps: PairLogps, beta: float) -> LossOutput:
    """Eq. 8: s(r_w) - s(r_w - r_l), plus 1. The winner becomes less likely, the loser more so."""
    rewards = _rewards(logps, beta)
    losses = torch.sigmoid(rewards.chosen) + torch.sigmoid(rewards.rejected - rewards.chosen)
    return LossOutput(losses, _metrics(logps, rewards))


def sft(logps: PairLogps, beta: float) -> LossOutput:
    """-log pi(y_w|x), summed over the winner's tokens; `beta` only scales the reward metrics."""
    return LossOutput(-logps.policy_chosen, _metrics(logps, _rewards(logps, beta)))


OBJECTIVES: Mapping[ObjectiveName, Objective] = {
    "apo-zero": Objective(apo_zero, unit="pairs", needs_reference=True),
    "apo-down": Objective(apo_down, unit="pairs", needs_reference=True),
    "dpo": Objective(dpo, unit="pairs", needs_reference=True),
    "sft": Objective(sft, unit="chosen_tokens", needs_reference=False),
}


@dataclass(frozen=True, slots=True)
class _Rewards:
    """r(x, y) = beta (log pi(y|x) - log pi_ref(y|x)) of both answers."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]


def _rewards(logps: PairLogps, beta: float) -> _Rewards:
    return _Rewards(
        chosen=beta * (logps.policy_chosen - logps.reference_chosen),
        rejected=beta * (logps.policy_rejected - logps.reference_rejected),
    )


def _metrics(logps: PairLogps, rewards: _Rewards) -> dict[str, Tensor]:
    chosen, rejected = rewards.chosen.detach(), rewards.rejected.detach()
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).to(chosen.dtype),
        "logp_chosen": logps.policy_chosen.detach(),
        "logp_rejected": logps.policy_rejected.detach(),
    }
