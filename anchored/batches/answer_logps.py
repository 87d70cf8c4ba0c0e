"""What a model gives each answer: summed logps, with their graph, without ever holding all logits.

In: a causal LM of transformers and trees. Out: a tensor [trees, answers]. `answer_logps` runs them as one row and scores
shared tokens once; `answer_logps_plain` runs each answer by itself through the model's own forward, and is what models
take that no tree row can express. Rows, losses and steps are the caller's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from anchored.batches import attention
from anchored.batches.attention import TreeUnsupportedError
from anchored.batches.tree import Layout, Tree, lay

_TILED_HEADS = frozenset({"llama", "qwen2", "qwen3"})
"""Model types whose logits are the output layer's, nothing added; the others score through their own head."""

_TILE_BYTES = 2**27
"""Logits held at a time."""

_plain: WeakSet[nn.Module] = WeakSet()
"""Models already found to take no tree rows."""


def answer_logps(model: PreTrainedModel, trees: Sequence[Tree], device: torch.device) -> Float[Tensor, "trees answers"]:
    """Summed logps of every answer, all trees as one row.

    Sets the model's attention to `anchored_tree` for good, as recomputation in a backward pass needs it; other calls of
    the model are not affected. A model that cannot take tree rows falls back to `answer_logps_plain` and says so once.
    """
    if model not in _plain:
        usual = model.config._attn_implementation
        try:
            _check_takes_trees(model, trees)
            return _row_logps(model, lay(trees).to(device))
        except TreeUnsupportedError as reason:
            model.set_attn_implementation(usual)
            _plain.add(model)
            message = f"{type(model).__name__} takes no tree rows ({reason}); each answer runs by itself: right, but slower"
            warnings.warn(message, stacklevel=2)
    return answer_logps_plain(model, trees, device)


def answer_logps_plain(
    model: PreTrainedModel, trees: Sequence[Tree], device: torch.device
) -> Float[Tensor, "trees answers"]:
    """The same logps, each answer by itself through the model's ordinary forward."""
    return torch.stack(
        [torch.stack([_one_logp(model, tree.prompt, answer, device) for answer in tree.answers]) for tree in trees]
    )


def _one_logp(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int], device: torch.device) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return _at_least_fp32(logits).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum()


def _check_takes_trees(model: PreTrainedModel, trees: Sequence[Tree]) -> None:
    """What can be known before the first layer; the attention function refuses the rest."""
    config = model.config.get_text_config()
    if not model._supports_attention_backend:
        raise TreeUnsupportedError("its attention cannot be replaced")
    if model._is_stateful:
        raise TreeUnsupportedError("it carries state along the row")
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers:
        raise TreeUnsupportedError(f"it has {', '.join(sorted(layers))} layers")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise TreeUnsupportedError(f"its {rope} position embeddings depend on the longest sequence of the row")


def _row_logps(model: PreTrainedModel, layout: Layout) -> Float[Tensor, "trees answers"]:
    if model.config._attn_implementation != attention.NAME:
        model.set_attn_implementation(attention.NAME)
    inputs = {
        "input_ids": layout.ids,
        "position_ids": layout.position_ids,
        # four dimensions are taken for a finished mask: none is built, none is read
        "attention_mask": torch.zeros(1, 1, 1, 1, device=layout.ids.device),
        "tree_segments": layout.segments,
        "use_cache": False,
    }
    head = model.get_output_embeddings()
    if model.config.model_type in _TILED_HEADS and type(head) is nn.Linear:
        states = model.get_decoder()(**inputs).last_hidden_state[0].index_select(0, layout.predictors)
        logps = _TiledLogps.apply(states, head.weight, layout.targets)
    else:
        logits = model(**inputs, logits_to_keep=layout.predictors).logits[0]
        logps = _at_least_fp32(logits).log_softmax(-1).gather(-1, layout.targets[:, None]).squeeze(-1)
    parts = torch.segment_reduce(logps, "sum", lengths=layout.scored_lengths.flatten(), unsafe=True)
    shared, branches = parts.view_as(layout.scored_lengths).split([1, layout.scored_lengths.shape[1] - 1], dim=1)
    return shared + branches


class _TiledLogps(torch.autograd.Function):
    """log softmax(states @ weight.T) at the targets, one tile of rows at a time.

    Logits that fit into one tile are kept for the backward pass; more are computed again there.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Int[Tensor, " scored"]) -> Float[Tensor, " scored"]:
        rows = max(1, _TILE_BYTES // (4 * weight.shape[0]))
        logps, norms, kept = [], [], None
        for tile, target in zip(states.split(rows), targets.split(rows), strict=True):
            logits = _logits(tile, weight)
            norm = logits.logsumexp(-1, keepdim=True)
            logps.append((logits.gather(-1, target[:, None]) - norm).squeeze(-1))
            norms.append(norm)
            kept = logits if len(states) <= rows else None
        ctx.save_for_backward(states, weight, targets, torch.cat(norms), kept)
        ctx.rows = rows
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " scored"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, targets, norms, kept = ctx.saved_tensors
        grad_states = torch.empty_like(states)
        # a sum over tiles in 16 bit would lose digits
        grad_weight = torch.zeros_like(weight, dtype=norms.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(states), ctx.rows):
            tile = slice(start, start + ctx.rows)
            logits = _logits(states[tile], weight) if kept is None else kept
            # d logp / d logits = onehot - softmax
            error = (logits - norms[tile]).exp_().mul_(-grad[tile, None])
            error[torch.arange(len(error), device=error.device), targets[tile]] += grad[tile]
            error = error.to(weight.dtype)
            torch.mm(error, weight, out=grad_states[tile])
            if grad_weight is not None:
                grad_weight += error.T @ states[tile]
        return grad_states, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    return _at_least_fp32(states @ weight.T)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
