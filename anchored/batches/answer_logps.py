"""What a model gives each answer: summed logps, with their graph, without ever holding all logits.

In: a causal LM of transformers, and trees. Out: a tensor [trees, answers]. `answer_logps` runs them as one row and
scores shared tokens once; `answer_logps_plain` runs each answer by itself through the model's own forward, which is
also what models take that no tree row can express. Which trees share a row, losses and steps are the caller's.
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
from anchored.batches.attention import TreeRow, TreeUnsupportedError
from anchored.batches.tree import Tree, lay

_KNOWN_TYPES = frozenset({"llama", "qwen2", "qwen3"})
"""Model types tested to take tree rows, whose logits are their output layer's and nothing added. Other types are
compared with the plain path once, and score through their own head."""

_TILE_BYTES = {False: 2**24, True: 2**30}
"""Logits computed at a time, by whether on CUDA: on CPU what its caches like, on CUDA what keeps the products large."""

_KEPT_BYTES = 2**27
"""Logits of a row that are kept for the backward pass rather than computed again."""

_takes_trees: WeakSet[nn.Module] = WeakSet()
_takes_no_trees: WeakSet[nn.Module] = WeakSet()
"""Models whose first row told."""


def answer_logps(model: PreTrainedModel, trees: Sequence[Tree], device: torch.device) -> Float[Tensor, "trees answers"]:
    """Summed logps of every answer, all trees as one row.

    Sets the model's attention to `anchored_tree` for good, because a backward pass may compute layers again; calls
    without a row are not affected. A model that cannot take rows falls back to `answer_logps_plain`, and says so once.
    """
    if model in _takes_no_trees:
        return answer_logps_plain(model, trees, device)
    usual = model.config._attn_implementation
    try:
        if model not in _takes_trees:
            _enable_trees(model)
            _compare_once(model, trees, device)
            _takes_trees.add(model)
        return _row_logps(model, trees, device)
    except TreeUnsupportedError as reason:
        model.set_attn_implementation(usual or "eager")
        _takes_trees.discard(model)
        _takes_no_trees.add(model)
        name = type(model).__name__
        warnings.warn(
            f"{name} takes no tree rows ({reason}); each answer runs by itself, which is slower", stacklevel=2
        )
        return answer_logps_plain(model, trees, device)


def answer_logps_plain(
    model: PreTrainedModel, trees: Sequence[Tree], device: torch.device
) -> Float[Tensor, "trees answers"]:
    """The same logps, each answer by itself through the model's ordinary forward."""
    logps = [_one_logp(model, tree.prompt, answer, device) for tree in trees for answer in tree.answers]
    return torch.stack(logps).view(len(trees), -1)


def _one_logp(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int], device: torch.device) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return _at_least_fp32(logits).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum()


def _enable_trees(model: PreTrainedModel) -> None:
    """Refuse what is known before the first layer (the attention function refuses the rest), else set the attention."""
    config = model.config.get_text_config()
    if model._is_stateful:
        raise TreeUnsupportedError("it carries state along the row")
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers:
        raise TreeUnsupportedError(f"it has {', '.join(sorted(layers))} layers")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise TreeUnsupportedError(f"its {rope} positions depend on the longest sequence in the row")
    if not model._supports_attention_backend:
        raise TreeUnsupportedError("its attention cannot be replaced")
    model.set_attn_implementation(attention.NAME)


def _compare_once(model: PreTrainedModel, trees: Sequence[Tree], device: torch.device) -> None:
    """A model type that was never tested must give one tree the logps of the plain path."""
    if model.config.model_type in _KNOWN_TYPES:
        return
    tree = max(trees, key=lambda tree: min(map(len, tree.branches)))
    with torch.no_grad():
        found, expected = _row_logps(model, [tree], device), answer_logps_plain(model, [tree], device)
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise TreeUnsupportedError(f"a row gives {found.tolist()}, the plain path {expected.tolist()}")


def _row_logps(model: PreTrainedModel, trees: Sequence[Tree], device: torch.device) -> Float[Tensor, "trees answers"]:
    layout = lay(trees).to(device)
    inputs = {
        "input_ids": layout.ids,
        "position_ids": layout.position_ids,
        # four dimensions are taken for a finished mask: none is built, and none is read
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "tree_row": TreeRow(layout.segments, device),
        "use_cache": False,
    }
    head = model.get_output_embeddings()
    if model.config.model_type in _KNOWN_TYPES and type(head) is nn.Linear and head.bias is None:
        states = model.get_decoder()(**inputs).last_hidden_state[0].index_select(0, layout.predictors)
        logps = _TiledLogps.apply(states, head.weight, layout.targets)
    else:
        logits = model(**inputs, logits_to_keep=layout.predictors).logits[0]
        logps = _at_least_fp32(logits).log_softmax(-1).gather(-1, layout.targets[:, None]).squeeze(-1)
    parts = torch.segment_reduce(logps, "sum", lengths=layout.scored_lengths.flatten(), unsafe=True)
    shared, branches = parts.view_as(layout.scored_lengths).tensor_split([1], dim=1)
    return shared + branches


class _TiledLogps(torch.autograd.Function):
    """log softmax(states @ weight.T) at the targets, one tile of rows at a time.

    Up to `_KEPT_BYTES` of logits are kept for the backward pass; more are computed again there.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Int[Tensor, " scored"]) -> Float[Tensor, " scored"]:
        rows = max(1, _TILE_BYTES[states.is_cuda] // (4 * weight.shape[0]))
        keep = 4 * weight.shape[0] * len(states) <= _KEPT_BYTES and any(ctx.needs_input_grad)
        logps, norms, kept = [], [], []
        for tile, target in zip(states.split(rows), targets.split(rows), strict=True):
            logits = _logits(tile, weight)
            norms.append(logits.logsumexp(-1, keepdim=True))
            logps.append((logits.gather(-1, target[:, None]) - norms[-1]).squeeze(-1))
            if keep:
                kept.append(logits)
        ctx.save_for_backward(states, weight, targets, torch.cat(norms), *kept)
        ctx.rows = rows
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " scored"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, targets, norms, *kept = ctx.saved_tensors
        grad_states = torch.empty_like(states)
        # a sum over tiles in 16 bit would lose digits
        grad_weight = torch.zeros_like(weight, dtype=norms.dtype) if ctx.needs_input_grad[1] else None
        for index, start in enumerate(range(0, len(states), ctx.rows)):
            tile = slice(start, start + ctx.rows)
            logits = kept[index] if kept else _logits(states[tile], weight)
            # d logp / d logits = onehot - softmax, in the logits' own memory
            error = logits.sub_(norms[tile]).exp_().mul_(-grad[tile, None])
            error.scatter_add_(1, targets[tile, None], grad[tile, None])
            error = error.to(weight.dtype)
            torch.mm(error, weight, out=grad_states[tile])
            if grad_weight is not None:
                _add_product(grad_weight, error.T, states[tile])
        return grad_states, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    return _at_least_fp32(states @ weight.T)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
