"""The first use of a kernel on a device: it is compared with the plain block once for each size of block."""

import copy
import logging
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stts_lightning.backbones import mvit, video_swin

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""What a kernel may be off by beyond twice what the plain block is off by in the same precision.

Differences are relative (2-norm), of a block's output and of its gradients, from the plain block in float32. In half precision
the plain block itself is off by up to 7 %, as max-pooling sends gradients elsewhere where rounded tokens are equal."""

_KNOWN: dict[Any, bool] = {}
"""By kernel, device, precision and size of block."""
_OF_BLOCK: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()
"""The same for each block by kernel, device and precision: quicker to find at each step."""


def agrees(kernel: Callable[..., Any], module: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives what a block gives, for a random clip, with its gradients; found out once, then remembered.

    Args:
        kernel: called with the block and its input.
        module: the block.
        device: where.
        dtype: that the kernel is to compute in.
    """
    of_block = _OF_BLOCK.setdefault(module, {})
    short = kernel, device, dtype
    if short in of_block:
        return of_block[short]
    key = (*short, _geometry(module))
    if key not in _KNOWN:
        # The caller may be in inference, under autocast, or being compiled.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            try:
                found, plain = differences(kernel, module, device, dtype)
                fits = found <= 2 * plain + TOLERANCE[dtype]
                reason = "" if fits else f"its results are off by {found:.1%}, those of the plain block by {plain:.1%}"
            except Exception as error:  # Triton's and the driver's are of many kinds; the plain block works with all of them.
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        _KNOWN[key] = not reason
        if reason:
            log.warning(
                "the kernel for %s is not used, the block runs as it is written: %s", " ".join(map(str, key[3][:-1])), reason
            )
    of_block[short] = _KNOWN[key]
    return of_block[short]


def _geometry(module: Any) -> tuple[Any, ...]:
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    if isinstance(module, mvit.Block):
        attn = module.attn
        return type(module).__name__, attn.size, attn.heads, attn.q_stride, attn.kv_stride, shapes
    assert isinstance(module, video_swin.Block)
    plan = module.attn.plan
    return type(module).__name__, plan.size, plan.window, plan.shift, module.attn.heads, shapes


def differences(kernel: Callable[..., Any], module: Any, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """How far a kernel, and the plain block in the same precision, are from the plain block in float32.

    Returns:
        For each the largest relative difference of the output, of the input's gradient, and of those of all weights together;
        infinite where something is not a number.
    """
    generator = torch.Generator(device).manual_seed(0)
    size = module.attn.size if isinstance(module, mvit.Block) else module.attn.plan.size
    width = module.norm1.weight.numel()
    shape = (1, 1 + math.prod(size), width) if isinstance(module, mvit.Block) else (1, *size, width)
    x = torch.randn(shape, device=device, generator=generator)

    def run(dtype: torch.dtype, kernel: Callable[..., Any] | None) -> list[Tensor]:
        block: nn.Module = copy.deepcopy(module).to(device, dtype).eval()  # In evaluation nothing is dropped.
        block.requires_grad_().zero_grad()
        leaf = x.to(dtype, copy=True).requires_grad_()
        out = block(leaf) if kernel is None else kernel(block, leaf)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.randn(out.shape, device=device, generator=torch.Generator(device).manual_seed(1))
        out.backward(weights.to(dtype))
        assert leaf.grad is not None
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in block.parameters()]
        return [out.detach().float(), leaf.grad.float(), torch.cat([grad.flatten().float() for grad in grads])]

    right = run(torch.float32, None)

    def off(found: list[Tensor]) -> float:
        each = [float((one - other).norm() / other.norm().clamp_min(1e-12)) for one, other in zip(found, right, strict=True)]
        return max(each) if all(map(math.isfinite, each)) else math.inf

    return off(run(dtype, kernel)), off(run(dtype, None))
