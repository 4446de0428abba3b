"""A linear layer, of which all products are oneDNN's on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stts_lightning.layers.products import lean, learns_by_pieces, outer, product, ready, working_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Linear layer, and GELU after it if that is wanted: x `(..., C)`, weight `(C', C)` -> `(..., C')`."""
    if lean(x):
        dtype = working_dtype(x)
        return product(x.to(dtype).contiguous(), ready(weight, dtype, keep=True), None if bias is None else bias.to(dtype), gelu)
    x = _Linear.apply(x, weight, bias) if learns_by_pieces(x) else F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


class _Linear(torch.autograd.Function):
    """A linear layer whose three products are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()  # Rows that lie apart would be slow beyond measure.
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows = grad.reshape(-1, grad.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(grad, weight.T, None) if to_x else None,
            outer(rows, x.reshape(-1, x.shape[-1])) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


class Linear(nn.Linear):
    """A linear layer that goes the way of `linear`; a GELU follows if asked for."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True, gelu: bool = False) -> None:
        super().__init__(dim, out_dim, bias)
        self.gelu = gelu

    def forward(self, input: Tensor) -> Tensor:
        """Args: `(..., C)`. Returns: `(..., C')`."""
        return linear(input, self.weight, self.bias, self.gelu)
