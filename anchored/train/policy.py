"""The model being trained: float32 weights that the optimizer moves, and a model that reads them in its precision.

An update of 2e-7 vanishes in a bfloat16 weight, so the weights proper are float32. A model that runs in float32 holds
them itself. One that runs in bfloat16 holds a rounded copy, made anew after each step: what is trained is then what the
saved checkpoint computes, layers run wholly in 16 bits, and gradients add up over micro-batches in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchored.batches.answer_logps import answer_logps
from anchored.batches.tree import Tree
from anchored.errors import TrainError
from anchored.llm.model_folder import fingerprint, load_model, load_tokenizer
from anchored.train.settings import TrainSettings

# measured: small rows are the fastest on a CPU
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, eq=False)
class Policy:
    """A model to train, and what it takes to save it as it came."""

    model: PreTrainedModel
    """Runs forward and backward in `precision`, dropout off."""
    weights: Mapping[str, nn.Parameter]
    """What the optimizer moves, in float32; in float32 precision these are the model's own parameters."""
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Of the weights before training: the reference's name."""
    device: torch.device
    precision: torch.dtype
    saved_dtypes: Mapping[str, torch.dtype]
    """Each parameter's precision in the model's own files."""
    tokens_per_batch: int
    """Tokens that go through the model at once."""

    def logps(self, trees: Sequence[Tree]) -> Float[Tensor, "trees answers"]:
        """The answers' log-probabilities under the model as it is now."""
        return answer_logps(self.model, trees, self.device)

    @torch.no_grad()
    def update_model(self) -> None:
        """Let the model read the weights as they are now."""
        for name, parameter in self.model.named_parameters():
            if parameter is not self.weights[name]:
                parameter.copy_(self.weights[name])

    @contextmanager
    def as_saved(self) -> Iterator[PreTrainedModel]:
        """The model with its weights on the CPU, in the precision they came in."""
        parameters = dict(self.model.named_parameters())
        running = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.weights[name].data.to("cpu", self.saved_dtypes[name])
            yield self.model
        finally:
            for name, parameter in parameters.items():
                parameter.data = running[name]


def load_policy(model: str | Path, settings: TrainSettings) -> Policy:
    """Load a Hugging Face folder or Hub id for training."""
    device = _device(settings.device)
    loaded = load_model(model, device=device).eval().requires_grad_(True)
    saved_dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    precision = _precision(settings.precision, device, set(saved_dtypes.values()))
    weights = _float32_weights(loaded, precision)
    return Policy(
        model=loaded,
        weights=weights,
        tokenizer=load_tokenizer(model),
        fingerprint=fingerprint(model),
        device=device,
        precision=precision,
        saved_dtypes=saved_dtypes,
        tokens_per_batch=settings.tokens_per_batch or _TOKENS_PER_BATCH[device.type],
    )


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


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("train.device is 'cuda', but PyTorch sees no GPU here; set train.device to 'cpu' or 'auto'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _precision(name: str, device: torch.device, saved: set[torch.dtype]) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.float32 not in saved else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
