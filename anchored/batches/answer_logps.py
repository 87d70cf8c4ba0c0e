"""What a model gives each answer: summed logps, with their graph, without ever holding all logits.

In: a causal LM of transformers, and trees. Out: a tensor [trees, answers]. `answer_logps` runs them as one row and
scores shared tokens once; `answer_logps_plain` runs each answer by itself through the model's own forward, which is
also what models take that no tree row can express. Which trees share a row, losses and steps are the caller's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from anchored.batches import attention
from anchored.batches.attention import TreeRow, TreeUnsupportedError
from anchored.batches.head import at_least_fp32, find_head, is_known, target_logps
from anchored.batches.tree import Layout, Tree, lay

_takes_trees: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Models set up for rows; of unknown types, with the tokens of the longest answer and prompt that was compared."""

_takes_no_trees: WeakSet[nn.Module] = WeakSet()


def answer_logps(
    model: PreTrainedModel, trees: Sequence[Tree], device: torch.device, *, fallback: bool = True
) -> Float[Tensor, "trees answers"]:
    """Summed logps of every answer, all trees as one row.

    Sets the model's attention to one that takes rows for good, because a backward pass may compute layers again; calls
    without a row are not affected. A model that cannot take rows falls back to `answer_logps_plain`, and says so once;
    without `fallback`, that is an error.
    """
    if model in _takes_no_trees:
        return answer_logps_plain(model, trees, device)
    usual = model.config._attn_implementation
    try:
        _refuse_moving_positions(model.config.get_text_config(), trees)
        if model not in _takes_trees:
            _enable_trees(model)
        if _needs_comparing(model, trees):
            _compare(model, trees, device)
        return _row_logps(model, trees, device)
    except TreeUnsupportedError as reason:
        if not fallback:
            raise
        model.set_attn_implementation(usual or "eager")
        _takes_trees.pop(model, None)
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


def sum_answers(layout: Layout, logps: Float[Tensor, " scored"]) -> Float[Tensor, "trees answers"]:
    """Each answer's sum along its path. In float64, so that the order of terms is lost in the rounding, both ways."""
    along = logps.double().index_select(0, layout.paths)
    sums = torch.segment_reduce(along, "sum", lengths=layout.answer_lengths.flatten(), unsafe=True)
    return sums.view_as(layout.answer_lengths).to(logps.dtype)


def _one_logp(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int], device: torch.device) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]], device=device)
    options = _forward_options(model)
    if "logits_to_keep" in signature(model.forward).parameters:
        options["logits_to_keep"] = len(answer) + 1
    logits = model(input_ids=ids, **options).logits[0, -len(answer) - 1 : -1]
    return at_least_fp32(logits).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum()


def _forward_options(model: PreTrainedModel) -> dict[str, Any]:
    """Nothing is generated, and no loss of the router's is wanted, however the model is configured."""
    options: dict[str, Any] = {"use_cache": False}
    if hasattr(model.config, "output_router_logits"):
        options["output_router_logits"] = False
    return options


def _enable_trees(model: PreTrainedModel) -> None:
    """Refuse what is known before the first layer (the attention function refuses the rest), else set the attention."""
    config = model.config.get_text_config()
    if model._is_stateful:
        raise TreeUnsupportedError("it carries state along the row")
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layers:
        raise TreeUnsupportedError(f"it has {', '.join(sorted(layers))} layers")
    if not model._supports_attention_backend:
        raise TreeUnsupportedError("its attention cannot be replaced")
    model.set_attn_implementation(attention.implementation(model.config._attn_implementation))
    _takes_trees[model] = 0
    if find_head(model) is None:
        warnings.warn(
            f"the output layer of {type(model).__name__} is of an untested type or has an adapter; all logits of a row "
            "are held at once, so lower train.tokens_per_batch if memory runs out",
            stacklevel=3,
        )


def _refuse_moving_positions(config: PreTrainedConfig, trees: Sequence[Tree]) -> None:
    """Some rotary embeddings turn all tokens differently once the longest sequence passes a length."""
    longest = max(tree.longest for tree in trees)
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        kind = rope.get("rope_type") or "default"
        limits = rope.get("original_max_position_embeddings"), getattr(config, "max_position_embeddings", None)
        if ("dynamic" in kind or kind == "longrope") and longest >= min(limit for limit in limits if limit):
            raise TreeUnsupportedError(f"its {kind} positions depend on the longest sequence in the row")


def _ropes(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One for all layers, or one by type of layer."""
    nested = [rope for rope in parameters.values() if isinstance(rope, dict) and "rope_type" in rope]
    yield from nested or [parameters]


def _needs_comparing(model: PreTrainedModel, trees: Sequence[Tree]) -> bool:
    """A type that was never tested is compared at its first row, and at the first that outgrows its window."""
    if is_known(model.config):
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None) or torch.inf
    return not _takes_trees[model] or _takes_trees[model] <= window < max(tree.longest for tree in trees)


def _compare(model: PreTrainedModel, trees: Sequence[Tree], device: torch.device) -> None:
    """Two trees in a row, the one with the longest branches and the longest, must have the plain path's logps."""
    branched = max(trees, key=lambda tree: min(map(len, (tree.answers[0], *tree.branches[1:]))))
    longest = max(trees, key=lambda tree: tree.longest)
    with torch.no_grad():
        found = _row_logps(model, [branched, longest], device)
        expected = answer_logps_plain(model, [branched, longest], device)
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        difference = float((found - expected).abs().max())
        raise TreeUnsupportedError(f"a row's logps differ from the plain path's by up to {difference:.2g}")
    _takes_trees[model] = longest.longest


def _row_logps(model: PreTrainedModel, trees: Sequence[Tree], device: torch.device) -> Float[Tensor, "trees answers"]:
    layout = lay(trees).to(device)
    inputs = {
        "input_ids": layout.ids,
        "position_ids": layout.position_ids,
        # four dimensions are taken for a finished mask: none is built, and none is read
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "tree_row": TreeRow(layout.segments, device),
        **_forward_options(model),
    }
    head = find_head(model)
    if head is not None:
        states = model.get_decoder()(**inputs).last_hidden_state[0].index_select(0, layout.predictors)
        logps = target_logps(head, states, layout.targets)
    else:
        logits = model(**inputs, logits_to_keep=layout.predictors).logits[0]
        logps = at_least_fp32(logits).log_softmax(-1).gather(-1, layout.targets[:, None]).squeeze(-1)
    return sum_answers(layout, logps)
