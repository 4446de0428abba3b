"""Pooling of attention heads in Triton: convolution, class token and norm in one pass over strided tokens.

cuDNN has no fast depthwise 3-D convolution: channels come last here, so that a thread's loads are whole vectors, nothing is
transposed, and the heads' common weights are read once a block of rows.

Letters: B clips, D heads, N tokens of the grid, N' those that come out, C channels of a head. A row is one token of one head of
one clip; rows are counted in the order `(B, 1 + N, D)`.
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

ROWS, WARPS = 16, 2
"""Rows of a program and its warps, among the fastest of those tried on a Hopper GPU."""

PROGRAMS = 528
"""Most programs of a sum over all rows: a few for each multiprocessor."""


@triton.jit
def _forward(
    x, weight, gamma, beta, out, conv, stride_b, stride_n, stride_d, eps, rows,
    T, H, W, TO, HO, WO, D,
    C: tl.constexpr, BLOCK: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    SAVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n_out = 1 + TO * HO * WO
    d = row % D
    token = (row // D) % n_out - 1  # -1 is the class token.
    b = row // (D * n_out)
    c = tl.arange(0, BLOCK)
    inside = c < C
    here = row < rows
    base = x + b.to(tl.int64) * stride_b + d * stride_d
    wo = token % WO
    ho = (token // WO) % HO
    to = token // (WO * HO)
    of_grid = here & (token >= 0)
    is_class = here & (token < 0)
    total = tl.load(base[:, None] + c[None, :], mask=is_class[:, None] & inside[None, :], other=0.0).to(tl.float32)
    for kt in range(3):  # Unrolled, all loads would go first, and their values out of the registers.
        t = to * ST + kt - 1
        for kh in range(3):
            h = ho * SH + kh - 1
            in_rows = of_grid & (t >= 0) & (t < T) & (h >= 0) & (h < H)
            for kw in tl.static_range(3):
                w = wo * SW + kw - 1
                mask = in_rows & (w >= 0) & (w < W)
                n = 1 + (t * H + h) * W + w
                value = tl.load(
                    base[:, None] + (n * stride_n)[:, None] + c[None, :], mask=mask[:, None] & inside[None, :], other=0.0
                )
                factor = tl.load(weight + (kt * 9 + kh * 3 + kw) * C + c, mask=inside, other=0.0)
                total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    mask = here[:, None] & inside[None, :]
    if SAVE:
        tl.store(conv + at, total.to(conv.dtype.element_ty), mask=mask)
    mean = tl.sum(total, 1) / C
    centred = tl.where(inside[None, :], total - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    g = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(beta + c, mask=inside, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * g[None, :] + shift[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_norm(
    conv, grad_out, gamma, grad_conv, partial, stride_b, stride_n, stride_d, eps, rows, n_out, D,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of the norm's input, and of gamma and beta summed over a program's rows: `(programs, 2, C)`."""
    c = tl.arange(0, BLOCK)
    inside = c < C
    g = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
    for_gamma = tl.zeros((ROWS, BLOCK), tl.float32)
    for_beta = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        value = tl.load(conv + at, mask=mask, other=0.0).to(tl.float32)
        place = (row // (D * n_out)).to(tl.int64) * stride_b + ((row // D) % n_out) * stride_n + (row % D) * stride_d
        grad = tl.load(grad_out + place[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(value, 1) / C
        centred = tl.where(inside[None, :], value - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        normed = centred * scale[:, None]
        for_gamma += grad * normed
        for_beta += grad
        grad *= g[None, :]
        grad = grad - (tl.sum(grad, 1) / C)[:, None] - normed * (tl.sum(grad * normed, 1) / C)[:, None]
        tl.store(grad_conv + at, (grad * scale[:, None]).to(grad_conv.dtype.element_ty), mask=mask)
    to = partial + tl.program_id(0) * 2 * C + c
    tl.store(to, tl.sum(for_gamma, 0), mask=inside)
    tl.store(to + C, tl.sum(for_beta, 0), mask=inside)


@triton.jit
def _backward_input(
    grad_conv, weight, grad_x, rows, T, H, W, TO, HO, WO, D,
    C: tl.constexpr, BLOCK: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n_in = 1 + T * H * W
    n_out = 1 + TO * HO * WO
    d = row % D
    token = (row // D) % n_in - 1
    b = row // (D * n_in)
    c = tl.arange(0, BLOCK)
    inside = c < C
    here = row < rows
    w = token % W
    h = (token // W) % H
    t = token // (W * H)
    of_grid = here & (token >= 0)
    base = b * n_out * D + d  # Row of the clip's class token.
    at = base.to(tl.int64)[:, None] * C + c[None, :]
    total = tl.load(grad_conv + at, mask=(here & (token < 0))[:, None] & inside[None, :], other=0.0).to(tl.float32)
    for kt in range(3):  # Unrolled, all loads would go first, and their values out of the registers.
        to = (t + 1 - kt) // ST
        in_time = of_grid & (t + 1 - kt >= 0) & ((t + 1 - kt) % ST == 0) & (to < TO)
        for kh in range(3):
            ho = (h + 1 - kh) // SH
            in_rows = in_time & (h + 1 - kh >= 0) & ((h + 1 - kh) % SH == 0) & (ho < HO)
            for kw in tl.static_range(3):
                wo = (w + 1 - kw) // SW
                mask = in_rows & (w + 1 - kw >= 0) & ((w + 1 - kw) % SW == 0) & (wo < WO)
                source = base + (1 + (to * HO + ho) * WO + wo) * D
                at = source.to(tl.int64)[:, None] * C + c[None, :]
                grad = tl.load(grad_conv + at, mask=mask[:, None] & inside[None, :], other=0.0)
                factor = tl.load(weight + (kt * 9 + kh * 3 + kw) * C + c, mask=inside, other=0.0)
                total += grad.to(tl.float32) * factor.to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit
def _backward_weight(
    x, grad_conv, partial, stride_b, stride_n, stride_d, rows, T, H, W, TO, HO, WO, D,
    C: tl.constexpr, BLOCK: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of three of the kernel's 27 places, summed over a program's rows: `(programs, 27, C)`."""
    n_out = 1 + TO * HO * WO
    c = tl.arange(0, BLOCK)
    inside = c < C
    kt = tl.program_id(0) // 3
    kh = tl.program_id(0) % 3
    left = tl.zeros((ROWS, BLOCK), tl.float32)
    middle = tl.zeros((ROWS, BLOCK), tl.float32)
    right = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        token = (row // D) % n_out - 1
        t = token // (WO * HO) * ST + kt - 1
        h = (token // WO) % HO * SH + kh - 1
        w = token % WO * SW
        mask = (row < rows) & (token >= 0) & (t >= 0) & (t < T) & (h >= 0) & (h < H)
        grad = tl.load(
            grad_conv + row.to(tl.int64)[:, None] * C + c[None, :], mask=mask[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        place = (row // (D * n_out)).to(tl.int64) * stride_b + (1 + (t * H + h) * W + w) * stride_n + (row % D) * stride_d
        at = x + place[:, None] + c[None, :]
        value = tl.load(at - stride_n, mask=(mask & (w >= 1))[:, None] & inside[None, :], other=0.0)
        left += grad * value.to(tl.float32)
        value = tl.load(at, mask=mask[:, None] & inside[None, :], other=0.0)
        middle += grad * value.to(tl.float32)
        value = tl.load(at + stride_n, mask=(mask & (w + 1 < W))[:, None] & inside[None, :], other=0.0)
        right += grad * value.to(tl.float32)
    to = partial + (tl.program_id(1) * 27 + tl.program_id(0) * 3) * C + c
    tl.store(to, tl.sum(left, 0), mask=inside)
    tl.store(to + C, tl.sum(middle, 0), mask=inside)
    tl.store(to + 2 * C, tl.sum(right, 0), mask=inside)


def _pooled(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    return [-(-n // s) for n, s in zip(size, stride, strict=True)]


def _by_place(weight: Tensor) -> Tensor:
    """Weights `(C, 1, 3, 3, 3)` -> `(27, C)`."""
    return weight.flatten(1).t().contiguous()


def _shape(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int, int]:
    batch, _, heads, channels = x.shape
    return batch, 1 + math.prod(_pooled(size, stride)), heads, channels


@torch.library.custom_op("stts::pool", mutates_args=())
def _pool(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, size: list[int], stride: list[int], eps: float, save: bool
) -> tuple[Tensor, Tensor]:
    shape = _shape(x, size, stride)
    out = x.new_empty(shape)
    conv = x.new_empty(shape if save else (0,))
    rows, heads, channels = math.prod(shape[:3]), shape[2], shape[3]
    if rows:
        _forward[(triton.cdiv(rows, ROWS),)](
            x, _by_place(weight), gamma, beta, out, conv, *x.stride()[:3], eps, rows, *size, *_pooled(size, stride), heads,
            channels, triton.next_power_of_2(channels), *stride, save, ROWS, num_warps=WARPS,
        )  # fmt: skip
    return out, conv


@_pool.register_fake
def _(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, size: list[int], stride: list[int], eps: float, save: bool
) -> tuple[Tensor, Tensor]:
    shape = _shape(x, size, stride)
    return x.new_empty(shape), x.new_empty(shape if save else (0,))


@torch.library.custom_op("stts::pool_backward", mutates_args=())
def _pool_backward(
    x: Tensor, conv: Tensor, grad: Tensor, weight: Tensor, gamma: Tensor, size: list[int], stride: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n_out, heads, channels = conv.shape
    block, rows, sizes = triton.next_power_of_2(channels), batch * n_out * heads, (*size, *_pooled(size, stride), heads)
    if not rows:
        return x.new_empty(x.shape), weight.new_zeros(weight.shape), gamma.new_zeros(2, channels)
    programs = min(triton.cdiv(rows, ROWS), PROGRAMS)
    grad_conv = torch.empty_like(conv)
    norm_sums = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    _backward_norm[(programs,)](
        conv,
        grad,
        gamma,
        grad_conv,
        norm_sums,
        *grad.stride()[:3],
        eps,
        rows,
        n_out,
        heads,
        channels,
        block,
        ROWS,
        num_warps=WARPS,
    )
    grad_x = x.new_empty(x.shape)
    tokens = math.prod(x.shape[:3])
    _backward_input[(triton.cdiv(tokens, ROWS),)](
        grad_conv, _by_place(weight), grad_x, tokens, *sizes, channels, block, *stride, ROWS, num_warps=WARPS
    )
    programs = min(triton.cdiv(rows, ROWS), PROGRAMS // 4)
    weight_sums = torch.empty(programs, 27, channels, dtype=torch.float32, device=x.device)
    _backward_weight[(9, programs)](
        x, grad_conv, weight_sums, *x.stride()[:3], rows, *sizes, channels, block, *stride, ROWS, num_warps=WARPS
    )
    grad_weight = weight_sums.sum(0).t().to(weight.dtype).reshape(weight.shape)
    return grad_x, grad_weight, norm_sums.sum(0).to(gamma.dtype)


@_pool_backward.register_fake
def _(
    x: Tensor, conv: Tensor, grad: Tensor, weight: Tensor, gamma: Tensor, size: list[int], stride: list[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), gamma.new_empty(2, gamma.shape[0])


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, size: list[int], stride: list[int], eps: float
    ) -> Tensor:
        out, conv = _pool(x, weight, gamma, beta, size, stride, eps, True)
        ctx.save_for_backward(x, conv, weight, gamma)
        ctx.size, ctx.stride, ctx.eps = size, stride, eps
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, conv, weight, gamma = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        grad_x, grad_weight, grad_norm = _pool_backward(x, conv, grad, weight, gamma, ctx.size, ctx.stride, ctx.eps)
        return grad_x, grad_weight, grad_norm[0], grad_norm[1], None, None, None


def pool(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, size: Sequence[int], stride: Sequence[int], eps: float
) -> Tensor:
    """Pool the grid's tokens by a strided depthwise 3x3x3 convolution, let the class token pass by, and norm both.

    Args:
        x: `(B, 1 + N, D, C)`, the class token first, of any strides with channels together.
        weight: `(C, 1, 3, 3, 3)`, common to all heads.
        gamma: `(C,)`, the norm's weight.
        beta: `(C,)`, its bias.
        size: frames, height and width of the grid.
        stride: along each.
        eps: of the norm.

    Returns:
        `(B, 1 + N', D, C)`, contiguous, of x's type.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, gamma, beta))
    if wanted:
        return _Pool.apply(x, weight, gamma, beta, list(size), list(stride), eps)  # type: ignore[return-value]
    return _pool(x, weight, gamma, beta, list(size), list(stride), eps, False)[0]
