"""Faster code for whole blocks of the backbones, by device. The plain models know nothing of it.

`Kernels.find` is the one decision: a block runs by its kernel, or as it is written. A kernel gives what the plain block gives;
it stands in a table only if it saves a tenth of a whole step somewhere and costs nothing elsewhere (docs/performance.md).
On a CPU that is in float32 and without torch.compile; on a CUDA GPU in every precision for MViT, in half precision for VideoSwin,
with torch.compile too, after a first comparison with the plain block (`comparison.agrees`).
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from stts_lightning.backbones import mvit, video_swin
from stts_lightning.backbones.registry import Backbone, BackboneError
from stts_lightning.kernels.comparison import agrees
from stts_lightning.kernels.cpu import mvit as cpu_mvit
from stts_lightning.kernels.cpu import video_swin as cpu_video_swin
from stts_lightning.kernels.cpu.attention import mkl_lags
from stts_lightning.kernels.cpu.linear import available, prepacked_weights

__all__ = ["CHOICES", "CPU", "Kernels", "cuda_kernels", "in_use", "kernels_for", "prepacked_weights", "unmodified"]

CHOICES = ("auto", "none")
"""`auto`: the kernels of the device, where there are any; `none`: every module as it is written."""

Kernel = Callable[..., Any]

CPU: dict[type[nn.Module], Kernel] = {mvit.Block: cpu_mvit.block, video_swin.Block: cpu_video_swin.block}

HALF = (torch.bfloat16, torch.float16)


def cuda_kernels() -> dict[type[nn.Module], Kernel]:
    """The table of CUDA GPUs; empty without Triton."""
    if find_spec("triton") is None:
        return {}
    from stts_lightning.kernels.cuda import mvit as cuda_mvit
    from stts_lightning.kernels.cuda import video_swin as cuda_video_swin

    return {mvit.Block: cuda_mvit.block, video_swin.Block: cuda_video_swin.block}


_PLAIN = {
    *(mvit.Block, mvit.PooledAttention, mvit.Pool, video_swin.Block, video_swin.WindowAttention, video_swin.WindowPlan),
    *(nn.Linear, nn.LayerNorm, nn.Conv3d, nn.GELU, nn.Dropout, nn.Identity, Mlp, DropPath),
}


class Kernels:
    """The kernels of one backbone.

    Args:
        backbone: whose modules are run.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._last = backbone.blocks[-1] if type(backbone) is mvit.MViT else None
        self._cuda = cuda_kernels()

    def find(self, module: nn.Module, x: Tensor) -> Kernel:
        """What to call in place of a module for an input like x: its kernel, or the module itself."""
        if x.is_cuda:
            return self._find_on_cuda(module, x)
        if torch.compiler.is_compiling():
            return module
        kernel = CPU.get(type(module))
        if kernel is None or not _runs_on_cpu(x) or not unmodified(module):
            return module
        # Of what the last block of MViT gives, only the class token is used.
        return partial(kernel, module, class_only=True) if module is self._last else partial(kernel, module)

    def of_gpu(self, module: nn.Module, dtype: torch.dtype) -> Kernel:
        """What a GPU runs a module by in a precision, if it agrees with it there: its kernel, or the module itself."""
        kernel = self._cuda.get(type(module))
        return partial(kernel, module) if kernel is not None and _fits(module, dtype) and unmodified(module) else module

    def _find_on_cuda(self, module: nn.Module, x: Tensor) -> Kernel:
        kernel = self._cuda.get(type(module))
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if kernel is None or torch.compiler.is_exporting() or not _fits(module, dtype):
            return module
        if not torch.compiler.is_compiling():
            if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateImportUsage]
                return module
            if isinstance(x, FakeTensor):  # There is nothing to compare.
                return self.of_gpu(module, dtype)
        return partial(kernel, module) if _proved(kernel, module, x.device, dtype) else module


def _fits(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a block's kernel takes its size and a precision."""
    if not isinstance(module, video_swin.Block):
        return dtype in (*HALF, torch.float32)
    plan = module.attn.plan
    return dtype in HALF and not (plan.sees_padding and plan.padded_size != plan.size)


@torch.compiler.assume_constant_result  # pyright: ignore[reportUnknownMemberType, reportUntypedFunctionDecorator]
def _proved(kernel: Kernel, module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a block is as its file says and its kernel has agreed with it here. torch.compile asks once for each graph."""
    return unmodified(module) and agrees(kernel, module, device, dtype)


def _runs_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch._C._are_functorch_transforms_active()  # torch.func.grad, vmap: they take plain operators.
    )


def unmodified(module: nn.Module) -> bool:
    """Whether a module and all in it are as their files say: no adapter in a layer's place, no hook, no other `forward`."""
    return not _has_any_global_hook() and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    # Asked for each block of each step: without the walk of `modules()`, and without attributes that a module lacks.
    kind = type(module)
    return (
        kind in _PLAIN
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and not (kind is nn.Dropout and module.p)
        and not (kind is nn.GELU and module.approximate != "none")
        and all(child is None or _is_plain(child) for child in module._modules.values())
    )


def kernels_for(backbone: Backbone, choice: str) -> Kernels | None:
    """The kernels of a backbone, or None for none.

    Raises:
        BackboneError: for another choice than `CHOICES`.
    """
    if choice not in CHOICES:
        raise BackboneError(f"kernels={choice}: allowed are {', '.join(CHOICES)}")
    return Kernels(backbone) if choice == "auto" else None


def in_use(backbone: Backbone, device: torch.device | str, precision: str = "32-true", compiled: bool = False) -> str:
    """Which kernels a backbone runs with, in words, for results: "cpu, AVX2, attention of torch", "cuda, Triton", or "none".

    Args:
        backbone: the backbone.
        device: where it runs.
        precision: as Lightning calls it, or the benchmark.
        compiled: whether torch.compile runs it.
    """
    kind = torch.device(device).type
    if backbone.kernels is None:
        return "none"
    if kind == "cuda":
        half = not precision.startswith(("32", "tf32"))
        return "cuda, Triton" if cuda_kernels() and (half or type(backbone) is mvit.MViT) else "none"
    if kind != "cpu" or compiled or not available() or not precision.startswith("32"):
        return "none"
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}, attention of {'oneDNN' if mkl_lags() else 'torch'}"
