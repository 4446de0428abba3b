"""The first use of a kernel on a device: it is compared with the plain block once for each size of block."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stts_lightning.backbones import mvit, video_swin

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest relative difference (2-norm) of a block's output, and of its gradients, from those of the plain block in float32.

Rounding alone gives 1e-5, 1e-2 and 2e-3; a wrong token or weight gives 0.1 and more."""

_KNOWN: dict[Any, bool] = {}


def agrees(kernel: Callable[..., Any], module: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel gives what a block gives, for a random clip, with its gradients; found out once, then remembered.

    Args:
        kernel: called with the block and its input.
        module: the block.
        device: where.
        dtype: that the kernel is to compute in.
    """
    key = (kernel, device, dtype, _geometry(module))
    if key not in _KNOWN:
        # The caller may be in inference, under autocast, or being compiled.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            try:
                worst = _difference(kernel, module, device, dtype)
                reason = "" if worst <= TOLERANCE[dtype] else f"its results differ by {worst:.1%} from those of the plain block"
            except Exception as error:  # Triton's and the driver's are of many kinds; the plain block works with all of them.
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        _KNOWN[key] = not reason
        if reason:
            log.warning(
                "the kernel for %s is not used, the block runs as it is written: %s", " ".join(map(str, key[3][:-1])), reason
            )
    return _KNOWN[key]


def _geometry(module: Any) -> tuple[Any, ...]:
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters())
    if isinstance(module, mvit.Block):
        attn = module.attn
        return type(module).__name__, attn.size, attn.heads, attn.q_stride, attn.kv_stride, shapes
    assert isinstance(module, video_swin.Block)
    plan = module.attn.plan
    return type(module).__name__, plan.size, plan.window, plan.shift, module.attn.heads, shapes


def _difference(kernel: Callable[..., Any], module: Any, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative difference of the output, of the input's gradient and of those of the weights together."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = module.attn.size if isinstance(module, mvit.Block) else module.attn.plan.size
    width = module.norm1.weight.numel()
    frames, height, w = tokens
    shape = (1, 1 + frames * height * w, width) if isinstance(module, mvit.Block) else (1, *tokens, width)
    x = torch.randn(shape, device=device, generator=generator)
    results: list[list[Tensor]] = []
    for precision, run in ((torch.float32, None), (dtype, kernel)):
        block: nn.Module = copy.deepcopy(module).to(device, precision).eval()  # In evaluation nothing is dropped.
        block.requires_grad_().zero_grad()
        leaf = x.to(precision, copy=True).requires_grad_()
        out = block(leaf) if run is None else run(block, leaf)
        out = out[0] if isinstance(out, tuple) else out
        weights = torch.randn(out.shape, device=device, generator=torch.Generator(device).manual_seed(1))
        out.backward(weights.to(precision))
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in block.parameters()]
        assert leaf.grad is not None
        flat = torch.cat([grad.flatten().float() for grad in grads])
        results.append([out.detach().float(), leaf.grad.float(), flat])
    # NaN is larger than any bound here.
    worst = [float((found - right).norm() / right.norm().clamp_min(1e-12)) for right, found in zip(*results, strict=True)]
    return max(worst) if all(value == value for value in worst) else float("inf")
