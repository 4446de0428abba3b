"""Attention in shifted windows in Triton, with a learned bias: tokens are read where they lie in the grid.

Nothing is rolled, padded, cut into windows or put together again, and no mask or bias is made for each window. The library's
fused attention takes 1.6 times as long with a bias, and its backward pass writes the gradient of the bias for every window before
it is summed.

Letters: B clips, W windows of N tokens, D heads of C channels. Queries and keys are taken in blocks of `SIDE`.
"""

# What Triton compiles has Triton's types, and is launched as `kernel[grid](...)`.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportMissingParameterType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from stts_lightning.backbones.video_swin import WindowPlan

SIDE = 64
"""Queries and keys of a block."""

FORWARD, QUERIES, KEYS, BIAS = {"num_warps": 4}, {"num_warps": 4}, {"num_warps": 4}, {"num_warps": 8, "num_stages": 1}
"""How each kernel is compiled: the fastest of those tried on a Hopper GPU that spill no registers."""
KEYS_ON_BLACKWELL = {"num_warps": 8}
"""There four warps spill."""

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _tokens(
    window, position, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr
):  # fmt: skip
    """Number of the token at each position of a window in its clip, and whether there is one: not beyond the end, not padding."""
    t = (window // ((PH // WH) * (PW // WW))) * WT + position // (WH * WW) + SHT
    h = (window // (PW // WW)) % (PH // WH) * WH + (position // WW) % WH + SHH
    w = window % (PW // WW) * WW + position % WW + SHW
    t = tl.where(t >= PT, t - PT, t)
    h = tl.where(h >= PH, h - PH, h)
    w = tl.where(w >= PW, w - PW, w)
    return (t * H + h) * W + w, (position < WT * WH * WW) & (t < T) & (h < H) & (w < W)


@triton.jit
def _logits(
    q, k, bias, regions, here, there, i, j, scale,
    N: tl.constexpr, ROW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of a block of queries and keys; -inf where they do not attend."""
    inside = here[:, None] & there[None, :]
    # Its rows are padded, so that eight neighbours lie inside or outside together, and are loaded together.
    of_bias = (i < N)[:, None] & (j < ROW)[None, :]
    b = tl.load(bias + i[:, None] * ROW + j[None, :], mask=of_bias, other=0.0).to(tl.float32)
    s = (tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + b) * LOG2E
    if MASKED:
        of_queries = tl.load(regions + i, mask=i < N, other=0)
        of_keys = tl.load(regions + j, mask=j < N, other=0)
        inside = inside & (of_queries[:, None] == of_keys[None, :])
    return tl.where(inside, s, -float("inf"))


@triton.jit
def _forward(
    qkv, bias, regions, out, lse, scale, T, H, W, PT, PH, PW, SHT, SHH, SHW, windows, D,
    WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SIDE: tl.constexpr,
    MASKED: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = WT * WH * WW
    ROW: tl.constexpr = (N + 7) // 8 * 8
    d = tl.program_id(1)
    b = tl.program_id(2) // windows
    window = tl.program_id(2) % windows
    c = tl.arange(0, CP)
    inside = c < C
    clip = b.to(tl.int64) * T * H * W
    row = 3 * D * C
    i = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    token, here = _tokens(window, i, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
    at = (clip + token)[:, None] * row + d * C + c[None, :]
    q = tl.load(qkv + at, mask=here[:, None] & inside[None, :], other=0.0)
    bias += d * N * ROW
    regions += window * N
    top = tl.full((SIDE,), -float("inf"), tl.float32)
    total = tl.zeros((SIDE,), tl.float32)
    result = tl.zeros((SIDE, CP), tl.float32)
    for first in range(0, N, SIDE):
        j = first + tl.arange(0, SIDE)
        token_j, there = _tokens(window, j, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
        at_j = (clip + token_j)[:, None] * row + (D + d) * C + c[None, :]
        k = tl.load(qkv + at_j, mask=there[:, None] & inside[None, :], other=0.0)
        v = tl.load(qkv + at_j + D * C, mask=there[:, None] & inside[None, :], other=0.0)
        s = _logits(q, k, bias, regions, here, there, i, j, scale, N, ROW, MASKED, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        # Rows that have met no key yet: any finite number serves.
        shown = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(s - shown[:, None])
        less = tl.exp2(top - shown)
        total = total * less + tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, result * less[:, None], input_precision=PRECISION)
        top = new
    total = tl.where(total > 0, total, 1.0)  # 0 where there is no token.
    result = result / total[:, None]
    to = (clip + token)[:, None] * (D * C) + d * C + c[None, :]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :])
    if SAVE:
        tl.store(lse + (tl.program_id(2) * D + d).to(tl.int64) * N + i, top + tl.log2(total), mask=here)


@triton.jit
def _backward_queries(
    qkv, bias, regions, out, grad_out, lse, delta, grad_qkv, scale, T, H, W, PT, PH, PW, SHT, SHH, SHW, windows, D,
    WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SIDE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, and of each query the product of what came out with its gradient, for the other passes."""
    N: tl.constexpr = WT * WH * WW
    ROW: tl.constexpr = (N + 7) // 8 * 8
    d = tl.program_id(1)
    b = tl.program_id(2) // windows
    window = tl.program_id(2) % windows
    c = tl.arange(0, CP)
    inside = c < C
    clip = b.to(tl.int64) * T * H * W
    row = 3 * D * C
    i = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    token, here = _tokens(window, i, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
    mask = here[:, None] & inside[None, :]
    at = (clip + token)[:, None] * row + d * C + c[None, :]
    to = (clip + token)[:, None] * (D * C) + d * C + c[None, :]
    q = tl.load(qkv + at, mask=mask, other=0.0)
    do = tl.load(grad_out + to, mask=mask, other=0.0)
    o = tl.load(out + to, mask=mask, other=0.0)
    of_window = (tl.program_id(2) * D + d).to(tl.int64) * N
    level = tl.load(lse + of_window + i, mask=here, other=0.0)
    product = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + of_window + i, product, mask=here)
    bias += d * N * ROW
    regions += window * N
    grad = tl.zeros((SIDE, CP), tl.float32)
    for first in range(0, N, SIDE):
        j = first + tl.arange(0, SIDE)
        token_j, there = _tokens(window, j, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
        at_j = (clip + token_j)[:, None] * row + (D + d) * C + c[None, :]
        k = tl.load(qkv + at_j, mask=there[:, None] & inside[None, :], other=0.0)
        v = tl.load(qkv + at_j + D * C, mask=there[:, None] & inside[None, :], other=0.0)
        s = _logits(q, k, bias, regions, here, there, i, j, scale, N, ROW, MASKED, PRECISION)
        p = tl.exp2(s - level[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - product[:, None])
        grad = tl.dot(ds.to(k.dtype), k, grad, input_precision=PRECISION)
    tl.store(grad_qkv + at, (grad * scale).to(grad_qkv.dtype.element_ty), mask=mask)


@triton.jit
def _backward_keys(
    qkv, bias, regions, grad_out, lse, delta, grad_qkv, scale, T, H, W, PT, PH, PW, SHT, SHH, SHW, windows, D,
    WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SIDE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and the values."""
    N: tl.constexpr = WT * WH * WW
    ROW: tl.constexpr = (N + 7) // 8 * 8
    d = tl.program_id(1)
    b = tl.program_id(2) // windows
    window = tl.program_id(2) % windows
    c = tl.arange(0, CP)
    inside = c < C
    clip = b.to(tl.int64) * T * H * W
    row = 3 * D * C
    j = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    token_j, there = _tokens(window, j, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
    mask = there[:, None] & inside[None, :]
    at_j = (clip + token_j)[:, None] * row + (D + d) * C + c[None, :]
    k = tl.load(qkv + at_j, mask=mask, other=0.0)
    v = tl.load(qkv + at_j + D * C, mask=mask, other=0.0)
    of_window = (tl.program_id(2) * D + d).to(tl.int64) * N
    bias += d * N * ROW
    regions += window * N
    grad_k = tl.zeros((SIDE, CP), tl.float32)
    grad_v = tl.zeros((SIDE, CP), tl.float32)
    for first in range(0, N, SIDE):
        i = first + tl.arange(0, SIDE)
        token, here = _tokens(window, i, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
        at = (clip + token)[:, None] * row + d * C + c[None, :]
        to = (clip + token)[:, None] * (D * C) + d * C + c[None, :]
        q = tl.load(qkv + at, mask=here[:, None] & inside[None, :], other=0.0)
        do = tl.load(grad_out + to, mask=here[:, None] & inside[None, :], other=0.0)
        level = tl.load(lse + of_window + i, mask=here, other=0.0)
        product = tl.load(delta + of_window + i, mask=here, other=0.0)
        s = _logits(q, k, bias, regions, here, there, i, j, scale, N, ROW, MASKED, PRECISION)
        p = tl.exp2(s - level[:, None])
        grad_v = tl.dot(tl.trans(p.to(do.dtype)), do, grad_v, input_precision=PRECISION)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - product[:, None])
        grad_k = tl.dot(tl.trans(ds.to(q.dtype)), q, grad_k, input_precision=PRECISION)
    tl.store(grad_qkv + at_j, (grad_k * scale).to(grad_qkv.dtype.element_ty), mask=mask)
    tl.store(grad_qkv + at_j + D * C, grad_v.to(grad_qkv.dtype.element_ty), mask=mask)


@triton.jit
def _backward_bias(
    qkv, bias, regions, grad_out, lse, delta, partial, scale, T, H, W, PT, PH, PW, SHT, SHH, SHW, windows, D, rows,
    WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SIDE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias of a block of queries and keys, summed over a program's windows: `(programs, D, N, N)`."""
    N: tl.constexpr = WT * WH * WW
    ROW: tl.constexpr = (N + 7) // 8 * 8
    blocks = tl.cdiv(N, SIDE)
    d = tl.program_id(1)
    i = tl.program_id(0) // blocks * SIDE + tl.arange(0, SIDE)
    j = tl.program_id(0) % blocks * SIDE + tl.arange(0, SIDE)
    c = tl.arange(0, CP)
    inside = c < C
    row = 3 * D * C
    bias += d * N * ROW
    grad = tl.zeros((SIDE, SIDE), tl.float32)
    for number in range(tl.program_id(2), rows, tl.num_programs(2)):
        window = number % windows
        clip = (number // windows).to(tl.int64) * T * H * W
        token, here = _tokens(window, i, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
        token_j, there = _tokens(window, j, T, H, W, PT, PH, PW, SHT, SHH, SHW, WT, WH, WW)
        at = (clip + token)[:, None] * row + d * C + c[None, :]
        at_j = (clip + token_j)[:, None] * row + (D + d) * C + c[None, :]
        to = (clip + token)[:, None] * (D * C) + d * C + c[None, :]
        q = tl.load(qkv + at, mask=here[:, None] & inside[None, :], other=0.0)
        do = tl.load(grad_out + to, mask=here[:, None] & inside[None, :], other=0.0)
        k = tl.load(qkv + at_j, mask=there[:, None] & inside[None, :], other=0.0)
        v = tl.load(qkv + at_j + D * C, mask=there[:, None] & inside[None, :], other=0.0)
        of_window = (number * D + d).to(tl.int64) * N
        level = tl.load(lse + of_window + i, mask=here, other=0.0)
        product = tl.load(delta + of_window + i, mask=here, other=0.0)
        s = _logits(q, k, bias, regions + window * N, here, there, i, j, scale, N, ROW, MASKED, PRECISION)
        p = tl.exp2(s - level[:, None])
        grad += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - product[:, None])
    to = partial + (tl.program_id(2) * D + d).to(tl.int64) * N * N + i[:, None] * N + j[None, :]
    tl.store(to, grad, mask=(i < N)[:, None] & (j < N)[None, :])


def _geometry(qkv: Tensor, padded: Sequence[int], window: Sequence[int], shift: Sequence[int], heads: int) -> tuple[Any, ...]:
    """What all kernels get: sizes, how many windows a clip has, heads; then constants."""
    windows = math.prod(n // m for n, m in zip(padded, window, strict=True))
    return (*qkv.shape[1:4], *padded, *shift, windows, heads)


def _constants(qkv: Tensor, window: Sequence[int], heads: int) -> tuple[Any, ...]:
    channels = qkv.shape[-1] // (3 * heads)
    return (*window, channels, max(16, triton.next_power_of_2(channels)), SIDE)


def _padded(bias: Tensor) -> Tensor:
    """Bias `(D, N, N)` with rows that are a multiple of 8 long."""
    return F.pad(bias, (0, -bias.shape[-1] % 8)) if bias.shape[-1] % 8 else bias


def _precision(qkv: Tensor) -> str:
    return "ieee" if qkv.dtype == torch.float32 else "tf32"


def _scale(qkv: Tensor, heads: int) -> float:
    return (qkv.shape[-1] // (3 * heads)) ** -0.5


@torch.library.custom_op("stts::window_attention", mutates_args=())
def _attend(
    qkv: Tensor, bias: Tensor, regions: Tensor | None, padded: list[int], window: list[int], shift: list[int], save: bool
) -> tuple[Tensor, Tensor]:
    heads, n = bias.shape[0], math.prod(window)
    out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
    geometry = _geometry(qkv, padded, window, shift, heads)
    rows = qkv.shape[0] * geometry[9]
    lse = torch.empty((rows, heads, n) if save else (0,), dtype=torch.float32, device=qkv.device)
    if rows:
        _forward[(triton.cdiv(n, SIDE), heads, rows)](
            qkv, _padded(bias), qkv if regions is None else regions, out, lse, _scale(qkv, heads), *geometry,
            *_constants(qkv, window, heads), regions is not None, save, _precision(qkv), **FORWARD,
        )  # fmt: skip
    return out, lse


@_attend.register_fake
def _(
    qkv: Tensor, bias: Tensor, regions: Tensor | None, padded: list[int], window: list[int], shift: list[int], save: bool
) -> tuple[Tensor, Tensor]:
    rows = qkv.shape[0] * _geometry(qkv, padded, window, shift, bias.shape[0])[9]
    lse = torch.empty((rows, bias.shape[0], math.prod(window)) if save else (0,), dtype=torch.float32, device=qkv.device)
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3), lse


@torch.library.custom_op("stts::window_attention_backward", mutates_args=())
def _attend_backward(
    qkv: Tensor,
    bias: Tensor,
    regions: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    padded: list[int],
    window: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor]:
    heads, n = bias.shape[0], math.prod(window)
    geometry, constants = _geometry(qkv, padded, window, shift, heads), _constants(qkv, window, heads)
    rows, blocks = qkv.shape[0] * geometry[9], triton.cdiv(n, SIDE)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    if not rows:
        return grad_qkv, torch.zeros_like(bias)
    scale, masked, precision = _scale(qkv, heads), regions is not None, _precision(qkv)
    keys = KEYS_ON_BLACKWELL if qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) >= (10, 0) else KEYS
    inputs = (qkv, _padded(bias), qkv if regions is None else regions)
    tail = (*constants, masked, precision)
    _backward_queries[(blocks, heads, rows)](*inputs, out, grad, lse, delta, grad_qkv, scale, *geometry, *tail, **QUERIES)
    _backward_keys[(blocks, heads, rows)](*inputs, grad, lse, delta, grad_qkv, scale, *geometry, *tail, **keys)
    # Enough programs for a large GPU; their sums are added up in the same order each time.
    programs = max(1, min(rows, 1024 // (blocks * blocks * heads)))
    partial = torch.empty(programs, *bias.shape, dtype=torch.float32, device=qkv.device)
    _backward_bias[(blocks * blocks, heads, programs)](*inputs, grad, lse, delta, partial, scale, *geometry, rows, *tail, **BIAS)
    return grad_qkv, partial.sum(0).to(bias.dtype)


@_attend_backward.register_fake
def _(
    qkv: Tensor,
    bias: Tensor,
    regions: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    padded: list[int],
    window: list[int],
    shift: list[int],
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(bias)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor, regions: Tensor | None, padded: list[int], window: list[int], shift: list[int]
    ) -> Tensor:
        out, lse = _attend(qkv, bias, regions, padded, window, shift, True)
        ctx.save_for_backward(qkv, bias, regions, out, lse)
        ctx.cut = padded, window, shift
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, regions, out, lse = ctx.saved_tensors
        grad_qkv, grad_bias = _attend_backward(qkv, bias, regions, out, lse, grads[0].contiguous(), *ctx.cut)
        return grad_qkv, grad_bias, None, None, None, None


def window_attention(qkv: Tensor, bias: Tensor, plan: WindowPlan) -> Tensor:
    """Attend within the windows of a grid.

    Args:
        qkv: `(B, T, H, W, 3 D C)`, contiguous, queries, keys and values of each token in its place.
        bias: `(D, N, N)`, contiguous, added to the logits of each window.
        plan: how the grid is cut; one whose padding is not seen, or that has none.

    Returns:
        `(B, T, H, W, D C)`, of qkv's type.
    """
    cut = list(plan.padded_size), list(plan.window), list(plan.shift)
    if torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad):
        return _Attention.apply(qkv, bias, plan.regions, *cut)  # type: ignore[return-value]
    return _attend(qkv, bias, plan.regions, *cut, False)[0]
