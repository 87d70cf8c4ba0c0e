"""Reference log-probabilities: what the model itself gives, computed once, found by content, resumable to the bit."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_folder
from training_pairs import InterruptAt, make_pairs, make_settings

from anchored.batches.answer_logps import answer_logps_plain
from anchored.errors import DataError, TrainError
from anchored.progress import Silent
from anchored.records import Answer, Pair
from anchored.train.examples import Example, prepare
from anchored.train.policy import Policy, load_policy
from anchored.train.ranks import Ranks
from anchored.train.reference import Reference, _plan, reference_logps

SETTINGS = make_settings(tokens_per_batch=150)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(save_folder(tmp_path_factory.mktemp("reference")), SETTINGS)


def examples_of(policy: Policy, pairs: Sequence[Pair]) -> tuple[Example, ...]:
    return prepare(pairs, policy, SETTINGS).kept


def compute(policy: Policy, examples: Sequence[Example], path: Path) -> Reference:
    return reference_logps(policy, examples, path, Ranks(), Silent())


def test_values_are_those_of_the_plain_forward_before_and_after_caching(policy: Policy, tmp_path: Path) -> None:
    examples = examples_of(policy, make_pairs(9))
    computed = compute(policy, examples, tmp_path / "r.sqlite")
    cached = compute(policy, examples, tmp_path / "r.sqlite")
    assert computed.computed == 18
    assert cached.computed == 0
    assert cached.logps == computed.logps
    for example in examples:
        with torch.no_grad():
            plain = answer_logps_plain(policy.model, [example.tree], policy.device)[0].tolist()
        assert [cached.logps[key] for key in example.keys] == pytest.approx(plain, rel=1e-5)


def test_another_order_subset_and_superset_compute_only_what_is_new(policy: Policy, tmp_path: Path) -> None:
    pairs = make_pairs(8)
    first = compute(policy, examples_of(policy, pairs[:6]), tmp_path / "r.sqlite")
    subset = compute(policy, examples_of(policy, pairs[4:2:-1]), tmp_path / "r.sqlite")
    assert subset.computed == 0
    assert subset.logps.items() <= first.logps.items()
    assert compute(policy, examples_of(policy, pairs), tmp_path / "r.sqlite").computed == 4
    # the loser of one pair, as the winner of another
    swapped = Pair(pairs[0].prompt, pairs[0].rejected, Answer("Something else."))
    assert compute(policy, examples_of(policy, [swapped]), tmp_path / "r.sqlite").computed == 1


def test_another_model_prompt_or_precision_finds_nothing(policy: Policy, tmp_path: Path) -> None:
    pairs = make_pairs(2)
    compute(policy, examples_of(policy, pairs), tmp_path / "r.sqlite")
    other = load_policy(save_folder(tmp_path / "other", seed=1), SETTINGS)
    assert compute(other, examples_of(other, pairs), tmp_path / "r.sqlite").computed == 4
    elsewhere = [Pair(make_pairs(1, seed=9)[0].prompt, pair.chosen, pair.rejected) for pair in pairs]
    assert compute(policy, examples_of(policy, elsewhere), tmp_path / "r.sqlite").computed == 4
    rounded = load_policy(tmp_path / "other", make_settings(precision="bfloat16"))
    assert compute(rounded, examples_of(rounded, pairs), tmp_path / "r.sqlite").computed == 4


@pytest.mark.parametrize("batches", [1, 3])
def test_an_interrupted_pass_keeps_what_it_has_and_ends_with_the_same_bits(
    policy: Policy, tmp_path: Path, batches: int
) -> None:
    # a loser shared by two pairs is computed once, wherever the interruption falls
    pairs = [*make_pairs(9), Pair(make_pairs(1)[0].prompt, Answer("Six."), make_pairs(1)[0].rejected)]
    examples = examples_of(policy, pairs)
    undisturbed = compute(policy, examples, tmp_path / "whole.sqlite")
    with pytest.raises(KeyboardInterrupt):
        reference_logps(policy, examples, tmp_path / "cut.sqlite", Ranks(), InterruptAt("reference", batches))
    resumed = compute(policy, examples, tmp_path / "cut.sqlite")
    assert 0 < resumed.computed < undisturbed.computed
    assert resumed.logps == undisturbed.logps


def test_what_is_left_after_a_kill_falls_into_the_same_batches(policy: Policy) -> None:
    pairs = make_pairs(30)
    shared = [replace(pair, chosen=Answer(f"Sum {i}.")) for i, pair in enumerate(pairs[:10])]
    examples = examples_of(policy, [*pairs, *shared, *pairs[:5]])
    plan = _plan(examples, (), 150)
    assert sum(map(len, plan)) == 40
    assert all(len(batch) == 1 or sum(example.tree.size for example in batch) <= 150 for batch in plan)
    for done in range(len(plan) + 1):
        known = {key for batch in plan[:done] for example in batch for key in example.keys}
        assert _plan(examples, known, 150) == plan[done:]


def test_a_file_that_is_no_store_is_named_with_the_way_out(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").write_bytes(b"not a database, but long enough to be taken for one" * 40)
    with pytest.raises(DataError, match=r"r\.sqlite: cannot be used .* delete the file to compute them again"):
        compute(policy, examples_of(policy, make_pairs(1)), tmp_path / "r.sqlite")


def test_a_model_with_broken_weights_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    broken = load_policy(save_folder(tmp_path / "broken"), SETTINGS)
    broken.model.get_output_embeddings().weight.data[0] = torch.nan
    with pytest.raises(TrainError, match=r"log-probability nan in torch\.float32; .* weights are broken"):
        compute(broken, examples_of(broken, make_pairs(2)), tmp_path / "r.sqlite")
    with sqlite3.connect(tmp_path / "r.sqlite") as database:
        assert database.execute("SELECT count(*) FROM logps").fetchone() == (0,)


def test_where_all_is_known_nothing_is_shown(policy: Policy, tmp_path: Path) -> None:
    started: list[str] = []

    class Listener(Silent):
        def start(self, task: str, total: int | None, done: int = 0) -> None:
            started.append(task)

    examples = examples_of(policy, make_pairs(3))
    for _ in range(2):
        reference_logps(policy, examples, tmp_path / "reference.sqlite", Ranks(), Listener())
    assert started == ["reference"]
