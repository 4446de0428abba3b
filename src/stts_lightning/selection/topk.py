"""The perturbed-maximum Top-K (paper Sec. 3.2, Eq. 4-8; Berthet et al. 2020): a Top-K that passes gradients.

Letters: B rows, N candidates, K kept, S noise samples. An indicator is `(B, K, N)`: row k tells where the k-th kept
candidate, in input order, comes from. Nothing here ever holds `(B, S, K, N)`: the forward pass adds sample indices up
by scatter, the backward pass gathers one weight a sample and takes one product with the noise.
"""

from typing import Any

import torch
from torch import Tensor


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


class MonteCarlo:
    """Estimate the expectation of Eq. 7 from S samples drawn on the scores' device."""

    jacobian = "full"

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, scores: Tensor, k: int, sigma: Tensor, generator: torch.Generator | None) -> Tensor:
        """Args: scores `(B, N)`, how many to keep, sigma, where the noise comes from. Returns: indicator `(B, K, N)`."""
        shape = (scores.shape[0], self.samples, scores.shape[1])
        noise = torch.randn(shape, device=scores.device, dtype=scores.dtype, generator=generator)
        return perturbed_topk(scores, k, sigma, noise, self.jacobian)


class OfficialMonteCarlo(MonteCarlo):
    """The official code's estimate: the same forward pass, only the diagonal of the Jacobian in the backward pass."""

    jacobian = "diagonal"


ESTIMATORS: dict[str, type[MonteCarlo]] = {"monte_carlo": MonteCarlo, "official": OfficialMonteCarlo}
