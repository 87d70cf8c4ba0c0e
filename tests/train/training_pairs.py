"""Small pairs with shared beginnings, as revisions are, and a run of the train stage on a tiny random model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file

from anchored.progress import Progress, Silent
from anchored.records import Answer, LabelledAnswer, Pair, TrainingRow, user_prompt
from anchored.runs import Run
from anchored.train.settings import TrainSettings
from anchored.train.stage import TrainInputs, TrainSummary, train

VARYING = ("pairs_per_second", "tokens_per_second")
"""What a line of metrics says of the machine, not of the run."""


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Sums with a right answer and one that errs in its last step."""
    random = Random(seed)
    return [_pair(random.randint(100, 999), random.randint(100, 999), random.randint(1, 9)) for _ in range(count)]


def make_answers(count: int, seed: int = 0) -> list[LabelledAnswer]:
    """The same sums as single answers: of each prompt the right one, the wrong one or, every third, both."""
    rows = []
    for place, pair in enumerate(make_pairs(count, seed)):
        both = (LabelledAnswer(pair.prompt, pair.chosen, True), LabelledAnswer(pair.prompt, pair.rejected, False))
        rows += both if place % 3 == 2 else both[place % 3 : place % 3 + 1]
    return rows


def make_settings(**changes: Any) -> TrainSettings:
    """Small and fast enough to see an effect in a few steps."""
    small: dict[str, Any] = {
        "objective": {"name": "apo-zero", "beta": 1.0},
        "optimizer": {"name": "rmsprop", "lr": 1e-4},
        "epochs": 2,
        "pairs_per_step": 4,
        "threads": 1,
    }
    return TrainSettings.model_validate(small | changes)


def trained(
    folder: Path,
    model: Path,
    settings: TrainSettings,
    rows: Sequence[TrainingRow],
    held_out: Sequence[TrainingRow] = (),
    progress: Progress | None = None,
) -> TrainSummary:
    """Run the stage in `folder`."""
    return train(Run(folder), settings, TrainInputs(model, rows, held_out), progress or Silent())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def steady(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without their timings."""
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]


class Notes(Silent):
    """Keeps what is told to people."""

    text = ""

    def note(self, text: str) -> None:
        self.text += text + "\n"


class InterruptAt:
    """Someone presses Ctrl-C when `task` has advanced so many times."""

    def __init__(self, task: str, times: int) -> None:
        self._task = task
        self._left = times

    def start(self, task: str, total: int | None, done: int = 0) -> None: ...

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        self._left -= task == self._task
        if not self._left:
            raise KeyboardInterrupt

    def finish(self, task: str) -> None: ...

    def note(self, text: str) -> None: ...


def _pair(first: int, second: int, slip: int) -> Pair:
    prompt = user_prompt(f"Add {first} and {second}.")
    steps = f"First the ones: {first % 10} plus {second % 10} is {first % 10 + second % 10}. The answer is "
    right, wrong = first + second, first + second + slip
    return Pair(prompt, Answer(f"{steps}{right}."), Answer(f"{steps}{wrong}, I think."))
