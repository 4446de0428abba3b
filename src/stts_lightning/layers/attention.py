"""Scaled dot-product attention.

On a CPU large attention is products of some thousand queries at a time with all keys, so that weights stay in a cache, and
the backward pass works them out again: where the default product lags behind oneDNN's, and where a bias learns. All else is
the library's.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stts_lightning.layers.products import (
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

WORTH_A_THREAD = 40_000
"""Weights of attention for each thread, from which on products are worth their calls."""

WORTH_KEEPING_NONE = 25_000
"""The same, where the alternative keeps the weights of all heads and windows."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of each head: softmax(q k^T / sqrt(C) + bias) v.

    Args:
        q: `(B, D, N, C)`.
        k, v: `(B, D, M, C)`.
        bias: `(D, N, M)`.

    Returns:
        `(B, N, D * C)`, heads side by side.
    """
    if not _by_products(q, k, bias):
        mask = None if bias is None else bias.unsqueeze(0)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    if torch.is_grad_enabled():
        return _Attend.apply(q, k, v, bias).flatten(2)  # type: ignore[union-attr]
    return _attended(q, k, v, bias).flatten(2)


def _by_products(q: Tensor, k: Tensor, bias: Tensor | None) -> bool:
    """Whether attention pays as products of our own."""
    if not (lean(q) or learns_by_pieces(q)) or working_dtype(q) is not torch.float32:
        return False
    worth = min(q.shape[2], _queries(k)) * k.shape[2] / _threads()
    if bias is None:
        return worth >= WORTH_A_THREAD and default_lags()
    # The library has no fused way for one that learns. With one that does not, windows are as fast there.
    return torch.is_grad_enabled() and bias.requires_grad and worth >= WORTH_KEEPING_NONE


@functools.cache
def _threads() -> int:
    """Asked once: blocks that run again in the backward pass, to save memory, have to decide alike."""
    return torch.get_num_threads()


def _queries(k: Tensor) -> int:
    """How many queries to take at a time."""
    return min(PIECE, max(WEIGHTS_AT_A_TIME // k.shape[2], 1))


def _together(cut: Callable[[Tensor], Sequence[Tensor]], *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The parts of tensors that are cut alike, one after the other; None throughout for one that is not there."""
    parts = [None if tensor is None else cut(tensor) for tensor in tensors]
    count = next(len(part) for part in parts if part is not None)
    return zip(*(itertools.repeat(None, count) if part is None else part for part in parts), strict=True)


def _heads(bias: Tensor | None, to_bias: Tensor | None, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each head's part of biases `(D, ...)` and tensors `(B, D, ...)`, of one clip after the other."""
    for clip in zip(*tensors, strict=True):
        yield from _together(Tensor.unbind, bias, to_bias, *clip)


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`(B, N, D, C)`."""
    batch, heads, tokens, channels = q.shape
    out, size = q.new_empty(batch, tokens, heads, channels), _queries(k)
    # As weights of products, a head's keys and values have to lie together; its queries do not.
    k, v = k.contiguous() * channels**-0.5, v.contiguous()
    for more, _, queries, keys, values, found in _heads(bias, None, q, k, v, out.transpose(1, 2)):
        keys = ready(keys, keys.dtype, math.ceil(tokens / size))  # What is turned lies as a product likes it.
        for plus, piece, place in _together(lambda x: x.split(size), more, queries, found):
            place.copy_(product(product(piece, keys, None, plus=plus).softmax(-1), values.T, None))
    return out


class _Attend(torch.autograd.Function):
    """Keeps queries, keys, values and bias alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        return _attended(q, k, v, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, bias = ctx.saved_tensors
        scale, size = q.shape[-1] ** -0.5, _queries(k)
        pieces = math.ceil(q.shape[2] / size)
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        tensors = q, k.contiguous() * scale, v.contiguous(), grads[0].contiguous().transpose(1, 2), *found
        for more, total, queries, keys, values, above, to_q, to_k, to_v in _heads(bias, to_bias, *tensors):
            laid_out, values = (ready(w, w.dtype, pieces) for w in (keys, values))
            of_keys: Tensor | None = None
            of_values: Tensor | None = None
            for plus, sums, piece, down, place in _together(lambda x: x.split(size), more, total, queries, above, to_q):
                weights = product(piece, laid_out, None, plus=plus).softmax(-1)
                of_values = outer(weights, down, of_values)
                down = product(down, values, None)
                down = torch.ops.aten._softmax_backward_data(down, weights, -1, weights.dtype)
                if sums is not None:
                    sums.add_(down)
                place.copy_(product(down, keys.T, None))
                of_keys = outer(down, piece, of_keys)
            assert of_keys is not None and of_values is not None
            torch.mul(of_keys, scale, out=to_k)
            to_v.copy_(of_values)
        return *found, to_bias
