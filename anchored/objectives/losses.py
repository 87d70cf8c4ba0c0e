"""The objectives as pure functions of logps; equations without a source are the APO paper's (arXiv 2408.06266).

In: the logps of a set of pairs or answers, and the settings. Out: one loss each, with its graph; the caller divides the
sum of a step's losses by the step's `unit`s, so a step may be split into micro-batches at will. Nothing here runs a
model, averages or logs. The APO and KTO losses carry the constants that make them non-negative: 1 - s(x) is written
s(-x), which keeps the digits that the subtraction would lose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from anchored.errors import RecipeError, TrainError
from anchored.objectives.logps import (
    AnswerLogps,
    Both,
    PairLogps,
    Weighted,
    as_pairs,
    flipped,
    log_ratios,
    metrics,
    policy_logps,
    rewards,
    with_margin,
)
from anchored.objectives.settings import ObjectiveSettings
from anchored.own import failure, import_attribute

__all__ = [
    "OBJECTIVES",
    "AnswerLogps",
    "Objective",
    "PairLogps",
    "Weighted",
    "as_pairs",
    "find_objective",
    "log_ratios",
    "losses_of",
    "metrics",
    "policy_logps",
    "rewards",
]

PairLoss = Callable[[PairLogps, ObjectiveSettings], Float[Tensor, " pairs"]]

_LOWEST_BETA = 1e-3
"""beta-dpo's, as in its authors' code."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A row of the table: the function and how a step uses it."""

    function: Callable[..., Float[Tensor, " pairs_or_answers"]]
    """(PairLogps or AnswerLogps, ObjectiveSettings) -> a loss each, with its graph."""
    takes: Literal["pairs", "answers"] = "pairs"
    """`answers`: a pair counts as two answers, and unpaired data does as well."""
    unit: Literal["pairs", "answers", "chosen_tokens", "undesirable"] = "pairs"
    """What a step's summed losses are divided by."""
    step_means: Mapping[str, Callable[..., Float[Tensor, " pairs_or_answers"]]] = field(default_factory=dict)
    """(logps, settings) -> the values whose mean over the whole step the loss finds in `logps.step`."""
    running: bool = False
    """Whether `logps.step` also holds `running_NAME` for each: the moving average of earlier steps' means."""
    mismatched: bool = False
    """Whether each prompt needs the answer of another prompt."""


def find_objective(name: str) -> Objective:
    """A row of the table, or the import of `package.module:name`."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    found = import_attribute(name, "train.objective.name")
    return found if isinstance(found, Objective) else _own(name, found)


def losses_of(
    objective: Objective, logps: PairLogps | AnswerLogps, settings: ObjectiveSettings
) -> Float[Tensor, " pairs_or_answers"]:
    """The objective's losses, one for each pair or answer; a function that fails or returns something else is named."""
    try:
        losses = objective.function(logps, settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if objective in OBJECTIVES.values():
            raise
        raise TrainError(f"train.objective.name: {_name_of(objective.function)} fails: {failure(error)}") from error
    policy = logps.policy_chosen if isinstance(logps, PairLogps) else logps.policy
    problem = _problem(losses, policy, objective.takes)
    if problem:
        raise TrainError(f"train.objective.name: {_name_of(objective.function)} {problem}")
    return losses


def sft(logps: AnswerLogps, settings: ObjectiveSettings) -> Float[Tensor, " answers"]:
    """-log pi(y_w|x) of the desirable answers, whose tokens divide the step's sum; beta scales the metrics alone."""
    return torch.where(logps.desirable, -logps.policy, torch.zeros_like(logps.policy))


def dpo(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """Eq. 6: -log s(r_w - r_l). With a margin: arXiv 2402.10571."""
    return -logsigmoid(_difference(rewards(logps, settings), logps))


def apo_zero(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """Eq. 7: -s(r_w) + s(r_l), plus 1. The winner becomes likelier and the loser less likely, each by itself."""
    reward = rewards(logps, settings)
    return torch.sigmoid(-reward.chosen) + torch.sigmoid(reward.rejected)


def apo_down(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """Eq. 8: s(r_w) - s(r_w - r_l), plus 1. The winner becomes less likely, the loser more so."""
    reward = rewards(logps, settings)
    return torch.sigmoid(reward.chosen) + torch.sigmoid(-_difference(reward, logps))


def kto_pair(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """Eq. 9: -s(r_w - beta KL) - s(beta KL - r_l), plus 2. KL is the step's mean log-ratio of the other kind of answer,
    as in TRL 0.8.6, but without graph."""
    ratios = log_ratios(logps, settings)
    kl_chosen, kl_rejected = (logps.step[name].clamp(min=0) for name in ("kl_chosen", "kl_rejected"))
    return torch.sigmoid(-settings.beta * (ratios.chosen - kl_rejected)) + torch.sigmoid(
        -settings.beta * (kl_chosen - ratios.rejected)
    )


def kto(logps: AnswerLogps, settings: ObjectiveSettings) -> Float[Tensor, " answers"]:
    """App. C, arXiv 2402.01306 eq. 7: desirable -s(r - beta KL), undesirable -s(beta KL - r), plus 1 each."""
    return _anchored(logps, settings, logps.step["kl"].clamp(min=0))


def apo_zero_unpaired(logps: AnswerLogps, settings: ObjectiveSettings) -> Float[Tensor, " answers"]:
    """App. C: `kto` with KL = 0."""
    return _anchored(logps, settings, 0.0)


def ipo(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """arXiv 2310.12036, eq. 17: (h - 1/(2 beta))^2, h the difference of log-ratios; the authors' is per token."""
    ratios = log_ratios(logps, settings)
    return (ratios.chosen - ratios.rejected - 1 / (2 * settings.beta)) ** 2


def slic_hinge(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """arXiv 2305.10425, on rewards as in arXiv 2309.06657: max(0, 1 - (r_w - r_l))."""
    return torch.relu(1 - _difference(rewards(logps, settings), logps))


def simpo(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """arXiv 2405.14734, eq. 6: -log s(beta log pi(y_w)/|y_w| - beta log pi(y_l)/|y_l| - margin), without reference."""
    return _reference_free(logps, settings)


def cpo(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """arXiv 2401.08417: dpo under a uniform reference; its second term, on the winner alone, is `sft_weight`'s."""
    return _reference_free(logps, settings)


def orpo(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """arXiv 2403.07691, eqs. 6-7: -beta log s(log odds(y_w) - log odds(y_l)); its first term is `sft_weight`'s."""
    logp = policy_logps(logps, settings)
    return -settings.beta * logsigmoid(_log_odds(logp.chosen) - _log_odds(logp.rejected))


def dpop(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """arXiv 2402.13228, eq. 3: dpo, the difference less beta lambda max(0, log pi_ref(y_w) - log pi(y_w))."""
    assert settings.penalty is not None
    reward = rewards(logps, settings)
    return -logsigmoid(_difference(reward, logps) - settings.penalty * torch.relu(-reward.chosen))


def beta_dpo(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    """arXiv 2407.08639: dpo with beta (1 + alpha (M - M_0)), M the step's mean difference of log-ratios and M_0 its
    moving average, this step included, as in the authors' code. Without their filtering of pairs."""
    assert settings.alpha is not None
    mean, earlier = logps.step[_MEAN_DIFFERENCE], logps.step[f"running_{_MEAN_DIFFERENCE}"]
    average = settings.momentum * earlier + (1 - settings.momentum) * mean
    beta = (settings.beta * (1 + settings.alpha * (mean - average))).clamp(min=_LOWEST_BETA)
    return -logsigmoid(beta * _log_ratio_difference(logps, settings) - logps.margins)


def npo(logps: AnswerLogps, settings: ObjectiveSettings) -> Float[Tensor, " answers"]:
    """arXiv 2404.05868, eq. 3: 2/beta log(1 + (pi/pi_ref)^beta) of the undesirable answers, 0 of the others."""
    losses = 2 / settings.beta * softplus(_answer_rewards(logps, settings))
    return torch.where(logps.desirable, torch.zeros_like(losses), losses)


def _difference(reward: Both, logps: PairLogps) -> Float[Tensor, " pairs"]:
    """r_w - r_l, less the margin."""
    return reward.chosen - reward.rejected - logps.margins


def _reference_free(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    logp = policy_logps(logps, settings)
    return -logsigmoid(settings.beta * (logp.chosen - logp.rejected) - logps.margins)


def _anchored(
    logps: AnswerLogps, settings: ObjectiveSettings, kl: Float[Tensor, ""] | float
) -> Float[Tensor, " answers"]:
    """s(beta KL - r) for a desirable answer, s(r - beta KL) for an undesirable one, weighted."""
    above = _answer_rewards(logps, settings) - settings.beta * kl
    return torch.where(
        logps.desirable,
        settings.desirable_weight * torch.sigmoid(-above),
        settings.undesirable_weight * torch.sigmoid(above),
    )


def _answer_rewards(logps: AnswerLogps, settings: ObjectiveSettings) -> Float[Tensor, " answers"]:
    ratios = logps.policy - logps.reference
    return settings.beta * (ratios / logps.tokens if settings.length_normalised else ratios)


def _log_odds(logp: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """log(p / (1 - p)) of p = exp(logp), finite where p rounds to 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


def _mismatched_log_ratios(logps: AnswerLogps, settings: ObjectiveSettings) -> Float[Tensor, " answers"]:
    assert logps.policy_mismatched is not None
    assert logps.reference_mismatched is not None
    return logps.policy_mismatched - logps.reference_mismatched


def _log_ratio_difference(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
    ratios = log_ratios(logps, settings)
    return ratios.chosen - ratios.rejected


def _expected(epsilon: float) -> tuple[float, float]:
    """Weights of a pair's loss and of its flipped loss: the expectation where a share epsilon is labelled wrongly."""
    return 1 - epsilon, epsilon


def _noise_corrected(epsilon: float) -> tuple[float, float]:
    """arXiv 2403.00409: weights whose expectation under flips of rate epsilon is the loss of the true labels."""
    return (1 - epsilon) / (1 - 2 * epsilon), -epsilon / (1 - 2 * epsilon)


def _with_options(loss: PairLoss, weights: Callable[[float], tuple[float, float]] = _expected) -> PairLoss:
    """The loss with what works alike for all losses over pairs: margin, label smoothing, the SFT term."""

    @wraps(loss)
    def losses(logps: PairLogps, settings: ObjectiveSettings) -> Float[Tensor, " pairs"]:
        logps = with_margin(logps, settings)
        total = loss(logps, settings)
        if settings.label_smoothing:
            as_labelled, as_flipped = weights(settings.label_smoothing)
            total = as_labelled * total + as_flipped * loss(flipped(logps), settings)
        if settings.sft_weight:
            total = total - settings.sft_weight * logps.policy_chosen / logps.chosen_tokens
        return total

    return losses


_MEAN_DIFFERENCE = "log_ratio_difference"

OBJECTIVES: Mapping[str, Objective] = {
    "sft": Objective(sft, takes="answers", unit="chosen_tokens"),
    "dpo": Objective(_with_options(dpo)),
    "apo-zero": Objective(_with_options(apo_zero)),
    "apo-down": Objective(_with_options(apo_down)),
    "kto-pair": Objective(
        _with_options(kto_pair),
        step_means={
            "kl_chosen": lambda logps, settings: log_ratios(logps, settings).chosen,
            "kl_rejected": lambda logps, settings: log_ratios(logps, settings).rejected,
        },
    ),
    "kto": Objective(kto, takes="answers", unit="answers", step_means={"kl": _mismatched_log_ratios}, mismatched=True),
    "apo-zero-unpaired": Objective(apo_zero_unpaired, takes="answers", unit="answers"),
    "ipo": Objective(_with_options(ipo)),
    "slic-hinge": Objective(_with_options(slic_hinge)),
    "simpo": Objective(_with_options(simpo)),
    "orpo": Objective(_with_options(orpo)),
    "cpo": Objective(_with_options(cpo)),
    "dpop": Objective(_with_options(dpop)),
    "robust-dpo": Objective(_with_options(dpo, _noise_corrected)),
    "beta-dpo": Objective(_with_options(beta_dpo), step_means={_MEAN_DIFFERENCE: _log_ratio_difference}, running=True),
    "npo": Objective(npo, takes="answers", unit="undesirable"),
}


def _own(name: str, found: Any) -> Objective:
    """The row of a function from elsewhere: over answers if its first parameter says so, else over pairs."""
    problem = _call_problem(found)
    if problem:
        raise RecipeError(
            f"train.objective.name is {name!r}, which {problem}; an objective is a function (logps, settings) that "
            "returns losses, or an Objective"
        )
    first = next(iter(inspect.signature(found).parameters.values())).annotation
    if (first if isinstance(first, str) else getattr(first, "__name__", "")).endswith("AnswerLogps"):
        return Objective(found, takes="answers", unit="answers")
    return Objective(found)


def _call_problem(found: object) -> str:
    """What keeps something from being called as (logps, settings)."""
    if not callable(found):
        return f"is a {type(found).__name__}"
    try:
        signature = inspect.signature(found)
    except ValueError:
        return "does not tell its parameters"
    try:
        signature.bind(None, None)
    except TypeError as error:
        return f"takes {signature}: {error}"
    return ""


def _problem(losses: object, policy: Tensor, takes: str) -> str:
    """What is wrong with what an objective returned, from what is known without waiting for the device."""
    if not isinstance(losses, Tensor):
        return f"returned a {type(losses).__name__}; it has to return a tensor with one loss for each of the {takes}"
    if losses.shape != policy.shape:
        return (
            f"returned losses of shape {list(losses.shape)} for {len(policy)} {takes}; it has to return one loss for "
            "each, neither summed nor averaged"
        )
    if policy.requires_grad and torch.is_grad_enabled() and not losses.requires_grad:
        return (
            "returned losses without a gradient; compute them from the policy's logps in torch, without detach or item"
        )
    return ""


def _name_of(function: Callable[..., object]) -> str:
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
