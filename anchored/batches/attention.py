"""Attention over rows of trees: every branch sees the trunk and itself, no branch sees another, exactly.

Registered with transformers as `anchored_tree`; a row's segments come through the model's keyword arguments, so no
model code is touched. Calls without segments (generation, evaluation) are plain SDPA. On CUDA in 16 bit a layer is one
variable-length call; elsewhere it is a few matrix products per segment, on CPU more than twice as fast as SDPA's fused
kernel. Partial attentions are never merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from anchored.batches.tree import Segment

NAME = "anchored_tree"

_CHUNK = 128
"""Queries per matrix product on CPU: a later chunk's keys need no masked half for an earlier chunk's queries."""


class TreeUnsupportedError(Exception):
    """This model's attention asks for what a tree row cannot give; its answers are scored one by one."""


def tree_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_segments: Sequence[Segment] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer; returns [batch, tokens, heads, dim]."""
    if tree_segments is None:
        kwargs |= {"scaling": scaling, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _refuse_what_a_tree_lacks(dropout, tree_segments, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # a row is the batch: [tokens, heads, dim]
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        attended = _varlen(q, k, v, tree_segments, scale)
    else:
        attended = _SegmentAttention.apply(q, k, v, tree_segments, scale)
    return attended[None], None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _refuse_what_a_tree_lacks(dropout: float, segments: Sequence[Segment], kwargs: dict[str, Any]) -> None:
    if dropout:
        raise TreeUnsupportedError(f"attention dropout is {dropout}")
    window = kwargs.get("sliding_window")
    longest = max(segment.keys for segment in segments)
    if window is not None and longest > window:
        raise TreeUnsupportedError(f"its attention window of {window} tokens is shorter than an answer with its prompt, {longest}")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise TreeUnsupportedError(f"its attention has {name}")


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """One call: queries lie as they are, keys and values are gathered per segment; causal from the bottom right."""
    from torch.nn.attention.varlen import varlen_attn

    gather = torch.cat([torch.arange(start, stop) for segment in segments for start, stop in _key_spans(segment)])
    gather = gather.to(q.device, non_blocking=True)
    return varlen_attn(
        q,
        k.index_select(0, gather),
        v.index_select(0, gather),
        _offsets([segment.queries for segment in segments], q.device),
        _offsets([segment.keys for segment in segments], q.device),
        max(segment.queries for segment in segments),
        max(segment.keys for segment in segments),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=True,
    )  # type: ignore[return-value]


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _key_spans(segment: Segment) -> tuple[tuple[int, int], tuple[int, int]]:
    return segment.before, (segment.start, segment.stop)


class _SegmentAttention(torch.autograd.Function):
    """Softmax attention by matrix products, one chunk of queries at a time.

    The probabilities are computed again in the backward pass, so memory stays linear in the row.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.scale = segments, scale
        attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for chunk in _chunks(segments):
            queries = _grouped(chunk.queries_of(q), k.shape[1]) * scale
            out = torch.bmm(_probabilities(queries, chunk.keys_of(k), chunk), chunk.keys_of(v))
            chunk.queries_of(attended).copy_(_ungrouped(out, q.shape[1]))
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        for chunk in _chunks(ctx.segments):
            queries, keys, values = _grouped(chunk.queries_of(q), k.shape[1]) * ctx.scale, chunk.keys_of(k), chunk.keys_of(v)
            out = _grouped(chunk.queries_of(grad), k.shape[1])
            p = _probabilities(queries, keys, chunk)
            chunk.add_to_keys(dv, torch.bmm(p.transpose(1, 2), out))
            dp = torch.bmm(out, values.transpose(1, 2))
            # the softmax's gradient: p (dp - sum(p dp))
            ds = dp.mul_(p)
            ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
            chunk.add_to_keys(dk, torch.bmm(ds.transpose(1, 2), queries))
            chunk.queries_of(dq).copy_(_ungrouped(torch.bmm(ds, keys) * ctx.scale, q.shape[1]))
        return dq, dk, dv, None, None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries [start, stop) of a segment, with the keys they may see: `before`, then [first, stop), causal at the end."""

    start: int
    stop: int
    first: int
    before: tuple[int, int]

    def queries_of(self, x: Float[Tensor, "tokens heads dim"]) -> Float[Tensor, "queries heads dim"]:
        return x[self.start : self.stop]

    def keys_of(self, x: Float[Tensor, "tokens heads dim"]) -> Float[Tensor, "heads keys dim"]:
        own = x[self.first : self.stop]
        keys = torch.cat((x[slice(*self.before)], own)) if self.before[1] else own
        return keys.transpose(0, 1)

    def add_to_keys(self, total: Float[Tensor, "tokens heads dim"], part: Float[Tensor, "heads keys dim"]) -> None:
        shared = self.before[1] - self.before[0]
        part = part.transpose(0, 1)
        total[self.first : self.stop] += part[shared:]
        if shared:
            total[slice(*self.before)] += part[:shared]


def _chunks(segments: Sequence[Segment]) -> Iterator[_Chunk]:
    for segment in segments:
        # equal chunks, not full ones and a rest
        count = -(-segment.queries // _CHUNK)
        bounds = [segment.start + segment.queries * index // count for index in range(count + 1)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            yield _Chunk(start, stop, segment.start, segment.before)


def _grouped(x: Float[Tensor, "queries heads dim"], kv_heads: int) -> Float[Tensor, "kv_heads rows dim"]:
    """Query heads that share a key head become rows of one product: no key is copied for them."""
    queries, heads, dim = x.shape
    return x.reshape(queries, kv_heads, heads // kv_heads, dim).transpose(0, 1).reshape(kv_heads, -1, dim)


def _ungrouped(x: Float[Tensor, "kv_heads rows dim"], heads: int) -> Float[Tensor, "queries heads dim"]:
    kv_heads, rows, dim = x.shape
    queries = rows * kv_heads // heads
    return x.reshape(kv_heads, queries, heads // kv_heads, dim).transpose(0, 1).reshape(queries, heads, dim)


def _probabilities(queries: Tensor, keys: Tensor, chunk: _Chunk) -> Float[Tensor, "kv_heads rows keys"]:
    scores = torch.bmm(queries, keys.transpose(1, 2))
    count = chunk.stop - chunk.start
    future = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu_(1)
    by_query = scores.view(scores.shape[0], count, -1, scores.shape[-1])
    by_query[..., -count:].masked_fill_(future[:, None], -torch.inf)
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
