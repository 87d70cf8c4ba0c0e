"""Attention over rows of trees: a branch sees what its answer shares with the trunk and itself, exactly.

Registered with transformers as `anchored_tree`; a row's segments come through the model's keyword arguments, so no
model code is touched. Calls without segments (generation, evaluation) are what they were before: SDPA, or the model's
own eager attention. On CUDA in 16 bit a layer is one variable-length call; elsewhere, and where scores are capped or
sinks take part, it is a few matrix products per segment, on CPU more than twice as fast as SDPA's fused kernel. Partial
attentions are never merged by their log-sum-exp.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from anchored.batches.tree import Segment

_SDPA, _EAGER = "anchored_tree", "anchored_tree_eager"

# before torch 2.13, heads may share keys without a word
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

_CHUNK = 128
"""Queries per matrix product on CPU: a later chunk's keys need no masked half for an earlier chunk's queries."""

_KEPT_BYTES = 2**25
"""Probabilities of a layer that are kept for the backward pass rather than computed again, off CUDA."""


@contextmanager
def nothing_kept() -> Iterator[None]:
    """While the block lasts, layers keep no probabilities, as on CUDA."""
    global _KEPT_BYTES
    usual, _KEPT_BYTES = _KEPT_BYTES, 0
    try:
        yield
    finally:
        _KEPT_BYTES = usual


class TreeUnsupportedError(Exception):
    """This model's attention asks for what a tree row cannot give; its answers are scored one by one."""


class TreeRow:
    """A row as its layers see it."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = segments
        self.device = device

    @cached_property
    def varlen(self) -> _Varlen:
        """Made by the first layer that needs it, used by all."""
        spans = [span for segment in self.segments for span in (segment.before, (segment.start, segment.stop))]
        queries, keys = ([getattr(segment, name) for segment in self.segments] for name in ("queries", "keys"))
        return _Varlen(
            keys=self._on_device(torch.cat([torch.arange(*span) for span in spans])),
            query_offsets=self._on_device(torch.tensor([0, *accumulate(queries)], dtype=torch.int32)),
            key_offsets=self._on_device(torch.tensor([0, *accumulate(keys)], dtype=torch.int32)),
            most_queries=max(queries),
            most_keys=max(keys),
        )

    def _on_device(self, made: Tensor) -> Tensor:
        # a copy that blocks waits for all that runs there: the backward pass of the row before
        return made.to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Varlen:
    """Arguments of one variable-length call: queries lie as they are, keys and values are gathered per segment."""

    keys: Int[Tensor, " keys"]
    query_offsets: Int[Tensor, " offsets"]
    key_offsets: Int[Tensor, " offsets"]
    most_queries: int
    most_keys: int


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a layer scores keys, beside being causal."""

    scale: float
    window: int | None
    """A query sees so many tokens of its answer and prompt, itself the last of them."""
    softcap: float | None
    """Scores become softcap * tanh(score / softcap), before anything is masked (Gemma 2, arXiv 2408.00118)."""


def implementation(usual: str | None) -> str:
    """The attention to set on a model that takes rows: its calls without a row go on as with the `usual` one."""
    return _EAGER if usual == "eager" else _SDPA


def tree_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_row: TreeRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls in every layer; returns [batch, tokens, heads, value_dim]."""
    if tree_row is None:
        kwargs |= {"scaling": scaling, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _refuse_what_a_tree_lacks(module, dropout, kwargs)
    rule = _Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
    sinks = kwargs.get("s_aux")
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if _takes_varlen(q, v) and rule.softcap is None and sinks is None:
        attended = _varlen_attention(q, k, v, tree_row.varlen, rule)
    else:
        attended = _SegmentAttention.apply(q, k, v, sinks, tree_row.segments, rule)
    return attended[None], None


def _tree_attention_beside_eager(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree_row: TreeRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`tree_attention` for models that SDPA cannot serve: every model's file has an eager attention of its own."""
    if tree_row is not None:
        return tree_attention(module, query, key, value, attention_mask, tree_row=tree_row, **kwargs)
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    eager = next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
    return eager(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_SDPA, tree_attention)
AttentionInterface.register(_EAGER, _tree_attention_beside_eager)
AttentionMaskInterface.register(_SDPA, sdpa_mask)
AttentionMaskInterface.register(_EAGER, eager_mask)


def _refuse_what_a_tree_lacks(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise TreeUnsupportedError(f"its attention drops out at {dropout}")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise TreeUnsupportedError("its attention looks ahead")
    if kwargs.get("position_bias") is not None:
        raise TreeUnsupportedError("its attention uses position_bias")


def _takes_varlen(q: Float[Tensor, "tokens heads dim"], v: Float[Tensor, "tokens kv_heads value_dim"]) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in range(8, 257, 8)
    )


def _varlen_attention(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "tokens kv_heads dim"],
    v: Float[Tensor, "tokens kv_heads dim"],
    row: _Varlen,
    rule: _Rule,
) -> Float[Tensor, "tokens heads dim"]:
    """Unequal numbers of queries and keys are causal from the bottom right, and so is the window."""
    attended = varlen_attn(
        q,
        k.index_select(0, row.keys),
        v.index_select(0, row.keys),
        row.query_offsets,
        row.key_offsets,
        row.most_queries,
        row.most_keys,
        scale=rule.scale,
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        **_GROUPED,
    )
    assert isinstance(attended, Tensor)
    return attended


class _SegmentAttention(torch.autograd.Function):
    """Softmax attention by matrix products, one chunk of queries at a time.

    Up to `_KEPT_BYTES` of probabilities are kept; of longer answers, the backward pass computes them again. In here
    states are head-major, and the query heads that share a key head are rows of one product: no key is copied for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "tokens heads dim"],
        k: Float[Tensor, "tokens kv_heads dim"],
        v: Float[Tensor, "tokens kv_heads value_dim"],
        sinks: Float[Tensor, " heads"] | None,
        segments: Sequence[Segment],
        rule: _Rule,
    ) -> Float[Tensor, "tokens heads value_dim"]:
        group = q.shape[1] // k.shape[1]
        rows, keys, values = _rows(q * rule.scale, group), _rows(k, 1), _rows(v, 1)
        chunks = tuple(_chunks(segments, group, rule.window))
        keep = any(ctx.needs_input_grad) and not q.is_cuda and rule.softcap is None and sinks is None
        keep = keep and sum(chunk.scores for chunk in chunks) * k.shape[1] * k.element_size() <= _KEPT_BYTES
        out, kept = rows.new_empty(*rows.shape[:2], values.shape[-1]), []
        for chunk in chunks:
            p = _probabilities(rows[:, chunk.rows], chunk.gather(keys), sinks, chunk, rule).keys
            out[:, chunk.rows] = torch.bmm(p, chunk.gather(values))
            if keep:
                kept.append(p)
        ctx.save_for_backward(rows, keys, values, sinks, *kept)
        ctx.chunks, ctx.rule, ctx.group = chunks, rule, group
        return _tokens(out, group)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "tokens heads value_dim"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, keys, values, sinks, *kept = ctx.saved_tensors
        grad_out = _rows(grad, ctx.group)
        grad_rows, grad_keys, grad_values = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        for index, chunk in enumerate(ctx.chunks):
            q, out, k = rows[:, chunk.rows], grad_out[:, chunk.rows], chunk.gather(keys)
            if kept:
                p, slope, sunk = _Probabilities(kept[index], None, None)
            else:
                p, slope, sunk = _probabilities(q, k, sinks, chunk, ctx.rule)
            chunk.accumulate(grad_values, p, out)
            # the softmax's gradient: p (dp - sum(p dp))
            ds = torch.bmm(out, chunk.gather(values).transpose(1, 2)).mul_(p)
            mean = ds.sum(-1, keepdim=True)
            ds.addcmul_(p, mean, value=-1)
            if slope is not None:
                ds.mul_(slope)
            if grad_sinks is not None and sunk is not None:
                # a sink's value is zero, which leaves -p sum(p dp)
                grad_sinks -= (sunk * mean).view(k.shape[0], -1, ctx.group).sum(1).flatten()
            chunk.accumulate(grad_keys, ds, q)
            grad_rows[:, chunk.rows] = torch.bmm(ds, k)
        grad_q = _tokens(grad_rows, ctx.group).mul_(ctx.rule.scale)
        return grad_q, _tokens(grad_keys, 1), _tokens(grad_values, 1), grad_sinks, None, None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some queries of a segment and the keys they may see: those of `before`, then `own`, causal at the end."""

    queries: int
    rows: slice
    own: slice
    before: slice
    hidden: int
    """So many of the first keys have left the last query's window, one less the query before's, and so on."""

    @property
    def scores(self) -> int:
        """Of one key head."""
        keys = self.own.stop - self.own.start + self.before.stop - self.before.start
        return (self.rows.stop - self.rows.start) * keys

    def gather(self, x: Float[Tensor, "heads tokens dim"]) -> Float[Tensor, "heads keys dim"]:
        own = x[:, self.own]
        return torch.cat((x[:, self.before], own), 1) if self.before.stop > self.before.start else own

    def accumulate(
        self,
        total: Float[Tensor, "heads tokens dim"],
        weights: Float[Tensor, "heads rows keys"],
        rows: Float[Tensor, "heads rows dim"],
    ) -> None:
        """Add weights.T @ rows to the keys that the weights belong to."""
        shared = self.before.stop - self.before.start
        total[:, self.own].baddbmm_(weights[..., shared:].transpose(1, 2), rows)
        if shared:
            total[:, self.before].baddbmm_(weights[..., :shared].transpose(1, 2), rows)


def _chunks(segments: Sequence[Segment], group: int, window: int | None) -> Iterator[_Chunk]:
    for segment in segments:
        # equal chunks, not full ones and a rest
        count = -(-segment.queries // _CHUNK)
        bounds = [segment.start + segment.queries * index // count for index in range(count + 1)]
        for start, stop in pairwise(bounds):
            # of the segment's keys, those that have left every query's window, and the last query's
            keys = segment.shared + stop - segment.start
            left, left_last = (max(0, keys - seen - (window or keys)) for seen in (stop - start - 1, 0))
            yield _Chunk(
                queries=stop - start,
                rows=slice(start * group, stop * group),
                own=slice(segment.start + max(0, left - segment.shared), stop),
                before=slice(min(segment.before[0] + left, segment.before[1]), segment.before[1]),
                hidden=left_last - left,
            )


def _rows(x: Float[Tensor, "tokens heads dim"], group: int) -> Float[Tensor, "kv_heads rows dim"]:
    tokens, heads, dim = x.shape
    return x.reshape(tokens, heads // group, group, dim).transpose(0, 1).reshape(heads // group, tokens * group, dim)


def _tokens(rows: Float[Tensor, "kv_heads rows dim"], group: int) -> Float[Tensor, "tokens heads dim"]:
    kv_heads, count, dim = rows.shape
    tokens = count // group
    return rows.view(kv_heads, tokens, group, dim).transpose(0, 1).reshape(tokens, kv_heads * group, dim)


class _Probabilities(NamedTuple):
    """What each query gives its keys, and what the gradient needs beside it."""

    keys: Float[Tensor, "heads rows keys"]
    slope: Float[Tensor, "heads rows keys"] | None
    """d capped score / d score."""
    sink: Float[Tensor, "heads rows 1"] | None
    """What goes to the head's sink, a key without a value (arXiv 2309.17453; learned in gpt-oss)."""


def _probabilities(
    queries: Float[Tensor, "heads rows dim"],
    keys: Float[Tensor, "heads keys dim"],
    sinks: Float[Tensor, " all_heads"] | None,
    chunk: _Chunk,
    rule: _Rule,
) -> _Probabilities:
    scores = torch.bmm(queries, keys.transpose(1, 2))
    slope = None
    if rule.softcap is not None:
        scores.div_(rule.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(rule.softcap)
    heads, rows, _ = scores.shape
    by_query = scores.view(heads, chunk.queries, rows // chunk.queries, -1)
    hide_later, hide_earlier = _hidden(scores.dtype, scores.device)
    by_query[..., -chunk.queries :].add_(hide_later[: chunk.queries, :, : chunk.queries])
    if chunk.hidden:
        last = chunk.queries - 1
        by_query[..., : chunk.hidden].add_(hide_earlier[: chunk.queries, :, last - chunk.hidden : last])
    if sinks is not None:
        column = sinks.to(scores.dtype).view(heads, 1, -1).expand(-1, chunk.queries, -1).reshape(heads, rows, 1)
        scores = torch.cat((scores, column), -1)
    p = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    if sinks is None:
        return _Probabilities(p, slope, None)
    return _Probabilities(p[..., :-1], slope, p[..., -1:])


class _Hidden(NamedTuple):
    """What is added to the scores of a chunk's last and first keys: -inf where a query does not see a key."""

    later: Float[Tensor, "queries 1 keys"]
    """Keys after the query."""
    earlier: Float[Tensor, "queries 1 keys"]
    """Keys before the query."""


@lru_cache(maxsize=8)
def _hidden(dtype: torch.dtype, device: torch.device) -> _Hidden:
    hidden = torch.full((_CHUNK, _CHUNK), -torch.inf, dtype=dtype, device=device)
    return _Hidden(hidden.triu(1)[:, None], hidden.tril(-1)[:, None])
