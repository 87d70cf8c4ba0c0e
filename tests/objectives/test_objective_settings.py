"""What each objective takes: every knob either changes the loss or is refused with a reason."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from drawn_logps import draw_for, losses_and_gradients, make_settings
from pydantic import ValidationError

from anchored.errors import RecipeError
from anchored.objectives.losses import OBJECTIVES, find_objective
from anchored.recipe import parse

GIVEN = {
    "margin": 0.5,
    "label_smoothing": 0.2,
    "length_normalised": True,
    "sft_weight": 0.5,
    "desirable_weight": 2.0,
    "undesirable_weight": 0.5,
    "penalty": 3.0,
    "alpha": 0.1,
    "momentum": 0.5,
}
NOT = {"length_normalised": False}


def test_all_knobs_are_tried() -> None:
    assert {"name", "beta", *GIVEN} == set(type(make_settings("dpo")).model_fields)


@pytest.mark.parametrize(("name", "knob"), list(product(OBJECTIVES, GIVEN)))
def test_a_knob_changes_the_loss_or_is_refused_with_a_reason(name: str, knob: str) -> None:
    default = make_settings(name)
    value = NOT[knob] if getattr(default, knob) is True else GIVEN[knob]
    logps = draw_for(OBJECTIVES[name])
    try:
        settings = make_settings(name, **{knob: value})
    except ValidationError as error:
        (problem,) = error.errors()
        assert f"{knob} {value!r} has no use with {name}: " in problem["msg"]
        assert problem["msg"].endswith(f"; leave {knob} out")
    else:
        changed, _ = losses_and_gradients(logps, settings)
        assert not torch.allclose(changed, losses_and_gradients(logps, default)[0])


REFUSED = {
    "margin": {"sft", "apo-zero", "kto-pair", "kto", "apo-zero-unpaired", "ipo", "orpo", "npo"},
    "label_smoothing": {"sft", "apo-zero", "kto-pair", "kto", "apo-zero-unpaired", "npo"},
    "length_normalised": {"sft", "kto"},
    "sft_weight": {"sft", "apo-down", "kto", "apo-zero-unpaired", "npo"},
    "desirable_weight": set(OBJECTIVES) - {"kto", "apo-zero-unpaired"},
    "undesirable_weight": set(OBJECTIVES) - {"kto", "apo-zero-unpaired"},
    "penalty": set(OBJECTIVES) - {"dpop"},
    "alpha": set(OBJECTIVES) - {"beta-dpo"},
    "momentum": set(OBJECTIVES) - {"beta-dpo"},
}


@pytest.mark.parametrize("knob", REFUSED)
def test_exactly_these_objectives_refuse_it(knob: str) -> None:
    def refuses(name: str) -> bool:
        try:
            make_settings(name, **{knob: GIVEN[knob]})
        except ValidationError:
            return True
        return False

    assert set(filter(refuses, OBJECTIVES)) == REFUSED[knob]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_knobs_that_an_objective_takes_work_together(name: str) -> None:
    knobs = {knob: value for knob, value in GIVEN.items() if name not in REFUSED[knob]}
    losses, gradients = losses_and_gradients(draw_for(OBJECTIVES[name]), make_settings(name, **knobs))
    assert all(tensor.isfinite().all() for tensor in (losses, *gradients))
    assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", [*OBJECTIVES, "my_package.my_module:my_loss"])
def test_resolved_settings_are_read_back_as_they_are(name: str) -> None:
    settings = make_settings(name)
    assert type(settings).model_validate(settings.model_dump(mode="json")) == settings


def test_what_is_not_given_is_the_objectives_own_default() -> None:
    assert make_settings("dpop").penalty == 50
    assert make_settings("dpop", penalty=None).penalty == 50
    assert make_settings("ipo").length_normalised
    assert make_settings("simpo").beta == 2
    assert make_settings("simpo", beta=2.5).beta == 2.5
    assert make_settings("dpo").beta == 0.1
    assert make_settings("cpo").sft_weight == 1
    assert make_settings("robust-dpo").label_smoothing == 0.1


def test_your_own_objective_takes_every_knob() -> None:
    settings = make_settings("package.module:name", **GIVEN)
    assert {knob: getattr(settings, knob) for knob in GIVEN} == GIVEN


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"name": "apo_zero"}, "train.objective.name: 'apo_zero' is not a choice; did you mean 'apo-zero'?"),
        ({"name": "apo_zero"}, "choose from sft, dpo, "),
        ({"name": "apo_zero"}, "npo, my_package.my_module:my_loss"),
        ({"name": "module:"}, "an objective of your own is written as my_package.my_module:my_loss (got 'module:')"),
        ({"name": "a b:c"}, "an objective of your own is written as"),
        ({"name": 3}, "train.objective.name: must be of the kind string (got 3)"),
        ({"name": "dpo", "margin": -1}, "train.objective.margin: must be 0 or more, in units of reward, or column"),
        ({"name": "dpo", "margin": "data"}, "train.objective.margin: must be 0 or more"),
        ({"name": "dpo", "margin": float("nan")}, "train.objective.margin: must be 0 or more"),
        ({"name": "dpo", "label_smoothing": 0.5}, "train.objective.label_smoothing: must be less than 0.5"),
        ({"name": "apo-zero", "margin": "column"}, "there is no difference to put a margin on; leave margin out"),
        ({"name": "ipo", "margin": 1}, "its margin is 1 / (2 beta)"),
        ({"name": "dpo", "lambda": 1}, "train.objective.lambda: unknown key"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(objective: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse({"policy": {"model": "m"}, "train": {"objective": objective}}, "recipe.yaml")
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_name_that_no_recipe_checked_is_an_error_too() -> None:
    with pytest.raises(RecipeError, match="there is no module 'apo_zero'"):
        find_objective("apo_zero")
