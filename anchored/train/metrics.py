"""What is measured while training: sums that stay on the device until they are read, and when to measure.

The lines themselves are written by `loop`; nothing here knows a file or a model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anchored.objectives.losses import Weighted
from anchored.train.ranks import Ranks

TRAJECTORY_POINTS = 20
"""Times a run is measured on held-out pairs, beside the start and the checkpoints."""


class Sums:
    """Named weighted sums over micro-batches and ranks, kept on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Weighted]) -> None:
        """Add up the values of a micro-batch."""
        for name, value in values.items():
            weights = value.weights.detach().double()
            total = torch.stack([(value.values.detach().double() * weights).sum(), weights.sum()])
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Every mean, in one sum over the ranks and one transfer; what has no weight has no mean.

        `reward_margin` is the difference of the mean rewards where single answers were measured.
        """
        summed = ranks.sum(torch.stack(list(self._sums.values()))).tolist()
        means = {name: total / weight for name, (total, weight) in zip(self._sums, summed, strict=True) if weight}
        if {"reward_chosen", "reward_rejected"} <= means.keys():
            means.setdefault("reward_margin", means["reward_chosen"] - means["reward_rejected"])
        return means


def trajectory_steps(steps: int, steps_per_epoch: int) -> frozenset[int]:
    """After how many steps held-out pairs are measured: none, evenly often, and at every checkpoint."""
    evenly = {round(steps * point / TRAJECTORY_POINTS) for point in range(TRAJECTORY_POINTS + 1)}
    return frozenset(evenly | set(range(0, steps + 1, steps_per_epoch)))
