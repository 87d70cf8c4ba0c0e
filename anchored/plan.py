"""What a recipe would take, before anything runs: the data as the model sees it, memory, disk, time.

In: a recipe. Out: a `Plan` of plain numbers, and tables of it. Reads the settings, the model's folder, its template,
the data and the benchmarks' files, raising what a run would raise; times a few passes of the model if it fits; asks
every endpoint whether it is there and takes the key. Writes nothing, trains nothing, costs nothing.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchored import pipeline
from anchored.progress import Progress
from anchored.recipe import Recipe
from anchored.report.tables import Table, duration

if TYPE_CHECKING:
    from anchored.batches.tree import Tree
    from anchored.evaluate.benchmark import Benchmark
    from anchored.train.estimate import Memory
    from anchored.train.examples import Example

GIB = 2**30
_TIMED_TOKENS = 512
_RANGE = (0.7, 1.5)
"""How far training may be off a few timed passes: other lengths, a warm or a busy machine, checkpoints."""


@dataclass(frozen=True, slots=True)
class DataPlan:
    """What would be trained on."""

    examples: int
    held_out: int
    left_out: dict[str, int]
    """Rows not trained on, by outcome."""
    created: bool
    """Whether the pairs exist; if not, the numbers are upper bounds from the settings."""
    tokens: dict[str, dict[str, float]]
    """Mean and most of prompt, chosen and rejected (or completion)."""
    tree_tokens: int
    """An epoch's tokens in tree rows."""
    separate_tokens: int
    """The same, each answer with its prompt by itself."""
    padded_tokens: int
    """The same, each answer padded to the longest of its step."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known before the first step. Bytes and seconds."""

    data: DataPlan
    steps: int
    device: str
    devices: int
    """Processes that train together on this machine."""
    precision: str
    tokens_per_batch: int
    memory: dict[str, int] | None
    """On each device: weights, gradients, optimizer, row, update, peak; None where it must be tried."""
    available_memory: int
    """Of each device."""
    advice: str
    """What would fit, where it does not."""
    checkpoint_bytes: int
    resume_bytes: int
    disk_bytes: int
    """At most, in the run folder."""
    free_disk: int
    tokens_per_second: float | None
    """Of one device, forward and backward; None where the model does not fit."""
    seconds: tuple[float, float] | None
    """Of all epochs, from and to."""
    asked: tuple[Asked, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A model that is asked over the network."""

    role: str
    """Stage and role."""
    model: str
    address: str
    problem: str
    """Why it will not answer; "" where it does."""
    served: bool
    """Whether its server will be started here, so that nobody can be asked yet."""


def make_plan(recipe: Recipe, folder: Path) -> Plan:
    """Check, the benchmarks too, and estimate; `folder` is where the run would lie."""
    from anchored.train import estimate
    from anchored.train.policy import sketch_policy

    notes = _Notes()
    settings, model = recipe.train, pipeline.model_of(recipe)
    pipeline.check_template(recipe)
    pipeline.check_creation(recipe)
    benchmarks = pipeline.check_evaluation(recipe)
    sketch = sketch_policy(model, settings)
    examples, data = _data(recipe, sketch, notes)
    row = estimate.fullest_row(examples, settings, sketch.tokens_per_batch)
    devices = _devices(settings)
    device = estimate.runs_on(settings)
    room = estimate.available_memory(device) // (1 if device == "cuda" else devices)
    memory = _memory(model, settings, row, devices, notes)
    fits = memory is not None and memory["peak"] < room
    step_size = settings.pairs_per_step * (1 if examples[0].paired else 2)
    steps = settings.epochs * math.ceil(data.examples / step_size)
    disk = estimate.estimate_disk(model, settings)
    rate = _tokens_per_second(model, settings, row) if fits else None
    return Plan(
        data=data,
        steps=steps,
        device=device,
        devices=devices,
        precision=str(sketch.precision).removeprefix("torch."),
        tokens_per_batch=sketch.tokens_per_batch,
        memory=memory,
        available_memory=room,
        advice="" if fits or memory is None else estimate.advice(model, settings, row, room),
        checkpoint_bytes=disk.checkpoint,
        resume_bytes=disk.resume_point,
        disk_bytes=disk.most(_checkpoints(settings)),
        free_disk=shutil.disk_usage(_existing(folder)).free,
        tokens_per_second=rate,
        seconds=_seconds(settings, data, rate, devices),
        asked=_asked(recipe, benchmarks),
        notes=tuple(notes.said),
    )


def _asked(recipe: Recipe, benchmarks: Sequence[Benchmark]) -> tuple[Asked, ...]:
    """Asks every endpoint whether it is there and takes the key, which costs nothing."""
    return tuple(
        Asked(role, one.model, one.serve or one.base_url, problem, one.serve is not None)
        for role, one, problem in asyncio.run(pipeline.check_endpoints(recipe, benchmarks))
    )


def plan_tables(plan: Plan) -> Iterator[Table]:
    """What people see."""
    yield _data_table(plan.data)
    yield _memory_table(plan)
    rows = [
        ("a checkpoint", _size(plan.checkpoint_bytes)),
        ("what resuming needs", _size(plan.resume_bytes)),
        ("the run folder, at most", _size(plan.disk_bytes)),
        ("free", _size(plan.free_disk)),
    ]
    short = "" if plan.disk_bytes < plan.free_disk else "Does not fit: set train.keep_last, or another --out."
    yield Table("Disk", ("", "size"), tuple(rows), note=short)
    yield _time_table(plan)
    if plan.asked:
        yield Table("Asked", ("by", "model", "at", "answers"), tuple(map(_asked_row, plan.asked)))


def _asked_row(one: Asked) -> tuple[str, ...]:
    answers = "not tried" if one.served else "no" if one.problem else "yes"
    return (one.role, one.model, one.address, answers)


def _data(recipe: Recipe, sketch: Any, notes: _Notes) -> tuple[list[Example], DataPlan]:
    from anchored.train.stage import TrainInputs, check_settings, prepare_data

    settings = recipe.train
    rows = pipeline.given_rows(recipe, notes)
    objective = check_settings(settings, None if rows is None else rows.training)
    if rows is None:
        return _upper_bound(recipe, sketch.context, notes)
    inputs = TrainInputs(pipeline.model_of(recipe), rows.training, rows.held_out)
    data = prepare_data(inputs, sketch, objective, settings, notes)
    plan = _counted(data.examples, settings.pairs_per_step, len(data.held_out), dict(data.left_out), created=True)
    return list(data.examples), plan


def _upper_bound(recipe: Recipe, context: int | None, notes: _Notes) -> tuple[list[Example], DataPlan]:
    """Pairs as long as the settings allow, as many as prompts are asked for."""
    from anchored.batches.tree import plant
    from anchored.train.examples import Example

    prompt, answer = recipe.train.max_prompt_tokens, recipe.train.max_answer_tokens
    if context is not None:
        prompt = min(prompt, context // 2)
        answer = min(answer, context - prompt)
    rejected = min(answer, recipe.create.sample.max_tokens)
    take = min(filter(None, (recipe.create.prompts.take, recipe.limit)), default=None)
    notes.note(
        "the pairs do not exist yet: numbers are upper bounds, of pairs as long as the settings allow"
        + ("" if take else ", and of one step, as create.prompts.take does not say how many")
    )
    count = take or recipe.train.pairs_per_step
    tree = plant([0] * prompt, [[0] * answer, [1] * rejected])
    example = Example("upper bound", tree, (b"", b""), (True, False), (answer, rejected))
    examples = [example] * count
    return examples, _counted(examples, recipe.train.pairs_per_step, 0, {}, created=False)


def _counted(
    examples: Sequence[Example], pairs_per_step: int, held_out: int, left_out: dict[str, int], *, created: bool
) -> DataPlan:
    names = ("chosen", "rejected") if examples[0].paired else ("completion",)
    columns = {"prompt": [len(example.tree.prompt) for example in examples]}
    for place, name in enumerate(names):
        columns[name] = [example.tokens[place] for example in examples]
    lengths = [[len(example.tree.prompt) + tokens for tokens in example.tokens] for example in examples]
    size = pairs_per_step * (1 if examples[0].paired else 2)
    padded = 0
    for start in range(0, len(lengths), size):
        step = [length for both in lengths[start : start + size] for length in both]
        padded += len(step) * max(step)
    return DataPlan(
        examples=len(examples),
        held_out=held_out,
        left_out=left_out,
        created=created,
        tokens={name: {"mean": statistics.fmean(found), "most": max(found)} for name, found in columns.items()},
        tree_tokens=sum(example.tree.size for example in examples),
        separate_tokens=sum(map(sum, lengths)),
        padded_tokens=padded,
    )


def _memory(model: Any, settings: Any, row: Sequence[Tree], devices: int, notes: _Notes) -> dict[str, int] | None:
    from anchored.train.estimate import CannotEstimate, estimate_memory

    try:
        memory: Memory = estimate_memory(model, settings, row)
    except CannotEstimate as reason:
        notes.note(f"memory must be tried: this architecture computes with its weights' values ({reason})"[:200])
        return None
    shared = devices if settings.sharded else 1
    parts = {name: getattr(memory, name) // shared for name in ("weights", "gradients", "optimizer", "update")}
    state = parts["weights"] + parts["gradients"] + parts["optimizer"]
    return {**parts, "row": memory.row, "peak": state + max(memory.row, parts["update"])}


def _tokens_per_second(model: Any, settings: Any, row: Sequence[Tree]) -> float:
    """The better of two timed forward and backward passes, after one that warms up."""
    import torch

    from anchored.train.policy import load_policy

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # one process, which measures its own speed
    policy = load_policy(model, settings.model_copy(update={"parallel": "ddp", "offload": False}))
    trees, tokens = [], 0
    for tree in row:
        if policy.device.type == "cpu" and tokens >= _TIMED_TOKENS:
            break
        trees.append(tree)
        tokens += tree.size
    rates = []
    for _ in range(3):
        began = time.monotonic()
        policy.logps(trees).sum().backward()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(tokens / (time.monotonic() - began))
    return max(rates[1:])


def _seconds(settings: Any, data: DataPlan, rate: float | None, devices: int) -> tuple[float, float] | None:
    """The reference pass, a third of a step's work per token, is done once."""
    if rate is None:
        return None
    expected = data.tree_tokens * (settings.epochs + 1 / 3) / (rate * devices)
    return _RANGE[0] * expected, _RANGE[1] * expected


def _devices(settings: Any) -> int:
    import torch

    from anchored.train.estimate import runs_on

    return settings.ranks or (torch.cuda.device_count() if runs_on(settings) == "cuda" else 1)


def _checkpoints(settings: Any) -> int:
    if settings.keep_last is None:
        return settings.epochs
    # the oldest one goes after the newest is there
    return min(settings.epochs, settings.keep_last + settings.keep_best + 1)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _data_table(data: DataPlan) -> Table:
    rows = [(name, f"{found['mean']:,.0f}", f"{found['most']:,.0f}") for name, found in data.tokens.items()]
    left_out = ", ".join(f"{count} {outcome}" for outcome, count in data.left_out.items()) or "none"
    saved = 1 - data.tree_tokens / data.separate_tokens
    note = (
        f"{data.examples:,} to train on, {data.held_out:,} held out; left out: {left_out}. An epoch has "
        f"{data.tree_tokens:,} tokens in tree rows: {saved:.0%} fewer than each answer by itself, "
        f"{1 - data.tree_tokens / data.padded_tokens:.0%} fewer than padded."
    )
    return Table("Data" if data.created else "Data (upper bounds)", ("tokens of", "mean", "most"), tuple(rows), note)


def _memory_table(plan: Plan) -> Table:
    of = f"each of {plan.devices} ranks" if plan.devices > 1 else plan.device
    rows = [(name, _size(size)) for name, size in (plan.memory or {}).items()]
    rows.append(("available", _size(plan.available_memory)))
    note = f"Does not fit; {plan.advice}." if plan.advice else f"A row has up to {plan.tokens_per_batch:,} tokens."
    return Table(f"Memory of {of}, {plan.precision}", ("", "size"), tuple(rows), note)


def _time_table(plan: Plan) -> Table:
    rows = [("steps", f"{plan.steps:,}")]
    if plan.seconds and plan.tokens_per_second:
        low, high = plan.seconds
        rows += [
            ("tokens per second, measured", f"{plan.tokens_per_second:,.0f}"),
            ("all epochs", f"{duration(low)} to {duration(high)}"),
        ]
    note = "" if plan.seconds else "Not timed: the model does not fit here."
    return Table("Time", ("", ""), tuple(rows), note)


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


class _Notes(Progress):
    """Keeps the notes of what is read."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, task: str, total: int | None, done: int = 0) -> None: ...

    def advance(self, task: str, by: int = 1, **facts: object) -> None: ...

    def finish(self, task: str) -> None: ...

    def note(self, text: str) -> None:
        self.said.append(text)
