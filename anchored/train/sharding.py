"""A policy whose weights are shared out: each rank holds a part, and has a layer whole only while it computes.

In: a loaded model on the CPU and the ranks. Out: the same model under PyTorch's `fully_shard`, behind a module that
scores trees. Its parameters are float32 parts, which the optimizer moves; each forward pass gathers them rounded to the
policy's precision, and each backward pass leaves every rank its part of the summed gradients, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from anchored.batches.answer_logps import answer_logps
from anchored.batches.head import is_known
from anchored.batches.tree import Tree
from anchored.errors import TrainError
from anchored.train.ranks import Ranks
from anchored.train.settings import TrainSettings

_ROOM = 0.8
"""Share of a device's memory that weights, gradients and optimizer state may take; the rest is the rows'."""


class Sharded(nn.Module):
    """A model and how it scores trees: gathering begins and ends with a call, whatever of the model that calls."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self._device = device

    def forward(self, trees: Sequence[Tree]) -> Float[Tensor, "trees answers"]:
        """The answers' logps. Every rank must call this equally often, whatever its trees."""
        return answer_logps(self.model, trees, self._device, fallback=False)


def shard(
    load: Callable[[], PreTrainedModel], settings: TrainSettings, precision: torch.dtype, ranks: Ranks, device: str
) -> Sharded:
    """Load a model onto the CPU and keep this rank's part of it, on `device` unless it is offloaded.

    One rank of a machine after another, so that a machine never holds more than one whole copy, in the precision that
    the model is saved in.
    """
    mesh = init_device_mesh(device, (ranks.count,))
    offload = CPUOffloadPolicy(pin_memory=device == "cuda") if settings.offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32),
        "offload_policy": offload,
    }
    return ranks.in_turn(lambda: _shard(load(), options, torch.device(device)))


def whole(weight: Tensor) -> Tensor:
    """A weight with all its parts, on every rank; all must ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight: some of its rows."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def first_row(weight: Tensor, ranks: Ranks) -> int:
    """Where this rank's rows begin: the first ranks have equally many, the last ones what is left."""
    if not isinstance(weight, DTensor):
        return 0
    rows = len(weight)
    return min(ranks.rank * -(-rows // ranks.count), rows)


def is_sharded(weight: Tensor) -> bool:
    """Whether each rank holds a part of the weight."""
    return isinstance(weight, DTensor)


def state_fits(parameters: int, settings: TrainSettings, device: str, ranks: Ranks) -> bool:
    """Whether a rank's device holds float32 weights, gradients and optimizer state of all parameters.

    4 bytes each for weight, gradient and every moment (RMSprop has one, AdamW two), 2 for the rounded copy.
    """
    moments = 1 if settings.optimizer.name == "rmsprop" else 2
    return parameters * (10 + 4 * moments) < _ROOM * _memory(device, ranks)


def check_shardable(model: PreTrainedModel) -> None:
    """Raise for a model whose ranks could not be kept in step."""
    if not is_known(model.config):
        raise TrainError(
            f"train.parallel: {type(model).__name__} is of a type whose tree rows were never tested, and without them "
            "each rank would gather its parts at other times; set it to ddp"
        )


def _shard(model: PreTrainedModel, options: dict[str, Any], device: torch.device) -> Sharded:
    check_shardable(model)
    module = Sharded(model, device)
    for layer in (found for found in model.modules() if isinstance(found, GradientCheckpointingLayer)):
        _divide(layer, options)
    # embeddings, last norm and head are used together at a row's two ends: they stay gathered in between
    _divide(module, options, reshard_after_forward=False)
    model.to(device) if not _offloads(options) else _move_buffers(model, device)
    return module


def _divide(module: nn.Module, options: dict[str, Any], **more: Any) -> None:
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    ignored = {parameter for parameter in module.parameters() if parameter.requires_grad} if frozen else set()
    for parameter in module.parameters():
        # what a layer shared out before is done
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()
    divided = fully_shard(module, ignored_params=ignored, **options, **more)
    # the loss is divided by the step's pairs already, so gradients add up; only sums, as gloo has nothing else
    divided.set_gradient_divide_factor(1.0)
    divided.set_force_sum_reduction_for_comms(True)


def _offloads(options: dict[str, Any]) -> bool:
    return isinstance(options["offload_policy"], CPUOffloadPolicy)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _memory(device: str, ranks: Ranks) -> int:
    """Bytes of a rank's device: a GPU's own, or its share of the machine's."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks.local_count
