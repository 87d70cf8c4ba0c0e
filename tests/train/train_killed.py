"""Runs the train stage again and again in one run folder, each time in a process that kills itself, then to the end.

    python train_killed.py RUN_FOLDER MODEL_FOLDER KILL...

A KILL is EVENT:NAME:COUNT: `open:metrics.jsonl:7` is SIGKILL at the 7th time that a file of this name is opened (an
audit event of Python's own), `advance:reference:2` when that task has advanced twice. One interpreter forks for all, as
starting one takes longer than training here.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kill_at import KillAt
from training_pairs import make_pairs, make_settings, trained

SETTINGS = make_settings(epochs=3, pairs_per_step=4, save_every_steps=2, tokens_per_batch=150)
PAIRS, HELD_OUT = make_pairs(18), make_pairs(5, seed=1)


class KillTraining(KillAt):
    """A kill whose event may also be that a task advances."""

    def start(self, task: str, total: int | None, done: int = 0) -> None: ...

    def advance(self, task: str, by: int = 1, **facts: object) -> None:
        self.see("advance", task)

    def finish(self, task: str) -> None: ...

    def note(self, text: str) -> None: ...


def main(folder: Path, model: Path, kills: list[str]) -> None:
    for kill in kills:
        child = os.fork()
        if not child:
            trained(folder, model, SETTINGS, PAIRS, HELD_OUT, KillTraining(kill))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"{kill} never happened"
    trained(folder, model, SETTINGS, PAIRS, HELD_OUT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
