"""The perturbed-maximum Top-K (paper Sec. 3.2, Eq. 4-8; Berthet et al. 2020): a Top-K that passes gradients.

Letters: B rows, N candidates, K kept, S noise samples. An indicator is `(B, K, N)`: row k tells where the k-th kept
candidate, in input order, comes from. Nothing here ever holds `(B, S, K, N)`: the forward pass adds sample indices up
by scatter, the backward pass gathers one weight a sample and takes one product with the noise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stts_lightning.selection.noise import Noise


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the K largest scores, in input order (Eq. 4).

    Args:
        scores: `(B, N)`.
        k: how many to keep.

    Returns:
        `(B, K)` int64, ascending.
    """
    return scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def one_hot(indices: Tensor, candidates: int, dtype: torch.dtype) -> Tensor:
    """Indicator `(B, K, N)` of indices `(B, K)`."""
    return torch.nn.functional.one_hot(indices, candidates).to(dtype)


def _bins(indices: Tensor, candidates: int) -> Tensor:
    """Flat position in `(K * N)` of each kept candidate: indices `(B, S, K)` -> `(B, S * K)`."""
    return (indices + torch.arange(indices.shape[-1], device=indices.device) * candidates).flatten(1)


class _PerturbedTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, sigma: Tensor, k: int, diagonal: bool) -> Tensor:
        rows, samples, candidates = noise.shape
        perturbed = torch.addcmul(scores.unsqueeze(1), noise, sigma.to(noise.dtype))
        indices = hard_topk(perturbed, k)  # (B, S, K)
        bins = _bins(indices, candidates)
        # Counts are exact in floating point, sums of 1/S are not.
        one = scores.new_ones(1, 1).expand_as(bins)
        counts = scores.new_zeros(rows, k * candidates).scatter_add_(1, bins, one)
        indicator = counts.div_(samples).view(rows, k, candidates)
        ctx.save_for_backward(indices, noise, sigma)
        ctx.diagonal = diagonal
        return indicator

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        indices, noise, sigma = ctx.saved_tensors
        (grad,) = grads
        rows, samples, candidates = noise.shape
        k = indices.shape[-1]
        bins = _bins(indices, candidates)
        if ctx.diagonal:
            chosen_noise = noise.gather(2, indices).flatten(1)
            diagonal = noise.new_zeros(rows, k * candidates).scatter_add_(1, bins, chosen_noise)
            product = (grad * diagonal.view_as(grad)).sum(1) / samples
        else:
            # <grad, Y_s> for each sample s, then its covariance with the noise. The mean over samples is a control
            # variate: E[Z] = 0, so subtracting it leaves the expectation (after S / (S - 1)) and cuts the variance.
            weights = grad.flatten(1).gather(1, bins).view(rows, samples, k).sum(-1)
            weights = weights - weights.mean(1, keepdim=True)
            product = torch.einsum("bs,bsn->bn", weights, noise) / (samples - 1)
        # At sigma = 0 the operator is the hard Top-K, whose gradient vanishes (end of Sec. 3.2).
        scale = torch.where(sigma > 0, 1.0 / sigma.clamp_min(torch.finfo(noise.dtype).tiny), torch.zeros_like(sigma))
        return product * scale.to(product.dtype), None, None, None, None


def perturbed_topk(scores: Tensor, k: int, sigma: Tensor | float, noise: Tensor, jacobian: str = "full") -> Tensor:
    """Expectation of the Top-K indicator under Gaussian noise on the scores, estimated from given samples (Eq. 7).

    The gradient is Eq. 8. `full` uses the whole Jacobian with the mean of the per-sample weights subtracted as control
    variate. `diagonal` uses d Y[k, n] / d s[n] alone. Differs from the official code: that has only the diagonal,
    whose cosine to the true gradient is 0.5 to 0.75; it is offered to reproduce official runs.

    Args:
        scores: `(B, N)`.
        k: how many to keep, 1 to N.
        sigma: standard deviation of the noise; 0 gives the hard Top-K and a zero gradient. A tensor avoids recompiles.
        noise: `(B, S, N)` standard normal samples.
        jacobian: "full" or "diagonal".

    Returns:
        Indicator `(B, K, N)`; each row sums to 1, rows are in input order.

    Raises:
        ValueError: if k is not in 1..N or the Jacobian's name is unknown.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k={k}: must lie in 1..{scores.shape[-1]}")
    if jacobian not in ("full", "diagonal"):
        raise ValueError(f"jacobian={jacobian!r}: must be 'full' or 'diagonal'")
    sigma = torch.as_tensor(sigma, dtype=noise.dtype, device=noise.device)
    return _PerturbedTopK.apply(scores, noise, sigma, k, jacobian == "diagonal")  # type: ignore[return-value]


class _Chances(NamedTuple):
    """The expectation's part in which certain candidates are the K-th largest, each with each noise of its own.

    R counts rows, those candidates and the nodes of the quadrature.

    Attributes:
        gaps: `(N, R)`, how far each candidate lies above the K-th largest, in standard deviations.
        selected: `(N, R)`, probability of lying above it; 1 for the K-th largest itself.
        others: `(N, R)` bool, False for the K-th largest itself.
    """

    gaps: Tensor
    selected: Tensor
    others: Tensor

    @classmethod
    def of(cls, scores: Tensor, first: int, last: int, scale: Tensor, nodes: Tensor) -> "_Chances":
        """For candidates `first` to `last - 1` of scores `(B, N)`."""
        gaps = (scores.T[:, :, None] - scores[:, first:last]) * scale  # (N, B, M)
        gaps = (gaps.unsqueeze(-1) - nodes).flatten(1)
        itself = torch.eye(scores.shape[1], device=scores.device, dtype=torch.bool)[:, first:last]
        others = ~itself[:, None, :, None].expand(-1, scores.shape[0], -1, len(nodes)).flatten(1)
        return cls(gaps, torch.where(others, 0.5 * torch.erfc(gaps * -math.sqrt(0.5)), 1.0), others)


def _counts(selected: Tensor, k: int) -> Tensor:
    """Probability that c of the candidates before each are selected, c below K: `(N, R)` -> `(N, K, R)` (Poisson-binomial)."""
    counts = selected.new_zeros(selected.shape[0], k, selected.shape[1])
    counts[0, 0] = 1.0
    for before, after, chance in zip(counts[:-1], counts[1:], selected[:-1], strict=True):
        torch.mul(before, 1 - chance, out=after)
        after[1:].addcmul_(before[:-1], chance)
    return counts


def _less(adjoint: Tensor, chance: Tensor) -> Tensor:
    """Gradient `(K, R)` of counts from that of the counts with one candidate more."""
    before = adjoint * (1 - chance)
    before[:-1].addcmul_(adjoint[1:], chance)
    return before


def _gain(adjoint: Tensor, counts: Tensor) -> Tensor:
    """Gradient `(R,)` of a candidate's probability from that of the counts that it joins."""
    return (adjoint[1:] * counts[:-1]).sum(0) - (adjoint * counts).sum(0)


class _ExactTopK(torch.autograd.Function):
    """See `exact_topk`. Both passes go over the K-th largest in chunks and keep nothing of one for the other."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: Tensor, k: int, nodes: Tensor, weights: Tensor, chunk: int) -> Tensor:
        rows, candidates = scores.shape
        ctx.save_for_backward(scores, scale, nodes, weights)
        ctx.k, ctx.chunk = k, chunk
        indicator = scores.new_zeros(candidates, k, rows)
        for first in range(0, candidates, chunk):
            last = min(first + chunk, candidates)
            selected = _Chances.of(scores, first, last, scale, nodes).selected
            before, after = _counts(selected, k), _counts(selected.flip(0), k).flip(0, 1)
            weighted = (selected.view(candidates, -1, len(nodes)) * weights).flatten(1)
            for left, right, weight, out in zip(before, after, weighted, indicator, strict=True):
                # Candidate l is the k-th kept if k - 1 before and K - k after it are selected.
                out.add_((left * right * weight).view(k, rows, -1).sum(-1))
        return indicator.permute(2, 1, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scores, scale, nodes, weights = ctx.saved_tensors
        rows, candidates = scores.shape
        k, chunk = ctx.k, ctx.chunk
        grad_output = grads[0].permute(2, 1, 0)  # (N, K, B)
        grad = torch.zeros_like(scores)
        for first in range(0, candidates, chunk):
            last = min(first + chunk, candidates)
            chances = _Chances.of(scores, first, last, scale, nodes)
            selected = chances.selected
            before, after = _counts(selected, k), _counts(selected.flip(0), k).flip(0, 1)
            share = grad_output.unsqueeze(-1) * weights.repeat(last - first)  # (N, K, B, M Q)
            share = share.flatten(2)
            slopes = torch.empty_like(selected)
            adjoint = torch.zeros_like(before[0])
            for at in reversed(range(candidates)):
                direct = share[at] * after[at]
                slopes[at] = _gain(adjoint, before[at]) + (direct * before[at]).sum(0)
                adjoint = _less(adjoint, selected[at]).addcmul_(direct, selected[at])
            adjoint.zero_()
            for at in range(candidates):
                slopes[at] += _gain(adjoint, after[at].flip(0))
                adjoint = _less(adjoint, selected[at]).addcmul_((share[at] * before[at]).flip(0), selected[at])
            # Through the normal distribution function, to the candidates and to the K-th largest.
            slopes *= torch.exp(-0.5 * chances.gaps.square()) * (chances.others * scale / math.sqrt(2 * math.pi))
            slopes = slopes.view(candidates, rows, last - first, -1).sum(-1)
            grad += slopes.sum(2).T
            grad[:, first:last] -= slopes.sum(0)
        return grad, None, None, None, None, None


def gauss_hermite(nodes: int = 64) -> Tensor:
    """Points and weights of Gauss-Hermite quadrature for a standard normal variable, `(2, nodes)` float64."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(np.stack((points, weights / weights.sum())))


def exact_topk(
    scores: Tensor, k: int, sigma: Tensor | float, quadrature: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Expectation of the Top-K indicator under Gaussian noise on the scores (Eq. 7), computed instead of estimated.

    Given which candidate is the K-th largest and its noise, the others lie above it independently; how many of them
    before and after a candidate do is a Poisson-binomial count. The noise of the K-th largest is integrated by
    Gauss-Hermite quadrature. Gradients are those of the expectation itself; nothing is random.

    Costs about N * N * K * nodes multiply-adds a row: made for tens of candidates, not for thousands.

    Args:
        scores: `(B, N)`.
        k: how many to keep, 1 to N.
        sigma: standard deviation of the noise; 0 gives the hard Top-K and a zero gradient. No gradient flows to it.
        quadrature: from `gauss_hermite`, on the scores' device; None is one of 64 nodes.
        chunk: candidates that are taken for the K-th largest at a time; None keeps what one pass holds near 64 MiB.

    Returns:
        Indicator `(B, K, N)`; each row sums to 1 up to the quadrature, rows are in input order.

    Raises:
        ValueError: if k is not in 1..N.
    """
    rows, candidates = scores.shape
    if not 1 <= k <= candidates:
        raise ValueError(f"k={k}: must lie in 1..{candidates}")
    sigma = torch.as_tensor(sigma, dtype=scores.dtype, device=scores.device)
    # Below this the noise is less than the scores' own resolution.
    floor = torch.finfo(scores.dtype).eps
    points, weights = (gauss_hermite() if quadrature is None else quadrature).to(scores)
    if chunk is None:
        chunk = max(1, 2**24 // max(rows * len(points) * candidates * k * 2, 1))
    indicator: Tensor = _ExactTopK.apply(scores, 1.0 / sigma.clamp_min(floor), k, points, weights, chunk)  # type: ignore[assignment]
    # At sigma = 0 the operator is the hard Top-K, whose gradient vanishes (end of Sec. 3.2).
    return torch.where(sigma > floor, indicator, one_hot(hard_topk(scores.detach(), k), candidates, scores.dtype))


def straight_through(indicator: Tensor, indices: Tensor) -> Tensor:
    """The hard indicator of what was chosen, with the gradients of a soft one.

    Args:
        indicator: soft, `(B, K, N)`.
        indices: chosen, `(B, K)`.

    Returns:
        `(B, K, N)`, of zeros and ones.
    """
    return one_hot(indices, indicator.shape[-1], indicator.dtype) + indicator - indicator.detach()


class Estimator(Protocol):
    """From scores `(B, N)`, how many to keep, sigma and the source of noise to the indicator `(B, K, N)` of Eq. 7."""

    def __call__(self, scores: Tensor, k: int, sigma: Tensor, noise: Noise) -> Tensor:
        """See the class."""
        ...


class Exact(nn.Module):
    """The expectation of Eq. 7 itself; needs no samples and no noise."""

    limit = 64
    """Candidates above which an exact expectation costs more than the model that it serves."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        # A buffer, so that it lies on the scores' device.
        self.register_buffer("quadrature", gauss_hermite(), persistent=False)
        self.quadrature: Tensor

    def forward(self, scores: Tensor, k: int, sigma: Tensor, noise: Noise) -> Tensor:
        """See `Estimator`. Raises ValueError for more candidates than `limit`."""
        if scores.shape[1] > self.limit:
            raise ValueError(f"selection.estimator='exact': made for {self.limit} candidates at most, here are {scores.shape[1]}")
        return exact_topk(scores, k, sigma, self.quadrature)


class MonteCarlo:
    """Estimate the expectation of Eq. 7 from S samples drawn on the scores' device."""

    jacobian = "full"

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, scores: Tensor, k: int, sigma: Tensor, noise: Noise) -> Tensor:
        """Args: scores `(B, N)`, how many to keep, sigma, where the noise comes from. Returns: indicator `(B, K, N)`."""
        shape = (scores.shape[0], self.samples, scores.shape[1])
        samples = noise.normal(shape, scores.device).to(scores.dtype)
        return perturbed_topk(scores, k, sigma, samples, self.jacobian)


class OfficialMonteCarlo(MonteCarlo):
    """The official code's estimate: the same forward pass, only the diagonal of the Jacobian in the backward pass."""

    jacobian = "diagonal"


ESTIMATORS: dict[str, Callable[[int], Estimator]] = {
    "monte_carlo": MonteCarlo,
    "exact": Exact,
    "official": OfficialMonteCarlo,
}
