import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.topk import ESTIMATORS, Exact, exact_topk, gauss_hermite, hard_topk, one_hot, perturbed_topk


@pytest.mark.reference
@pytest.mark.parametrize("case", ["a", "b", "c", "d", "e", "f", "s0"])
def test_logits_match_the_official_model(shared: Path, case: str) -> None:
    golden = np.load(shared / "golden/mvit/golden_perturbed_topk.npz")
    info = json.loads((shared / "golden/mvit/golden_perturbed_topk.json").read_text())[case]
    get = lambda name: torch.from_numpy(golden[f"{case}/{name}"])  # noqa: E731
    scores, noise, grad = get("scores").requires_grad_(), get("noise"), get("grad_out_BKL")

    indicator = perturbed_topk(scores, info["K"], info["sigma"], noise, "diagonal")
    torch.testing.assert_close(indicator, get("Y_BKL"), atol=1e-6, rtol=0)
    indicator.backward(grad)
    torch.testing.assert_close(scores.grad, get("grad_scores_official_diagonal"), atol=2e-5, rtol=1e-4)
    assert torch.equal(hard_topk(scores, info["K"]), get("hard_indices"))

    # Ours subtracts the mean weight: the golden product less the mean weight times the mean noise, times S / (S - 1).
    scores.grad = None
    perturbed_topk(scores, info["K"], info["sigma"], noise).backward(grad)
    picked = hard_topk((scores.detach()[:, None] + info["sigma"] * noise), info["K"])
    weights = sum(grad[:, k].gather(1, picked[:, :, k]) for k in range(info["K"]))
    if info["sigma"] == 0:
        assert torch.equal(scores.grad, torch.zeros_like(scores))
        return
    control = weights.mean(1, keepdim=True) * noise.mean(1) / info["sigma"]
    expected = (get("grad_scores_full_jacobian_eq8") - control) * info["n"] / (info["n"] - 1)
    torch.testing.assert_close(scores.grad, expected, atol=5e-5, rtol=1e-4)


def dense_expectation(scores: Tensor, k: int, sigma: float, points: int = 400_000) -> Tensor:
    """The definition, by brute force in another formulation: sort, count subsets."""
    noise = torch.randn(points, scores.shape[-1], generator=torch.Generator().manual_seed(7), dtype=scores.dtype)
    order = (scores + sigma * noise).argsort(-1, descending=True)[:, :k].sort(-1).values
    counts = [torch.bincount(order[:, j], minlength=scores.shape[-1]) for j in range(k)]
    return torch.stack(counts).to(scores.dtype) / points


@pytest.mark.parametrize(("n", "k"), [(8, 5), (4, 1), (9, 3)])
def test_forward_is_the_expectation_and_backward_its_derivative(n: int, k: int) -> None:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    sigma, samples = 0.2, 400_000
    noise = torch.randn(1, samples, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = scores[None].clone().requires_grad_()
    indicator = perturbed_topk(leaf, k, sigma, noise)
    expected = dense_expectation(scores, k, sigma)
    torch.testing.assert_close(indicator[0].detach(), expected, atol=4e-3, rtol=0)

    upstream = torch.randn(1, k, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    indicator.backward(upstream)
    assert leaf.grad is not None
    # Central differences of the brute-force expectation with common noise.
    step = 0.05
    differences = []
    for i in range(n):
        moved = [dense_expectation(scores + s * step * torch.eye(n, dtype=scores.dtype)[i], k, sigma) for s in (1, -1)]
        differences.append(((moved[0] - moved[1]) * upstream[0]).sum() / (2 * step))
    difference = torch.stack(differences)
    cosine = torch.nn.functional.cosine_similarity(leaf.grad[0], difference, dim=0)
    assert cosine > 0.995, (leaf.grad, difference)
    torch.testing.assert_close(leaf.grad[0], difference, atol=0.08 * float(difference.abs().max()), rtol=0.05)


def test_control_variate_lifts_the_cosine_and_the_diagonal_is_another_direction() -> None:
    torch.manual_seed(0)
    cosines: dict[str, list[float]] = {"full": [], "diagonal": [], "plain": []}
    for _ in range(40):
        scores = torch.rand(1, 8)
        upstream = torch.randn(1, 5, 8)

        def gradient(samples: int, jacobian: str = "full", scores: Tensor = scores, upstream: Tensor = upstream) -> Tensor:
            leaf = scores.clone().requires_grad_()
            perturbed_topk(leaf, 5, 0.1, torch.randn(1, samples, 8), jacobian).backward(upstream)
            assert leaf.grad is not None
            return leaf.grad[0]

        true = gradient(200_000)
        noise = torch.randn(1, 500, 8)
        picked = hard_topk(scores[:, None] + 0.1 * noise, 5)
        weights = sum(upstream[:, k].gather(1, picked[:, :, k]) for k in range(5))
        plain = torch.einsum("bs,bsn->n", weights, noise) / 500 / 0.1
        for name, value in (("full", gradient(500)), ("diagonal", gradient(500, "diagonal")), ("plain", plain)):
            cosines[name].append(float(torch.nn.functional.cosine_similarity(value, true, dim=0)))
    mean = {name: sum(values) / len(values) for name, values in cosines.items()}
    assert mean["full"] > 0.9
    assert mean["full"] > mean["plain"] + 0.05
    assert mean["diagonal"] < 0.7


@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
@pytest.mark.parametrize("sigma", [0.0, 1e-12, 0.1])
def test_constant_scores_and_vanishing_noise_stay_finite(jacobian: str, sigma: float) -> None:
    scores = torch.zeros(3, 6, requires_grad=True)
    indicator = perturbed_topk(scores, 2, sigma, torch.randn(3, 50, 6), jacobian)
    indicator.backward(torch.randn_like(indicator))
    assert torch.isfinite(indicator).all()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    torch.testing.assert_close(indicator.sum(-1), torch.ones(3, 2))


def test_rows_keep_the_order_of_the_input() -> None:
    indicator = perturbed_topk(torch.rand(4, 9), 4, 0.3, torch.randn(4, 300, 9))
    position = (indicator * torch.arange(9.0)).sum(-1)
    assert (position.diff(dim=-1) > 0).all()
    assert (indicator.sum(1) <= 1 + 1e-6).all(), "no candidate is kept more than once"


def test_sigma_zero_is_the_hard_topk() -> None:
    scores = torch.rand(5, 7)
    soft = perturbed_topk(scores, 3, 0.0, torch.randn(5, 10, 7))
    torch.testing.assert_close(soft, one_hot(hard_topk(scores, 3), 7, soft.dtype))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_estimators_repeat_with_their_noise(name: str) -> None:
    estimator = ESTIMATORS[name](50)
    scores, sigma = torch.rand(2, 8), torch.tensor(0.3)
    draws = [estimator(scores, 3, sigma, Noise.of([seed, 7])) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) == (name == "exact"), "only the exact expectation has nothing to draw"


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k}: must lie in 1..4"):
        perturbed_topk(torch.rand(1, 4), k, 0.1, torch.randn(1, 10, 4))


def test_nothing_as_large_as_rows_samples_kept_candidates_is_held() -> None:
    rows, samples, k, n = 2, 64, 12, 40
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for value in itertools.chain(out if isinstance(out, tuple | list) else (out,)):
                if isinstance(value, Tensor):
                    biggest = max(biggest, value.untyped_storage().nbytes() // value.element_size())
            return out

    scores = torch.rand(rows, n, requires_grad=True)
    noise = torch.randn(rows, samples, n)
    with Watch():
        out = perturbed_topk(scores, k, 0.1, noise)
        out.backward(torch.ones_like(out))
    assert biggest <= rows * samples * n


@pytest.mark.parametrize(("n", "k", "sigma"), [(8, 5, 0.1), (4, 1, 0.05), (9, 3, 0.2), (6, 6, 0.1), (16, 10, 0.5), (8, 5, 0.01)])
def test_exact_is_the_expectation(n: int, k: int, sigma: float) -> None:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    exact = exact_topk(scores[None], k, sigma)[0]
    torch.testing.assert_close(exact.sum(-1), torch.ones(k, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(exact, dense_expectation(scores, k, sigma), atol=4e-3, rtol=0)
    # Finer than any sampling: the quadrature itself.
    torch.testing.assert_close(exact, exact_topk(scores[None], k, sigma, gauss_hermite(160))[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(exact, exact_topk(scores[None], k, sigma, chunk=3)[0], atol=1e-12, rtol=0)


def test_exact_gradient_is_its_derivative_and_what_the_samples_estimate() -> None:
    scores = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: exact_topk(s, 3, 0.1), (scores,))
    assert torch.autograd.gradcheck(lambda s: exact_topk(s, 3, 0.1, chunk=2), (scores,))
    upstream = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(2, 400_000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    exact, estimated = (
        torch.autograd.grad(y, scores, upstream)[0] for y in (exact_topk(scores, 3, 0.1), perturbed_topk(scores, 3, 0.1, noise))
    )
    torch.testing.assert_close(estimated, exact, atol=0.02 * float(exact.abs().max()), rtol=0)


def test_exact_goes_smoothly_to_the_hard_choice() -> None:
    scores = torch.tensor([[0.0, 0.3, 1.0, 0.31]])
    hard = one_hot(hard_topk(scores, 2), 4, torch.float32)
    gaps = [float((exact_topk(scores, 2, sigma) - hard).abs().max()) for sigma in (0.1, 0.01, 0.003, 0.001, 1e-5, 0.0)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0
    for values in (scores, torch.full((1, 4), 0.5)):  # also where all are equal
        for sigma in (0.1, 1e-3, 1e-6, 0.0):
            leaf = values.clone().requires_grad_()
            y = exact_topk(leaf, 2, sigma)
            y.square().sum().backward()
            assert torch.isfinite(y).all()
            assert torch.isfinite(leaf.grad).all()
    with pytest.raises(ValueError, match="made for 64 candidates at most, here are 3136"):
        Exact(0)(torch.rand(1, 3136), 4, torch.tensor(0.1), None)
