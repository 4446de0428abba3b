"""How fast the perturbed Top-K is by itself, by estimator."""

import functools
from collections.abc import Iterator, Sequence

import torch

from stts_lightning.analysis import peers
from stts_lightning.analysis.attempts import Attempt
from stts_lightning.analysis.benchmarks import Plan, Row, mib, times
from stts_lightning.analysis.entrants import Entrant
from stts_lightning.analysis.speed import Work, in_turns, peak_memory
from stts_lightning.classifier import VideoClassifier
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import Selector
from stts_lightning.selection.topk import ESTIMATORS, Estimator, Exact


def operator(entrants: Sequence[Entrant], plan: Plan) -> Iterator[Row]:
    """The Top-K's estimators, forward and backward, at the sizes of the entrants' slots."""
    for batch in plan.batches:
        for one in entrants:
            if not isinstance(one.model, VideoClassifier):
                continue
            for name, selector in one.model.slots.selectors.items():
                assert isinstance(selector, Selector)
                frames, height, width = selector.in_size
                keep = selector.out_size[0] if name.startswith("t") else 1
                candidates = frames if name.startswith("t") else len(getattr(selector, "corners", range(height * width)))
                rows = batch if name.startswith("t") else batch * frames
                yield from _estimators(f"{one.name}, {name}", rows, candidates, keep, one.model.slots.selection.samples, plan)


def _estimators(name: str, rows: int, candidates: int, keep: int, samples: int, plan: Plan) -> Iterator[Row]:
    torch.manual_seed(0)
    scores = torch.rand(rows, candidates, device=plan.device, requires_grad=True)
    grad_output = torch.randn(rows, keep, candidates, device=plan.device)
    sigma = torch.tensor(0.1, device=plan.device)
    estimators: dict[str, Estimator] = {kind: make(samples) for kind, make in ESTIMATORS.items()}
    if candidates > Exact.limit:
        del estimators["exact"]
    if rows * samples * keep * candidates < 2**28:
        estimators["one-hot"] = peers.OneHot(samples)

    def work(estimate: Estimator) -> Work:
        return lambda: estimate(scores, keep, sigma, Noise.of([7])).backward(grad_output)

    works = {kind: Attempt(functools.partial(work, estimate)) for kind, estimate in estimators.items()}
    memory = {kind: peak_memory(run, plan.device) for kind, run in works.items()}
    timings = in_turns(works, plan.device, plan.seconds, plan.rounds, on_device=plan.timer)
    for kind, run in works.items():
        facts: Row = {"model": name, "estimator": kind, "rows": rows, "candidates": candidates, "kept": keep, "samples": samples}
        if run.failure:
            yield {**facts, "remark": run.failure}
            continue
        yield {**facts, **times(timings[kind]), "memory_mib": mib(memory[kind])}
