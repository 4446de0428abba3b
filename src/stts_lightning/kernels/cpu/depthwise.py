"""Depthwise 3x3x3 convolution on a CPU.

The library's gradient of the input takes ten times as long as it needs to, that of the weight five times.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Triple = tuple[int, int, int]


def depthwise(x: Tensor, weight: Tensor, stride: Triple) -> Tensor:
    """Convolve each channel by itself, padded by 1.

    Args:
        x: `(B, C, T, H, W)`, channels last in memory.
        weight: `(C, 1, 3, 3, 3)`.
        stride: along T, H and W.

    Returns:
        `(B, C, ceil(T / stride), ...)`, channels last in memory.
    """
    if torch.is_grad_enabled():
        return _Depthwise.apply(x, weight, stride)  # type: ignore[return-value]
    return F.conv3d(x, weight, None, stride, padding=1, groups=x.shape[1])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Triple) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return F.conv3d(x, weight, None, stride, padding=1, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad_output = grads[0].contiguous(memory_format=torch.channels_last_3d)
        to_x, to_weight, _ = ctx.needs_input_grad
        return (
            _input_grad(grad_output, x, weight, ctx.stride) if to_x else None,
            _weight_grad(grad_output, x, weight, ctx.stride) if to_weight else None,
            None,
        )


def _input_grad(grad_output: Tensor, x: Tensor, weight: Tensor, stride: Triple) -> Tensor:
    """A convolution with the flipped kernel, of the gradient with zeros between where the stride has left out tokens."""
    spread = grad_output
    if math.prod(stride) > 1:
        spread = torch.zeros_like(x)
        spread[(..., *(slice(None, None, s) for s in stride))] = grad_output
    return F.conv3d(spread, weight.flip(2, 3, 4), padding=1, groups=x.shape[1])


def _weight_grad(grad_output: Tensor, x: Tensor, weight: Tensor, stride: Triple) -> Tensor:
    """The sum of three gradients of a convolution in space, one for each tap in time: those the library has fast code for."""
    grad = torch.zeros_like(weight)
    along, *space = stride
    kernel, channels = weight[:, :, 0].contiguous(), x.shape[1]
    for clip, grads in zip(x.transpose(1, 2), grad_output.transpose(1, 2), strict=True):  # Frames come first.
        for tap in range(3):
            first = int(tap == 0)  # The first frame of the output sees padding there.
            last = min(len(grads), (len(clip) - tap) // along + 1)
            if last <= first:
                continue
            seen = clip[first * along + tap - 1 : (last - 1) * along + tap : along]
            _, part, _ = torch.ops.aten.convolution_backward(
                grads[first:last], seen, kernel, None, space, (1, 1), (1, 1), False, (0, 0), channels, (False, True, False)
            )
            grad[:, :, tap] += part
    return grad
