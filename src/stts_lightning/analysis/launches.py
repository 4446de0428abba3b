"""What a GPU would be asked to do for a step, counted without one: launches, bytes, waits, and what bounds the step.

A forward pass runs on fake CUDA tensors, which know shapes, types and devices alone. So a tensor that is left on the host, a copy
between devices and a question to the device are seen. A training step runs on the meta device, as the gradients of fake CUDA
tensors would ask the driver: launches and bytes are the same there.

A convolution counts as one launch. cuDNN adds some that transpose its inputs: a profiler counts about a tenth more.
"""

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stts_lightning.analysis.benchmarks import Row
from stts_lightning.analysis.entrants import Entrant
from stts_lightning.classifier import VideoClassifier

OWN = {"pool": 2, "pool_backward": 8, "window_attention": 1, "window_attention_backward": 4}
"""Launches of one call of a kernel of ours, with the small ones that prepare its weights and add up its sums."""

ATTENTION_BACKWARD = 3
"""Launches of the backward pass of fused attention."""

LAUNCH, BANDWIDTH, RATE = 5e-6, 3.0e12, 500e12
"""Seconds of the host for a launch, bytes a second of the device's memory, its operations a second in bfloat16. Guesses, for a
host that keeps up and a large GPU, which tell orders of size and no more."""

_FREE = ("empty", "new_empty", "detach", "_unsafe_view", "lift_fresh", "_reshape_alias", "resize_")
_ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")


@dataclass
class Asked:
    """What the device was asked to do.

    Attributes:
        launches: kernels.
        bytes: read and written by them, each tensor once a kernel.
        waits: copies between devices and questions to the device, by operator.
        by_operator: launches of each operator.
    """

    launches: int = 0
    bytes: int = 0
    waits: list[str] = field(default_factory=list)
    by_operator: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, launches: int, tensors: Sequence[Tensor]) -> None:
        """A call of an operator."""
        self.launches += launches
        self.by_operator[name] += launches
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def seconds(self, gflops: float) -> tuple[float, float]:
        """How long the host launches, and the device works, for so many GFLOPs (a multiply-add is one): by arithmetic."""
        return self.launches * LAUNCH, max(self.bytes / BANDWIDTH, 2e9 * gflops / RATE)


class _Counting(TorchDispatchMode):
    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        seen = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        out = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        kinds = {one.device.type for one in seen + made}
        # A number that lies on the host goes along with a launch; any other tensor of the host is copied.
        numbers = all(one.dim() == 0 for one in seen if one.device.type == "cpu")
        if name in _ASKS or ("cuda" in kinds and "cpu" in kinds and not (numbers and name not in ("_to_copy", "copy_"))):
            self.asked.waits.append(name)
        if namespace != "prim" and kinds & {"cuda", "meta"} and not func.is_view and not name.startswith(_FREE):
            self.asked.add(name, OWN.get(name, 1) if namespace == "stts" else 1, seen + made)
        return out


class _FusedAttention(torch.autograd.Function):
    """Fused attention by its shapes: which kernel computes it is the driver's to say."""

    asked: Asked

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        _FusedAttention.asked.add("attention", 1, [one for one in (q, k, v, bias, out) if one is not None])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        made = [None if one is None else torch.empty_like(one) for one in inputs]
        _FusedAttention.asked.add(
            "attention backward", ATTENTION_BACKWARD, [o for o in (*inputs, *made, *grads) if o is not None]
        )
        return tuple(made)


class _Attention(TorchFunctionMode):
    """Sends attention to `_FusedAttention`, in the type of autocast."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, *bias = (one if one is None or self.dtype is None else one.to(self.dtype) for one in args)
        return _FusedAttention.apply(q, k, v, bias[0] if bias else None)


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """CUDA's autocast; torch.autocast would switch itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def _moved(module: nn.Module, device: str) -> nn.Module:
    """Put tensors of a device, without values, in the place of a module's own."""
    for part in module.modules():
        for name, one in part._parameters.items():
            if one is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(one, device=device), one.requires_grad)
        for name, one in part._buffers.items():
            if one is not None:
                part._buffers[name] = torch.empty_like(one, device=device)
    return module


def count_forward(
    build: Callable[[], nn.Module], batch: int, size: Sequence[int], precision: str, training: bool = False
) -> Asked:
    """What a forward pass asks of a GPU, and whether anything waits or lies on the host.

    Args:
        build: makes the model, which is changed.
        batch: clips.
        size: frames, height and width of one.
        precision: "bf16" (autocast), "bf16-true" (weights in bfloat16) or "32".
        training: a training step's forward pass, with noise from seeds.
    """
    model, asked = build().train(training), Asked()
    if precision == "bf16-true":
        model = model.cast_weights(torch.bfloat16) if isinstance(model, VideoClassifier) else model.bfloat16()
    dtype = torch.bfloat16 if precision == "bf16" else None
    _FusedAttention.asked = asked
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(training), _Attention(dtype), _Counting(asked):
        _moved(model, "cuda")
        clip = _clip(model, batch, size, precision, "cuda")
        if training and isinstance(model, VideoClassifier):
            model.slots._seeds = torch.empty(batch, dtype=torch.int64, device="cuda")
        _reset(asked)
        with _autocast(dtype):
            out = model(clip)
    if out.device.type != "cuda":
        asked.waits.append("the result lies on the host")
    return asked


def count_training(build: Callable[[], nn.Module], batch: int, size: Sequence[int]) -> Asked:
    """What forward pass, cross-entropy, backward pass and a fused AdamW ask of a GPU, under autocast to bfloat16."""
    model, asked = build().train(), Asked()
    _FusedAttention.asked = asked
    if isinstance(model, VideoClassifier) and model.backbone.kernels is not None:
        model.backbone.kernels = _AsOnCuda(model.backbone.kernels)  # type: ignore[assignment]
    with _Attention(torch.bfloat16), _Counting(asked), _Casts():
        _moved(model, "meta")
        clip = _clip(model, batch, size, "bf16", "meta")
        label = torch.empty(batch, dtype=torch.int64, device="meta")
        if isinstance(model, VideoClassifier):
            model.slots._seeds = torch.empty(batch, dtype=torch.int64, device="meta")
        _reset(asked)
        F.cross_entropy(model(clip).float(), label).backward()
        asked.add("AdamW", 1 + sum(1 for _ in model.parameters()) // 30, [])
    return asked


class _AsOnCuda:
    """The kernels of a GPU, on the meta device."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def find(self, module: nn.Module, x: Tensor) -> Callable[..., Any]:
        """See `Kernels.find`."""
        return self.kernels.of_gpu(module, torch.bfloat16)


class _Casts(TorchFunctionMode):
    """Autocast's casts to bfloat16 and float32 on the meta device, for which torch has no autocast."""

    LOWER = (F.linear, F.conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__)
    RAISE = (F.layer_norm, F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = torch.bfloat16 if func in self.LOWER else torch.float32 if func in self.RAISE else None
        if dtype is not None:
            args = [self._cast(one, dtype) for one in args]
            kwargs = {key: self._cast(one, dtype) for key, one in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _cast(self, one: Any, dtype: torch.dtype) -> Any:
        if not isinstance(one, Tensor) or not one.is_floating_point() or one.dtype == dtype:
            return one
        if not isinstance(one, nn.Parameter):
            return one.to(dtype)
        if id(one) not in self.weights:  # Each weight once a step, as autocast does.
            self.weights[id(one)] = one.to(dtype)
        return self.weights[id(one)]


def _clip(model: nn.Module, batch: int, size: Sequence[int], precision: str, device: str) -> Tensor:
    if isinstance(model, VideoClassifier):
        return torch.empty(batch, 3, *size, dtype=torch.uint8, device=device)
    return torch.empty(batch, 3, *size, dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32, device=device)


def _reset(asked: Asked) -> None:
    asked.launches, asked.bytes = 0, 0
    asked.waits.clear()
    asked.by_operator.clear()


def counted(entrants: Sequence[Entrant], batches: Sequence[int], precisions: Sequence[str]) -> Iterator[Row]:
    """What a GPU would be asked to do, counted without one: by forward passes, and by training steps in bf16."""
    for batch, number, one in itertools.product(batches, precisions, entrants):
        forward = count_forward(functools.partial(copy.deepcopy, one.model), batch, one.clip, number)
        host, device = forward.seconds(batch * one.gflops)
        step = count_training(functools.partial(copy.deepcopy, one.model), batch, one.clip) if number == "bf16" else None
        yield {
            "model": one.name,
            "batch": batch,
            "precision": number,
            "launches": forward.launches,
            "gigabytes": forward.bytes / 1e9,
            "waits": len(forward.waits),
            "host_ms": 1e3 * host,
            "arithmetic_ms": 1e3 * device,
            "bound_by": "host" if host > device else "device",
            "training_launches": step.launches if step else None,
            "training_gigabytes": step.bytes / 1e9 if step else None,
        }
