"""The model being trained: float32 weights that the optimizer moves, and a model that reads them in its precision.

An update of 2e-7 vanishes in a bfloat16 weight, so the weights proper are float32. A model that runs in float32 holds
them itself. One that runs in bfloat16 holds a rounded copy, made anew after each step: what is trained is then what the
saved checkpoint computes, layers run wholly in 16 bits, and gradients add up over micro-batches in float32. With
adapters (`lora`) these are the weights, in float32 in any case, and the model's own stay as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from anchored.batches.answer_logps import answer_logps
from anchored.batches.fused import fuse
from anchored.batches.tree import Tree
from anchored.errors import TrainError
from anchored.llm.model_folder import fingerprint, is_adapter, load_model, load_tokenizer, model_folder
from anchored.train.lora import adapters_off, add_adapter, merged, quantization
from anchored.train.ranks import Ranks
from anchored.train.settings import LoraSettings, TrainSettings
from anchored.train.sharding import Sharded, divides, shard, whole

# measured: small rows are the fastest on a CPU
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, eq=False)
class Policy:
    """A model to train, and what it takes to save it as it came."""

    model: PreTrainedModel
    """Runs forward and backward in `precision`, dropout off."""
    source: str | Path
    """The folder or Hub id it was loaded from."""
    weights: Mapping[str, nn.Parameter]
    """What the optimizer moves, in float32: the adapters, or else all; in float32 precision the model's own."""
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Of the weights before training: the reference's name."""
    device: torch.device
    precision: torch.dtype
    saved_dtypes: Mapping[str, torch.dtype]
    """Each parameter's precision in the model's own files."""
    lora: LoraSettings | None
    """How adapters are trained; None: the model's own weights are."""
    tokens_per_batch: int
    """Tokens that go through the model at once."""
    sharded: Sharded | None = None
    """Scores trees where each rank holds a part of the weights; None: this process has them all."""

    @property
    def gradients_summed(self) -> bool:
        """Whether backward passes leave gradients that are the sum over all ranks already."""
        return self.sharded is not None and self.lora is None

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None if it does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def logps(self, trees: Sequence[Tree]) -> Float[Tensor, "trees answers"]:
        """The answers' log-probabilities under the model as it is now."""
        return self.sharded.logps(trees) if self.sharded else answer_logps(self.model, trees, self.device)

    def as_started(self) -> AbstractContextManager[None]:
        """While the block lasts, the model that training starts from, whatever was trained since: adapters off."""
        return adapters_off(self.model) if self.lora else nullcontext()

    def content(self) -> str:
        """A name of the weights as they are now."""
        content = hashlib.sha256()
        for name, weight in self.weights.items():
            content.update(name.encode())
            content.update(whole(weight.detach()).cpu().contiguous().view(torch.uint8).numpy().data)
        return content.hexdigest()

    @torch.no_grad()
    def update_model(self) -> None:
        """Let the model read the weights as they are now."""
        for name, parameter in self.model.named_parameters():
            if parameter is not (weight := self.weights.get(name, parameter)):
                parameter.copy_(weight)

    def as_saved(self, ranks: Ranks) -> PreTrainedModel | None:
        """What a checkpoint holds, as `save_pretrained` writes it: the adapters, or the whole model on the CPU.

        The whole model has its weights in the precision they came in. Every rank must ask; the first one gets it.
        """
        if self.lora and not self.lora.merge:
            return self.model if ranks.first else None
        if self.lora:
            config = self.model.peft_config["default"]
            return merged(self.source, self.weights, config, self.saved_dtypes) if ranks.first else None
        saved = {}
        for name, weight in self.weights.items():
            gathered = whole(weight.detach())
            if ranks.first:
                saved[name] = gathered.to("cpu", self.saved_dtypes[name])
        return _with_weights(self.model, saved) if ranks.first else None


def load_policy(model: str | Path, settings: TrainSettings, ranks: Ranks = Ranks()) -> Policy:  # noqa: B008
    """Load a Hugging Face folder or Hub id for training."""
    if is_adapter(model_folder(model)):
        raise TrainError(
            f"{model}: an adapter, and training starts from whole models; train it with train.lora.merge: true, or "
            "merge it (peft: merge_and_unload) and save"
        )
    device = find_device(settings.device)
    if divides(model, settings, device.type, ranks):
        mesh = init_device_mesh(device.type, (ranks.count,))
        # one rank of a machine after another, so that it never holds more than one whole copy
        return ranks.in_turn(lambda: _load(model, settings, device, mesh))
    return _load(model, settings, device, mesh=None)


def sketch_policy(model: str | Path, settings: TrainSettings) -> Policy:
    """A policy without weights, on PyTorch's meta device: to be measured, not to be trained."""
    return _load(model, settings, find_device(settings.device), mesh=None, sketch=True)


def _load(
    model: str | Path, settings: TrainSettings, device: torch.device, mesh: DeviceMesh | None, sketch: bool = False
) -> Policy:
    """A whole policy, or this rank's part of it on `mesh`."""
    lora = settings.lora
    quantized = quantization(lora, device)
    if sketch:
        loaded = load_model(model, device="meta")
    else:
        loaded = load_model(model, device="cpu" if mesh else device, quantization=quantized)
    fuse(loaded)
    saved_dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    precision = _precision(settings.precision, device, set(saved_dtypes.values()))
    if lora:
        weights = _adapter_weights(loaded, model, precision, settings, lora)
    else:
        weights = _float32_weights(loaded, precision) if mesh is None else {}
    if settings.gradient_checkpointing:
        recompute_layers(loaded)
    sharded = shard(loaded, settings, precision, mesh) if mesh else None
    if sharded and not lora:
        weights = dict(loaded.named_parameters())
    return Policy(
        model=loaded,
        source=model,
        weights=weights,
        tokenizer=load_tokenizer(model),
        # a quantized model is another reference than the one it was made of
        fingerprint="" if sketch else fingerprint(model) + (f" {lora.quantize}" if lora and lora.quantize else ""),
        device=loaded.device if sketch else device,
        precision=precision,
        saved_dtypes=saved_dtypes,
        lora=lora,
        tokens_per_batch=settings.tokens_per_batch or _TOKENS_PER_BATCH[device.type],
        sharded=sharded,
    )


def recompute_layers(model: PreTrainedModel) -> None:
    """Let the model's layers keep their inputs alone, and compute the rest again in the backward pass."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise TrainError(
            f"train.gradient_checkpointing: {type(model).__name__} has no layers that can be computed again; "
            "set it to false, and lower train.tokens_per_batch if memory runs out"
        )
    rates = model.config.get_text_config().to_dict().items()
    if dropping := [name for name, rate in rates if "drop" in name and isinstance(rate, float) and rate > 0]:
        raise TrainError(
            f"train.gradient_checkpointing: the model's config.json has {dropping[0]}, which some layers of this kind "
            "would begin to do; set it to 0 there, or gradient_checkpointing to false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        # a layer asks whether it is being trained; what is inside it, where dropout is, stays in eval mode
        layer.training = True


def _with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model like `model`, on the CPU, with these weights."""
    with torch.device("meta"):
        like: PreTrainedModel = type(model)(model.config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    like.load_state_dict({**buffers, **weights}, strict=False, assign=True)
    like.tie_weights()
    like.generation_config = model.generation_config
    return like


def _adapter_weights(
    model: PreTrainedModel, source: str | Path, precision: torch.dtype, settings: TrainSettings, lora: LoraSettings
) -> dict[str, nn.Parameter]:
    """The adapters' weights, in float32 on the model in `precision`."""
    if lora.quantize is None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(precision)
    return add_adapter(model, source, lora, settings.seed)


def _float32_weights(model: PreTrainedModel, precision: torch.dtype) -> dict[str, nn.Parameter]:
    """The weights in float32, and the model in `precision` with its gradients going to them."""
    weights = {}
    for name, parameter in model.named_parameters():
        exact = parameter.data.float()
        parameter.data = exact.to(precision)
        weights[name] = parameter if precision is torch.float32 else _behind(parameter, exact)
    return weights


def _behind(parameter: nn.Parameter, exact: Tensor) -> nn.Parameter:
    """A float32 weight that `parameter` is a rounded copy of: each micro-batch's gradient is added to its own."""
    weight = nn.Parameter(exact)

    def add_gradient(rounded: Tensor) -> None:
        assert rounded.grad is not None
        if weight.grad is None:
            weight.grad = rounded.grad.float()
        else:
            weight.grad += rounded.grad
        rounded.grad = None

    parameter.register_post_accumulate_grad_hook(add_gradient)
    return weight


def find_device(name: str) -> torch.device:
    """The device that `train.device` means here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("train.device is 'cuda', but PyTorch sees no GPU here; set train.device to 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _precision(name: str, device: torch.device, saved: set[torch.dtype]) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.float32 not in saved else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
