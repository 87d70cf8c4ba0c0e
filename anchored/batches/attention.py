"""Attention over rows of trees: every branch sees the trunk and itself, no branch sees another, exactly.

Registered with transformers as `anchored_tree`; a row's segments come through the model's keyword arguments, so no
model code is touched. Calls without segments (generation, evaluation) are plain SDPA. On CUDA in 16 bit a layer is one
variable-length call; elsewhere it is a few matrix products per segment, on CPU more than twice as fast as SDPA's fused
kernel. Partial attentions are never merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from anchored.batches.tree import Segment

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

NAME = "anchored_tree"

_HAS_VARLEN = varlen_attn is not None and "enable_gqa" in signature(varlen_attn).parameters

_CHUNK = 128
"""Queries per matrix product on CPU: a later chunk's keys need no masked half for an earlier chunk's queries."""


class TreeUnsupportedError(Exception):
    """This model's attention asks for what a tree row cannot give; its answers are scored one by one."""


class TreeRow:
    """A row as its layers see it."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self.longest = max(segment.keys for segment in segments)

    @cached_property
    def varlen(self) -> _Varlen:
        """Made by the first layer that needs it, used by all."""
        spans = [span for segment in self.segments for span in (segment.before, (segment.start, segment.stop))]
        queries, keys = ([getattr(segment, name) for segment in self.segments] for name in ("queries", "keys"))
        return _Varlen(
            keys=torch.cat([torch.arange(*span) for span in spans]).to(self.device),
            query_offsets=torch.tensor([0, *accumulate(queries)], dtype=torch.int32).to(self.device),
            key_offsets=torch.tensor([0, *accumulate(keys)], dtype=torch.int32).to(self.device),
            most_queries=max(queries),
            most_keys=max(keys),
        )


@dataclass(frozen=True, slots=True)
class _Varlen:
    """Arguments of one variable-length call: queries lie as they are, keys and values are gathered per segment."""

    keys: Int[Tensor, " keys"]
    query_offsets: Int[Tensor, " offsets"]
    key_offsets: Int[Tensor, " offsets"]
    most_queries: int
    most_keys: int


def tree_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_row: TreeRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer; returns [batch, tokens, heads, dim]."""
    if tree_row is None:
        kwargs |= {"scaling": scaling, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _refuse_what_a_tree_lacks(dropout, tree_row, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    if _takes_varlen(q):
        attended = _varlen_attention(q, k, v, tree_row.varlen, scale)
    else:
        attended = _SegmentAttention.apply(q, k, v, tree_row.segments, scale)
    return attended[None], None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _refuse_what_a_tree_lacks(dropout: float, row: TreeRow, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise TreeUnsupportedError(f"its attention drops out at {dropout}")
    window = kwargs.get("sliding_window")
    if window is not None and row.longest > window:
        raise TreeUnsupportedError(f"its window of {window} tokens is shorter than {row.longest}, a prompt and answer")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise TreeUnsupportedError(f"its attention uses {name}")


def _takes_varlen(q: Float[Tensor, "tokens heads dim"]) -> bool:
    return _HAS_VARLEN and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in range(8, 257, 8)


def _varlen_attention(
    q: Float[Tensor, "tokens heads dim"],
    k: Float[Tensor, "tokens kv_heads dim"],
    v: Float[Tensor, "tokens kv_heads dim"],
    row: _Varlen,
    scale: float,
) -> Float[Tensor, "tokens heads dim"]:
    """Unequal numbers of queries and keys are causal from the bottom right."""
    assert varlen_attn is not None
    attended = varlen_attn(
        q,
        k.index_select(0, row.keys),
        v.index_select(0, row.keys),
        row.query_offsets,
        row.key_offsets,
        row.most_queries,
        row.most_keys,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended


class _SegmentAttention(torch.autograd.Function):
    """Softmax attention by matrix products, one chunk of queries at a time.

    The probabilities are computed again in the backward pass, so memory stays linear in the row. Inside, tensors are
    head-major, and the query heads that share a key head are rows of one product: no key is copied for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Float[Tensor, "tokens heads dim"],
        k: Float[Tensor, "tokens kv_heads dim"],
        v: Float[Tensor, "tokens kv_heads dim"],
        segments: Sequence[Segment],
        scale: float,
    ) -> Float[Tensor, "tokens heads dim"]:
        group = q.shape[1] // k.shape[1]
        rows, keys, values = _rows(q * scale, group), _rows(k, 1), _rows(v, 1)
        ctx.save_for_backward(rows, keys, values)
        ctx.segments, ctx.scale, ctx.group = segments, scale, group
        out = torch.empty_like(rows)
        for chunk in _chunks(segments, group):
            p = _probabilities(rows[:, chunk.rows], chunk.gather(keys), group)
            out[:, chunk.rows] = torch.bmm(p, chunk.gather(values))
        return _tokens(out, group)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "tokens heads dim"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, keys, values = ctx.saved_tensors
        grad_out = _rows(grad, ctx.group)
        grad_rows, grad_keys, grad_values = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        for chunk in _chunks(ctx.segments, ctx.group):
            q, out, k = rows[:, chunk.rows], grad_out[:, chunk.rows], chunk.gather(keys)
            p = _probabilities(q, k, ctx.group)
            chunk.accumulate(grad_values, p, out)
            # the softmax's gradient: p (dp - sum(p dp))
            ds = torch.bmm(out, chunk.gather(values).transpose(1, 2)).mul_(p)
            ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
            chunk.accumulate(grad_keys, ds, q)
            grad_rows[:, chunk.rows] = torch.bmm(ds, k)
        grad_q = _tokens(grad_rows, ctx.group).mul_(ctx.scale)
        return grad_q, _tokens(grad_keys, 1), _tokens(grad_values, 1), None, None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some queries of a segment and the keys they may see: those of `before`, then `own`, causal at the end."""

    rows: slice
    own: slice
    before: slice

    def gather(self, x: Float[Tensor, "heads tokens dim"]) -> Float[Tensor, "heads keys dim"]:
        own = x[:, self.own]
        return torch.cat((x[:, self.before], own), 1) if self.before.stop else own

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


def _chunks(segments: Sequence[Segment], group: int) -> Iterator[_Chunk]:
    for segment in segments:
        # equal chunks, not full ones and a rest
        count = -(-segment.queries // _CHUNK)
        bounds = [segment.start + segment.queries * index // count for index in range(count + 1)]
        for start, stop in pairwise(bounds):
            yield _Chunk(slice(start * group, stop * group), slice(segment.start, stop), slice(*segment.before))


def _rows(x: Float[Tensor, "tokens heads dim"], group: int) -> Float[Tensor, "kv_heads rows dim"]:
    tokens, heads, dim = x.shape
    return x.reshape(tokens, heads // group, group, dim).transpose(0, 1).reshape(heads // group, tokens * group, dim)


def _tokens(rows: Float[Tensor, "kv_heads rows dim"], group: int) -> Float[Tensor, "tokens heads dim"]:
    kv_heads, count, dim = rows.shape
    tokens = count // group
    return rows.view(kv_heads, tokens, group, dim).transpose(0, 1).reshape(tokens, kv_heads * group, dim)


def _probabilities(
    queries: Float[Tensor, "heads rows dim"], keys: Float[Tensor, "heads keys dim"], group: int
) -> Float[Tensor, "heads rows keys"]:
    scores = torch.bmm(queries, keys.transpose(1, 2))
    count = queries.shape[1] // group
    by_query = scores.view(scores.shape[0], count, group, scores.shape[-1])
    by_query[..., -count:].add_(_future(scores.dtype, scores.device)[:count, :, :count])
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


@lru_cache(maxsize=8)
def _future(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "queries 1 keys"]:
    """What is added to the scores of a chunk's last keys: -inf where the key comes after the query."""
    return torch.full((_CHUNK, _CHUNK), -torch.inf, dtype=dtype, device=device).triu_(1)[:, None]
