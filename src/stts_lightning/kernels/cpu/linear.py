"""Linear layers by oneDNN, and the MLP's part of a block.

torch's own products are MKL's, which use AVX2 alone on processors of another maker than Intel; oneDNN's use what there is,
and compute GELU or a sum in the same loop.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 2048
"""Tokens that go through an MLP at a time: few enough that their hidden channels stay in a cache."""


def available() -> bool:
    """Whether this build of torch has oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def mkldnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
    """OneDNN's linear layer: `x weight^T + bias`, then GELU, or plus another tensor."""
    if plus is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")


_packed: ContextVar[dict[tuple[int, int, int], tuple[Tensor, Tensor]] | None] = ContextVar("packed", default=None)


@contextlib.contextmanager
def prepacked_weights() -> Iterator[None]:
    """While this lasts, evaluation keeps each weight in the layout that oneDNN's products want, besides the weight itself.

    Products of few tokens, as selection leaves them, take up to a third less time. An optimiser's step or loaded weights are
    noticed; what is written through `.data` is not, so that this is for a test or a prediction, not for a whole program.
    """
    token = _packed.set({}) if _packed.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _packed.reset(token)


def prepack(weight: Tensor, rows: int) -> Tensor:
    """A weight in the layout that products want, if it is kept (`prepacked_weights`) or used for more than one chunk of rows."""
    kept = None if weight.is_inference() else _packed.get()  # Such weights do not tell whether they have changed.
    if kept is None:
        return _reordered(weight) if rows > CHUNK_TOKENS else weight
    key = id(weight), weight.data_ptr(), weight._version
    if key not in kept:
        kept[key] = weight, _reordered(weight)  # The weight too, so that no other gets its number.
    return kept[key][1]


def _reordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), CHUNK_TOKENS)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer: x `(..., C)` -> `(..., C')`."""
    if torch.is_grad_enabled():
        return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[return-value]
    return mkldnn_linear(x.contiguous(), prepack(layer.weight, 0), layer.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return mkldnn_linear(x.contiguous(), weight, bias)  # oneDNN is slow beyond measure on rows that lie apart.

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows = grad.flatten(0, -2)
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            mkldnn_linear(grad, weight.T, None) if to_x else None,
            weight_grad(rows, x.flatten(0, -2)) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def weight_grad(grad_output: Tensor, rows: Tensor) -> Tensor:
    """Gradient of a linear layer's weight: `(n, C')`, `(n, C)` -> `(C', C)`."""
    if not len(rows):
        return rows.new_zeros(grad_output.shape[1], rows.shape[1])
    if grad_output.shape[1] > rows.shape[1]:  # One of them has to be transposed in memory: the narrower.
        return weight_grad(rows, grad_output).T
    return mkldnn_linear(grad_output.T.contiguous(), rows.contiguous().T, None)


def mlp_residual(x: Tensor, norm: nn.LayerNorm, mlp: Mlp, drop_path: nn.Module, skip_proj: nn.Linear | None = None) -> Tensor:
    """The MLP's part of a block: `skip + drop_path(mlp(norm(x)))`.

    Args:
        x: `(B, N, C)`.
        norm: before the MLP.
        mlp: from C to C' channels.
        drop_path: of the residual path.
        skip_proj: linear layer from the normed tokens to the skip connection; None: the skip connection is x.

    Returns:
        `(B, N, C')`.
    """
    fc1, fc2 = mlp.fc1, mlp.fc2
    assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
    if torch.is_grad_enabled():
        normed = norm(x)
        hidden = linear(mlp.act(linear(normed, fc1)), fc2)
        return (x if skip_proj is None else linear(normed, skip_proj)) + drop_path(hidden)
    tokens, out = x.flatten(0, -2), x.new_empty(*x.shape[:-1], fc2.out_features)
    weight1, weight2 = prepack(fc1.weight, len(tokens)), prepack(fc2.weight, len(tokens))
    for rows, place in zip(tokens.split(CHUNK_TOKENS), out.flatten(0, -2).split(CHUNK_TOKENS), strict=True):
        normed = norm(rows)
        skip = rows if skip_proj is None else linear(normed, skip_proj)
        hidden = mkldnn_linear(normed, weight1, fc1.bias, gelu=True)
        place.copy_(mkldnn_linear(hidden, weight2, fc2.bias, plus=skip))
    return out
