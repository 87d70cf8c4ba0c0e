"""The output layer: logps of chosen tokens from hidden states, without ever holding all logits.

In: hidden states, the tokens that follow them, and what a model's forward does between its states and its logits. Out:
one logp per state. Which types of models are known well enough for that is said here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from anchored.batches.compiled import one_pass
from anchored.batches.fused import product

_TILE_BYTES = {False: 2**27, True: 2**30}
"""Logits held at a time, by whether on CUDA: what keeps the products large."""

_CACHED_BYTES = 2**20
"""Logits that the elementwise work on a CPU takes at a time: what stays in a core's cache from one pass to the next."""


@dataclass(frozen=True, slots=True)
class Shaping:
    """What becomes of the output layer's numbers: scaled, then capped to softcap * tanh(logits / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """Logits are shaping(states @ weight.T + bias)."""

    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None
    shaping: Shaping


_SHAPINGS: Mapping[str, Callable[[Any], Shaping]] = {
    "cohere": lambda config: Shaping(scale=config.logit_scale),
    "cohere2": lambda config: Shaping(scale=config.logit_scale),
    "gemma2": lambda config: Shaping(softcap=config.final_logit_softcapping),
    "gemma3": lambda config: Shaping(),
    "gemma3_text": lambda config: Shaping(softcap=config.final_logit_softcapping),
    "gpt_neox": lambda config: Shaping(),
    "gpt_oss": lambda config: Shaping(),
    "granite": lambda config: Shaping(scale=1 / config.logits_scaling),
    "llama": lambda config: Shaping(),
    "mistral": lambda config: Shaping(),
    "mixtral": lambda config: Shaping(),
    "olmo2": lambda config: Shaping(),
    "phi": lambda config: Shaping(),
    "phi3": lambda config: Shaping(),
    "qwen2": lambda config: Shaping(),
    "qwen3": lambda config: Shaping(),
    "qwen3_moe": lambda config: Shaping(),
}
"""Model types tested to take tree rows and to score as their own forward does, by what that does with their logits."""


def is_known(config: PreTrainedConfig) -> bool:
    """Whether models of this type were tested against their own forward, in rows and at the head."""
    return config.model_type in _SHAPINGS


def find_head(model: PreTrainedModel) -> Head | None:
    """The model's head; None where its own forward must make the logits: unknown types, adapters on the layer."""
    layer = model.get_output_embeddings()
    if not is_known(model.config) or type(layer) is not nn.Linear:
        return None
    return Head(layer.weight, layer.bias, _SHAPINGS[model.config.model_type](model.config))


def target_logps(
    head: Head, states: Float[Tensor, "scored dim"], targets: Int[Tensor, " scored"]
) -> Float[Tensor, " scored"]:
    """log softmax of the logits at the targets, in float32 at least."""
    leaves = (states, head.weight, head.bias)
    if not torch.is_grad_enabled():
        # a function's forward cannot tell by itself that no backward will come
        leaves = tuple(None if leaf is None else leaf.detach() for leaf in leaves)
    return _TiledLogps.apply(*leaves, targets, head.shaping)


def at_least_fp32(x: Tensor) -> Tensor:
    """Logits are rounded to their model's precision before they come here; what follows need not be."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _TiledLogps(torch.autograd.Function):
    """`target_logps`, one tile of states at a time.

    A single tile is kept for the backward pass, which begins with it and would need that memory again; where there are
    more, they are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "scored dim"],
        weight: Float[Tensor, "vocab dim"],
        bias: Float[Tensor, " vocab"] | None,
        targets: Int[Tensor, " scored"],
        shaping: Shaping,
    ) -> Float[Tensor, " scored"]:
        rows = max(1, _TILE_BYTES[states.is_cuda] // (_bytes(weight) * len(weight)))
        logps, norms = [], []
        kept: Tensor | None = None
        for tile, target in zip(states.split(rows), targets[:, None].split(rows), strict=True):
            # the tile before goes first
            kept = None
            kept = _logits(tile, weight, bias)
            kept = kept if kept.is_cuda else _shaped(at_least_fp32(kept), shaping)
            logp, norm = (_scores if kept.is_cuda else _scores_in_place)(kept, target, shaping)
            logps.append(logp)
            norms.append(norm)
        if len(logps) > 1 or not any(ctx.needs_input_grad):
            kept = None
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(norms), kept)
        ctx.rows, ctx.shaping = rows, shaping
        return torch.cat(logps).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " scored"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, bias, targets, norms, kept = ctx.saved_tensors
        needs_states, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_states: list[Tensor] = []
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        split = (of.split(ctx.rows) for of in (states, norms, targets[:, None], grad[:, None]))
        for tile, norm, target, counts in zip(*split, strict=True):
            begun = kept
            if begun is None:
                begun = _logits(tile, weight, bias)
                if not begun.is_cuda:
                    begun = _shaped(at_least_fp32(begun), ctx.shaping).sub_(norm)
            gradient = _logit_gradient if begun.is_cuda else _logit_gradient_in_place
            error = gradient(begun, norm, target, counts, ctx.shaping)
            if needs_bias:
                of_tile = error.sum(0, dtype=norms.dtype)
                grad_bias = of_tile if grad_bias is None else grad_bias + of_tile
            error = error.to(weight.dtype)
            if needs_states:
                grad_states.append(product(error, weight.T))
            # sums over tiles in 16 bit would lose digits
            if needs_weight:
                grad_weight = _plus_product(grad_weight, error.T, tile, norms.dtype)
        of_states = torch.cat(grad_states) if needs_states else None
        return of_states, _as(grad_weight, weight), _as(grad_bias, bias), None, None


def _bytes(weight: Tensor) -> int:
    """Of a logit: the CPU's work is in float32."""
    return weight.element_size() if weight.is_cuda else 4


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "rows vocab"]:
    """Unshaped, in the model's precision."""
    return product(states, weight) if bias is None else nn.functional.linear(states, weight, bias)


def _shaped(logits: Float[Tensor, "rows vocab"], shaping: Shaping) -> Float[Tensor, "rows vocab"]:
    """In the memory of the logits."""
    if shaping.scale != 1:
        logits.mul_(shaping.scale)
    if shaping.softcap is not None:
        logits.div_(shaping.softcap).tanh_().mul_(shaping.softcap)
    return logits


# on a GPU the logits stay as they are, and each function passes over them once


@one_pass
def _scores(logits: Tensor, targets: Tensor, shaping: Shaping) -> tuple[Tensor, Tensor]:
    """Of the unshaped logits [rows, vocab]: each target's logp, and the logsumexp, both [rows, 1]."""
    exact = _shaped(at_least_fp32(logits).clone(), shaping)
    norms = exact.logsumexp(-1, keepdim=True)
    return exact.gather(-1, targets) - norms, norms


@one_pass
def _logit_gradient(logits: Tensor, norms: Tensor, targets: Tensor, grad: Tensor, shaping: Shaping) -> Tensor:
    """The gradient of the unshaped logits, rounded as they are."""
    exact = _shaped(at_least_fp32(logits).clone(), shaping)
    # d logp / d logits = onehot - softmax
    chosen = torch.arange(logits.shape[-1], device=logits.device) == targets
    error = (chosen.to(exact.dtype) - (exact - norms).exp()) * (grad * shaping.scale)
    if shaping.softcap is not None:
        error = error * (1 - (exact / shaping.softcap).square())
    return error.to(logits.dtype)


# on a CPU float32 logits become what is wanted where they lie, a cache's fill at a time


def _scores_in_place(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, "rows 1"], shaping: Shaping
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """As `_scores`, of shaped logits, which become log-probabilities."""
    found = logits.gather(-1, targets)
    for part in logits.split(_cached_rows(logits)):
        if part.is_cpu:
            torch.log_softmax(part, -1, out=part)
        else:
            part.sub_(part.logsumexp(-1, keepdim=True))
    logps = logits.gather(-1, targets)
    return logps, found - logps


def _logit_gradient_in_place(
    logps: Float[Tensor, "rows vocab"],
    norms: Float[Tensor, "rows 1"],
    targets: Int[Tensor, "rows 1"],
    grad: Float[Tensor, "rows 1"],
    shaping: Shaping,
) -> Float[Tensor, "rows vocab"]:
    """As `_logit_gradient`, in the memory of the log-probabilities."""
    grad = grad * shaping.scale
    slope = None if shaping.softcap is None else 1 - ((logps + norms) / shaping.softcap).square_()
    rows = _cached_rows(logps)
    for part, part_grad in zip(logps.split(rows), grad.split(rows), strict=True):
        part.exp_().mul_(-part_grad)
    error = logps.scatter_add_(1, targets, grad)
    return error if slope is None else error.mul_(slope)


def _cached_rows(logits: Float[Tensor, "rows vocab"]) -> int:
    return max(1, _CACHED_BYTES // (4 * logits.shape[-1])) if logits.is_cpu else len(logits)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if total is None:
        return (left @ right).to(dtype)
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)


def _as(total: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if total is None or parameter is None else total.to(parameter.dtype)
