"""A policy whose weights are shared out: each rank holds a part, and has a layer whole only while it computes.

In: a loaded model on the CPU and the ranks. Out: the same model under PyTorch's `fully_shard`, behind a module that
scores trees. Its parameters are float32 parts, which the optimizer moves; each forward pass gathers them rounded to the
policy's precision, and each backward pass leaves every rank its part of the summed gradients, in float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from anchored.batches.answer_logps import answer_logps
from anchored.batches.attention import TreeUnsupportedError
from anchored.batches.head import is_known
from anchored.batches.tree import Tree
from anchored.errors import TrainError
from anchored.llm.model_folder import weight_shapes
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

    def logps(self, trees: Sequence[Tree]) -> Float[Tensor, "trees answers"]:
        """The answers' logps. Every rank must call this equally often, whatever its trees."""
        found = self(trees)
        if not found.requires_grad:
            # what waits for its backward pass would be out of date after the next update of the weights
            divided: Any = self
            divided.reshard()
        return found

    def forward(self, trees: Sequence[Tree]) -> Float[Tensor, "trees answers"]:
        """What gathered weights give; `logps` calls it."""
        try:
            return answer_logps(self.model, trees, self._device, fallback=False)
        except TreeUnsupportedError as reason:
            raise _no_rows(self.model, str(reason)) from None


def divides(model: str | Path, settings: TrainSettings, device: str, ranks: Ranks) -> bool:
    """Whether the settings, or what a device can hold, ask for weights to be shared out."""
    if settings.sharded or settings.parallel == "ddp" or ranks.count == 1:
        return settings.sharded
    return _bytes_of_state(model, settings) > _ROOM * _memory(device, ranks)


def shard(model: PreTrainedModel, settings: TrainSettings, precision: torch.dtype, mesh: DeviceMesh) -> Sharded:
    """Keep this rank's part of `model`, which lies on the CPU, on the mesh's device or on the CPU as the settings say.

    Adapters stay whole, and their gradients are the caller's to sum. Nothing goes between ranks here.
    """
    device = torch.device(mesh.device_type)
    _check(model, settings)
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if settings.offload else OffloadPolicy(),
        "ignored_params": set[nn.Parameter](),
    }
    if settings.lora:
        options["ignored_params"] = {parameter for parameter in model.parameters() if parameter.requires_grad}
    module = Sharded(model, device)
    for layer in (found for found in model.modules() if isinstance(found, GradientCheckpointingLayer)):
        _divide(layer, options)
    # embeddings, last norm and head are used together at a row's two ends: they stay gathered in between
    _divide(module, {**options, "reshard_after_forward": False})
    for tensor in (*options["ignored_params"], *model.buffers()):
        tensor.data = tensor.data.to(device)
    return module


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


def _divide(module: nn.Module, options: dict[str, Any]) -> None:
    for parameter in module.parameters():
        # what is trained is float32; a layer's own parameters are divided by now
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()
    divided = fully_shard(module, **options)
    # the loss is divided by the step's pairs already, so gradients add up; by sums alone, as gloo knows no other way
    divided.set_gradient_divide_factor(1.0)
    divided.set_force_sum_reduction_for_comms(True)


def _check(model: PreTrainedModel, settings: TrainSettings) -> None:
    if not is_known(model.config):
        raise _no_rows(model, "its type was never tested")
    if settings.lora and settings.lora.quantize:
        raise TrainError("train.parallel: 4-bit weights cannot be shared out; set it to ddp, or lora.quantize to null")


def _no_rows(model: PreTrainedModel, reason: str) -> TrainError:
    return TrainError(
        f"train.parallel: {type(model).__name__} takes no tree rows ({reason}), and without them each rank would "
        "gather the weights at other times; set it to ddp"
    )


def _bytes_of_state(model: str | Path, settings: TrainSettings) -> int:
    """What a rank holds that holds everything.

    4 bytes each for weight, gradient and every moment (RMSprop has one, AdamW two) and 2 for the rounded copy, for each
    parameter; with adapters, little more than the 2.
    """
    parameters = sum(math.prod(shape) for shape in weight_shapes(model))
    moments = 1 if settings.optimizer.name == "rmsprop" else 2
    return parameters * (2 if settings.lora else 10 + 4 * moments)


def _memory(device: str, ranks: Ranks) -> int:
    """Bytes of a rank's device: a GPU's own, or its share of the machine's."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks.local_count
