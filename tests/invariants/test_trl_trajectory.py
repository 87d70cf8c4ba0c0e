"""A whole training beside TRL's own `DPOTrainer`: the same tokens, losses and, ten steps later, the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import TRIMMED, save_folder
from torch import Tensor
from training_pairs import make_pairs, make_settings, trained, weights
from trl import DPOConfig, DPOTrainer

from anchored.records import Pair
from anchored.runs import read_lines
from anchored.train.examples import Example, prepare
from anchored.train.policy import load_policy
from anchored.train.settings import TrainSettings
from anchored.train.step import epoch_order

PAIRS_PER_STEP, EPOCHS, PAIRS = 4, 2, 20
PROMPT, ANSWER = 22, 24
"""Tokens: all prompts have so many, and some answers more, so that both trainers cut them at the same place."""

SETTINGS = make_settings(
    objective={"name": "apo-zero", "beta": 0.5},
    epochs=EPOCHS,
    pairs_per_step=PAIRS_PER_STEP,
    max_answer_tokens=ANSWER,
    tokens_per_batch=150,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # nothing follows the end-of-turn token: TRL scores what does
    return save_folder(tmp_path_factory.mktemp("model"), chat_template=TRIMMED)


@pytest.fixture(scope="module")
def pairs(model: Path) -> list[Pair]:
    """Those whose prompts have the same number of tokens: TRL has one limit for prompt and answer together."""
    many = make_pairs(4 * PAIRS)
    fitting = [
        pair
        for pair, example in zip(many, examples_of(model, many, SETTINGS), strict=True)
        if prompt(example) == PROMPT
    ]
    return fitting[:PAIRS]


@pytest.fixture(scope="module")
def trl(model: Path, pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    """Trained, on every epoch's pairs in our order."""
    order = [place for epoch in range(EPOCHS) for place in epoch_order(len(pairs), SETTINGS.seed, epoch)]
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        loss_type=["apo_zero"],
        beta=SETTINGS.objective.beta,
        max_length=PROMPT + ANSWER,
        optim="rmsprop",
        learning_rate=SETTINGS.optimizer.lr,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=PAIRS_PER_STEP // 2,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(str(model), args=config, train_dataset=Dataset.from_list([turns(pairs[at]) for at in order]))
    trainer.train()
    return trainer


def examples_of(model: Path, pairs: list[Pair], settings: TrainSettings) -> tuple[Example, ...]:
    return prepare(pairs, load_policy(model, settings), settings).kept


def prompt(example: Example) -> int:
    return len(example.tree.prompt)


def turns(pair: Pair) -> dict[str, Any]:
    """TRL's explicit prompt."""
    return {
        "prompt": [{"role": "user", "content": pair.prompt.messages[0].content}],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
    }


def scored_by(trainer: DPOTrainer, row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Prompt and scored tokens of chosen and rejected, as TRL's collator hands them to the model."""
    batch = trainer.data_collator([row])
    parts = []
    for ids, read, scored in zip(
        *(batch[name] for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        parts.append((ids[(read == 1) & (scored == 0)].tolist(), ids[scored == 1].tolist()))
    return parts


def test_the_trainers_read_and_score_the_same_tokens(model: Path, pairs: list[Pair], trl: DPOTrainer) -> None:
    assert len(pairs) == PAIRS
    examples = examples_of(model, pairs, SETTINGS)
    order = [place for epoch in range(EPOCHS) for place in epoch_order(len(pairs), SETTINGS.seed, epoch)]
    for place, row in zip(order, trl.train_dataset, strict=True):
        tree = examples[place].tree
        assert scored_by(trl, row) == [(list(tree.prompt), list(answer)) for answer in tree.answers]
    lengths = {len(answer) for example in examples for answer in example.tree.answers}
    assert ANSWER in lengths, "some are cut"
    assert min(lengths) < ANSWER, "others end with their end-of-turn token"


def test_ten_steps_give_the_same_losses_and_weights(
    model: Path, pairs: list[Pair], trl: DPOTrainer, tmp_path: Path
) -> None:
    trained(tmp_path, model, SETTINGS, pairs)
    ours, theirs = read_lines(tmp_path / "metrics.jsonl"), [line for line in trl.state.log_history if "loss" in line]
    assert len(ours) == len(theirs) == 10
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["lr"] == pytest.approx(yours["learning_rate"], rel=1e-9)
        for name, its in (("loss", "loss"), ("logp_chosen", "logps/chosen"), ("reward_margin", "rewards/margins")):
            assert mine[name] == pytest.approx(yours[its], rel=1e-4, abs=1e-5), (mine["step"], name)
    assert ours[0]["loss"] - ours[-1]["loss"] > 0.1, "the training does something"
    assert_near(weights(tmp_path / "checkpoints" / "epoch-02"), trl.model.state_dict(), weights(model))


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Each weight to 1e-4 of its size, and all of them together to 1e-3 of what training changed."""
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.dist(ours[name], weight) < 1e-4 * weight.norm(), name
    far = torch.stack([torch.dist(ours[name], theirs[name]) for name in start]).norm()
    moved = torch.stack([torch.dist(start[name], theirs[name]) for name in start]).norm()
    assert far < 1e-3 * moved
