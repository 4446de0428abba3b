"""What acts on each token alone, for both backbones: linear layers and the perceptron.

In evaluation on a CPU, tokens go through these layers in pieces that stay in the processor's cache, and GELU is worked out
in the product's own loop; elsewhere the same layers are plain ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE = 2048
"""Tokens at a time: few enough that four times their channels stay in a cache, enough to keep the product's pace."""

_FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def lean(x: Tensor) -> bool:
    """Whether x is evaluated on a CPU, one operator after the other: neither trained with, nor traced, nor compiled."""
    return (
        _FUSED
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


def working_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is worked out in: autocast's choice, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Linear layer, and GELU after it if that is wanted: x `(..., C)`, weight `(C', C)` -> `(..., C')`."""
    if not lean(x):
        x = F.linear(x, weight, bias)
        return F.gelu(x) if gelu else x
    dtype = working_dtype(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # oneDNN's product, also faster than the library's default where that is MKL on processors of other makers.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


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
