"""What acts on each token alone, for both backbones: linear layers and the perceptron.

On a CPU, products are oneDNN's, and tokens go through these layers in pieces that stay in the processor's cache: in
evaluation with GELU in the product's own loop, in training with a backward pass that works out again what is cheap. Elsewhere,
and where they are traced, compiled, or something hooks into them, the same layers are plain ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

PIECE = 2048
"""Tokens at a time: few enough that four times their channels stay in a cache, enough to keep the product's pace."""

_FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _by_pieces(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether x lies on a CPU, one operator after the other runs on it, and oneDNN knows its type."""
    return (
        _FUSED
        and x.device.type == "cpu"
        and x.dtype in dtypes
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


def lean(x: Tensor) -> bool:
    """Whether x is evaluated in pieces: nothing is kept for a backward pass."""
    return not torch.is_grad_enabled() and _by_pieces(x, torch.float32, torch.bfloat16)


def _learns_by_pieces(x: Tensor) -> bool:
    return torch.is_grad_enabled() and _by_pieces(x, torch.float32) and not torch.is_autocast_enabled("cpu")


def working_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is worked out in: autocast's choice, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Linear layer, and GELU after it if that is wanted: x `(..., C)`, weight `(C', C)` -> `(..., C')`."""
    if lean(x):
        dtype = working_dtype(x)
        return _product(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), gelu)
    x = _Linear.apply(x, weight, bias) if _learns_by_pieces(x) else F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    # oneDNN's: faster than the library's default where that is MKL on processors of another maker.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


class _Linear(torch.autograd.Function):
    """A linear layer of which two products of three are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0]
        rows = grad.reshape(-1, grad.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.T, None) if to_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


class _Perceive(torch.autograd.Function):
    """Norm, linear layer, GELU, linear layer: keeps its input and what GELU saw, and works out again what they became."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *weights: Tensor) -> Tensor:
        scale, shift, first, first_bias, second, second_bias = weights
        out = x.new_empty(*x.shape[:-1], len(second))
        hidden: list[Tensor] = []
        for piece, place in zip(x.view(-1, x.shape[-1]).split(PIECE), out.view(-1, len(second)).split(PIECE), strict=True):
            hidden.append(_product(F.layer_norm(piece, scale.shape, scale, shift, eps), first, first_bias))
            place.copy_(_product(F.gelu(hidden[-1]), second, second_bias))
        ctx.save_for_backward(x, *weights, *hidden)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors  # Once: what is checkpointed is worked out again by each look.
        hidden = weights[6:]
        scale, shift, first, _, second, _ = weights[:6]
        to_x, _, *wanted = ctx.needs_input_grad
        found = [torch.zeros_like(w) if want else None for w, want in zip(weights[:6], wanted, strict=True)]
        to_scale, to_shift, to_first, to_first_bias, to_second, to_second_bias = found
        grad_x = torch.empty_like(x) if to_x else None
        width = x.shape[-1]
        places = [None] * len(hidden) if grad_x is None else grad_x.view(-1, width).split(PIECE)
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        for piece, above, before, place in zip(x.view(-1, width).split(PIECE), grad.split(PIECE), hidden, places, strict=True):
            if to_second is not None:
                to_second.addmm_(above.T, F.gelu(before))
            if to_second_bias is not None:
                to_second_bias += above.sum(0)
            above = torch.ops.aten.gelu_backward(_product(above, second.T, None), before)
            normed, mean, inverse = torch.native_layer_norm(piece, scale.shape, scale, shift, ctx.eps)
            if to_first is not None:
                to_first.addmm_(above.T, normed)
            if to_first_bias is not None:
                to_first_bias += above.sum(0)
            if place is None and to_scale is None and to_shift is None:
                continue
            down, more_scale, more_shift = torch.ops.aten.native_layer_norm_backward(
                _product(above, first.T, None), piece, scale.shape, mean, inverse, scale, shift, [True, True, True]
            )
            if place is not None:
                place.copy_(down)
            if to_scale is not None:
                to_scale += more_scale
            if to_shift is not None:
                to_shift += more_shift
        return grad_x, None, *found


def piecewise(rows: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """A function of each token, in pieces where that pays.

    Args:
        rows: `(n, C)` -> `(n, width)`; where it is not applied in pieces, `(B, N, C)` -> `(B, N, width)`.
        x: `(B, N, C)`.
        width: channels that come out.

    Returns:
        `(B, N, width)`.
    """
    if not lean(x):
        return rows(x)
    flat = x.reshape(-1, x.shape[-1])
    out = flat.new_empty(flat.shape[0], width)
    for piece, place in zip(flat.split(PIECE), out.split(PIECE), strict=True):
        place.copy_(rows(piece))
    return out.view(*x.shape[:-1], width)


class Linear(nn.Linear):
    """A linear layer that goes the way of `linear`; a GELU follows if asked for."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True, gelu: bool = False) -> None:
        super().__init__(dim, out_dim, bias)
        self.gelu = gelu

    def forward(self, input: Tensor) -> Tensor:
        """Args: `(..., C)`. Returns: `(..., C')`."""
        return linear(input, self.weight, self.bias, self.gelu)


class Perceptron(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, gelu=True)
        self.fc2 = Linear(hidden, out_dim)


def perceive(norm: nn.LayerNorm, mlp: Perceptron, x: Tensor) -> Tensor:
    """The perceptron of normed tokens: x `(..., C)` -> `(..., C')`."""
    if not _learns_by_pieces(x) or not x.is_contiguous() or not all(map(_untouched, (norm, mlp, *mlp))):
        return mlp(norm(x))
    first, second = mlp.fc1, mlp.fc2
    weights = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
    return _Perceive.apply(x, norm.eps, *weights)  # type: ignore[return-value]


def _untouched(module: nn.Module) -> bool:
    """Whether a module is of these very layers and nothing hooks into it: adapters and probes see plain calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in (nn.LayerNorm, Linear, Perceptron) and not any(hooks)
