"""Layers that keep less for the backward pass and read memory less often; equal to the originals but for round-off.

In: a loaded model. `fuse` puts its own modules in the place of those it knows by class, on this one model: parameters,
their names and the state dict stay, transformers' classes stay, and layers of unknown classes stay as they are. What
eager layers keep for each token (three copies of a norm's states, four of a feed-forward layer's) becomes one and two,
and the rest is computed again where it is needed, without another matrix product. Attention makes queries, keys and
values in one product and turns them where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers import PreTrainedModel

from anchored.batches.attention import tree_attention
from anchored.batches.compiled import one_pass

_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})
_FEED_FORWARDS = frozenset({"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP"})
"""Classes of transformers whose forward is that of `RMSNorm` and of `FeedForward`, word for word."""

_ATTENTIONS: Mapping[str, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda layer: None,
    "MistralAttention": lambda layer: getattr(layer.config, "sliding_window", None),
    "Qwen2Attention": lambda layer: layer.sliding_window,
}
"""The same for `FusedAttention`, with what they give as their window."""

_LARGE = 2**27
"""Multiplications from which oneDNN is worth its preparation of every new shape."""


def fuse(model: PreTrainedModel) -> int:
    """Replace what is known, in place; returns how many layers."""
    replaced = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            fused = _fused(layer)
            if fused is not None:
                setattr(parent, name, fused.train(layer.training))
                replaced += 1
            elif _is_of_transformers(layer) and type(layer).__name__ in _ATTENTIONS:
                # it stays what it was for all that is no tree row, generation above all
                layer.__class__ = _fused_attention(type(layer))
                replaced += 1
    return replaced


def product(x: Float[Tensor, "rows inner"], weight: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """x @ weight.T. Large ones on CPU go to oneDNN: PyTorch's own choice is MKL, a tenth slower on AMD's processors."""
    large = x.shape[0] * weight.numel() >= _LARGE
    if large and x.is_cpu and x.dtype is weight.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


class RMSNorm(nn.Module):
    """States over their root mean square, times a weight (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = epsilon

    def forward(self, states: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return _RMSNorm.apply(states, self.weight, self.variance_epsilon)


class FeedForward(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, states: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        layers = self.gate_proj, self.up_proj, self.down_proj
        if all(map(_is_bare, layers)):
            rows = states.reshape(-1, states.shape[-1])
            return _FeedForward.apply(rows, *(layer.weight for layer in layers)).view(states.shape)
        # an adapter, or whatever else was put around a projection since
        return self.down_proj(silu(self.gate_proj(states)) * self.up_proj(states))


class FusedAttention(nn.Module):
    """Mixed into an attention of transformers: takes tree rows, and leaves all else to the original."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        layer: Any = self
        projections = layer.q_proj, layer.k_proj, layer.v_proj
        if kwargs.get("tree_row") is None or not _are_alike(projections):
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        weights, biases = zip(*((projection.weight, projection.bias) for projection in projections), strict=True)
        states, cos, sin = (of.squeeze(0) for of in (hidden_states, *position_embeddings))
        made = _TurnedProjections.apply(states, cos, sin, *weights, *biases)
        heads = [projection.out_features // layer.head_dim for projection in projections]
        q, k, v = (x.transpose(0, 1)[None] for x in made.view(len(states), -1, layer.head_dim).split(heads, 1))
        rule = {
            "dropout": layer.attention_dropout if self.training else 0.0,
            "scaling": layer.scaling,
            "sliding_window": layer.window_of(layer),
        }
        attended, _ = tree_attention(self, q, k, v, **{**kwargs, "attention_mask": None, **rule})
        return layer.o_proj(attended.reshape(1, len(states), -1)), None


@lru_cache
def _fused_attention(original: type[nn.Module]) -> type[nn.Module]:
    window = staticmethod(_ATTENTIONS[original.__name__])
    return type(f"Fused{original.__name__}", (FusedAttention, original), {"window_of": window})


def _is_of_transformers(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("transformers.models.")


def _fused(layer: nn.Module) -> nn.Module | None:
    kind = type(layer)
    if not _is_of_transformers(layer):
        return None
    if kind.__name__ in _NORMS:
        assert isinstance(layer.weight, nn.Parameter)
        return RMSNorm(layer.weight, float(layer.variance_epsilon))  # type: ignore[arg-type]
    if kind.__name__ in _FEED_FORWARDS and _is_silu(layer.act_fn):
        return FeedForward(layer.gate_proj, layer.up_proj, layer.down_proj)  # type: ignore[arg-type]
    return None


def _is_silu(activation: object) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def _is_bare(layer: nn.Module, bias: bool = False) -> bool:
    """A linear layer and nothing else: no hook, no adapter, and no bias but where one may be."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and (bias or layer.bias is None) and not hooks


def _are_alike(layers: Sequence[nn.Module]) -> bool:
    """Bare, all with a bias or all without."""
    return all(_is_bare(layer, bias=True) for layer in layers) and len({layer.bias is None for layer in layers}) == 1


class _RMSNorm(torch.autograd.Function):
    """Keeps the states as they came and one number per token. Computes in float32, as the originals do."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed, scale = _normed(states, weight, epsilon)
        ctx.save_for_backward(states, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, weight, scale = ctx.saved_tensors
        of_states, of_weight = _norm_gradients(grad, states, weight, scale, *ctx.needs_input_grad[:2])
        return of_states, of_weight, None


@one_pass
def _normed(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The states over their root mean square, times the weight; and one over the root mean square."""
    exact = states.to(torch.float32)
    scale = exact.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    normed = (exact * scale).to(states.dtype)
    return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight, scale


@one_pass
def _norm_gradients(
    grad: Tensor, states: Tensor, weight: Tensor, scale: Tensor, needs_states: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    exact, out = grad.to(torch.float32), weight.to(torch.float32)
    normed = states.to(torch.float32) * scale
    both = (exact * normed).reshape(-1, weight.shape[0])
    of_weight = both.sum(0).to(weight.dtype) if needs_weight else None
    if not needs_states:
        return None, of_weight
    # d out / d states = scale (weight - normed mean(weight normed)): the norm's own part takes out the mean
    total = torch.mv(both, out) if both.is_cpu else (both * out).sum(-1)
    mean = total.div_(weight.shape[0]).view_as(scale)
    of_states = (exact * out).addcmul_(normed, mean, value=-1).mul_(scale)
    return of_states.to(states.dtype), of_weight


class _FeedForward(torch.autograd.Function):
    """Keeps its input and the outputs of gate and up; their product is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens width"],
        gate_weight: Float[Tensor, "inner width"],
        up_weight: Float[Tensor, "inner width"],
        down_weight: Float[Tensor, "width inner"],
    ) -> Float[Tensor, "tokens width"]:
        gate, up = product(x, gate_weight), product(x, up_weight)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        return product(_gated(gate, up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tokens width"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad
        inner, grad_gate, grad_up = _gate_gradients(product(grad, down_weight.T), gate, up)
        grad_down = grad.T @ inner if needs_down else None
        del inner
        grad_x = product(grad_gate, gate_weight.T).add_(product(grad_up, up_weight.T)) if needs_x else None
        return (
            grad_x,
            grad_gate.T @ x if needs_gate else None,
            grad_up.T @ x if needs_up else None,
            grad_down,
        )


@one_pass
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate).mul_(up)


@one_pass
def _gate_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_gated` again, and the gradients of gate and up where `grad` is its own."""
    active = silu(gate)
    return active * up, torch.ops.aten.silu_backward(grad * up, gate), active.mul_(grad)


class _TurnedProjections(torch.autograd.Function):
    """Queries, keys and values side by side; queries and keys turned by position (Su et al. 2021, arXiv 2104.09864).

    Keeps its input alone. A head's dimensions are turned in pairs of one from its first half and one from its second.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "tokens width"],
        cos: Float[Tensor, "tokens dim"],
        sin: Float[Tensor, "tokens dim"],
        *projections: Tensor | None,
    ) -> Float[Tensor, "tokens all_heads*dim"]:
        weights, biases = projections[:3], projections[3:]
        ctx.save_for_backward(x, cos, sin, *weights)
        made = product(x, torch.cat(weights))  # type: ignore[arg-type]
        if biases[0] is not None:
            made += torch.cat(biases)  # type: ignore[arg-type]
        turned = _turned_part(made, weights)
        _turn(turned, turned, cos, *sin.unsqueeze(1).chunk(2, -1))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "tokens all_heads*dim"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, cos, sin, *weights = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = needs[:3], needs[3:]
        back = torch.empty_like(grad)
        first, second = (-half for half in sin.unsqueeze(1).chunk(2, -1))
        _turn(_turned_part(grad, weights), _turned_part(back, weights), cos, second, first)
        back[:, -len(weights[2]) :] = grad[:, -len(weights[2]) :]
        sizes = [len(weight) for weight in weights]
        # gradients are parts of one product: it is computed, and held, also where only one of them is asked for
        return (
            product(back, torch.cat(weights).T) if needs_x else None,
            None,
            None,
            *_needed((back.T @ x).split(sizes) if any(needs_weights) else (), needs_weights),
            *_needed(back.sum(0).split(sizes) if any(needs_biases) else (), needs_biases),
        )


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradients[index] if needed else None for index, needed in enumerate(needs)]


def _turned_part(made: Tensor, weights: Any) -> Float[Tensor, "tokens heads_turned*dim"]:
    return made[:, : -len(weights[2])]


def _turn(
    x: Float[Tensor, "tokens heads*dim"],
    out: Float[Tensor, "tokens heads*dim"],
    cos: Float[Tensor, "tokens dim"],
    first_sin: Float[Tensor, "tokens 1 half_dim"],
    second_sin: Float[Tensor, "tokens 1 half_dim"],
) -> None:
    """(a, b) becomes (a cos - b first_sin, b cos + a second_sin), in place or not."""
    (a, b), (out_a, out_b) = (of.unflatten(-1, (-1, cos.shape[-1])).chunk(2, -1) for of in (x, out))
    first_cos, second_cos = cos.unsqueeze(1).chunk(2, -1)
    turned = (a * first_cos).addcmul_(b, first_sin, value=-1)
    torch.mul(b, second_cos, out=out_b).addcmul_(a, second_sin)
    out_a.copy_(turned)
