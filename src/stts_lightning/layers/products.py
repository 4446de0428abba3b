"""Products on a CPU: when they are oneDNN's, in which type, and how their weights lie."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = TypeVar("Made")

PIECE = 2048
"""Tokens at a time: few enough that four times their channels stay in a cache, enough to keep the product's pace."""

WORTH_LAYING_OUT = 3
"""Products with one weight from which on it pays to lay it out for them."""

_FUSED = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_BF16 = _FUSED and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # Not on processors of AVX2 alone.
_EVALUATED = (torch.float32, torch.bfloat16) if _BF16 else (torch.float32,)


def _by_pieces(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether x lies on a CPU, one operator after the other runs on it, and oneDNN knows the type it is worked out in."""
    return (
        _FUSED
        and x.device.type == "cpu"
        and x.dtype in dtypes
        and working_dtype(x) in dtypes
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


def lean(x: Tensor) -> bool:
    """Whether x is evaluated in pieces: nothing is kept for a backward pass."""
    return not torch.is_grad_enabled() and _by_pieces(x, *_EVALUATED)


def learns_by_pieces(x: Tensor) -> bool:
    """Whether x is trained on in pieces: with backward passes of our own."""
    return torch.is_grad_enabled() and _by_pieces(x, torch.float32)


def working_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is worked out in: autocast's choice, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


_laid_out: ContextVar[dict[tuple[object, ...], tuple[Tensor, Any]] | None] = ContextVar("laid_out", default=None)


@contextlib.contextmanager
def constant_weights() -> Iterator[None]:
    """While this lasts weights do not change: in evaluation on a CPU each is laid out once, as its products like it best.

    A product of some hundred tokens takes a fifth less time for it. The weights are held twice until the end. An optimiser's
    step or new weights loaded are noticed; what is written by way of `.data` is not. Training goes on as without it.
    """
    token = _laid_out.set({}) if _laid_out.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _laid_out.reset(token)


def _kept(weight: Tensor) -> dict[tuple[object, ...], tuple[Tensor, Any]] | None:
    """What has been made of constant weights; None where this one may change unnoticed."""
    return _laid_out.get() if isinstance(weight, nn.Parameter) and not weight.is_inference() else None


def once(weight: Tensor, *which: object, make: Callable[[], Made]) -> Made:
    """What is made of a weight: anew each time, or once while weights are constant.

    Args:
        weight: it depends on nothing else,
        which: but on this.
        make: makes it.
    """
    kept = _kept(weight)
    if kept is None:
        return make()
    key = weight.data_ptr(), weight._version, *which
    if key not in kept:
        kept[key] = weight, make()  # The weight too: nothing else shall come to lie where it lies.
    return kept[key][1]


def ready(weight: Tensor, dtype: torch.dtype, uses: int = 1, part: slice | None = None, keep: bool = False) -> Tensor:
    """A weight, or a part of its outputs, as `product` takes it.

    Args:
        weight: `(C', C)`.
        dtype: to work in.
        uses: for how many products; for some it pays to lay it out.
        part: of the outputs.
        keep: whether what is laid out may be kept while weights are constant.
    """
    whole = part or slice(0, len(weight))

    def laid_out() -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight[whole].to(dtype), PIECE)

    if keep and _kept(weight) is not None:
        return once(weight, whole.start, whole.stop, dtype, make=laid_out)
    return laid_out() if uses >= WORTH_LAYING_OUT else weight[whole].to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, plus: Tensor | None = None) -> Tensor:
    """Linear layer, and GELU or a sum after it, in one loop."""
    # oneDNN's: faster than the library's default where that is MKL on processors of another maker.
    if plus is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
    if plus.dtype != x.dtype:
        return plus + product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")


@functools.cache
def default_lags() -> bool:
    """Whether the default product takes more than 1.4 times oneDNN's here; measured once.

    It does where it is MKL, which knows no AVX-512 on processors of another maker, and theirs is of full width: two times as
    long. On others the two differ by a tenth, so that no noise decides.
    """
    a, b = (torch.ones(512, 512, dtype=torch.float32, device="cpu") for _ in range(2))
    taken: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(12):
            for default, times in taken.items():
                start = time.perf_counter()
                F.linear(a, b) if default else product(a, b, None)
                times.append(time.perf_counter() - start)
    return min(taken[True]) > 1.4 * min(taken[False])


def outer(above: Tensor, rows: Tensor, plus: Tensor | None = None) -> Tensor:
    """Sum over rows of what came down times what went in: the gradient of a linear layer's weight.

    Args:
        above: `(n, C')`.
        rows: `(n, C)`.
        plus: to add it to, the result of another such call.

    Returns:
        `(C', C)`, in memory perhaps the other way round.
    """
    if not len(above) or not default_lags():
        sums = above.new_zeros(above.shape[1], rows.shape[1]) if plus is None else plus
        return sums.addmm_(above.T, rows)  # In place, so that no autocast changes its type.
    if above.shape[1] > rows.shape[1]:  # One has to be turned: the smaller.
        return outer(rows, above, None if plus is None else plus.T).T
    # Turned here, the product runs at full pace. Rows that lie apart would be slow beyond measure.
    return product(above.T.contiguous(), rows.contiguous().T, None, plus=plus)
