"""The train stage: pairs, or labelled answers, and a model in; checkpoints, metrics and trajectories out.

Called again after a kill, it goes on from the newest saved moment, and what it leaves is what the undisturbed run would
have left. Generating pairs and scoring checkpoints are other stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from anchored.errors import DataError, ModelError, TrainError
from anchored.objectives.losses import OBJECTIVES, Objective, find_objective
from anchored.process import keep_freed_memory, return_freed_memory
from anchored.progress import Progress
from anchored.records import Pair, TrainingRow
from anchored.runs import Run, one_line, read_lines, write_lines
from anchored.train.checkpoint import (
    ResumePoint,
    checkpoint_name,
    drop_checkpoints_after,
    forget_resume_points,
    load_resume_point,
)
from anchored.train.estimate import GIB, CannotEstimate, advice, available_memory, estimate_memory, fullest_row
from anchored.train.examples import Example, Examples, prepare, with_mismatched
from anchored.train.launch import run_ranks
from anchored.train.loop import Journal, find_best_epoch, run_steps
from anchored.train.model_card import CardFacts
from anchored.train.optimizer import build_optimizer
from anchored.train.policy import Policy, find_device, load_policy
from anchored.train.ranks import Ranks, joined, lost_contact
from anchored.train.reference import Reference, known_reference, reference_logps
from anchored.train.settings import TrainSettings
from anchored.train.step import Training, step_size
from anchored.train.trackers import TrackedRun, Trackers, check_installed

_LOOKED_AT = 0.02
"""Share of the memory under which weights, gradients and state are too small for any row to matter."""

_TOO_MUCH = 1.2
"""An estimate is off by up to a quarter."""


@dataclass(frozen=True)
class TrainSummary:
    """What a complete training says of itself."""

    pairs: int
    held_out: int
    left_out: dict[str, int]
    """Pairs not trained on, by outcome (`identical`: equal answers, perhaps only after truncation)."""
    steps: int
    checkpoints: dict[str, int]
    """Name of each checkpoint's folder that was kept, and the step it was saved after."""
    reference_computed: int
    """Answers whose reference log-probability this process had to compute; the others were known."""
    seconds: float
    """In the loop, over all the processes that took part."""
    best: str | None = None
    """The epoch with the lowest held-out loss, as its checkpoint is or was called."""


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """What is trained, and on what."""

    model: str | Path
    """A Hugging Face folder or Hub id."""
    rows: Sequence[TrainingRow]
    """Pairs, or labelled answers."""
    held_out: Sequence[TrainingRow] = ()
    """Measured with, never trained on."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What is trained on and measured with, as model and objective see it."""

    examples: Sequence[Example]
    held_out: Sequence[Example]
    left_out: Mapping[str, int]
    """Rows that are not among `examples`, by outcome."""


def train(run: Run, settings: TrainSettings, inputs: TrainInputs, progress: Progress) -> TrainSummary:
    """Train the model, measuring on the held-out rows; a complete run only returns its summary.

    Where the settings ask for several ranks, they are started here and ended with it.
    """
    if run.summary("train") is None:
        device = find_device(settings.device).type
        count = _local_ranks(settings, device)
        work = partial(train_as_rank, run, settings, inputs)
        if count > 1:
            run_ranks(count, device, work, progress)
        else:
            with joined(Ranks(), device) if settings.sharded else nullcontext():
                work(progress, Ranks())
    return_freed_memory()
    forget_resume_points(run.checkpoints)
    summary = run.summary("train")
    assert summary is not None
    return TrainSummary(**summary)


def train_as_rank(run: Run, settings: TrainSettings, inputs: TrainInputs, progress: Progress, ranks: Ranks) -> None:
    """Train as one of the processes that do it together; the first one marks the run complete."""
    try:
        summary = _train(run, settings, inputs, progress, ranks)
        if ranks.first:
            run.complete("train", asdict(summary))
            # the last moment is of no use any more
            forget_resume_points(run.checkpoints)
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"out of memory: lower train.tokens_per_batch (now {settings.tokens_per_batch or 'chosen by device'}), or "
            f"set train.gradient_checkpointing or train.lora; `anchored plan` says what would fit ({one_line(error)})"
        ) from None
    except OSError as error:
        if lost_contact(error):
            raise
        raise DataError(
            f"{run.folder}: {one_line(error)}; mend that and run the same command again: it goes on from here"
        ) from None


def check_settings(settings: TrainSettings, rows: Sequence[TrainingRow] | None) -> Objective:
    """The objective; raises for what is not installed, and for rows that it cannot take (None: there are none yet).

    Quick: no model is loaded for it.
    """
    check_installed(settings.trackers)
    objective = find_objective(settings.objective.name)
    if rows is not None:
        _check_rows(rows, objective, settings)
    return objective


def prepare_data(
    inputs: TrainInputs, policy: Policy, objective: Objective, settings: TrainSettings, progress: Progress
) -> PreparedData:
    """The rows as the objective needs them; raises where they or the settings leave nothing to train or compare."""
    prepared, held_out = (prepare(rows, policy, settings) for rows in (inputs.rows, inputs.held_out))
    _check_enough(prepared, settings)
    _tell_left_out("training", prepared, progress)
    _tell_left_out("the held-out rows", held_out, progress)
    _tell_cut(prepared, settings, progress)
    _check_used(prepared.kept, held_out.kept, objective, settings)
    if not objective.mismatched:
        return PreparedData(prepared.kept, held_out.kept, prepared.left_out)
    donors = prepared.kept if len(_prompts(held_out.kept)) < 2 else held_out.kept
    return PreparedData(
        examples=with_mismatched(prepared.kept, prepared.kept, policy.context, settings.seed),
        held_out=with_mismatched(held_out.kept, donors, policy.context, settings.seed),
        left_out=prepared.left_out,
    )


def _local_ranks(settings: TrainSettings, device: str) -> int:
    """How many processes of this machine train together."""
    gpus = torch.cuda.device_count() if device == "cuda" else None
    count = settings.ranks or gpus or 1
    if gpus is not None and count > gpus:
        raise TrainError(
            f"train.ranks is {count}, but PyTorch sees {gpus} GPUs here; set it to {gpus} at most, or null"
        )
    return count


def _train(run: Run, settings: TrainSettings, inputs: TrainInputs, progress: Progress, ranks: Ranks) -> TrainSummary:
    run.folder.mkdir(parents=True, exist_ok=True)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    objective = check_settings(settings, inputs.rows)
    policy = load_policy(inputs.model, settings, ranks)
    if policy.device.type == "cpu":
        keep_freed_memory()
    data = prepare_data(inputs, policy, objective, settings, progress)
    examples, held_out_examples = data.examples, data.held_out
    if ranks.first:
        _warn_of_memory(policy, inputs.model, examples, settings, progress)
    everything = (*examples, *held_out_examples)
    with policy.as_started():
        reference = reference_logps(policy, everything, run.reference, ranks, progress)
    optimizer = build_optimizer(policy.weights.values(), settings.optimizer)
    training = Training(policy, optimizer, settings, objective, examples, held_out_examples, ranks, reference.logps)
    begun_with = _identity(settings, policy, examples, held_out_examples)
    point = load_resume_point(run.checkpoints, begun_with, policy, optimizer, ranks)
    training.running.update(point.running)
    if point.reference:
        training.reference = known_reference(point.reference, everything, run.reference, ranks).logps
    tracked = _tracked(run, settings, point)
    if ranks.first:
        _forget_after(point.step, training, run)
    facts = _card_facts(training, inputs, data.left_out)
    with Trackers(settings.trackers if ranks.first else (), tracked, progress) as trackers:
        point = run_steps(training, point, Journal(run, trackers, progress, facts))
    return _summary(training, run, data.left_out, reference, point)


def _summary(
    training: Training, run: Run, left_out: Mapping[str, int], reference: Reference, point: ResumePoint
) -> TrainSummary:
    epochs = range(1, training.settings.epochs + 1)
    best = find_best_epoch(training, run)
    return TrainSummary(
        pairs=len(training.examples),
        held_out=len(training.held_out),
        left_out=dict(left_out),
        steps=training.steps,
        checkpoints={
            checkpoint_name(epoch): epoch * training.steps_per_epoch
            for epoch in epochs
            if (run.checkpoints / checkpoint_name(epoch)).exists()
        },
        reference_computed=reference.computed,
        seconds=point.seconds,
        best=None if best is None else checkpoint_name(best),
    )


def _tracked(run: Run, settings: TrainSettings, point: ResumePoint) -> TrackedRun:
    """What the trackers are opened for, before the lines of steps that are done again are dropped."""
    recipe = run.read_recipe() or {"train": settings.model_dump(mode="json")}
    seen = max((line["step"] for line in read_lines(run.metrics)), default=0)
    return TrackedRun(run.folder, recipe, done=point.step, seen=seen)


def _card_facts(training: Training, inputs: TrainInputs, left_out: Mapping[str, int]) -> CardFacts:
    methods = {row.method for row in inputs.rows if isinstance(row, Pair) and row.method}
    return CardFacts(
        base_model=inputs.model,
        settings=training.settings,
        precision=str(training.policy.precision).removeprefix("torch."),
        rows=len(training.examples),
        paired=training.examples[0].paired,
        methods=tuple(sorted(methods)),
        held_out=len(training.held_out),
        left_out=left_out,
        steps=training.steps,
    )


def _check_rows(rows: Sequence[TrainingRow], objective: Objective, settings: TrainSettings) -> None:
    if not rows:
        raise DataError(
            "there is no pair to train on; give data with at least one, or look at the refused pairs of `create`"
        )
    if objective.takes == "pairs" and not isinstance(rows[0], Pair):
        unpaired = ", ".join(name for name, other in OBJECTIVES.items() if other.takes == "answers")
        raise DataError(
            f"train.objective.name is {settings.objective.name!r}, which compares two answers to a prompt, but the "
            f"data is unpaired (prompt, completion, label); use {unpaired}, or give pairs"
        )


def _warn_of_memory(
    policy: Policy, model: str | Path, examples: Sequence[Example], settings: TrainSettings, progress: Progress
) -> None:
    """Say so before hours pass if training will clearly not fit; far smaller models are not looked at."""
    room = available_memory(policy.device.type)
    weights = sum(weight.numel() for weight in policy.model.parameters())
    if settings.sharded or 16 * weights < _LOOKED_AT * room:
        return
    row = fullest_row(examples, settings, policy.tokens_per_batch)
    try:
        needed = estimate_memory(model, settings, row)
    except CannotEstimate:
        return
    # the weights are there already
    if needed.peak - needed.weights > _TOO_MUCH * room:
        progress.note(
            f"memory: training takes about {needed.peak / GIB:.1f} GiB and {(room + needed.weights) / GIB:.1f} GiB are "
            f"there; {advice(model, settings, row, room + needed.weights)}"
        )


def _prompts(examples: Sequence[Example]) -> set[tuple[int, ...]]:
    return {example.tree.prompt for example in examples}


def _check_enough(prepared: Examples, settings: TrainSettings) -> None:
    left_out = _counted(prepared.left_out)
    if not prepared.kept and prepared.problem:
        raise ModelError(f"none of the pairs can be trained on ({left_out}): {prepared.problem}")
    if not prepared.kept:
        raise DataError(
            f"none of the pairs can be trained on ({left_out}); give other data, or raise train.max_answer_tokens"
        )
    steps = settings.epochs * math.ceil(len(prepared.kept) / step_size(prepared.kept[0], settings))
    if settings.optimizer.warmup_steps >= steps:
        raise TrainError(
            f"train.optimizer.warmup_steps is {settings.optimizer.warmup_steps}, but the run has only {steps} steps; "
            "lower it, or raise train.epochs"
        )


def _tell_left_out(of: str, examples: Examples, progress: Progress) -> None:
    if examples.left_out:
        problem = f" ({examples.problem})" if examples.problem else ""
        progress.note(f"left out of {of}: {_counted(examples.left_out)}{problem}")


def _tell_cut(examples: Examples, settings: TrainSettings, progress: Progress) -> None:
    rows = len(examples.kept)
    answers = sum(len(example.labels) for example in examples.kept)
    if examples.cut_prompts:
        progress.note(
            f"{examples.cut_prompts} of {rows} prompts are longer than {settings.max_prompt_tokens} tokens and keep "
            "their end (train.max_prompt_tokens)"
        )
    if examples.cut_answers:
        progress.note(
            f"{examples.cut_answers} of {answers} answers are longer than {settings.max_answer_tokens} tokens and keep "
            "their start, without an end of turn (train.max_answer_tokens)"
        )


def _counted(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in left_out.items())


def _check_used(
    examples: Sequence[Example], held_out: Sequence[Example], objective: Objective, settings: TrainSettings
) -> None:
    """Raise where a setting would have no effect for want of data."""
    wanted = {"undesirable": False, "chosen_tokens": True}.get(objective.unit)
    if wanted is not None and not any(wanted in example.labels for example in examples):
        kind = "desirable" if wanted else "undesirable"
        raise DataError(
            f"train.objective.name is {settings.objective.name!r}, which learns from {kind} answers alone, but the "
            "data has none; add some, or use another objective"
        )
    if settings.keep_best and not held_out:
        raise TrainError(
            "train.keep_best is true, but no rows are held out to find the best checkpoint with; raise train.held_out "
            "(create.prompts.held_out for created pairs), or leave keep_best out"
        )


def _identity(
    settings: TrainSettings, policy: Policy, examples: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, str]:
    """What shapes the run, by name, to recognise at resuming."""
    # the data counts by what is in it, not by its name
    shaping: dict[str, Any] = settings.model_dump(mode="json", exclude={*settings.how_only, "data", "held_out"})
    return {
        **{f"train.{name}": json.dumps(value) for name, value in shaping.items()},
        "the model": policy.fingerprint,
        "the pairs": _hash(examples),
        "the held-out pairs": _hash(held_out),
    }


def _hash(examples: Iterable[Example]) -> str:
    facts = (b"".join(example.keys) + repr((example.labels, example.margin)).encode() for example in examples)
    return sha256(b"".join(facts)).hexdigest()[:16]


def _forget_after(step: int, training: Training, run: Run) -> None:
    """Drop the lines and checkpoints of steps that will be done again."""
    for path in filter(Path.exists, (run.metrics, run.trajectories)):
        # at the very beginning, the measurement at step 0 is made again too
        write_lines(path, [line for line in read_lines(path) if 0 < step >= line["step"]])
    drop_checkpoints_after(run.checkpoints, step // training.steps_per_epoch)
