"""What the train stage refuses or leaves out, and how it says so: one line that names the value and the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from tiny_models import CHATML, make_model, make_tokenizer, save_folder
from training_pairs import Notes, make_pairs, make_settings, trained
from transformers import get_scheduler

from anchored.errors import DataError, ModelError, TrainError
from anchored.objectives import ObjectiveName
from anchored.records import Answer, Message, Outcome, Prompt
from anchored.runs import Run
from anchored.train.optimizer import build_optimizer, learning_rate
from anchored.train.settings import OptimizerSettings, TrainSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"), context=300)


def test_no_pairs_is_an_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pair to train on"):
        trained(tmp_path, model, make_settings(), [])


def test_pairs_that_cannot_teach_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    good, same, refused, cut = make_pairs(4)
    good = replace(good, rejected=Answer("No."))
    same = replace(same, rejected=same.chosen)
    refused = replace(refused, outcome=Outcome.LEAK)
    # these differ in their last words only, which are cut off
    settings = make_settings(max_answer_tokens=12)
    notes = Notes()
    summary = trained(tmp_path, model, settings, [good, same, refused, cut], [same], notes)
    assert summary.pairs == 1
    assert summary.held_out == 0
    assert summary.left_out == {"identical": 2, "leak": 1}
    assert not Run(tmp_path).trajectories.exists()
    assert notes.text.splitlines() == [
        "left out of training: 1 leak, 2 identical",
        "left out of the held-out rows: 1 identical",
        "1 of 2 answers are longer than 12 tokens and keep their start, without an end of turn "
        "(train.max_answer_tokens)",
    ]


def test_only_pairs_that_cannot_teach_is_an_error_that_counts_them(model: Path, tmp_path: Path) -> None:
    pairs = [replace(pair, rejected=pair.chosen) for pair in make_pairs(3)]
    with pytest.raises(DataError, match=r"none of the pairs can be trained on \(3 identical\)"):
        trained(tmp_path, model, make_settings(), pairs)


def test_a_pair_that_the_template_does_not_take_is_left_out(tmp_path: Path) -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    folder = save_folder(tmp_path / "model", chat_template=no_system)
    good, odd = make_pairs(2)
    odd = replace(odd, prompt=Prompt((Message("system", "Be brief."), *odd.prompt.messages), "odd"))
    notes = Notes()
    summary = trained(tmp_path / "run", folder, make_settings(epochs=1), [good, odd], [odd], notes)
    assert (summary.pairs, summary.held_out, summary.left_out) == (1, 0, {"malformed": 1})
    assert "1 malformed (pair 'odd': the chat template refuses" in notes.text
    with pytest.raises(ModelError, match=r"none of the pairs .*1 malformed.*'odd'.*no system role"):
        trained(tmp_path / "none", folder, make_settings(), [odd])


def test_a_pair_longer_than_the_context_fails_before_training(model: Path, tmp_path: Path) -> None:
    pair = replace(make_pairs(1)[0], chosen=Answer("Add coins. " * 100))
    numbers = r"has \d+ prompt and 290 answer tokens, but the model's context is 300; lower train\.max_prompt_tokens"
    with pytest.raises(TrainError, match=numbers):
        trained(tmp_path, model, make_settings(max_answer_tokens=290), [*make_pairs(3), pair])
    assert list(tmp_path.iterdir()) == []


def test_a_pair_without_the_margin_that_is_asked_for_is_named(model: Path, tmp_path: Path) -> None:
    one, other = make_pairs(2)
    settings = make_settings(objective={"name": "dpo", "margin": "column"})
    says = rf"pair '{other.prompt.id}' \('Add .*'\) has no number in the column margin, .* one margin for all pairs"
    with pytest.raises(DataError, match=says):
        trained(tmp_path, model, settings, [replace(one, margin=1.0), other])


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer) - 100).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"holds token \d+, but the model has embeddings for \d+ tokens only"):
        trained(tmp_path / "run", tmp_path / "model", make_settings(), make_pairs(3))


def test_a_model_without_a_chat_template_is_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "model", chat_template=None)
    with pytest.raises(ModelError, match="chat template"):
        trained(tmp_path / "run", folder, make_settings(), make_pairs(3))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        trained(tmp_path / "run", tmp_path / "nowhere", make_settings(), make_pairs(3))


def test_a_gpu_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TrainError, match=r"train\.device is 'cuda', .* set train\.device to 'cpu' or 'auto'"):
        trained(tmp_path, model, make_settings(device="cuda"), make_pairs(3))


def test_a_warm_up_longer_than_the_run_is_named(model: Path, tmp_path: Path) -> None:
    settings = make_settings(optimizer={"warmup_steps": 2}, epochs=2)
    with pytest.raises(TrainError, match=r"train\.optimizer\.warmup_steps is 2, but the run has only 2 steps"):
        trained(tmp_path, model, settings, make_pairs(3))


def test_what_the_limits_cut_is_counted(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(3)
    long = replace(pairs[0], chosen=Answer("word " * 200))
    notes = Notes()
    trained(tmp_path, model, make_settings(max_answer_tokens=150), [long, *pairs[1:]], progress=notes)
    assert notes.text.count("1 of 6 answers are longer than 150 tokens and keep their start") == 1
    assert "prompts are longer" not in notes.text
    again = Notes()
    trained(tmp_path / "again", model, make_settings(max_prompt_tokens=5), pairs, progress=again)
    assert "3 of 3 prompts are longer than 5 tokens and keep their end" in again.text
    assert "answers are longer" not in again.text


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"objective": {"name": "apo_zero"}},
            ", ".join(map(repr, get_args(ObjectiveName))) + " or 'my_package.my_module:my_loss'",
        ),
        ({"objective": {"beta": 0}}, "greater than 0"),
        ({"optimizer": {"lr": float("inf")}}, "finite number"),
        ({"optimizer": {"name": "sgd"}}, "'rmsprop' or 'adamw'"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"batch_size": 4}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_name_the_choices(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TrainSettings.model_validate(wrong)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_are_those_of_transformers(schedule: str) -> None:
    settings = OptimizerSettings.model_validate({"schedule": schedule, "lr": 3e-4})
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], settings)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=25)
    for step in range(25):
        assert learning_rate(settings, step, 25) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_warm_up_rises_evenly_to_the_rate_and_no_step_is_wasted() -> None:
    settings = OptimizerSettings(lr=1.0, warmup_steps=3)
    rates = [learning_rate(settings, step, 7) for step in range(7)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
