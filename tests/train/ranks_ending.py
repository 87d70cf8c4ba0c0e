"""Ways for ranks to come to an end in tests; light to import, as every rank is a new process."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from anchored.errors import TrainError
from anchored.progress import Progress
from anchored.train.ranks import Ranks


@dataclass(frozen=True)
class Ending:
    """Work that ends in rank 1 as `how` says, while the others wait for it."""

    how: str
    notes: Path

    def __call__(self, progress: Progress, ranks: Ranks) -> None:
        (self.notes / f"{ranks.rank}.pid").write_text(str(os.getpid()))
        assert int(ranks.sum(torch.ones(1))) == ranks.count
        progress.note("all are here")
        if ranks.rank == 1:
            if self.how == "error":
                raise TrainError("step 3: the loss is nan")
            if self.how == "fault":
                raise LookupError("no such thing")
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        ranks.wait()
