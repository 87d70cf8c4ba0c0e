"""The training loop, on plain PyTorch: a step is a set of pairs, however many micro-batches it takes.

In: a policy, examples and the reference's log-probabilities. Out: the policy trained; metrics, trajectories and
checkpoints in the run folder. A step depends on its number, the settings and the weights alone, so a killed run repeats
what it lost and goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from anchored.batches.packing import pack
from anchored.errors import TrainError
from anchored.objectives.losses import OBJECTIVES, LossOutput, Objective, PairLogps
from anchored.progress import Progress
from anchored.runs import Run, append_line
from anchored.train.checkpoint import ResumePoint, checkpoint_name, save_checkpoint, save_resume_point
from anchored.train.examples import Example
from anchored.train.metrics import Sums, trajectory_steps
from anchored.train.optimizer import clip_gradients, learning_rate
from anchored.train.policy import Policy
from anchored.train.settings import TrainSettings


@dataclass(frozen=True, eq=False)
class Training:
    """All that the loop works with; only the weights and the optimizer's state change."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    settings: TrainSettings
    examples: Sequence[Example]
    held_out: Sequence[Example]
    reference: Mapping[bytes, float]

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.settings.objective.name]

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.examples), self.settings)

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch


def steps_per_epoch(pairs: int, settings: TrainSettings) -> int:
    """Steps in which every pair is seen once."""
    return math.ceil(pairs / settings.pairs_per_step)


def run_steps(training: Training, point: ResumePoint, run: Run, progress: Progress) -> ResumePoint:
    """Train from `point` to the end."""
    policy, per_epoch = training.policy, training.steps_per_epoch
    measured_at = trajectory_steps(training.steps, per_epoch) if training.held_out else frozenset()
    progress.start("train", total=training.steps, done=point.step)
    began = time.monotonic() - point.seconds
    if point.step == 0 and measured_at:
        append_line(run.trajectories, {"step": 0, "epoch": 0.0, **measure(training)})
    for step in range(point.step + 1, training.steps + 1):
        measured = take_step(training, step)
        append_line(run.metrics, measured)
        if step in measured_at:
            append_line(run.trajectories, {"step": step, "epoch": measured["epoch"], **measure(training)})
        if step % per_epoch == 0:
            save_checkpoint(run.checkpoints / checkpoint_name(step // per_epoch), policy)
        if step % per_epoch == 0 or step % (training.settings.save_every_steps or per_epoch) == 0:
            point = ResumePoint(step, time.monotonic() - began, point.begun_with)
            save_resume_point(run.checkpoints, point, policy, training.optimizer)
        facts = {name: measured[name] for name in ("loss", "reward_margin", "pairs_per_second")}
        progress.advance("train", 1, **facts)
    progress.finish("train")
    return point


def take_step(training: Training, step: int) -> dict[str, float]:
    """Step number `step`, the first being 1: gradients of its pairs, then one update. Returns its line of metrics."""
    began = time.monotonic()
    settings, optimizer = training.settings, training.optimizer
    examples = examples_of(training, step)
    optimizer.zero_grad()
    sums, units = Sums(), _units(training.objective, examples)
    for batch in _micro_batches(examples, training.policy.tokens_per_batch):
        output = _forward(training, batch)
        (output.losses.sum() / units).backward()
        sums.add({"loss": output.losses, **output.metrics})
    sums.add({"grad_norm": clip_gradients(training.policy.weights.values(), settings.optimizer.max_grad_norm)})
    totals = sums.read()
    loss, grad_norm = totals.pop("loss") / units, totals.pop("grad_norm")
    _check_finite(step, settings, loss, grad_norm)
    lr = learning_rate(settings.optimizer, step - 1, training.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    training.policy.update_model()
    seconds = time.monotonic() - began
    pairs_seen = _pairs_seen(training, step)
    return {
        "step": step,
        "epoch": pairs_seen / len(training.examples),
        "pairs_seen": pairs_seen,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        **{name: total / len(examples) for name, total in totals.items()},
        "pairs_per_second": len(examples) / seconds,
        "tokens_per_second": sum(example.tree.size for example in examples) / seconds,
    }


@torch.no_grad()
def measure(training: Training) -> dict[str, float]:
    """Loss, log-probabilities and rewards on the held-out pairs."""
    sums = Sums()
    for batch in _micro_batches(training.held_out, training.policy.tokens_per_batch):
        output = _forward(training, batch)
        sums.add({"loss": output.losses, **output.metrics})
    totals = sums.read()
    loss = totals.pop("loss") / _units(training.objective, training.held_out)
    return {"loss": loss, **{name: total / len(training.held_out) for name, total in totals.items()}}


def examples_of(training: Training, step: int) -> list[Example]:
    """The pairs of a step: a part of its epoch's permutation, the last step of an epoch holding the rest."""
    epoch, index = divmod(step - 1, training.steps_per_epoch)
    order = _epoch_order(len(training.examples), training.settings.seed, epoch)
    size = training.settings.pairs_per_step
    return [training.examples[place] for place in order[index * size : (index + 1) * size]]


@lru_cache(maxsize=1)
def _epoch_order(pairs: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation that depends on the seed and the epoch alone."""
    order = list(range(pairs))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)


def _pairs_seen(training: Training, step: int) -> int:
    epoch, index = divmod(step, training.steps_per_epoch)
    return epoch * len(training.examples) + index * training.settings.pairs_per_step


def _units(objective: Objective, examples: Sequence[Example]) -> int:
    """What the summed losses of `examples` are divided by."""
    return len(examples) if objective.unit == "pairs" else sum(example.chosen_tokens for example in examples)


def _micro_batches(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    for places in pack([example.tree.size for example in examples], tokens):
        yield [examples[place] for place in places]


def _forward(training: Training, batch: Sequence[Example]) -> LossOutput:
    policy = training.policy.logps([example.tree for example in batch])
    reference = torch.tensor([[training.reference[key] for key in example.keys] for example in batch])
    tokens = torch.tensor([[example.chosen_tokens, example.rejected_tokens] for example in batch])
    # made on the CPU first: a tensor made on a GPU from numbers waits for all that runs there
    reference, tokens = (known.to(policy.device, non_blocking=True) for known in (reference, tokens))
    logps = PairLogps(*policy.unbind(1), *reference.unbind(1), *tokens.unbind(1))
    return training.objective.function(logps, training.settings.objective.beta)


def _check_finite(step: int, settings: TrainSettings, loss: float, grad_norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise TrainError(
        f"step {step}: the loss is {loss} and the gradient's norm {grad_norm}; lower train.optimizer.lr "
        f"(now {settings.optimizer.lr:g}) or set train.optimizer.max_grad_norm; what was saved before stays as it is"
    )
