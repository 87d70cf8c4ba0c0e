"""One optimizer step: gradients of a set of pairs, however many micro-batches and ranks share them, then one update.

In: a training and the step's number. Out: the step's metrics. What a loss needs from the whole step (kto's KL) is
estimated over the whole step: from the one forward pass where each rank has one micro-batch, else by a pass without
gradients before the one with them. A step depends on its number, the settings and the weights alone.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from anchored.batches.packing import pack
from anchored.errors import TrainError
from anchored.objectives.losses import AnswerLogps, Objective, PairLogps, Weighted, as_pairs, losses_of, metrics
from anchored.train.examples import Example
from anchored.train.metrics import Sums
from anchored.train.optimizer import clip_gradients, learning_rate
from anchored.train.policy import Policy
from anchored.train.ranks import Ranks
from anchored.train.settings import TrainSettings

Logps = PairLogps | AnswerLogps

_NAMED = 5
"""Pairs that an error names."""


@dataclass(eq=False)
class Training:
    """All that a step works with. Weights, the optimizer's state and what is last here change."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    settings: TrainSettings
    objective: Objective
    examples: Sequence[Example]
    held_out: Sequence[Example]
    ranks: Ranks
    reference: Mapping[bytes, float]
    """The reference's logp of every answer, by the answer's key."""
    running: dict[str, float] = field(default_factory=dict)
    """Moving averages of step means, for objectives that use them."""

    @property
    def step_size(self) -> int:
        """Examples per step: as many pairs, or twice as many single answers."""
        return step_size(self.examples[0], self.settings)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.step_size)

    @property
    def steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch


def step_size(example: Example, settings: TrainSettings) -> int:
    """Examples like `example` per step."""
    return settings.pairs_per_step if example.paired else 2 * settings.pairs_per_step


def take_step(training: Training, step: int) -> dict[str, float]:
    """Step number `step`, the first being 1. Returns its line of metrics."""
    began = time.monotonic()
    settings, optimizer = training.settings, training.optimizer
    examples = examples_of(training, step)
    optimizer.zero_grad()
    measured = _Measured(training, examples)
    for batch, logps in _with_step_means(training, measured.batches):
        losses = losses_of(training.objective, logps, settings.objective)
        (losses * batch.weight).sum().div(measured.units).backward()
        measured.add(batch, logps, losses)
    if not training.policy.gradients_summed:
        training.ranks.sum_gradients(training.policy.weights.values())
    grad_norm = clip_gradients(training.policy.weights.values(), settings.optimizer.max_grad_norm)
    line = measured.line(grad_norm)
    _check_finite(
        f"step {step}: the loss is {line['loss']} and the gradient's norm {line['grad_norm']}", settings, line, measured
    )
    lr = learning_rate(settings.optimizer, step - 1, training.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    training.policy.update_model()
    _update_running(training, line)
    seconds = time.monotonic() - began
    seen = _examples_seen(training, step)
    return {
        "step": step,
        "epoch": seen / len(training.examples),
        "pairs_seen": seen,
        "lr": lr,
        **line,
        "pairs_per_second": len(examples) / seconds,
        "tokens_per_second": sum(example.tree.size for example in examples) / seconds,
    }


@torch.no_grad()
def measure(training: Training, step: int) -> dict[str, float]:
    """Loss, logps and rewards on the held-out pairs, after step number `step`."""
    measured = _Measured(training, training.held_out)
    for batch, logps in _with_step_means(training, measured.batches):
        measured.add(batch, logps, losses_of(training.objective, logps, training.settings.objective))
    line = measured.line()
    _check_finite(f"after step {step}: the held-out loss is {line['loss']}", training.settings, line, measured)
    return line


def examples_of(training: Training, step: int) -> list[Example]:
    """The pairs of a step: a part of its epoch's permutation, the last step of an epoch holding the rest."""
    epoch, index = divmod(step - 1, training.steps_per_epoch)
    order = epoch_order(len(training.examples), training.settings.seed, epoch)
    size = training.step_size
    return [training.examples[place] for place in order[index * size : (index + 1) * size]]


@lru_cache(maxsize=1)
def epoch_order(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation that depends on the seed and the epoch alone."""
    order = list(range(examples))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return tuple(order)


def _examples_seen(training: Training, step: int) -> int:
    epoch, index = divmod(step, training.steps_per_epoch)
    return epoch * len(training.examples) + index * training.step_size


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch. One of weight 0 keeps a rank in step with the others and counts for nothing."""

    examples: Sequence[Example]
    weight: float = 1.0


def share(examples: Sequence[Example], tokens: int, ranks: Ranks) -> list[Batch]:
    """This rank's micro-batches of at most `tokens` each: equally many on every rank, and about equally full."""
    rows = [
        Batch([examples[place] for place in places])
        for places in pack([example.tree.size for example in examples], tokens, multiple_of=ranks.count)
    ]
    smallest = min(examples, key=lambda example: example.tree.size)
    rows += [Batch([smallest], weight=0.0)] * (-len(rows) % ranks.count)
    return rows[ranks.rank :: ranks.count]


class _Measured:
    """The micro-batches of one step, or of the held-out pairs, and what comes of them."""

    def __init__(self, training: Training, examples: Sequence[Example]) -> None:
        self._training = training
        self.batches = share(examples, training.policy.tokens_per_batch, training.ranks)
        self.units = _units(training.objective, examples)
        self.examples = examples
        self._sums = Sums()
        self._losses: list[Tensor] = []
        self._step: Mapping[str, Tensor] = {}

    def add(self, batch: Batch, logps: Logps, losses: Tensor) -> None:
        """Keep a micro-batch's losses and metrics, on the device."""
        self._losses.append(losses.detach() * batch.weight)
        self._step = logps.step
        # pairs are measured as pairs, also where the objective looks at each answer by itself
        compared = as_pairs(logps) if isinstance(logps, AnswerLogps) and batch.examples[0].paired else logps
        measured = metrics(compared, self._training.settings.objective)
        self._sums.add({name: Weighted(of.values, of.weights * batch.weight) for name, of in measured.items()})

    def line(self, grad_norm: Tensor | None = None) -> dict[str, float]:
        """Loss, gradient norm, metrics and step means; the first time that anything waits for the device."""
        total = torch.stack([losses.double().sum() for losses in self._losses]).sum(0, keepdim=True)
        # the weights of all ranks add up to the units, so the mean is the step's loss
        units = torch.full_like(total, self.units / self._training.ranks.count)
        self._sums.add({"loss": Weighted(total / units, units)})
        known_to_all = dict(self._step) if grad_norm is None else {"grad_norm": grad_norm, **self._step}
        self._sums.add(
            {name: Weighted(value.to(total).reshape(1), torch.ones_like(total)) for name, value in known_to_all.items()}
        )
        return self._sums.means(self._training.ranks)

    def not_finite(self) -> list[str]:
        """Ids of the pairs whose loss is no number."""
        return self._training.ranks.gather(
            [
                batch.examples[index * len(batch.examples) // len(losses)].id
                for batch, losses in zip(self.batches, self._losses, strict=True)
                for index in (~losses.isfinite()).nonzero().flatten().tolist()
            ]
        )


def _with_step_means(training: Training, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Logps]]:
    """Each micro-batch with its logps, which hold the means over all of them that the objective asks for."""
    if not training.objective.step_means:
        for batch in batches:
            yield batch, _logps(training, batch)
        return
    if len(batches) == 1 or not torch.is_grad_enabled():
        found = [_logps(training, batch) for batch in batches]
        means = _step_means(training, batches, found)
    else:
        with torch.no_grad():
            means = _step_means(training, batches, (_logps(training, batch) for batch in batches))
        found = (_logps(training, batch) for batch in batches)
    for batch, logps in zip(batches, found, strict=True):
        yield batch, replace(logps, step=means)


@torch.no_grad()
def _step_means(training: Training, batches: Sequence[Batch], logps: Iterable[Logps]) -> dict[str, Tensor]:
    """The objective's means over the step on all ranks, and the moving ones with `running_` before their names."""
    wanted, settings = training.objective.step_means, training.settings.objective
    total: Tensor | float = 0.0
    for batch, found in zip(batches, logps, strict=True):
        values = torch.stack([value(found, settings).double() for value in wanted.values()])
        sums = torch.cat([values.sum(1), torch.full_like(values[0, :1], values.shape[1])])
        total = total + sums * batch.weight
    assert isinstance(total, Tensor)
    *sums, count = training.ranks.sum(total).unbind()
    means = {name: (value / count).float() for name, value in zip(wanted, sums, strict=True)}
    if not training.objective.running:
        return means
    running = training.running
    earlier = {name: torch.full_like(mean, running[name]) if name in running else mean for name, mean in means.items()}
    return means | {f"running_{name}": mean for name, mean in earlier.items()}


def _update_running(training: Training, line: Mapping[str, float]) -> None:
    """Move the moving averages towards the step's means."""
    if training.objective.running:
        momentum = training.settings.objective.momentum
        for name in training.objective.step_means:
            earlier = training.running.get(name, line[name])
            training.running[name] = momentum * earlier + (1 - momentum) * line[name]


def _logps(training: Training, batch: Batch) -> Logps:
    """What the objective takes, for one micro-batch."""
    examples = batch.examples
    policy = training.policy.logps([example.tree for example in examples])
    known = torch.tensor([[training.reference[key] for key in example.keys] for example in examples])
    tokens = torch.tensor([example.tokens for example in examples])
    margins = torch.tensor([example.margin for example in examples])
    labels = torch.tensor([example.labels for example in examples])
    # made on the CPU first: a tensor made on a GPU from numbers waits for all that runs there
    reference, tokens, margins, labels = (
        made.to(policy.device, non_blocking=True) for made in (known, tokens, margins, labels)
    )
    if training.objective.takes == "pairs":
        return PairLogps(
            policy_chosen=policy[:, 0],
            policy_rejected=policy[:, 1],
            reference_chosen=reference[:, 0],
            reference_rejected=reference[:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            margins=margins,
        )
    own = labels.shape[1]
    logps = AnswerLogps(
        policy=policy[:, :own].flatten(),
        reference=reference[:, :own].flatten(),
        tokens=tokens[:, :own].flatten(),
        desirable=labels.flatten(),
    )
    if not training.objective.mismatched:
        return logps
    return replace(
        logps,
        policy_mismatched=policy[:, own].repeat_interleave(own),
        reference_mismatched=reference[:, own].repeat_interleave(own),
    )


def _units(objective: Objective, examples: Sequence[Example]) -> int:
    """What the summed losses of `examples` are divided by."""
    if objective.unit == "pairs":
        return len(examples)
    labelled = [
        (label, tokens) for example in examples for label, tokens in zip(example.labels, example.tokens, strict=False)
    ]
    if objective.unit == "answers":
        return len(labelled)
    if objective.unit == "undesirable":
        return max(1, sum(not label for label, _ in labelled))
    return max(1, sum(tokens for label, tokens in labelled if label))


def _check_finite(problem: str, settings: TrainSettings, line: Mapping[str, float], measured: _Measured) -> None:
    if math.isfinite(line["loss"]) and math.isfinite(line.get("grad_norm", 0.0)):
        return
    # each once: a pair has two answers, and a prompt may stand in several rows
    ids = list(dict.fromkeys(measured.not_finite() or [example.id for example in measured.examples]))
    named = ", ".join(map(repr, ids[:_NAMED])) + (f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")
    raise TrainError(
        f"{problem}, with the pairs {named}; lower train.optimizer.lr (now {settings.optimizer.lr:g}), set "
        "train.optimizer.max_grad_norm, or look at those pairs; what was saved before stays as it is"
    )
