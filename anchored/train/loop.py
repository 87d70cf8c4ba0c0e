"""The training loop: steps one after another, and what the world gets to know of them.

In: a training, the moment to go on from, and a journal. Out: the policy trained; metrics, trajectories and checkpoints
in the run folder. A killed run repeats what it lost and goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from anchored.progress import Progress
from anchored.runs import Run, append_line, read_lines
from anchored.train.checkpoint import (
    ResumePoint,
    checkpoint_name,
    drop_checkpoints_except,
    save_checkpoint,
    save_resume_point,
)
from anchored.train.keep import best_epoch, kept_epochs
from anchored.train.metrics import trajectory_steps
from anchored.train.model_card import CardFacts, model_card
from anchored.train.reference import reference_logps
from anchored.train.step import Training, measure, take_step
from anchored.train.trackers import Trackers


@dataclass(frozen=True, slots=True)
class Journal:
    """Where it is written what happens in a run, by the first rank alone."""

    run: Run
    trackers: Trackers
    progress: Progress
    facts: CardFacts
    """What every checkpoint's model card says."""


def run_steps(training: Training, point: ResumePoint, journal: Journal) -> ResumePoint:
    """Train from `point` to the end."""
    settings, per_epoch, run = training.settings, training.steps_per_epoch, journal.run
    measured_at = trajectory_steps(training.steps, per_epoch) if training.held_out else frozenset()
    journal.progress.start("train", total=training.steps, done=point.step)
    began = time.monotonic() - point.seconds
    _drop_checkpoints(training, run, point.step // per_epoch)  # a kill may have come before it
    if point.step == 0 and measured_at:
        _measure(training, journal, step=0, epoch=0.0)
    for step in range(point.step + 1, training.steps + 1):
        line = take_step(training, step)
        if training.ranks.first:
            append_line(run.metrics, line)
            journal.trackers.log("train", line)
        held_out = _measure(training, journal, step, line["epoch"]) if step in measured_at else None
        epoch, rest = divmod(step, per_epoch)
        if rest == 0:
            card = model_card(journal.facts, epoch, step, held_out)
            save_checkpoint(run.checkpoints / checkpoint_name(epoch), training.policy, training.ranks, card)
            if _refreshes(training, epoch):
                point = replace(point, reference=_refresh(training, journal))
        if rest == 0 or step % (settings.save_every_steps or per_epoch) == 0:
            point = replace(point, step=step, seconds=time.monotonic() - began, running=dict(training.running))
            save_resume_point(run.checkpoints, point, training.policy, training.optimizer, training.ranks)
        if rest == 0:
            _drop_checkpoints(training, run, epoch)
        journal.progress.advance("train", 1, **_shown(line))
    journal.progress.finish("train")
    return point


def find_best_epoch(training: Training, run: Run) -> int | None:
    """The epoch of the lowest held-out loss so far; None where losses of different epochs do not compare."""
    if training.settings.refresh_reference_epochs is not None:
        return None
    return best_epoch(read_lines(run.trajectories), training.steps_per_epoch)


def _measure(training: Training, journal: Journal, step: int, epoch: float) -> dict[str, float]:
    line = {"step": step, "epoch": epoch, **measure(training, step)}
    if training.ranks.first:
        append_line(journal.run.trajectories, line)
        journal.trackers.log("held_out", line)
    return line


def _drop_checkpoints(training: Training, run: Run, done: int) -> None:
    """Delete what need not be kept of the checkpoints of `done` epochs; the newest is safe by now."""
    if training.ranks.first and training.settings.keep_last is not None:
        kept = kept_epochs(training.settings, done, find_best_epoch(training, run))
        drop_checkpoints_except(run.checkpoints, kept)


def _refreshes(training: Training, epoch: int) -> bool:
    """Whether the policy after `epoch` becomes the reference of the epochs to come."""
    every = training.settings.refresh_reference_epochs
    return every is not None and epoch % every == 0 and epoch < training.settings.epochs


def _refresh(training: Training, journal: Journal) -> str:
    """Make the policy as it is now the reference; returns its name in the file of reference logps."""
    everything = (*training.examples, *training.held_out)
    name = f"{training.policy.content()} {training.policy.precision}"
    path, progress = journal.run.reference, journal.progress
    reference = reference_logps(training.policy, everything, path, training.ranks, progress, name)
    training.reference = reference.logps
    return reference.name


_SHOWN = {"loss": "loss", "reward_margin": "margin", "pairs_per_second": "pairs/s", "tokens_per_second": "tokens/s"}
"""What progress shows of a line of metrics, and what it is called there."""


def _shown(line: Mapping[str, Any]) -> dict[str, float]:
    return {shown: line[name] for name, shown in _SHOWN.items() if name in line}
