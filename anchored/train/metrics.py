"""What is measured while training: sums over pairs that stay on the device until they are read, and when to measure.

The lines themselves are written by `loop`; nothing here knows a file or a model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TRAJECTORY_POINTS = 20
"""Times a run is measured on held-out pairs, beside the start and the checkpoints."""


class Sums:
    """Named sums over micro-batches, kept on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add up the values of a micro-batch, one per pair."""
        for name, value in values.items():
            total = value.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def read(self) -> dict[str, float]:
        """All sums in one transfer: the only place that waits for the device."""
        return dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True))


def trajectory_steps(steps: int, steps_per_epoch: int) -> frozenset[int]:
    """After how many steps held-out pairs are measured: none, evenly often, and at every checkpoint."""
    evenly = {round(steps * point / TRAJECTORY_POINTS) for point in range(TRAJECTORY_POINTS + 1)}
    return frozenset(evenly | set(range(0, steps + 1, steps_per_epoch)))
