"""The estimators of the differentiable Top-K beside each other: how good their gradients are, and what they cost.

    python scripts/estimators.py quality
    python scripts/estimators.py cost

Prints tables in Markdown; docs/estimators.md holds them. `quality` compares gradients with the exact ones, for random scores
and random gradients from above. `cost` runs each forward and backward pass in a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stts_lightning.selection.topk import exact_topk, hard_topk, perturbed_topk

SAMPLES = 500
SIZES = {"frames of MViT": (16, 8, 5), "frames of VideoSwin": (16, 16, 10), "anchors": (128, 9, 1), "196 tokens": (16, 196, 98)}
TOKENS = {"tokens of S0:0.5, MViT": (64, 3136, 1568)}
"""Rows, candidates and kept ones; a row of space is a frame, so 8 clips of 8 frames are 64."""

Gradient = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


def through(jacobian: str) -> Gradient:
    """Gradient of the scores through the package's operator."""

    def gradient(scores: Tensor, noise: Tensor, above: Tensor, k: int, sigma: float) -> Tensor:
        leaf = scores.clone().requires_grad_()
        (perturbed_topk(leaf, k, sigma, noise, jacobian) * above).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    return gradient


def without_control_variate(scores: Tensor, noise: Tensor, above: Tensor, k: int, sigma: float) -> Tensor:
    """Eq. 8 as it stands: the mean over samples of <gradient, indicator> noise / sigma."""
    indices = hard_topk(scores.unsqueeze(1) + sigma * noise, k)  # (B, S, K)
    bins = (indices + torch.arange(k) * scores.shape[1]).flatten(1)
    weights = above.flatten(1).gather(1, bins).view(*indices.shape).sum(-1)
    return torch.einsum("bs,bsn->bn", weights, noise) / (noise.shape[1] * sigma)


ESTIMATORS: dict[str, Gradient] = {
    "monte_carlo": through("full"),
    "without its control variate": without_control_variate,
    "official (diagonal)": through("diagonal"),
}


def exact_gradient(scores: Tensor, above: Tensor, k: int, sigma: float) -> Tensor:
    """Gradient of the expectation itself."""
    leaf = scores.clone().requires_grad_()
    (exact_topk(leaf, k, sigma) * above).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def quality() -> None:
    """Cosine to the exact gradient, and bias and deviation as shares of its length."""
    print("| candidates, kept | sigma | estimator | cosine of one draw | bias | deviation |\n|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for _, candidates, k in SIZES.values():
        rows, draws = (2, 12) if candidates > 64 else (32, 60)
        scores = torch.rand(rows, candidates, generator=generator, dtype=torch.float64)
        scores = (scores - scores.amin(1, keepdim=True)) / (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True))
        above = torch.randn(rows, k, candidates, generator=generator, dtype=torch.float64)
        for sigma in (0.02, 0.1, 0.5):
            true = exact_gradient(scores, above, k, sigma)
            found: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
            for _ in range(draws):
                noise = torch.randn(rows, SAMPLES, candidates, generator=generator, dtype=torch.float64)
                for name, gradient in ESTIMATORS.items():
                    found[name].append(gradient(scores, noise, above, k, sigma))
            for name, gradients in found.items():
                all_draws = torch.stack(gradients)  # (draws, B, N)
                cosine = torch.cosine_similarity(all_draws, true.expand_as(all_draws), dim=-1).mean()
                length = true.norm(dim=-1)
                spread = (all_draws - all_draws.mean(0)).square().sum(-1).mean(0).sqrt()
                # What is left of the mean beyond its own sampling error.
                off = ((all_draws.mean(0) - true).square().sum(-1) - spread.square() / draws).clamp_min(0).sqrt()
                shares = [float((value / length).median()) for value in (off, spread)]
                shown = " | ".join(f"{share:.2f}" if share < 100 else "> 100" for share in shares)
                print(f"| {candidates}, {k} | {sigma} | {name} | {cosine:.3f} | {shown} |", flush=True)


def one_hot_topk(scores: Tensor, k: int, sigma: float, noise: Tensor) -> Tensor:
    """What is often written: every sample's indicator as a one-hot tensor `(B, S, K, N)`, kept for the backward pass."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scores: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
            indices = hard_topk(scores.unsqueeze(1) + sigma * noise, k)
            samples = torch.nn.functional.one_hot(indices, scores.shape[1]).float()
            ctx.save_for_backward(samples)
            return samples.mean(1)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
            (samples,) = ctx.saved_tensors
            jacobian = torch.einsum("bskn,bsm->bknm", samples, noise) / (noise.shape[1] * sigma)
            return torch.einsum("bkn,bknm->bm", grad, jacobian)

    return Operator.apply(scores)  # type: ignore[return-value]


def measure(name: str, rows: int, candidates: int, k: int) -> None:
    """Forward and backward of one formulation; prints seconds (median) and MiB (peak over what was there before)."""
    torch.manual_seed(0)
    scores = torch.rand(rows, candidates, requires_grad=True)
    above = torch.randn(rows, k, candidates)

    def run() -> None:
        noise = torch.empty(0) if name == "exact" else torch.randn(rows, SAMPLES, candidates)
        if name == "exact":
            indicator = exact_topk(scores, k, 0.1)  # Without the limit of candidates that `Exact` has.
        elif name == "one-hot":
            indicator = one_hot_topk(scores, k, 0.1, noise)
        else:
            indicator = perturbed_topk(scores, k, 0.1, noise, {"monte_carlo": "full", "official": "diagonal"}[name])
        indicator.backward(above)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    while not times or (sum(times) < 2 and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([statistics.median(times[1:] or times), peak / 1024]))


def cost(limit: float) -> None:
    """Time and memory of each formulation at each size."""
    print("| | rows, candidates, kept | formulation | forward + backward | memory |\n|---|---|---|---|---|")
    for label, (rows, candidates, k) in {**SIZES, **TOKENS}.items():
        for name in ("monte_carlo", "official", "exact", "one-hot"):
            size = f"| {label} | {rows}, {candidates}, {k} | {name} |"
            if name == "exact" and candidates > 1000:
                print(f"{size} not run: time grows with the square of the candidates | |", flush=True)
                continue
            indicators = rows * SAMPLES * k * candidates * 4 / 2**30
            if name == "one-hot" and 3 * indicators > limit:  # The operator holds integers of twice the size beside them.
                print(f"{size} not run | {indicators:,.0f} GiB for the indicators alone |", flush=True)
                continue
            command = [sys.executable, __file__, "measure", name, *map(str, (rows, candidates, k))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, mebibytes = json.loads(done.stdout)
            print(f"{size} {1000 * seconds:,.1f} ms | {mebibytes:,.0f} MiB |", flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("quality", help="gradients against the exact ones")
    costs = commands.add_parser("cost", help="time and memory")
    costs.add_argument("--limit", type=float, default=8.0, help="GiB above which one-hot is not tried")
    one = commands.add_parser("measure", help="one measurement, for `cost`")
    one.add_argument("name")
    one.add_argument("size", type=int, nargs=3)
    options = parser.parse_args()
    if options.command == "quality":
        quality()
    elif options.command == "cost":
        cost(options.limit)
    else:
        measure(options.name, *options.size)


if __name__ == "__main__":
    main()
