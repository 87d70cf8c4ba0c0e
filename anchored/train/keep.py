"""Which checkpoints of a run stay: all of them, or the newest and the best.

In: how the held-out rows were measured, and the settings. Out: epochs, by number. The best is found again from
`trajectories.jsonl` each time, so a resumed run needs no memory of it. Nothing here deletes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from anchored.train.settings import TrainSettings


def best_epoch(trajectories: Iterable[Mapping[str, Any]], steps_per_epoch: int) -> int | None:
    """The epoch after which the held-out loss was lowest, the first of equals; None if none was measured."""
    losses = {
        line["step"] // steps_per_epoch: line["loss"]
        for line in trajectories
        if line["step"] and line["step"] % steps_per_epoch == 0 and math.isfinite(line["loss"])
    }
    return min(sorted(losses), key=losses.__getitem__, default=None)


def kept_epochs(settings: TrainSettings, done: int, best: int | None) -> set[int]:
    """The epochs whose checkpoints stay when `done` epochs are done."""
    oldest = 1 if settings.keep_last is None else max(1, done - settings.keep_last + 1)
    kept = set(range(oldest, done + 1))
    return kept | {best} if settings.keep_best and best is not None else kept
