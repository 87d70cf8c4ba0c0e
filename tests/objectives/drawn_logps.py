"""Random logps in float64 that all tests of objectives start from, and gradients of their losses."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from anchored.objectives.losses import AnswerLogps, Objective, PairLogps, find_objective, losses_of
from anchored.objectives.settings import ObjectiveSettings

Logps = TypeVar("Logps", PairLogps, AnswerLogps)


def make_settings(name: str, **knobs: Any) -> ObjectiveSettings:
    return ObjectiveSettings.model_validate({"name": name, **knobs})


def draw_pairs(pairs: int = 60, seed: int = 0) -> PairLogps:
    """Pairs whose rewards at beta 0.3 lie within about 10 of 0, with margins of their own."""
    random = torch.Generator().manual_seed(seed)
    reference = -80 * torch.rand(2, pairs, generator=random, dtype=torch.float64) - 30
    # winners likelier than under the reference on the whole, losers less likely
    shift = torch.tensor([[12.0], [18.0]])
    policy = reference + 30 * torch.rand(2, pairs, generator=random, dtype=torch.float64) - shift
    return PairLogps(
        *policy.requires_grad_().unbind(),
        *reference.unbind(),
        *torch.randint(1, 60, (2, pairs), generator=random).unbind(),
        margins=torch.rand(pairs, generator=random, dtype=torch.float64),
    )


def draw_answers(answers: int = 120, seed: int = 0) -> AnswerLogps:
    """Answers of both kinds in disorder, with mismatched ones."""
    random = torch.Generator().manual_seed(seed)
    reference = -80 * torch.rand(2, answers, generator=random, dtype=torch.float64) - 30
    policy = reference + 30 * torch.rand(2, answers, generator=random, dtype=torch.float64) - 12
    return AnswerLogps(
        policy[0].requires_grad_(),
        reference[0],
        tokens=torch.randint(1, 60, (answers,), generator=random),
        desirable=torch.rand(answers, generator=random) < 0.4,
        policy_mismatched=policy[1],
        reference_mismatched=reference[1],
    )


def draw_for(objective: Objective, seed: int = 0) -> PairLogps | AnswerLogps:
    return draw_pairs(seed=seed) if objective.takes == "pairs" else draw_answers(seed=seed)


def leaves(logps: Logps) -> list[Tensor]:
    """The policy's logps that losses are differentiated by."""
    return [logps.policy_chosen, logps.policy_rejected] if isinstance(logps, PairLogps) else [logps.policy]


def fresh(logps: Logps) -> Logps:
    """The same numbers, as leaves of a new graph."""
    names = [field.name for field in fields(logps) if field.name in ("policy", "policy_chosen", "policy_rejected")]
    return replace(logps, **{name: getattr(logps, name).detach().clone().requires_grad_() for name in names})


def with_step_means(objective: Objective, logps: Logps, settings: ObjectiveSettings, earlier: float = 0.5) -> Logps:
    """The logps of a whole step, with the means that the training loop would compute over them."""
    means = {name: values(logps, settings).mean().detach() for name, values in objective.step_means.items()}
    running = {f"running_{name}": mean - earlier for name, mean in means.items()} if objective.running else {}
    return replace(logps, step=means | running)


def losses_and_gradients(logps: Logps, settings: ObjectiveSettings) -> tuple[Tensor, list[Tensor]]:
    """Losses of a whole step, and the gradients of their sum by the policy's logps; zeros where they do not depend."""
    objective = find_objective(settings.name)
    logps = fresh(logps)
    losses = losses_of(objective, with_step_means(objective, logps, settings), settings)
    found = torch.autograd.grad(losses.sum(), leaves(logps), allow_unused=True, materialize_grads=True)
    return losses.detach(), list(found)
