"""A linear layer, of which all products are oneDNN's on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
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
    """A linear layer whose three products are oneDNN's; the default's, where gradients have gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return product(x.contiguous(), weight, bias)  # Rows that lie apart would be slow beyond measure.

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows, seen = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        again = torch.is_grad_enabled()
        return (
            (F.linear(grad, weight.T) if again else product(grad, weight.T, None)) if to_x else None,
            (rows.T @ seen if again else outer(rows, seen)) if to_weight else None,
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
