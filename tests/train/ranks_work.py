"""What ranks do in tests: trainings one after another, in processes that are started once and import this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from training_pairs import InterruptAt, make_pairs, make_settings

from anchored.progress import Progress, Silent
from anchored.records import LabelledAnswer, Pair
from anchored.runs import Run
from anchored.train.ranks import Ranks
from anchored.train.stage import TrainInputs, train_as_rank

PAIRS, HELD_OUT = make_pairs(9), make_pairs(3, seed=1)
"""With 4 pairs a step, an epoch's last step has fewer pairs than ranks."""


@dataclass(frozen=True)
class Training:
    """One training, in a folder of its own."""

    folder: Path
    model: Path
    changes: dict[str, Any] = field(default_factory=dict)
    unpaired: bool = False
    stop_after: int = 0
    """Steps until it is interrupted; 0: it runs to the end."""

    def run(self, ranks: Ranks, **how: Any) -> None:
        """Train as one of the ranks."""
        settings = make_settings(tokens_per_batch=150, **{**self.changes, **how})
        rows, held_out = (_labelled(pairs) if self.unpaired else pairs for pairs in (PAIRS, HELD_OUT))
        inputs = TrainInputs(self.model, rows, held_out)
        progress = InterruptAt("train", self.stop_after) if self.stop_after else Silent()
        try:
            train_as_rank(Run(self.folder), settings, inputs, progress, ranks)
        except KeyboardInterrupt:
            assert self.stop_after


@dataclass(frozen=True)
class Trainings:
    """Work for ranks: trainings one after another."""

    each: Sequence[Training]

    def __call__(self, progress: Progress, ranks: Ranks) -> None:
        torch.set_num_threads(1)
        for training in self.each:
            training.run(ranks)
            progress.note(training.folder.name)


def _labelled(pairs: Sequence[Pair]) -> list[LabelledAnswer]:
    answers = [((pair.chosen, True), (pair.rejected, False)) for pair in pairs]
    return [
        LabelledAnswer(pair.prompt, answer, good)
        for pair, both in zip(pairs, answers, strict=True)
        for answer, good in both
    ]
