"""Steps: against a training loop written independently here, split in every way, ordered by seed, ended by NaN."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_folder
from training_pairs import InterruptAt, make_pairs, make_settings, steady, trained, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from anchored.errors import TrainError
from anchored.objectives.losses import OBJECTIVES
from anchored.records import Pair
from anchored.runs import read_lines
from anchored.train.examples import prepare
from anchored.train.metrics import trajectory_steps
from anchored.train.policy import load_policy
from anchored.train.step import epoch_order


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"))


def plain_training(folder: Path, pairs: list[Pair], epochs: int, lr: float, beta: float) -> torch.nn.Module:
    """APO-zero with RMSprop and a linear schedule, all pairs in each step: nothing of anchored is used."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logp(pair: Pair, answer: str) -> torch.Tensor:
        prompt = [{"role": "user", "content": pair.prompt.messages[0].content}]
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": answer}], return_dict=False, tokenize=True
        )
        # the last token is the newline after the end of turn
        ids = torch.tensor([whole[:-1]])
        logits = model(input_ids=ids).logits[0]
        scores = torch.log_softmax(logits, -1)
        return torch.stack([scores[i - 1, ids[0, i]] for i in range(len(before), ids.shape[1])]).sum()

    with torch.no_grad():
        reference = [(logp(pair, pair.chosen.text), logp(pair, pair.rejected.text)) for pair in pairs]
    optimizer = torch.optim.RMSprop(model.parameters(), lr=lr, alpha=0.99, eps=1e-8)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=epochs)
    for _ in range(epochs):
        losses = []
        for pair, (chosen, rejected) in zip(pairs, reference, strict=True):
            reward_chosen = beta * (logp(pair, pair.chosen.text) - chosen)
            reward_rejected = beta * (logp(pair, pair.rejected.text) - rejected)
            losses.append(-torch.sigmoid(reward_chosen) + torch.sigmoid(reward_rejected))
        torch.stack(losses).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def test_ten_steps_move_the_weights_as_a_plain_loop_does(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(5)
    settings = make_settings(
        objective={"name": "apo-zero", "beta": 0.1},
        optimizer={"name": "rmsprop", "lr": 1e-5},
        epochs=10,
        pairs_per_step=16,
        tokens_per_batch=100,
    )
    trained(tmp_path, model, settings, pairs)
    expected = plain_training(model, pairs, epochs=10, lr=1e-5, beta=0.1).state_dict()
    start, ours = weights(model), weights(tmp_path / "checkpoints" / "epoch-10")
    for name, weight in ours.items():
        assert (weight - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
        moved = (expected[name] - start[name]).norm()
        assert moved > 1e-5 * start[name].norm(), f"{name} hardly moved: the comparison shows nothing"
        assert (weight - expected[name]).norm() <= 0.01 * moved, name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_depend_on_its_micro_batches(model: Path, tmp_path: Path, objective: str) -> None:
    pairs = make_pairs(16)
    # one step shows gradients; the second shows that the first left the same weights
    settings = {"objective": {"name": objective, "beta": 1.0}, "pairs_per_step": 16}
    trained(tmp_path / "1x16", model, make_settings(**settings, tokens_per_batch=10_000), pairs)
    trained(tmp_path / "16x1", model, make_settings(**settings, tokens_per_batch=1), pairs)
    together, apart = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("1x16", "16x1"))
    for one, other in zip(steady(together), steady(apart), strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-5)
    assert together[0]["grad_norm"] == pytest.approx(apart[0]["grad_norm"], rel=1e-5)


def test_each_pair_of_a_smaller_last_step_weighs_more(model: Path, tmp_path: Path) -> None:
    """With a vanishing rate, the gradient of 5 pairs in steps of 4 and 1 is that of each step's own mean."""
    pairs = make_pairs(5)
    still = {"objective": {"name": "sft"}, "optimizer": {"lr": 1e-30}, "epochs": 1}
    trained(tmp_path / "two", model, make_settings(**still, pairs_per_step=4), pairs)
    lines = read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [line["pairs_seen"] for line in lines] == [4, 5]
    assert [line["epoch"] for line in lines] == [0.8, 1.0]
    alone = pairs[epoch_order(5, 0, 0)[4]]
    trained(tmp_path / "alone", model, make_settings(**still), [alone])
    expected = steady(read_lines(tmp_path / "alone" / "metrics.jsonl"))[0]
    for name in ("loss", "grad_norm", "logp_chosen"):
        assert lines[1][name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_falls(model: Path, tmp_path: Path, objective: str) -> None:
    settings = make_settings(objective={"name": objective, "beta": 0.5}, optimizer={"lr": 2e-5}, epochs=3)
    trained(tmp_path, model, settings, make_pairs(16))
    lines = read_lines(tmp_path / "metrics.jsonl")
    first, last = ([line["loss"] for line in lines if epoch - 1 < line["epoch"] <= epoch] for epoch in (1, 3))
    assert sum(last) < sum(first)


def test_apo_zero_raises_winners_and_lowers_losers(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(8)
    settings = make_settings(epochs=4, optimizer={"lr": 3e-5})
    trained(tmp_path, model, settings, pairs, held_out=pairs)
    before, *_, after = read_lines(tmp_path / "trajectories.jsonl")
    assert before["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert after["logp_chosen"] > before["logp_chosen"] + 0.5
    assert after["logp_rejected"] < before["logp_rejected"] - 0.5
    assert after["reward_chosen"] == pytest.approx(after["logp_chosen"] - before["logp_chosen"], abs=1e-4)
    assert after["reward_accuracy"] == 1.0


def test_the_order_is_a_permutation_by_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert epoch_order(50, 0, 0) == orders[0]


def test_held_out_pairs_are_measured_twenty_times_and_at_checkpoints() -> None:
    at = trajectory_steps(steps=1000, steps_per_epoch=300)
    assert at == set(range(0, 1001, 50)) | {300, 600, 900}
    assert trajectory_steps(steps=3, steps_per_epoch=1) == {0, 1, 2, 3}


def test_a_loss_that_is_no_number_ends_training_and_spoils_nothing(model: Path, tmp_path: Path) -> None:
    settings = make_settings(optimizer={"lr": 1e30}, epochs=3, pairs_per_step=8)
    says = r"step 2: .* norm nan, with the pairs .* and 3 more; lower train\.optimizer\.lr \(now 1e\+30\)"
    with pytest.raises(TrainError, match=says):
        trained(tmp_path, model, settings, make_pairs(8))
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-01", "resume"]
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "checkpoints" / "epoch-01").values())


def test_weights_under_which_the_held_out_loss_is_no_number_are_not_saved(model: Path, tmp_path: Path) -> None:
    settings = make_settings(optimizer={"lr": 1e30}, epochs=1, pairs_per_step=8)
    says = r"after step 1: the held-out loss is nan, with the pairs '\w+'.*; lower train\.optimizer\.lr"
    with pytest.raises(TrainError, match=says):
        trained(tmp_path, model, settings, make_pairs(8), make_pairs(2, seed=1))
    assert not (tmp_path / "checkpoints").exists()
    assert [line["step"] for line in read_lines(tmp_path / "trajectories.jsonl")] == [0]


def test_an_error_names_each_pair_once_also_where_its_answers_count_by_themselves(model: Path, tmp_path: Path) -> None:
    settings = make_settings(objective={"name": "apo-zero-unpaired"}, optimizer={"lr": 1e30}, pairs_per_step=2)
    with pytest.raises(TrainError, match=r"step 2: .*, with the pairs ('\w+'), (?!\1)'\w+'; lower"):
        trained(tmp_path, model, settings, make_pairs(4))


def test_only_the_pair_whose_loss_is_no_number_is_named_and_what_was_saved_still_trains(
    model: Path, tmp_path: Path
) -> None:
    pairs = [replace(pair, prompt=replace(pair.prompt, id=f"sum {place}")) for place, pair in enumerate(make_pairs(6))]
    settings = make_settings(objective={"name": "dpo"}, pairs_per_step=2)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, settings, pairs, progress=InterruptAt("train", 3))
    policy = load_policy(model, settings)
    spoilt, *_ = prepare(pairs[4:5], policy, settings).kept
    with closing(sqlite3.connect(tmp_path / "reference.sqlite")) as database, database:
        before = database.execute("SELECT logp FROM logps WHERE answer = ?", (spoilt.keys[0],)).fetchone()
        database.execute("UPDATE logps SET logp = ? WHERE answer = ?", (math.inf, spoilt.keys[0]))
    with pytest.raises(TrainError, match=r"step [456]: the loss is inf .*, with the pairs 'sum 4'; lower"):
        trained(tmp_path, model, settings, pairs)
    with closing(sqlite3.connect(tmp_path / "reference.sqlite")) as database, database:
        database.execute("UPDATE logps SET logp = ? WHERE answer = ?", (*before, spoilt.keys[0]))
    trained(tmp_path, model, settings, pairs)
    trained(tmp_path / "undisturbed", model, settings, pairs)
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (tmp_path, tmp_path / "undisturbed"))
    assert steady(ours) == steady(theirs)


def test_a_norm_bound_scales_long_gradients_down_and_leaves_short_ones(model: Path, tmp_path: Path) -> None:
    """AdamW and RMSprop hardly feel a gradient's scale, so look at what RMSprop keeps of it: the square."""
    squares = {}
    for bound in (None, 1e6, 0.5):
        settings = make_settings(optimizer={"lr": 1e-30, "max_grad_norm": bound}, epochs=2, pairs_per_step=4)
        folder = tmp_path / str(bound)
        with pytest.raises(KeyboardInterrupt):
            trained(folder, model, settings, make_pairs(4), progress=InterruptAt("train", 1))
        (file,) = (folder / "checkpoints" / "resume").glob("step-*/*.safetensors")
        moments = {name: moment for name, moment in load_file(file).items() if name.startswith("square_avg")}
        squares[bound] = sum(float(moment.sum()) for moment in moments.values())
        norm = read_lines(folder / "metrics.jsonl")[0]["grad_norm"]
    assert squares[1e6] == squares[None] == pytest.approx(0.01 * norm**2, rel=1e-4)
    assert squares[0.5] == pytest.approx(0.01 * 0.5**2, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"name": "beta-dpo", "beta": 0.5}},
        {"objective": {"name": "kto", "beta": 0.5}},
        {"refresh_reference_epochs": 1},
        {"refresh_reference_epochs": 2},
    ],
    ids=["moving average", "mismatched answers", "refreshed each epoch", "refreshed every other epoch"],
)
@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_that_goes_on_is_the_undisturbed_one(
    model: Path, tmp_path: Path, changes: dict[str, Any], steps: int
) -> None:
    settings = make_settings(**changes, optimizer={"lr": 2e-5}, epochs=3, pairs_per_step=3, save_every_steps=1)
    pairs, held_out = make_pairs(6), make_pairs(3, seed=1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "resumed", model, settings, pairs, held_out, InterruptAt("train", steps))
    for name in ("resumed", "undisturbed"):
        trained(tmp_path / name, model, settings, pairs, held_out)
    for file in ("metrics.jsonl", "trajectories.jsonl"):
        ours, theirs = (read_lines(tmp_path / name / file) for name in ("resumed", "undisturbed"))
        assert steady(ours) == steady(theirs)


def test_a_refreshed_reference_is_the_policy_itself(model: Path, tmp_path: Path) -> None:
    settings = make_settings(refresh_reference_epochs=2, epochs=4, pairs_per_step=8)
    trained(tmp_path, model, settings, make_pairs(8), make_pairs(3, seed=1))
    margins = [line["reward_margin"] for line in read_lines(tmp_path / "metrics.jsonl")]
    # before each epoch's only step: the reference is the start, the start, the policy, the policy a step ago
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[2] == pytest.approx(0, abs=1e-4)
    assert min(margins[1], margins[3]) > 0.1
    # the measurement after an epoch is still against the reference that the epoch was trained with
    held_out = {line["step"]: line["reward_margin"] for line in read_lines(tmp_path / "trajectories.jsonl")}
    assert min(held_out[2], held_out[4]) > 0.1


def test_a_refreshed_reference_that_was_lost_is_an_error(model: Path, tmp_path: Path) -> None:
    settings = make_settings(refresh_reference_epochs=1, epochs=3, save_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, model, settings, make_pairs(8), progress=InterruptAt("train", 3))
    (tmp_path / "reference.sqlite").unlink()
    says = r"reference\.sqlite: lacks 16 logps of the refreshed reference .*; restore the file, or use --redo train"
    with pytest.raises(TrainError, match=says):
        trained(tmp_path, model, settings, make_pairs(8))


def test_each_pair_has_the_margin_of_its_column(model: Path, tmp_path: Path) -> None:
    """At the first step policy and reference agree, so dpo's loss is -log s(-margin)."""
    margins = [0.0, 0.5, 2.0]
    pairs = [replace(pair, margin=margin) for pair, margin in zip(make_pairs(3), margins, strict=True)]
    settings = make_settings(objective={"name": "dpo", "margin": "column"}, epochs=1)
    trained(tmp_path, model, settings, pairs)
    expected = sum(math.log(1 + math.exp(margin)) for margin in margins) / 3
    assert read_lines(tmp_path / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, abs=1e-4)
