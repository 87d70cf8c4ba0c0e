from __future__ import annotations

from anchored.pipeline import _parted
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
