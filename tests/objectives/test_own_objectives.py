"""Objectives that users bring, by import path: found in the current folder, called as ours are, wrong ones named."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drawn_logps import draw_answers, draw_pairs, losses_and_gradients, make_settings

from anchored.errors import RecipeError, TrainError
from anchored.objectives.losses import Objective, find_objective, losses_of

MODULE = """
from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from anchored.objectives.losses import AnswerLogps, Objective, PairLogps, rewards


def dpo_again(logps: PairLogps, settings):
    reward = rewards(logps, settings)
    return -logsigmoid(reward.chosen - reward.rejected)


def unlike(logps: AnswerLogps, settings):
    return torch.where(logps.desirable, -logps.policy, logps.policy)


def centred(logps, settings):
    return (logps.policy_chosen - logps.step["level"]) ** 2


full = Objective(centred, step_means={"level": lambda logps, settings: logps.policy_chosen})

number = 3


def three(logps, settings, extra):
    return logps.policy_chosen


def a_number(logps, settings):
    return 1.0


def a_mean(logps, settings):
    return logps.policy_chosen.mean()


def misspelt(logps, settings):
    return torch.stack([logps.policy_choosen])


def cut_off(logps, settings):
    return logps.policy_chosen.detach() ** 2
"""


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module and a package, which Python has on no path of its own."""
    (tmp_path / "my_losses.py").write_text(MODULE)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "broken.py").write_text("import no_such_thing\n")
    (tmp_path / "my_package" / "torn.py").write_text("def loss(logps, settings)\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("my_losses", "my_package")]:
        del sys.modules[name]


def test_a_function_in_the_current_folder_is_an_objective_over_pairs() -> None:
    objective = find_objective("my_losses:dpo_again")
    assert (objective.takes, objective.unit) == ("pairs", "pairs")
    pairs, settings = draw_pairs(), make_settings("my_losses:dpo_again", beta=0.3)
    found, gradients = losses_and_gradients(pairs, settings)
    dpo = make_settings("dpo", beta=0.3)
    no_margins = type(pairs)(*(getattr(pairs, name) for name in pairs.__slots__[:6]), torch.zeros(60).double())
    expected, expected_gradients = losses_and_gradients(no_margins, dpo)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_the_annotation_of_the_first_parameter_makes_it_an_objective_over_answers() -> None:
    objective = find_objective("my_losses:unlike")
    assert (objective.takes, objective.unit) == ("answers", "answers")
    losses, _ = losses_and_gradients(draw_answers(), make_settings("my_losses:unlike"))
    assert losses.shape == (120,)


def test_an_objective_of_ones_own_is_taken_as_it_is() -> None:
    objective = find_objective("my_losses:full")
    assert isinstance(objective, Objective)
    pairs = draw_pairs()
    losses, _ = losses_and_gradients(pairs, make_settings("my_losses:full"))
    torch.testing.assert_close(losses.mean(), pairs.policy_chosen.detach().var(correction=0))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_module:loss", "there is no module 'no_module'; it has to be an installed package or lie in the current"),
        ("my_package.gone:loss", "there is no module 'my_package.gone'"),
        ("my_package.broken:loss", "importing my_package.broken fails: ModuleNotFoundError: No module named 'no_such"),
        ("my_package.torn:loss", "importing my_package.torn fails: SyntaxError: expected ':'"),
        ("my_losses:los", r"my_losses.py has no 'los'"),
        ("my_losses:number", "is a int; an objective is a function"),
        ("my_losses:three", r"takes .*extra.*an objective is a function \(logps, settings\)"),
    ],
)
def test_what_cannot_be_an_objective_is_said_on_one_line(path: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as raised:
        find_objective(path)
    assert path in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("a_number", "returned a float; it has to return a tensor with one loss for each of the pairs"),
        ("a_mean", "returned losses of shape [] for 60 pairs"),
        ("cut_off", "returned losses without a gradient"),
    ],
)
def test_a_wrong_result_is_said_on_one_line(function: str, says: str) -> None:
    objective = find_objective(f"my_losses:{function}")
    with pytest.raises(TrainError, match=rf"train\.objective\.name: my_losses:{function} {re.escape(says)}"):
        losses_of(objective, draw_pairs(), make_settings(f"my_losses:{function}"))


def test_a_function_that_fails_is_said_with_its_line() -> None:
    objective, settings = find_objective("my_losses:misspelt"), make_settings("my_losses:misspelt")
    line = 1 + MODULE.splitlines().index("    return torch.stack([logps.policy_choosen])")
    says = rf"my_losses:misspelt fails: AttributeError: .*policy_choosen.* \(.*my_losses\.py, line {line}\)$"
    with pytest.raises(TrainError, match=says):
        losses_of(objective, draw_pairs(), settings)


def test_held_out_pairs_need_no_gradient() -> None:
    with torch.no_grad():
        losses_of(find_objective("my_losses:cut_off"), draw_pairs(), make_settings("my_losses:cut_off"))


def test_the_example_in_the_docs_runs(current_folder: Path) -> None:
    """The ten lines of docs/objectives.md, as they stand there."""
    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(# my_losses\.py\n.*?)```", text, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    (current_folder / "my_losses.py").write_text(example)
    (name,) = re.findall(r"train\.objective\.name=(my_losses:\w+)", text)
    losses, gradients = losses_and_gradients(draw_pairs(), make_settings(name, margin=0.5))
    assert losses.isfinite().all()
    assert all(gradient.any() for gradient in gradients)
