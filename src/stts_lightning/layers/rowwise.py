"""What acts on each token alone, for both backbones: a norm with the layers that follow it, and the perceptron.

On a CPU, products are oneDNN's, and tokens go through these layers in pieces that stay in the processor's cache: in
evaluation with GELU in the product's own loop, in training with a backward pass that works out again what is cheap. Elsewhere,
and where they are traced, compiled, or something hooks into them, the same layers are plain ones.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from stts_lightning.layers.linear import Linear, linear
from stts_lightning.layers.products import (
    PIECE,
    constant_weights,
    lean,
    learns_by_pieces,
    outer,
    product,
    ready,
    working_dtype,
)

Look = tuple[Tensor | None, tuple[int, ...]]
"""Places of tokens `(n,)`, each once, or None for all; and the numbers of a layer's next outputs that are wanted of them."""

Weights = Sequence[Tensor | None]


def _projected(x: Tensor, looks: Sequence[Look], eps: float, weights: Sequence[Tensor], keep: bool) -> list[Tensor]:
    scale, shift, *layer = weights
    dtype = working_dtype(x)
    weight, bias = layer
    bias = bias.to(dtype)
    out, start = [], 0
    for rows, widths in _looked_at(x, looks):
        flat = rows.view(-1, x.shape[-1])
        made = [_Joined(flat, width, dtype) for width in widths]
        parts = _parts(start, widths)
        weights = [ready(weight, dtype, _pieces(flat), part, keep) for part in parts]
        for begin in range(0, len(flat), PIECE):
            piece = F.layer_norm(flat[begin : begin + PIECE], scale.shape, scale, shift, eps).to(dtype)
            for one, laid_out, part in zip(made, weights, parts, strict=True):
                one.put(begin, product(piece, laid_out, bias[part]))
        start += sum(widths)
        out += [one.rows.view(*rows.shape[:-1], width) for one, width in zip(made, widths, strict=True)]
    return out


def _parts(start: int, widths: Sequence[int]) -> list[slice]:
    """Outputs of a layer, one part after the other."""
    ends = list(itertools.accumulate(widths, initial=start))
    return list(map(slice, ends, ends[1:]))


class _Joined:
    """Pieces of rows that become one tensor; a single piece is that tensor.

    Args:
        flat: rows that the pieces are made of, `(n, C)`.
        width: channels that come out.
        dtype: of what comes out.
        into: to overwrite, if that is as good.
    """

    def __init__(self, flat: Tensor, width: int, dtype: torch.dtype, into: Tensor | None = None) -> None:
        self._single = len(flat) <= PIECE
        self.rows = flat.new_empty(0 if self._single else len(flat), width, dtype=dtype) if into is None else into

    def put(self, begin: int, piece: Tensor) -> None:
        """A piece, which starts at this row."""
        if self._single:
            self.rows = piece.to(self.rows.dtype)
        else:
            self.rows[begin : begin + PIECE] = piece


def _pieces(flat: Tensor) -> int:
    """How many pieces tokens `(n, C)` make."""
    return math.ceil(len(flat) / PIECE)


class _Project(torch.autograd.Function):
    """Norm, then parts of a linear layer: keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, looks: Sequence[Look], eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.looks, ctx.eps = looks, eps
        return tuple(_projected(x, looks, eps, weights, keep=False))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        weight = weights[2]
        found = _Gradients(ctx.needs_input_grad[3:], weights, ctx.eps)
        grad_x: Tensor | None = None
        left, start = list(grads), 0
        for (places, _), (rows, widths) in zip(ctx.looks, _looked_at(x, ctx.looks), strict=True):
            flat = rows.view(-1, x.shape[-1])
            above = [left.pop(0).reshape(-1, width) for width in widths]
            down = _Joined(flat, flat.shape[1], flat.dtype)
            turned = ready(weight[start : start + sum(widths)].T, weight.dtype, _pieces(flat))
            for begin in range(0, len(flat), PIECE):
                piece = flat[begin : begin + PIECE]
                normed, *statistics = found.normed(piece)
                grad = torch.cat([part[begin : begin + PIECE] for part in above], dim=1)
                found.linear(2, grad, normed, start)
                down.put(begin, found.norm(product(grad, turned, None), piece, statistics))
            start += sum(widths)
            grad_x = _put(down.rows.view_as(rows), places, grad_x, x)
        return grad_x, None, None, *found.values()


def _put(rows: Tensor, places: Tensor | None, into: Tensor | None, like: Tensor) -> Tensor:
    """Add rows to a sum, at their places; None is a sum of nothing so far."""
    if places is None:
        return rows if into is None else into.add_(rows)
    if into is None and len(places) == like.shape[1]:
        return torch.empty_like(like).index_copy_(1, places, rows)
    return (torch.zeros_like(like) if into is None else into).index_add_(1, places, rows)


def _perceived(x: Tensor, drop: Tensor | None, eps: float, weights: Weights, hidden: list[Tensor] | None) -> Tensor:
    """See `perceive`; appends what GELU saw to `hidden`, if that is wanted."""
    scale, shift, *layers = weights
    dtype = working_dtype(x)
    flat = x.view(-1, x.shape[-1])
    keep = hidden is None
    first, second, past = (None if w is None else ready(w, dtype, _pieces(flat), keep=keep) for w in layers[::2])
    first_bias, second_bias, past_bias = (None if b is None else b.to(dtype) for b in layers[1::2])
    assert scale is not None and first is not None and second is not None and layers[2] is not None
    out = _Joined(flat, len(layers[2]), flat.dtype, into=flat if hidden is None and past is None else None)
    for number, (piece, kept) in enumerate(zip(flat.split(PIECE), _rows(drop, x), strict=True)):
        normed = F.layer_norm(piece, scale.shape, scale, shift, eps).to(dtype)
        beside = piece if past is None else product(normed, past, past_bias)
        if hidden is None:
            seen = product(normed, first, first_bias, gelu=True)
        else:
            hidden.append(product(normed, first, first_bias))
            seen = F.gelu(hidden[-1])
        if kept is None:
            out.put(number * PIECE, product(seen, second, second_bias, plus=beside))
        else:
            out.put(number * PIECE, torch.addcmul(beside, product(seen, second, second_bias), kept))
    return out.rows.view(*x.shape[:-1], len(layers[2]))


def _rows(drop: Tensor | None, x: Tensor) -> Iterable[Tensor | None]:
    """Factors of clips `(B, 1, 1)`, for each piece of the tokens x `(B, N, C)`."""
    if drop is None:
        return itertools.repeat(None, _pieces(x.flatten(0, -2)))
    return drop.expand(*x.shape[:-1], 1).reshape(-1, 1).split(PIECE)


class _Perceive(torch.autograd.Function):
    """`perceive` that keeps its input and what GELU saw, and works out again what they became."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Tensor | None, eps: float, *weights: Tensor | None) -> Tensor:
        hidden: list[Tensor] = []
        out = _perceived(x, drop, eps, weights, hidden)
        ctx.save_for_backward(x, drop, *weights, *hidden)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, drop, *saved = ctx.saved_tensors  # Once: what is checkpointed is worked out again by each look.
        weights, hidden = saved[:8], saved[8:]
        found = _Gradients(ctx.needs_input_grad[3:], weights, ctx.eps)
        first, second = (ready(w.T, w.dtype, len(hidden)) for w in (weights[2], weights[4]))
        past = None if weights[6] is None else ready(weights[6].T, x.dtype, len(hidden))
        flat, above = (t.reshape(-1, t.shape[-1]) for t in (x, grads[0]))
        grad_x = _Joined(flat, x.shape[-1], x.dtype)
        pieces = zip(flat.split(PIECE), above.split(PIECE), hidden, _rows(drop, x), strict=True)
        for number, (piece, beside, before, kept) in enumerate(pieces):
            grad = beside if kept is None else beside * kept
            found.linear(4, grad, F.gelu(before))
            grad = torch.ops.aten.gelu_backward(product(grad, second, None), before)
            normed, *statistics = found.normed(piece)
            found.linear(2, grad, normed)
            if past is None:
                down = found.norm(product(grad, first, None), piece, statistics)
                grad_x.put(number * PIECE, down.add_(beside))
            else:
                found.linear(6, beside, normed)
                down = product(beside, past, None, plus=product(grad, first, None))
                grad_x.put(number * PIECE, found.norm(down, piece, statistics))
        return grad_x.rows.view_as(x), None, None, *found.values()


class _Gradients:
    """Gradients of a norm's and of linear layers' weights, summed up over pieces; None where they are not wanted.

    Args:
        wanted: of which weights.
        weights: the norm's scale and shift, then weight and bias of each layer.
        eps: the norm's.
    """

    def __init__(self, wanted: Sequence[bool], weights: Sequence[Tensor | None], eps: float) -> None:
        self._sums: list[dict[int, Tensor] | None] = [{} if want else None for want in wanted]
        """Of each weight that is wanted, by its first output."""
        self._scale, self._shift, self._eps = weights[0], weights[1], eps

    def linear(self, number: int, above: Tensor, rows: Tensor, start: int = 0) -> None:
        """Add those of a layer's outputs from `start` on: of its weight, which has this number, and its bias."""
        weight = self._sums[number]
        if weight is not None:
            weight[start] = outer(above, rows, weight.get(start))
        if self._sums[number + 1] is not None:
            self._add(number + 1, above.sum(0), start)

    def normed(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows through the norm, their means and inverse deviations."""
        assert self._scale is not None
        return torch.native_layer_norm(rows, self._scale.shape, self._scale, self._shift, self._eps)

    def norm(self, above: Tensor, rows: Tensor, statistics: Sequence[Tensor]) -> Tensor:
        """Add those of the norm; returns that of the rows."""
        assert self._scale is not None
        wanted = [True, *(sums is not None for sums in self._sums[:2])]
        down, *found = torch.ops.aten.native_layer_norm_backward(
            above, rows, self._scale.shape, *statistics, self._scale, self._shift, wanted
        )
        for number, more in enumerate(found):
            if wanted[1 + number]:
                self._add(number, more)
        return down

    def _add(self, number: int, more: Tensor, start: int = 0) -> None:
        sums = self._sums[number]
        assert sums is not None
        sums[start] = sums[start].add_(more) if start in sums else more

    def values(self) -> list[Tensor | None]:
        """What has come of it, for each weight."""
        ordered = [[part for _, part in sorted(sums.items())] if sums else [] for sums in self._sums]
        return [torch.cat(parts) if len(parts) > 1 else parts[0].contiguous() if parts else None for parts in ordered]


def piecewise(rows: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """A function of each token, in pieces where that pays.

    Args:
        rows: `(n, C)` -> `(n, width)`; where it is not applied in pieces, `(B, N, C)` -> `(B, N, width)`.
        x: `(B, N, C)`.
        width: channels that come out.

    Returns:
        `(B, N, width)`.
    """
    if not lean(x):
        return rows(x)
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= PIECE:
        return rows(x)
    out = flat.new_empty(flat.shape[0], width)
    with constant_weights():
        for piece, place in zip(flat.split(PIECE), out.split(PIECE), strict=True):
            place.copy_(rows(piece))
    return out.view(*x.shape[:-1], width)


class Perceptron(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, gelu=True)
        self.fc2 = Linear(hidden, out_dim)


def project(norm: nn.Module, layer: nn.Module, x: Tensor, looks: Sequence[Look]) -> list[Tensor]:
    """Normed tokens through parts of a linear layer, of each part only the tokens that are wanted.

    Args:
        norm: of tokens; see `ahead`.
        layer: linear, or what somebody has put in its place.
        x: `(B, N, C)`.
        looks: which tokens and how many outputs, in the order of the outputs; all of these.

    Returns:
        `(B, n, width)` for each width of each look.
    """
    if untouched(norm, layer) and x.is_contiguous():
        if learns_by_pieces(x):
            return list(_Project.apply(x, looks, norm.eps, norm.weight, norm.bias, layer.weight, layer.bias))  # type: ignore[arg-type]
        if lean(x):
            return _projected(x, looks, norm.eps, (norm.weight, norm.bias, layer.weight, layer.bias), keep=True)  # type: ignore[arg-type]
    normed = norm(x)
    widths = [width for _, wanted in looks for width in wanted]
    if untouched(layer):
        parts = zip(layer.weight.split(widths), layer.bias.split(widths), strict=True)  # type: ignore[union-attr]
        return [linear(rows, *next(parts)) for rows, wanted in _looked_at(normed, looks) for _ in wanted]
    made = iter(layer(normed).split(widths, dim=-1))
    return [rows for places, wanted in looks for _ in wanted for rows, _ in _looked_at(next(made), [(places, ())])]


def _looked_at(x: Tensor, looks: Sequence[Look]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Tokens of each look, and the outputs that are wanted of them."""
    for places, widths in looks:
        yield (x if places is None else x.index_select(1, places)), widths


def perceive(norm: nn.LayerNorm, mlp: Perceptron, x: Tensor, drop_path: nn.Module, past: nn.Module | None = None) -> Tensor:
    """The perceptron's part of a block: x + drop_path(mlp(norm(x))), of x or of past(norm(x)) if the width changes.

    Args:
        norm: of tokens.
        mlp: from C to C'.
        x: `(B, N, C)`; nobody else's, it may be overwritten.
        drop_path: of the residual path.
        past: linear from C to C', or None where they are equal.

    Returns:
        `(B, N, C')`.
    """
    by_hand = (lean(x) or learns_by_pieces(x)) and x.is_contiguous()
    if by_hand and untouched(norm, mlp, drop_path) and untouched(*mlp, *([] if past is None else [past])):
        weights: list[Tensor | None] = [norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
        weights += [past.weight, past.bias] if isinstance(past, nn.Linear) else [None, None]
        drop = drop_path(x.new_ones(len(x), 1, 1)) if drop_path.training and drop_path.drop_prob else None  # type: ignore[union-attr]
        if lean(x):
            return _perceived(x, drop, norm.eps, weights, None)
        return _Perceive.apply(x, drop, norm.eps, *weights)  # type: ignore[return-value]
    normed = norm(x)
    return (x if past is None else past(normed)) + drop_path(mlp(normed))


def joined(x: Tensor, found: Tensor, own: bool) -> Tensor:
    """Sum of what goes past a layer and what comes out of it, in evaluation where the latter lies.

    Args:
        x: `(B, N, C)`.
        found: the same size.
        own: whether nobody else can hold what was found.
    """
    return found.add_(x) if own and lean(found) and found.dtype == x.dtype else x + found


def ahead(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, nn.Module]:
    """Tokens and their norm, for one who applies it where it suits; normed ones and nothing where somebody looks at the norm."""
    return (x, norm) if untouched(norm) else (norm(x), nn.Identity())


def untouched(*modules: nn.Module) -> bool:
    """Whether modules are of these very layers and nothing hooks into them: adapters and probes see plain calls."""
    return all(type(module) in _LAYERS and not hooked(module) for module in modules)


_LAYERS = (nn.LayerNorm, nn.Linear, Linear, Perceptron, DropPath)


def hooked(module: nn.Module) -> bool:
    """Whether somebody looks at what goes into a module or comes out, or calls another function in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(bool, (*hooks, _has_any_global_hook(), "forward" in vars(module))))
