"""Depthwise 3x3x3 convolution, with the gradients that suit a CPU."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def depthwise(x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """Convolve each channel by itself, padded by 1.

    Args:
        x: `(B, C, T, H, W)`, channels last in memory if no copy is wanted.
        weight: `(C, 1, 3, 3, 3)`.
        stride: along T, H and W.

    Returns:
        `(B, C, ceil(T / stride), ...)`.
    """
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Depthwise.apply(x, weight, tuple(stride))  # type: ignore[return-value]
    return F.conv3d(x, weight, None, tuple(stride), padding=1, groups=x.shape[1])


class _Depthwise(torch.autograd.Function):
    """The library's gradients take several times what they need to: of the input ten times, of the weight five times."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv3d(x, weight, None, stride, padding=1, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last_3d)
        to_x, to_weight, _ = ctx.needs_input_grad
        return (
            _to_input(grad, x, weight, ctx.stride) if to_x else None,
            _to_weight(grad, x, weight, ctx.stride) if to_weight else None,
            None,
        )


def _to_input(grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Another such convolution, of the gradient with zeros between."""
    spread = grad
    if math.prod(stride) > 1:
        spread = torch.zeros_like(x, dtype=grad.dtype)
        spread[(..., *(slice(None, None, s) for s in stride))] = grad
    return F.conv3d(spread, weight.flip(2, 3, 4), padding=1, groups=x.shape[1])


def _to_weight(grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Three gradients of a convolution in space, one for each tap in time: the library is good at those."""
    out = torch.zeros_like(weight)
    along, *space = stride
    kernel, channels = weight[:, :, 0].contiguous(), x.shape[1]
    for clip, above in zip(x.transpose(1, 2), grad.to(x.dtype).transpose(1, 2), strict=True):  # Frames come first.
        for tap in range(3):
            first = int(tap == 0)  # Frames of the result that see one there, not padding.
            last = min(len(above), (len(clip) - tap) // along + 1)
            if last <= first:
                continue
            seen = clip[first * along + tap - 1 : (last - 1) * along + tap : along]
            _, found, _ = torch.ops.aten.convolution_backward(
                above[first:last], seen, kernel, None, space, (1, 1), (1, 1), False, (0, 0), channels, (False, True, False)
            )
            out[:, :, tap] += found
    return out
