"""What an objective gets to see of a set of answers, and what all objectives derive from it.

In: summed logps (natural log) under policy and reference. Out: log-ratios, rewards, metrics. Nothing here waits for the
device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anchored.objectives.settings import ObjectiveSettings


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss over pairs may depend on."""

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    chosen_tokens: Int[Tensor, " pairs"]
    rejected_tokens: Int[Tensor, " pairs"]
    margins: Float[Tensor, " pairs"]
    """Per-pair margins of the data, in units of reward; zeros where the data has none."""
    step: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Means over the whole step that the objective asked for, by name, without graph."""


@dataclass(frozen=True, slots=True)
class AnswerLogps:
    """What a loss over single labelled answers may depend on."""

    policy: Float[Tensor, " answers"]
    reference: Float[Tensor, " answers"]
    tokens: Int[Tensor, " answers"]
    desirable: Bool[Tensor, " answers"]
    policy_mismatched: Float[Tensor, " answers"] | None = None
    """Of the answer to another prompt that rides with each, where the objective asks for it."""
    reference_mismatched: Float[Tensor, " answers"] | None = None
    step: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Means over the whole step that the objective asked for, by name, without graph."""


@dataclass(frozen=True, slots=True)
class Both:
    """One quantity of a pair's two answers."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]


@dataclass(frozen=True, slots=True)
class Weighted:
    """A metric: the mean over a step is its sum of values x weights over its sum of weights."""

    values: Float[Tensor, " pairs_or_answers"]
    weights: Float[Tensor, " pairs_or_answers"]


def log_ratios(logps: PairLogps, settings: ObjectiveSettings) -> Both:
    """log pi(y|x) - log pi_ref(y|x) of both answers, per token where `length_normalised`."""
    return _per_length(
        Both(logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected),
        logps,
        settings,
    )


def rewards(logps: PairLogps, settings: ObjectiveSettings) -> Both:
    """Eq. 5: beta x log-ratio of both answers."""
    ratios = log_ratios(logps, settings)
    return Both(settings.beta * ratios.chosen, settings.beta * ratios.rejected)


def policy_logps(logps: PairLogps, settings: ObjectiveSettings) -> Both:
    """log pi(y|x) of both answers, per token where `length_normalised`: all that objectives without reference see."""
    return _per_length(Both(logps.policy_chosen, logps.policy_rejected), logps, settings)


def with_margin(logps: PairLogps, settings: ObjectiveSettings) -> PairLogps:
    """The same with the margin that holds for all pairs added to the pairs' own."""
    if settings.margin == "column":
        return logps
    return replace(logps, margins=logps.margins + settings.margin)


def flipped(logps: PairLogps) -> PairLogps:
    """The same pairs labelled the other way round."""
    return PairLogps(
        policy_chosen=logps.policy_rejected,
        policy_rejected=logps.policy_chosen,
        reference_chosen=logps.reference_rejected,
        reference_rejected=logps.reference_chosen,
        chosen_tokens=logps.rejected_tokens,
        rejected_tokens=logps.chosen_tokens,
        margins=-logps.margins,
        step=logps.step,
    )


def as_pairs(logps: AnswerLogps) -> PairLogps:
    """Answers that are a pair's two, one pair after another, chosen first: as those pairs."""
    return PairLogps(
        *(both[side::2] for both in (logps.policy, logps.reference, logps.tokens) for side in (0, 1)),
        margins=torch.zeros_like(logps.reference[::2]),
        step=logps.step,
    )


def metrics(logps: PairLogps | AnswerLogps, settings: ObjectiveSettings) -> dict[str, Weighted]:
    """What is reported of every objective, without graph. A reward is beta x summed log-ratio, whatever the options.

    Pairs: rewards and logps of both answers, `reward_margin` = chosen - rejected, `reward_accuracy` = share of pairs
    with chosen > rejected. Single answers: desirable ones count as chosen, the others as rejected, so that a step may
    hold none of a kind; `reward_accuracy` is the share of answers whose reward has its label's sign, and there is no
    `reward_margin`: it is the difference of the two mean rewards, which only the reader of the sums can take.
    """
    if isinstance(logps, PairLogps):
        return _pair_metrics(logps, settings)
    logp, reward = logps.policy.detach(), settings.beta * (logps.policy - logps.reference).detach()
    desirable, one = logps.desirable.to(reward.dtype), torch.ones_like(reward)
    right = torch.where(logps.desirable, reward > 0, reward < 0)
    return {
        "reward_chosen": Weighted(reward, desirable),
        "reward_rejected": Weighted(reward, one - desirable),
        "reward_accuracy": Weighted(right.to(reward.dtype), one),
        "logp_chosen": Weighted(logp, desirable),
        "logp_rejected": Weighted(logp, one - desirable),
    }


def _pair_metrics(logps: PairLogps, settings: ObjectiveSettings) -> dict[str, Weighted]:
    chosen = settings.beta * (logps.policy_chosen - logps.reference_chosen).detach()
    rejected = settings.beta * (logps.policy_rejected - logps.reference_rejected).detach()
    values = {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).to(chosen.dtype),
        "logp_chosen": logps.policy_chosen.detach(),
        "logp_rejected": logps.policy_rejected.detach(),
    }
    one = torch.ones_like(chosen)
    return {name: Weighted(value, one) for name, value in values.items()}


def _per_length(sums: Both, logps: PairLogps, settings: ObjectiveSettings) -> Both:
    if not settings.length_normalised:
        return sums
    return Both(sums.chosen / logps.chosen_tokens, sums.rejected / logps.rejected_tokens)
