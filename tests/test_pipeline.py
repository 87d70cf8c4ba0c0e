from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import anchored

from anchored import recipe as recipes
from anchored.datasets_io import read_pairs
from anchored.errors import ModelError
from anchored.pipeline import Plan, _parted, execute
from anchored.progress import Silent
from anchored.records import Answer, Pair, user_prompt


def test_no_prompt_is_both_trained_on_and_held_out() -> None:
    pairs = [
        Pair(user_prompt(f"question {number}"), Answer(f"good {take}"), Answer("bad"))
        for number in range(50)
        for take in range(3)
    ]
    parted = _parted(pairs, held_out=4, seed=0)
    held_out = {pair.prompt.id for pair in parted.held_out}
    assert len(held_out) == 4
    assert len(parted.held_out) == 12
    assert len(parted.training) == 138
    assert not held_out & {pair.prompt.id for pair in parted.training}
    assert _parted(pairs, 4, seed=0) == parted
    assert _parted(pairs, 4, seed=1) != parted


def test_pairs_that_take_no_answer_of_the_policy_are_made_where_nobody_has_it(tmp_path: Path) -> None:
    data, recipe = tmp_path / "judged.jsonl", tmp_path / "recipe.yaml"
    data.write_text(json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}) + "\n")
    recipe.write_text(
        f"policy: {{model: {tmp_path}/gone}}\n"
        f"create: {{method: judge-off-policy, prompts: {{data: {data}}}}}\n"
        "evaluate: {benchmarks: []}\n"
    )
    done = anchored("create", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert len(read_pairs(tmp_path / "run").pairs) == 1
    with pytest.raises(ModelError, match="gone"):
        execute(Plan(recipes.load(recipe), tmp_path / "whole"), Silent())
    assert not (tmp_path / "whole" / "pairs.parquet").exists(), (
        "whoever trains as well is told before anything is asked"
    )
