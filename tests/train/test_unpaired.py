"""Single labelled answers, and kto's mismatched ones: against plain transformers, split and ordered in every way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import save_folder
from training_pairs import make_answers, make_pairs, make_settings, steady, trained, weights
from transformers import AutoModelForCausalLM

from anchored import recipe as recipes
from anchored.errors import DataError
from anchored.pipeline import Plan, execute
from anchored.progress import Silent
from anchored.records import Answer, LabelledAnswer, Pair, TrainingRow
from anchored.runs import read_lines
from anchored.train.examples import Example, prepare, with_mismatched
from anchored.train.policy import Policy, load_policy

PAIRS, ANSWERS = make_pairs(6), make_answers(9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return load_policy(model, make_settings())


def examples_of(policy: Policy, rows: Sequence[TrainingRow]) -> list[Example]:
    kept = prepare(rows, policy, make_settings()).kept
    return with_mismatched(kept, kept, policy.context, seed=0)


def plain_kto(
    folder: Path, examples: Sequence[Example], steps: int, lr: float, beta: float
) -> list[tuple[float, float]]:
    """Loss and KL of so many steps on all examples at once; nothing but token ids comes from anchored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logp(prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        scores = torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], -1)
        return scores.gather(1, ids[0, len(prompt) :, None]).sum()

    def all_logps() -> list[list[torch.Tensor]]:
        return [[logp(one.tree.prompt, answer) for answer in one.tree.answers] for one in examples]

    with torch.no_grad():
        reference = all_logps()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=lr, alpha=0.99, eps=1e-8)
    lines = []
    for _ in range(steps):
        logps = all_logps()
        ratios = [
            [one - other for one, other in zip(*both, strict=True)] for both in zip(logps, reference, strict=True)
        ]
        # the mismatched answer stands once for each answer of its prompt
        mismatched = [ratio[-1] for ratio in ratios for _ in ratio[:-1]]
        mean = torch.stack(mismatched).mean().detach()
        kl = mean.clamp(min=0)
        losses = [
            1 - torch.sigmoid(beta * (ratio - kl) if desirable else beta * (kl - ratio))
            for example, all_ratios in zip(examples, ratios, strict=True)
            for desirable, ratio in zip(example.labels, all_ratios[:-1], strict=True)
        ]
        loss = torch.stack(losses).mean()
        lines.append((loss.item(), mean.item()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lines


@pytest.mark.parametrize("tokens", [1, 10_000])
@pytest.mark.parametrize("rows", [PAIRS, ANSWERS], ids=["pairs", "answers"])
def test_kto_is_what_plain_transformers_gives_however_a_step_is_split(
    model: Path, policy: Policy, tmp_path: Path, rows: list[TrainingRow], tokens: int
) -> None:
    settings = make_settings(
        objective={"name": "kto", "beta": 0.5},
        optimizer={"lr": 2e-5, "schedule": "constant"},
        epochs=4,
        pairs_per_step=16,
        tokens_per_batch=tokens,
    )
    trained(tmp_path, model, settings, rows)
    lines = read_lines(tmp_path / "metrics.jsonl")
    expected = plain_kto(model, examples_of(policy, rows), steps=4, lr=2e-5, beta=0.5)
    assert max(abs(kl) for _, kl in expected) > 0.1, "the policy hardly left the reference: nothing is shown"
    for line, (loss, kl) in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("objective", ["kto", "apo-zero-unpaired", "npo", "sft"])
def test_a_step_of_answers_does_not_depend_on_its_micro_batches(model: Path, tmp_path: Path, objective: str) -> None:
    settings = {"objective": {"name": objective}, "pairs_per_step": 3}
    trained(tmp_path / "one", model, make_settings(**settings, tokens_per_batch=10_000), ANSWERS, make_answers(4, 1))
    trained(tmp_path / "many", model, make_settings(**settings, tokens_per_batch=1), ANSWERS, make_answers(4, 1))
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        lines = [steady(read_lines(tmp_path / folder / name)) for folder in ("one", "many")]
        for one, other in zip(*lines, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    # twice as many answers as pairs in a step
    assert [line["pairs_seen"] for line in read_lines(tmp_path / "one" / "metrics.jsonl")] == [6, 12, 18, 24]


def write_unpaired(path: Path, rows: Sequence[LabelledAnswer], messages: bool) -> Path:
    columns = {
        "prompt": [row.prompt.messages[0].content for row in rows],
        "completion": [row.answer.text for row in rows],
        "label": [row.desirable for row in rows],
    }
    if messages:
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            columns[name] = [[{"role": role, "content": text}] for text in columns[name]]  # type: ignore[list-item]
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        table.to_pandas().to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize(
    ("objective", "file", "messages"),
    [("kto", "data.jsonl", True), ("apo-zero-unpaired", "data.parquet", True), ("npo", "data.csv", False)],
)
def test_unpaired_data_trains_from_a_file_to_a_checkpoint(
    model: Path, tmp_path: Path, objective: str, file: str, messages: bool
) -> None:
    data = write_unpaired(tmp_path / file, make_answers(30), messages)
    train = {
        "data": str(data),
        "held_out": 6,
        "objective": {"name": objective, "beta": 1.0},
        "optimizer": {"lr": 1e-4},
        "epochs": 3,
        "pairs_per_step": 4,
        "threads": 1,
    }
    recipe = recipes.parse({"policy": {"model": str(model)}, "train": train}, "test")
    run = execute(Plan(recipe, tmp_path / "run", ("train",)), Silent())
    summary = run.summary("train")
    assert summary is not None
    assert summary["pairs"] + summary["held_out"] == 40
    before, *_, after = read_lines(run.trajectories)
    assert after["loss"] < before["loss"]
    assert after["logp_rejected"] < before["logp_rejected"]
    assert after["reward_margin"] == pytest.approx(after["reward_chosen"] - after["reward_rejected"])
    if objective != "npo":
        assert after["logp_chosen"] > before["logp_chosen"]
        assert after["reward_accuracy"] > 0.9


def test_unpaired_data_does_not_train_a_loss_over_pairs(model: Path, tmp_path: Path) -> None:
    says = "'dpo', which compares two answers .* use sft, kto, apo-zero-unpaired, npo, or give pairs"
    with pytest.raises(DataError, match=says):
        trained(tmp_path, model, make_settings(objective={"name": "dpo"}), ANSWERS)


@pytest.mark.parametrize(("objective", "kind"), [("npo", "undesirable"), ("sft", "desirable")])
def test_data_without_the_answers_that_an_objective_learns_from_is_named(
    model: Path, tmp_path: Path, objective: str, kind: str
) -> None:
    rows = [row for row in ANSWERS if row.desirable == (objective == "npo")]
    with pytest.raises(DataError, match=f"learns from {kind} answers alone, but the data has none"):
        trained(tmp_path, model, make_settings(objective={"name": objective}), rows)


def mismatched_of(examples: Sequence[Example]) -> dict[tuple[int, ...], tuple[int, ...]]:
    return {one.tree.prompt: one.tree.answers[-1] for one in examples}


def test_a_mismatched_answer_is_always_one_of_another_prompt(policy: Policy) -> None:
    examples = examples_of(policy, ANSWERS)
    own: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for one in examples:
        own.setdefault(one.tree.prompt, set()).update(one.tree.answers[:-1])
    whose = {answer: prompt for prompt, answers in own.items() for answer in answers}
    assert len(own) == 9
    assert any(len(answers) == 2 for answers in own.values())
    found = mismatched_of(examples)
    assert all(whose[answer] != prompt for prompt, answer in found.items())
    # a derangement: each prompt gives an answer to exactly one other
    assert {whose[answer] for answer in found.values()} == own.keys()


def test_mismatched_answers_depend_on_the_seed_but_not_on_the_order_or_names_of_rows(policy: Policy) -> None:
    first = mismatched_of(examples_of(policy, ANSWERS))
    renamed = [replace(row, prompt=replace(row.prompt, id=f"row {n}")) for n, row in enumerate(ANSWERS)]
    Random(1).shuffle(renamed)
    assert mismatched_of(examples_of(policy, renamed)) == first
    kept = prepare(ANSWERS, policy, make_settings()).kept
    assert mismatched_of(with_mismatched(kept, kept, policy.context, seed=1)) != first


def test_two_prompts_exchange_their_answers_and_one_alone_is_an_error(
    model: Path, policy: Policy, tmp_path: Path
) -> None:
    one, other = PAIRS[:2]
    for example in examples_of(policy, [one, other]):
        partner = other if example.id == one.prompt.id else one
        answers = prepare([partner], policy, make_settings()).kept[0].tree.answers
        assert example.tree.answers[-1] in answers
    alone = [one, Pair(one.prompt, one.chosen, Answer("No."))]
    with pytest.raises(DataError, match="all rows have the same prompt; add prompts, or use apo-zero-unpaired"):
        trained(tmp_path, model, make_settings(objective={"name": "kto"}), alone)


def test_a_mismatched_answer_never_passes_the_context(policy: Policy) -> None:
    long = replace(PAIRS[0], chosen=Answer("Add coins. " * 30))
    kept = prepare([long, PAIRS[1]], policy, make_settings()).kept
    context = max(len(one.tree.prompt) for one in kept) + 40
    for one in with_mismatched(kept, kept, context, seed=0):
        assert 0 < len(one.tree.answers[-1]) <= context - len(one.tree.prompt)


def test_the_mismatched_answers_do_not_train(model: Path, tmp_path: Path) -> None:
    """Without a KL to subtract, kto is apo-zero-unpaired: at the first step, where policy and reference agree."""
    for name in ("kto", "apo-zero-unpaired"):
        settings = make_settings(objective={"name": name}, epochs=1, pairs_per_step=16)
        trained(tmp_path / name, model, settings, PAIRS)
    ours, theirs = (weights(tmp_path / name / "checkpoints" / "epoch-01") for name in ("kto", "apo-zero-unpaired"))
    # RMSprop's first step is the gradient's sign, so a gradient that is zero but for round-off may differ
    for name, weight in ours.items():
        assert ((weight - theirs[name]).abs() < 1e-6).float().mean() > 0.99, name
