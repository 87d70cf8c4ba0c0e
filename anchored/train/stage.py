"""The train stage: pairs and a model in; checkpoints, metrics and trajectories out.

Called again after a kill, it goes on from the newest saved moment, and what it leaves is what the undisturbed run would
have left. Generating pairs and scoring checkpoints are other stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from anchored.errors import DataError, ModelError, TrainError
from anchored.progress import Progress
from anchored.records import Pair
from anchored.runs import Run, one_line, read_lines, write_lines
from anchored.train.checkpoint import checkpoint_name, drop_checkpoints_after, load_resume_point, resume_file
from anchored.train.examples import Example, Examples, prepare
from anchored.train.loop import Training, run_steps, steps_per_epoch
from anchored.train.optimizer import build_optimizer
from anchored.train.policy import Policy, load_policy
from anchored.train.reference import reference_logps
from anchored.train.settings import TrainSettings


@dataclass(frozen=True)
class TrainSummary:
    """What a complete training says of itself."""

    pairs: int
    held_out: int
    left_out: dict[str, int]
    """Pairs not trained on, by outcome (`identical`: equal answers, perhaps only after truncation)."""
    steps: int
    checkpoints: dict[str, int]
    """Name of each checkpoint's folder, and the step it was saved after."""
    reference_computed: int
    """Answers whose reference log-probability this process had to compute; the others were known."""
    seconds: float
    """In the loop, over all the processes that took part."""


def train(
    run: Run,
    settings: TrainSettings,
    model: str | Path,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    progress: Progress,
) -> TrainSummary:
    """Train `model` on `pairs`, measuring on `held_out`; a complete run only returns its summary."""
    summary = run.summary("train")
    if summary is None:
        try:
            summary = asdict(_train(run, settings, model, pairs, held_out, progress))
            run.complete("train", summary)
        except torch.OutOfMemoryError as error:
            raise TrainError(
                f"out of memory: lower train.tokens_per_batch (now {settings.tokens_per_batch or 'chosen by device'}) "
                f"({one_line(error)})"
            ) from None
        except OSError as error:
            raise DataError(
                f"{run.folder}: {one_line(error)}; mend that and run the same command again: it goes on from here"
            ) from None
    # the last moment is of no use any more, and the largest file of the run
    resume_file(run.checkpoints).unlink(missing_ok=True)
    return TrainSummary(**summary)


def _train(
    run: Run,
    settings: TrainSettings,
    model: str | Path,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    progress: Progress,
) -> TrainSummary:
    if not pairs:
        raise DataError(
            "there is no pair to train on; give data with at least one, or look at the refused pairs of `create`"
        )
    run.folder.mkdir(parents=True, exist_ok=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    policy = load_policy(model, settings)
    training_pairs = prepare(pairs, policy, settings)
    held_out_pairs = prepare(held_out, policy, settings)
    _check_enough(training_pairs, settings, progress)
    everything = (*training_pairs.kept, *held_out_pairs.kept)
    reference = reference_logps(policy, everything, run.reference, policy.tokens_per_batch, progress)
    optimizer = build_optimizer(policy.weights.values(), settings.optimizer)
    training = Training(policy, optimizer, settings, training_pairs.kept, held_out_pairs.kept, reference.logps)
    begun_with = _identity(settings, policy, training_pairs, held_out_pairs)
    point = load_resume_point(run.checkpoints, begun_with, policy, optimizer)
    _forget_after(point.step, training, run)
    point = run_steps(training, point, run, progress)
    return TrainSummary(
        pairs=len(training.examples),
        held_out=len(training.held_out),
        left_out=dict(training_pairs.left_out),
        steps=training.steps,
        checkpoints={
            checkpoint_name(epoch): epoch * training.steps_per_epoch for epoch in range(1, settings.epochs + 1)
        },
        reference_computed=reference.computed,
        seconds=point.seconds,
    )


def _check_enough(prepared: Examples, settings: TrainSettings, progress: Progress) -> None:
    left_out = ", ".join(f"{count} {outcome}" for outcome, count in prepared.left_out.items())
    if not prepared.kept and prepared.problem:
        raise ModelError(f"none of the pairs can be trained on ({left_out}): {prepared.problem}")
    if not prepared.kept:
        raise DataError(
            f"none of the pairs can be trained on ({left_out}); give other data, or raise train.max_answer_tokens"
        )
    if left_out:
        progress.note(f"left out of training: {left_out}" + (f" ({prepared.problem})" if prepared.problem else ""))
    steps = settings.epochs * steps_per_epoch(len(prepared.kept), settings)
    if settings.optimizer.warmup_steps >= steps:
        raise TrainError(
            f"train.optimizer.warmup_steps is {settings.optimizer.warmup_steps}, but the run has only {steps} steps; "
            "lower it, or raise train.epochs"
        )


def _identity(settings: TrainSettings, policy: Policy, pairs: Examples, held_out: Examples) -> dict[str, str]:
    """What shapes the run, by name, to recognise at resuming."""
    # the data counts by what is in it, not by its name
    shaping: dict[str, Any] = settings.model_dump(mode="json", exclude={*settings.how_only, "data", "held_out"})
    return {
        **{f"train.{name}": json.dumps(value) for name, value in shaping.items()},
        "the model": policy.fingerprint,
        "the pairs": _hash(pairs.kept),
        "the held-out pairs": _hash(held_out.kept),
    }


def _hash(examples: Iterable[Example]) -> str:
    return sha256(b"".join(key for example in examples for key in example.keys)).hexdigest()[:16]


def _forget_after(step: int, training: Training, run: Run) -> None:
    """Drop the lines and checkpoints of steps that will be done again."""
    for path in filter(Path.exists, (run.metrics, run.trajectories)):
        # at the very beginning, the measurement at step 0 is made again too
        write_lines(path, [line for line in read_lines(path) if 0 < step >= line["step"]])
    drop_checkpoints_after(run.checkpoints, step // training.steps_per_epoch)
