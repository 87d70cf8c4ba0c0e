"""The objectives against closed forms in numpy, the paper's gradients, what options add, and numbers far out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
import torch
from beartype import beartype
from drawn_logps import (
    draw_answers,
    draw_for,
    draw_pairs,
    leaves,
    losses_and_gradients,
    make_settings,
    with_step_means,
)
from jaxtyping import jaxtyped

from anchored.objectives import UNPAIRED, ObjectiveName
from anchored.objectives.losses import (
    OBJECTIVES,
    AnswerLogps,
    PairLogps,
    as_pairs,
    losses_of,
    metrics,
)

BETA = 0.3
OVER_PAIRS = [name for name, objective in OBJECTIVES.items() if objective.takes == "pairs"]
OVER_ANSWERS = [name for name in OBJECTIVES if name not in OVER_PAIRS]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def slope(x: np.ndarray) -> np.ndarray:
    """d(x) of Figure 3."""
    return sigmoid(x) * (1 - sigmoid(x))


class Numbers:
    """The quantities of the papers, in numpy: w is the winner, l the loser; D and U are desirable and undesirable."""

    def __init__(self, pairs: PairLogps, answers: AnswerLogps) -> None:
        self.pi_w, self.pi_l = pairs.policy_chosen.detach().numpy(), pairs.policy_rejected.detach().numpy()
        self.h_w = self.pi_w - pairs.reference_chosen.numpy()
        self.h_l = self.pi_l - pairs.reference_rejected.numpy()
        self.n_w, self.n_l = pairs.chosen_tokens.numpy(), pairs.rejected_tokens.numpy()
        self.w, self.l = BETA * self.h_w, BETA * self.h_l
        self.m = pairs.margins.numpy()
        self.pi = answers.policy.detach().numpy()
        self.r = BETA * (self.pi - answers.reference.numpy())
        self.good = answers.desirable.numpy()
        assert answers.policy_mismatched is not None
        assert answers.reference_mismatched is not None
        self.kl = float((answers.policy_mismatched - answers.reference_mismatched).mean())


CLOSED_FORMS: dict[str, Callable[[Numbers], np.ndarray]] = {
    "dpo": lambda x: np.log1p(np.exp(-(x.w - x.l - x.m))),
    "apo-zero": lambda x: 1 - sigmoid(x.w) + sigmoid(x.l),
    "apo-down": lambda x: sigmoid(x.w) + 1 - sigmoid(x.w - x.l - x.m),
    "kto-pair": lambda x: (
        2
        - sigmoid(x.w - BETA * max(x.h_l.mean(), 0))  # the cross form: each against the other kind's mean
        - sigmoid(BETA * max(x.h_w.mean(), 0) - x.l)
    ),
    "ipo": lambda x: (x.h_w / x.n_w - x.h_l / x.n_l - 1 / (2 * BETA)) ** 2,
    "slic-hinge": lambda x: np.maximum(0, 1 - (x.w - x.l - x.m)),
    # the pair's own margins beside simpo's default of 1
    "simpo": lambda x: np.log1p(np.exp(-(BETA * (x.pi_w / x.n_w - x.pi_l / x.n_l) - 1 - x.m))),
    "orpo": lambda x: (
        -x.pi_w / x.n_w + BETA * np.log1p(np.exp(-(np.log(odds(x.pi_w / x.n_w)) - np.log(odds(x.pi_l / x.n_l)))))
    ),
    "cpo": lambda x: np.log1p(np.exp(-(BETA * (x.pi_w - x.pi_l) - x.m))) - x.pi_w / x.n_w,
    "dpop": lambda x: np.log1p(np.exp(-(x.w - x.l - x.m - BETA * 2 * np.maximum(0, -x.h_w)))),
    "robust-dpo": lambda x: (
        (0.9 * np.log1p(np.exp(-(x.w - x.l - x.m))) - 0.1 * np.log1p(np.exp(x.w - x.l - x.m))) / 0.8
    ),
    # the loop's moving average lies 0.5 below the step's mean here, and the step itself moves it by a tenth of that
    "beta-dpo": lambda x: np.log1p(np.exp(-(BETA * (1 + 0.6 * 0.45) * (x.h_w - x.h_l) - x.m))),
    "sft": lambda x: np.where(x.good, -x.pi, 0),
    "kto": lambda x: np.where(x.good, 1 - sigmoid(x.r - BETA * x.kl), 1 - sigmoid(BETA * x.kl - x.r)),
    "apo-zero-unpaired": lambda x: np.where(x.good, 1 - sigmoid(x.r), sigmoid(x.r)),
    "npo": lambda x: np.where(x.good, 0, 2 / BETA * np.log1p(np.exp(x.r))),
}


def odds(logp: np.ndarray) -> np.ndarray:
    return np.exp(logp) / (1 - np.exp(logp))


def test_the_table_holds_exactly_the_names_that_recipes_may_use() -> None:
    assert set(OBJECTIVES) == set(get_args(ObjectiveName)) == set(CLOSED_FORMS)


def test_unpaired_are_those_that_take_single_answers_but_sft() -> None:
    assert {name for name, one in OBJECTIVES.items() if one.takes == "answers"} == {*UNPAIRED, "sft"}


@pytest.mark.parametrize("module", ["anchored.objectives", "anchored.objectives.settings"])
def test_names_and_settings_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_loss_is_its_closed_form(name: str) -> None:
    pairs, answers = draw_pairs(), draw_answers()
    settings = make_settings(name, beta=BETA, **({"penalty": 2.0} if name == "dpop" else {}))
    losses, _ = losses_and_gradients(pairs if name in OVER_PAIRS else answers, settings)
    expected = CLOSED_FORMS[name](Numbers(pairs, answers))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9, atol=1e-13)


def test_the_closed_forms_are_tried_where_they_bend() -> None:
    """A clamp, a relu or a floor that no drawn number reaches would go untested."""
    x = Numbers(draw_pairs(), draw_answers())
    assert x.kl > 0
    assert {x.h_w.mean() > 0, x.h_l.mean() > 0} == {True, False}
    for bend in (x.h_w, 1 - (x.w - x.l - x.m), x.h_w / x.n_w - x.h_l / x.n_l - 1 / (2 * BETA)):
        assert (bend > 0).any()
        assert (bend < 0).any()


@pytest.mark.parametrize("name", ["dpo", "apo-zero", "apo-down"])
def test_each_gradient_is_the_papers_in_direction_and_size(name: str) -> None:
    pairs = replace(draw_pairs(), margins=torch.zeros(60, dtype=torch.float64))
    x = Numbers(pairs, draw_answers())
    expected_chosen, expected_rejected = {
        # winner up by beta d(r_w), loser down by beta d(r_l)
        "apo-zero": (-BETA * slope(x.w), BETA * slope(x.l)),
        # winner down by beta d(r_w), the difference up by beta d(r_w - r_l)
        "apo-down": (BETA * slope(x.w) - BETA * slope(x.w - x.l), BETA * slope(x.w - x.l)),
        "dpo": (-BETA * sigmoid(x.l - x.w), BETA * sigmoid(x.l - x.w)),
    }[name]
    _, (chosen, rejected) = losses_and_gradients(pairs, make_settings(name, beta=BETA))
    np.testing.assert_allclose(chosen.numpy(), expected_chosen, rtol=1e-9, atol=1e-16)
    np.testing.assert_allclose(rejected.numpy(), expected_rejected, rtol=1e-9, atol=1e-16)


def test_apo_moves_winners_the_way_its_name_says_at_the_start() -> None:
    """Where policy and reference agree, minimizing apo-zero raises winners; apo-down leaves them and lowers losers."""
    pairs = draw_pairs()
    start = replace(
        pairs,
        policy_chosen=pairs.reference_chosen,
        policy_rejected=pairs.reference_rejected,
        margins=torch.zeros_like(pairs.margins),
    )
    _, (chosen, rejected) = losses_and_gradients(start, make_settings("apo-zero", beta=BETA))
    assert (chosen == -BETA / 4).all()
    assert (rejected == BETA / 4).all()
    _, (chosen, rejected) = losses_and_gradients(start, make_settings("apo-down", beta=BETA))
    assert (chosen == 0).all()
    assert (rejected == BETA / 4).all()


def test_means_over_the_step_carry_no_gradient() -> None:
    """kto-pair's pairs are moved by their own loss alone, though every loss holds the mean of all log-ratios."""
    settings = make_settings("kto-pair", beta=BETA)
    pairs = draw_pairs()
    x = Numbers(pairs, draw_answers())
    _, (chosen, rejected) = losses_and_gradients(pairs, settings)
    from_losers, from_winners = (BETA * max(mean, 0) for mean in (x.h_l.mean(), x.h_w.mean()))
    np.testing.assert_allclose(chosen.numpy(), -BETA * slope(x.w - from_losers), rtol=1e-9)
    np.testing.assert_allclose(rejected.numpy(), BETA * slope(from_winners - x.l), rtol=1e-9)


@pytest.mark.parametrize("name", ["kto", "kto-pair"])
def test_a_negative_estimate_of_the_kl_counts_as_zero(name: str) -> None:
    objective, settings = OBJECTIVES[name], make_settings(name)
    logps = draw_for(objective)
    below, none = (
        replace(logps, step={name: torch.tensor(kl, dtype=torch.float64) for name in objective.step_means})
        for kl in (-3.0, 0.0)
    )
    above = replace(logps, step={name: torch.tensor(3.0, dtype=torch.float64) for name in objective.step_means})
    assert torch.equal(losses_of(objective, below, settings), losses_of(objective, none, settings))
    assert not torch.equal(losses_of(objective, above, settings), losses_of(objective, none, settings))


def test_unpaired_apo_zero_on_pairs_is_half_of_apo_zero() -> None:
    pairs = draw_pairs()
    answers = AnswerLogps(
        torch.cat([pairs.policy_chosen, pairs.policy_rejected]).detach(),
        torch.cat([pairs.reference_chosen, pairs.reference_rejected]),
        torch.cat([pairs.chosen_tokens, pairs.rejected_tokens]),
        torch.arange(120) < 60,
    )
    losses, (gradient,) = losses_and_gradients(answers, make_settings("apo-zero-unpaired"))
    paired, (chosen, rejected) = losses_and_gradients(pairs, make_settings("apo-zero"))
    torch.testing.assert_close(2 * losses.mean(), paired.mean())
    torch.testing.assert_close(gradient, torch.cat([chosen, rejected]))


def test_dynamic_beta_has_a_floor() -> None:
    settings = make_settings("beta-dpo", beta=0.1)
    means = {"log_ratio_difference": torch.tensor(-1e4), "running_log_ratio_difference": torch.tensor(0.0)}
    pairs = replace(draw_pairs(), step=means)
    found = losses_of(OBJECTIVES["beta-dpo"], pairs, settings)
    expected, _ = losses_and_gradients(pairs, make_settings("dpo", beta=1e-3))
    torch.testing.assert_close(found.detach(), expected)


def test_dynamic_beta_stays_where_the_step_is_as_the_steps_before() -> None:
    settings, objective = make_settings("beta-dpo"), OBJECTIVES["beta-dpo"]
    pairs = with_step_means(objective, draw_pairs(), settings, earlier=0.0)
    expected, _ = losses_and_gradients(pairs, make_settings("dpo"))
    torch.testing.assert_close(losses_of(objective, pairs, settings).detach(), expected)


@pytest.mark.parametrize("name", ["dpo", "apo-down", "ipo", "slic-hinge", "simpo", "orpo", "cpo", "dpop", "beta-dpo"])
def test_label_smoothing_is_the_expectation_over_flipped_labels(name: str) -> None:
    """Of the pair's loss and the loss of the pair the other way round, whose margin is the other way round as well."""
    knobs = {"beta": BETA, "sft_weight": 0.0}
    pairs, plain = draw_pairs(), make_settings(name, **knobs)
    objective = OBJECTIVES[name]
    pairs = with_step_means(objective, pairs, plain)
    constant = 1.0 if name == "simpo" else 0.0
    turned = replace(other_way_round(pairs), margins=-pairs.margins - 2 * constant)
    expected = 0.8 * losses_of(objective, pairs, plain) + 0.2 * losses_of(objective, turned, plain)
    found = losses_of(objective, pairs, make_settings(name, **knobs, label_smoothing=0.2))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(losses.sum(), leaves(pairs)) for losses in (found, expected)))
    assert not torch.equal(found, losses_of(objective, pairs, plain))


def other_way_round(pairs: PairLogps) -> PairLogps:
    return PairLogps(
        pairs.policy_rejected,
        pairs.policy_chosen,
        pairs.reference_rejected,
        pairs.reference_chosen,
        pairs.rejected_tokens,
        pairs.chosen_tokens,
        -pairs.margins,
        pairs.step,
    )


def test_robust_dpo_on_noisy_labels_expects_the_loss_of_the_true_ones() -> None:
    pairs = draw_pairs()
    noisy = make_settings("robust-dpo", label_smoothing=0.3)
    as_they_are, flipped = (losses_and_gradients(logps, noisy)[0] for logps in (pairs, other_way_round(pairs)))
    torch.testing.assert_close(0.7 * as_they_are + 0.3 * flipped, losses_and_gradients(pairs, make_settings("dpo"))[0])


def test_one_margin_for_all_is_the_same_margin_in_every_pair() -> None:
    pairs = draw_pairs()
    none = replace(pairs, margins=torch.zeros_like(pairs.margins))
    half = replace(pairs, margins=torch.full_like(pairs.margins, 0.5))
    for name in ("dpo", "apo-down", "slic-hinge", "simpo", "cpo", "dpop", "robust-dpo", "beta-dpo"):
        found, _ = losses_and_gradients(none, make_settings(name, margin=0.5))
        expected, _ = losses_and_gradients(half, make_settings(name, margin="column"))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["dpo", "apo-zero", "apo-down", "kto-pair", "slic-hinge", "cpo", "dpop", "beta-dpo"])
def test_length_normalised_losses_are_those_of_logps_per_token(name: str) -> None:
    pairs = draw_pairs()
    per_token = replace(
        pairs,
        policy_chosen=pairs.policy_chosen / pairs.chosen_tokens,
        policy_rejected=pairs.policy_rejected / pairs.rejected_tokens,
        reference_chosen=pairs.reference_chosen / pairs.chosen_tokens,
        reference_rejected=pairs.reference_rejected / pairs.rejected_tokens,
    )
    found, _ = losses_and_gradients(pairs, make_settings(name, sft_weight=0.0, length_normalised=True))
    expected, _ = losses_and_gradients(per_token, make_settings(name, sft_weight=0.0))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["apo-zero-unpaired", "npo"])
def test_length_normalised_losses_of_answers_are_those_of_logps_per_token(name: str) -> None:
    answers = draw_answers()
    per_token = replace(answers, policy=answers.policy / answers.tokens, reference=answers.reference / answers.tokens)
    found, _ = losses_and_gradients(answers, make_settings(name, length_normalised=True))
    expected, _ = losses_and_gradients(per_token, make_settings(name))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["dpo", "apo-zero", "ipo"])
def test_the_extra_term_is_the_winners_loss_per_token(name: str) -> None:
    pairs = draw_pairs()
    plain, _ = losses_and_gradients(pairs, make_settings(name))
    found, _ = losses_and_gradients(pairs, make_settings(name, sft_weight=0.25))
    torch.testing.assert_close(found - plain, (-0.25 * pairs.policy_chosen / pairs.chosen_tokens).detach())


@pytest.mark.parametrize("name", ["kto", "apo-zero-unpaired"])
def test_weights_scale_each_kind_of_answer(name: str) -> None:
    answers = draw_answers()
    plain, _ = losses_and_gradients(answers, make_settings(name))
    found, _ = losses_and_gradients(answers, make_settings(name, desirable_weight=1.5, undesirable_weight=0.25))
    torch.testing.assert_close(found, torch.where(answers.desirable, 1.5 * plain, 0.25 * plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_stay_finite_far_out_and_keep_their_precision(name: str, dtype: torch.dtype) -> None:
    """Rewards of 1e4 and more, certain answers (logp 0), tiny differences."""
    far = torch.tensor([0.0, -1e-30, -1.0, -1e4, -1e6], dtype=dtype)
    first, second, third, fourth = torch.cartesian_prod(far, far, far, far).unbind(1)
    ones = torch.ones(len(first), dtype=torch.long)
    settings = make_settings(name, beta=1.0, **({"label_smoothing": 0.1} if name in ("dpo", "orpo", "dpop") else {}))
    logps = (
        PairLogps(first, second, third, fourth, ones, ones, margins=torch.zeros_like(first))
        if name in OVER_PAIRS
        else AnswerLogps(first, second, ones, third == 0, third, fourth)
    )
    losses, gradients = losses_and_gradients(logps, settings)
    for tensor in (losses, *gradients):
        assert tensor.isfinite().all()
        assert tensor.dtype == dtype


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_in_parts_is_the_whole_step(name: str) -> None:
    """Losses of parts, with the means of the whole step, are the whole's; the units are the caller's to count."""
    objective, settings = OBJECTIVES[name], make_settings(name)
    logps = with_step_means(objective, draw_for(objective), settings)
    parts = [
        replace(logps, **{field: value[part] for field, value in vectors(logps).items()})
        for part in (slice(0, 7), slice(7, 8), slice(8, None))
    ]
    whole = losses_of(objective, logps, settings).sum()
    in_parts = torch.stack([losses_of(objective, part, settings).sum() for part in parts]).sum()
    torch.testing.assert_close(in_parts, whole)
    for expected, found in zip(
        torch.autograd.grad(whole, leaves(logps), allow_unused=True, materialize_grads=True),
        torch.autograd.grad(in_parts, leaves(logps), allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def vectors(logps: PairLogps | AnswerLogps) -> dict[str, torch.Tensor]:
    return {field.name: getattr(logps, field.name) for field in fields(logps) if field.name != "step"}


@pytest.mark.parametrize("name", OVER_PAIRS)
def test_metrics_of_pairs_are_unweighted_and_without_graph(name: str) -> None:
    pairs = draw_pairs()
    x = Numbers(pairs, draw_answers())
    found = metrics(pairs, make_settings(name, beta=BETA))
    expected = {
        "reward_chosen": x.w,
        "reward_rejected": x.l,
        "reward_margin": x.w - x.l,
        "reward_accuracy": (x.w > x.l).astype(float),
        "logp_chosen": x.pi_w,
        "logp_rejected": x.pi_l,
    }
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert not found[key].values.requires_grad
        assert (found[key].weights == 1).all()
        np.testing.assert_allclose(found[key].values.numpy(), values, rtol=1e-12)


@pytest.mark.parametrize("name", OVER_ANSWERS)
def test_metrics_of_answers_are_means_over_their_kind(name: str) -> None:
    answers = draw_answers()
    x = Numbers(draw_pairs(), answers)
    found = metrics(answers, make_settings(name, beta=BETA))
    means = {key: float((of.values * of.weights).sum() / of.weights.sum()) for key, of in found.items()}
    assert means == pytest.approx(
        {
            "reward_chosen": x.r[x.good].mean(),
            "reward_rejected": x.r[~x.good].mean(),
            "reward_accuracy": np.where(x.good, x.r > 0, x.r < 0).mean(),
            "logp_chosen": x.pi[x.good].mean(),
            "logp_rejected": x.pi[~x.good].mean(),
        }
    )
    assert not any(of.values.requires_grad for of in found.values())


def test_answers_of_one_kind_give_the_other_no_weight() -> None:
    answers = replace(draw_answers(), desirable=torch.ones(120, dtype=torch.bool))
    found = metrics(answers, make_settings("kto"))
    assert found["reward_rejected"].weights.sum() == 0
    assert found["reward_chosen"].weights.sum() == 120


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shapes_are_what_the_signatures_say(name: str) -> None:
    objective, settings = OBJECTIVES[name], make_settings(name)
    logps = with_step_means(objective, draw_for(objective), settings)
    checked = jaxtyped(typechecker=beartype)(objective.function)
    assert checked(logps, settings).shape == leaves(logps)[0].shape


@pytest.mark.parametrize(
    ("unit", "names"),
    [
        ("chosen_tokens", {"sft"}),
        ("undesirable", {"npo"}),
        ("answers", {"kto", "apo-zero-unpaired"}),
    ],
)
def test_only_these_are_not_means_over_pairs(unit: str, names: set[str]) -> None:
    assert {name for name, objective in OBJECTIVES.items() if objective.unit == unit} == names


def test_answers_that_are_pairs_are_measured_as_pairs() -> None:
    logps = AnswerLogps(
        policy=torch.tensor([-1.0, -2.0, -9.0, -4.0]),
        reference=torch.tensor([-2.0, -4.0, -8.0, -9.0]),
        tokens=torch.tensor([1, 2, 3, 4]),
        desirable=torch.tensor([True, False, True, False]),
    )
    found = metrics(as_pairs(logps), make_settings(name="kto", beta=0.5))
    assert found["reward_margin"].values.tolist() == [0.5 * (1 - 2), 0.5 * (-1 - 5)]
    assert found["reward_accuracy"].values.tolist() == [0, 0]
    assert found["logp_rejected"].values.tolist() == [-2, -4]
