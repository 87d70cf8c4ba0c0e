"""What training will take, before it begins: memory by what it is for, disk, and tokens.

In: the settings, the model's folder, and trees that share a row. Out: bytes. Weights, gradients and the optimizer's
state are counted; what a row takes is found by running its forward and backward pass on a model without weights
(PyTorch's meta device), where every operation says what it would allocate and none computes. Nothing here knows files.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anchored.batches.attention import nothing_kept
from anchored.batches.packing import pack
from anchored.batches.tree import Tree
from anchored.train.examples import Example
from anchored.train.policy import Policy, sketch_policy
from anchored.train.settings import OptimizerSettings, TrainSettings
from anchored.train.step import step_size

GIB = 2**30

_CUDA_TILE = 2**31
"""What the head's larger tiles on a GPU, and their gradient, take beyond those of the meta device."""

_QUANTIZED = 0.53
"""Bytes of a weight in 4 bits: its half byte, and its share of the doubly quantized scales (arXiv 2305.14314, 3)."""

_STEPS = 64
"""Steps whose rows are looked at for the fullest one."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device."""

    weights: int
    """In the precision they are read in, and beside that in float32 where they are not float32 themselves."""
    gradients: int
    optimizer: int
    """The optimizer's state."""
    row: int
    """What a row of trees adds at its worst moment: activations, logits, gradients of activations."""
    update: int
    """What the optimizer's update adds; rows are gone by then."""

    @property
    def state(self) -> int:
        """What is there from the first step on."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return self.state + max(self.row, self.update)


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes in the run folder."""

    checkpoint: int
    """One of them."""
    resume_point: int

    def most(self, checkpoints: int) -> int:
        """While the last of so many is written: a new resume point stands beside the old one for a moment."""
        return checkpoints * self.checkpoint + 2 * self.resume_point


class CannotEstimate(Exception):
    """The architecture computes something that depends on the weights' values; it must be tried."""


def estimate_memory(model: str | Path, settings: TrainSettings, trees: Sequence[Tree]) -> Memory:
    """Of training with rows such as these trees; reads the model's config and no weights."""
    policy = sketch_policy(model, settings)
    trained = sum(weight.numel() for weight in policy.weights.values())
    largest = max(weight.numel() for weight in policy.weights.values())
    on_cuda = runs_on(settings) == "cuda"
    with nothing_kept() if on_cuda else nullcontext():
        row = _row_bytes(policy, trees) + (_CUDA_TILE if on_cuda else 0)
    return Memory(
        weights=_weight_bytes(policy),
        gradients=4 * trained,
        optimizer=4 * _moments(settings.optimizer) * trained,
        row=row,
        # one weight after another; AdamW on a GPU needs no room beside them
        update=0 if on_cuda and settings.optimizer.name == "adamw" else 8 * largest,
    )


def estimate_disk(model: str | Path, settings: TrainSettings) -> Disk:
    """Of checkpoints, and of what resuming needs."""
    policy = sketch_policy(model, settings)
    trained = sum(weight.numel() for weight in policy.weights.values())
    if policy.lora and not policy.lora.merge:
        checkpoint = 4 * trained
    else:
        named = {**dict(policy.model.named_parameters()), **policy.weights}
        checkpoint = sum(named[name].numel() * dtype.itemsize for name, dtype in _saved(policy))
    return Disk(checkpoint, 4 * (1 + _moments(settings.optimizer)) * trained)


def fullest_row(examples: Sequence[Example], settings: TrainSettings, tokens: int) -> list[Tree]:
    """The trees of the micro-batch with the most tokens, of the first steps in the data's order."""
    size = step_size(examples[0], settings)
    fullest: list[Tree] = []
    for start in range(0, min(len(examples), _STEPS * size), size):
        trees = [example.tree for example in examples[start : start + size]]
        for places in pack([tree.size for tree in trees], tokens):
            row = [trees[place] for place in places]
            if sum(tree.size for tree in row) > sum(tree.size for tree in fullest):
                fullest = row
    return fullest


def available_memory(device: str) -> int:
    """Bytes that can still be had: a GPU's free memory, or what the machine or this container has left."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            left = int(line.split()[1]) * 1024
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        left = min(left, int(limit[0]) - int(used[0]))
    return left


def runs_on(settings: TrainSettings) -> str:
    """cuda or cpu."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Way:
    """A change of settings with which training would take less memory."""

    change: str
    memory: Memory


def ways_to_fit(model: str | Path, settings: TrainSettings, trees: Sequence[Tree], room: int) -> list[Way]:
    """Changes, each by itself, after which training fits into `room` bytes: those that keep the result first."""
    smallest = [max(trees, key=lambda tree: tree.size)]
    half = list(trees[: max(1, len(trees) // 2)])
    tried = [
        ("train.gradient_checkpointing=true", {"gradient_checkpointing": True}, trees),
        (f"train.tokens_per_batch={_tokens(half)}", {}, half),
        (f"train.tokens_per_batch={_tokens(smallest)}", {}, smallest),
        (
            f"train.gradient_checkpointing=true train.tokens_per_batch={_tokens(smallest)}",
            {"gradient_checkpointing": True},
            smallest,
        ),
        ("train.lora={}", {"lora": _LORA}, trees),
        (
            f"train.lora={{}} train.gradient_checkpointing=true train.tokens_per_batch={_tokens(smallest)}",
            {"lora": _LORA, "gradient_checkpointing": True},
            smallest,
        ),
    ]
    ways: dict[str, Way] = {}
    for change, changes, row in tried:
        changed = TrainSettings.model_validate(settings.model_dump(mode="json") | changes)
        if changed == settings and len(row) == len(trees):
            continue
        memory = estimate_memory(model, changed, row)
        if memory.peak < room:
            ways[change] = Way(change, memory)
    return list(ways.values())


def advice(model: str | Path, settings: TrainSettings, trees: Sequence[Tree], room: int) -> str:
    """What to change, for a message."""
    try:
        ways = ways_to_fit(model, settings, trees, room)
    except CannotEstimate:
        return "lower train.tokens_per_batch, or set train.gradient_checkpointing"
    fits = " or ".join(f"{way.change} ({way.memory.peak / GIB:.1f} GiB)" for way in ways[:3])
    return f"what would fit: {fits}" if fits else "nothing that can be set makes it fit; take a smaller model"


_LORA: dict[str, Any] = {}


def _weight_bytes(policy: Policy) -> int:
    held = {id(tensor): tensor for tensor in chain(policy.model.parameters(), policy.model.buffers())}
    held |= {id(weight): weight for weight in policy.weights.values()}
    if policy.lora is None or policy.lora.quantize is None:
        return sum(tensor.nbytes for tensor in held.values())
    trained = {id(weight) for weight in policy.weights.values()}
    kept_whole = {id(layer.weight) for layer in _ends(policy)}
    return sum(
        int(tensor.numel() * _QUANTIZED)
        if tensor.dim() > 1 and id(tensor) not in trained | kept_whole
        else tensor.nbytes
        for tensor in held.values()
    )


def _ends(policy: Policy) -> Iterable[Any]:
    """The embedding and the output layer, which bitsandbytes leaves as they are."""
    return filter(None, (policy.model.get_input_embeddings(), policy.model.get_output_embeddings()))


def _saved(policy: Policy) -> Iterable[tuple[str, torch.dtype]]:
    """The model's own parameters with their saved precision; adapters call a layer's weight its base's."""
    named = dict(policy.model.named_parameters())
    for name, dtype in policy.saved_dtypes.items():
        layer, _, kind = name.rpartition(".")
        yield (name if name in named else f"{layer}.base_layer.{kind}"), dtype


def _moments(settings: OptimizerSettings) -> int:
    """Numbers that the optimizer keeps per weight."""
    return 1 if settings.name == "rmsprop" else 2


def _row_bytes(policy: Policy, trees: Sequence[Tree]) -> int:
    """What a forward and backward pass over the row allocates at its worst moment, gradients of weights apart."""
    for weight in policy.weights.values():
        weight.grad = torch.empty_like(weight)
    try:
        with _Held() as held:
            policy.logps(trees).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        raise CannotEstimate(str(error)) from error
    return held.most


class _Held(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        for leaf in _tensors(made):
            storage = leaf.untyped_storage()
            if storage._cdata not in given:
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._drop, storage.nbytes())
        return made

    def _drop(self, size: int) -> None:
        self._now -= size


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _tokens(trees: Sequence[Tree]) -> int:
    return sum(tree.size for tree in trees)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
