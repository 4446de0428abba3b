"""Scaled dot-product attention.

Where a CPU's default product lags behind oneDNN's, large attention is products of some thousand queries at a time with all
keys: their weights stay in a cache, and the backward pass works them out again. All else is the library's fused attention.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stts_lightning.backbones.products import (
    PIECE,
    default_lags,
    lean,
    learns_by_pieces,
    outer,
    product,
    ready,
    working_dtype,
)

WEIGHTS_AT_A_TIME = 2**20
"""Weights of attention of one piece of queries: 4 MiB."""

WORTH_A_THREAD = 3 * 2**20
"""Multiply-adds of a product for each thread, from which on it is worth its call."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each head: softmax(q k^T / sqrt(C)) v.

    Args:
        q: `(B, D, N, C)`.
        k, v: `(B, D, M, C)`.

    Returns:
        `(B, N, D * C)`, heads side by side.
    """
    if not _by_products(q, k):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found: Tensor = _Attend.apply(q, k, v) if torch.is_grad_enabled() else _attended(q, k, v)  # type: ignore[assignment]
    return found.flatten(2)


def _by_products(q: Tensor, k: Tensor) -> bool:
    """Whether attention pays as products of our own."""
    if not (lean(q) or learns_by_pieces(q)) or working_dtype(q) is not torch.float32:
        return False
    work = min(q.shape[2], _queries(k)) * k.shape[2] * k.shape[3]
    return work >= WORTH_A_THREAD * torch.get_num_threads() and default_lags()


def _queries(k: Tensor) -> int:
    """How many queries to take at a time."""
    return min(PIECE, max(WEIGHTS_AT_A_TIME // k.shape[2], 1))


def _heads(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each head's part of tensors `(B, D, ...)`, of one clip after the other."""
    for clip in zip(*tensors, strict=True):
        yield from zip(*clip, strict=True)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(B, N, D, C)`."""
    batch, heads, tokens, channels = q.shape
    out, size = q.new_empty(batch, tokens, heads, channels), _queries(k)
    # As weights of products, a head's keys and values have to lie together; its queries do not.
    k, v = k.contiguous() * channels**-0.5, v.contiguous()
    for queries, keys, values, found in _heads(q, k, v, out.transpose(1, 2)):
        pieces = queries.split(size)
        keys = ready(keys, keys.dtype, len(pieces))  # What is turned lies as a product likes it.
        for piece, place in zip(pieces, found.split(size), strict=True):
            place.copy_(product(product(piece, keys, None).softmax(-1), values.T, None))
    return out


class _Attend(torch.autograd.Function):
    """Keeps queries, keys and values alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _attended(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = ctx.saved_tensors
        scale, size = q.shape[-1] ** -0.5, _queries(k)
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        above = grads[0].contiguous().transpose(1, 2)
        for queries, keys, values, grad, to_q, to_k, to_v in _heads(q, k.contiguous() * scale, v.contiguous(), above, *found):
            pieces = queries.split(size)
            laid_out, values = (ready(w, w.dtype, len(pieces)) for w in (keys, values))
            of_keys: Tensor | None = None
            of_values: Tensor | None = None
            for piece, down, place in zip(pieces, grad.split(size), to_q.split(size), strict=True):
                weights = product(piece, laid_out, None).softmax(-1)
                of_values = outer(weights, down, of_values)
                down = product(down, values, None)
                down = torch.ops.aten._softmax_backward_data(down, weights, -1, weights.dtype)
                place.copy_(product(down, keys.T, None))
                of_keys = outer(down, piece, of_keys)
            assert of_keys is not None and of_values is not None
            torch.mul(of_keys, scale, out=to_k)
            to_v.copy_(of_values)
        return found
