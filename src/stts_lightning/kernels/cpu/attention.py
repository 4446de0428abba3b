"""Attention on a CPU: the library's, or products of our own where its products use half of the processor."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stts_lightning.kernels.cpu.linear import mkldnn_linear, weight_grad

CHUNK_WEIGHTS = 2**20
"""Attention weights that are computed at a time: 4 MiB, to stay in a cache."""

LARGE = 2**16
"""Pairs of a query and a key in one head from which on products of our own are worth their calls."""


@functools.cache
def mkl_lags() -> bool:
    """Whether torch's products, and with them its attention, run at half of oneDNN's speed here.

    They are MKL's, which uses no AVX-512 on processors of another maker than Intel. Before AMD's family 26 (Zen 5) AVX-512 was
    executed in halves, and nothing is lost.
    """
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("vendor_id") == "AuthenticAMD" and int(facts.get("cpu family", 0)) >= 26


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: softmax(q k^T / sqrt(C) + bias) v.

    Args:
        q: `(B, D, N, C)`.
        k, v: `(B, D, M, C)`.
        bias: `(D, N, M)`.

    Returns:
        `(B, N, D * C)`, heads side by side.
    """
    if mkl_lags() and q.shape[2] * k.shape[2] >= LARGE and (bias is None or torch.is_grad_enabled()):
        out: Tensor = _Attend.apply(q, k, v, bias)  # type: ignore[assignment]
        return out.flatten(2)
    mask = None if bias is None else bias.unsqueeze(0)  # Only of four dimensions does the library's fast code take it.
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _each_head(bias: Tensor | None, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Bias `(N, M)` or None, and the parts of tensors `(B, D, ...)`, of each head of each clip."""
    for clip in zip(*tensors, strict=True):
        yield from zip([None] * len(clip[0]) if bias is None else bias, *clip, strict=True)


def _chunks(bias: Tensor | None, grad_bias: Tensor | None, keys: Tensor, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Rows of tensors `(N, ...)`, or None for one that is not there: as many as their weights for all keys stay in a cache."""
    size = max(CHUNK_WEIGHTS // len(keys), 1)
    parts = [tensor.split(size) for tensor in tensors]
    none = [None] * len(parts[0])
    optional = (none if tensor is None else tensor.split(size) for tensor in (bias, grad_bias))
    yield from zip(*optional, *parts, strict=True)


class _Attend(torch.autograd.Function):
    """A head and some queries at a time. The backward pass computes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        batch, heads, tokens, channels = q.shape
        out = q.new_empty(batch, tokens, heads, channels)
        # As the weights of a product, keys and values have to be contiguous; queries need not be.
        tensors = (q, k.contiguous() * channels**-0.5, v, out.transpose(1, 2))
        for bias_of_head, queries, keys, values, out_of_head in _each_head(bias, *tensors):
            values = values.T.contiguous()
            for plus, _, rows, place in _chunks(bias_of_head, None, keys, queries, out_of_head):
                place.copy_(mkldnn_linear(mkldnn_linear(rows, keys, None, plus=plus).softmax(-1), values, None))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, bias = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        tensors = (q, k.contiguous() * scale, v.contiguous(), grads[0].contiguous().transpose(1, 2), grad_q, grad_k, grad_v)
        for number, (bias_of_head, queries, keys, values, grad, to_q, to_k, to_v) in enumerate(_each_head(bias, *tensors)):
            to_bias = None if grad_bias is None else grad_bias[number % len(grad_bias)]
            to_k.zero_()
            to_v.zero_()
            for plus, to_plus, rows, grad_rows, to_rows in _chunks(bias_of_head, to_bias, keys, queries, grad, to_q):
                weights = mkldnn_linear(rows, keys, None, plus=plus).softmax(-1)
                to_v += weight_grad(weights, grad_rows)
                to_weights = mkldnn_linear(grad_rows, values, None)
                to_logits = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
                if to_plus is not None:
                    to_plus += to_logits
                to_rows.copy_(mkldnn_linear(to_logits, keys.T, None))
                to_k += weight_grad(to_logits, rows) * scale
        return grad_q, grad_k, grad_v, grad_bias
