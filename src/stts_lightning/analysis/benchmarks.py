"""What is measured of models, and the rows that come of it: forward passes and training steps."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.analysis import peers
from stts_lightning.analysis.attempts import Attempt, release
from stts_lightning.analysis.entrants import Entrant
from stts_lightning.analysis.speed import (
    CAPTURED,
    DeviceTimer,
    Timing,
    Work,
    device_timer,
    float32_products,
    graph_memory,
    in_turns,
    matmul,
    peak_memory,
)
from stts_lightning.classifier import VideoClassifier
from stts_lightning.kernels import in_use, prepacked_weights
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import Selector

Row = dict[str, Any]

TOLERANCE = 0.05
"""Relative difference of outputs from float32 above which a row is flagged; bfloat16 is at 0.015."""

GRAPHS = ("reduce-overhead", "max-autotune")
"""Ways of torch.compile that capture CUDA graphs."""


@dataclass(frozen=True)
class Precision:
    """What a model is computed in.

    Attributes:
        trainer: what a trainer calls it.
        autocast: type that autocast works in; None for no autocast.
        weights: type that weights and clips are held in.
        tf32: whether float32 products of a GPU are in TF32.
    """

    trainer: str
    autocast: torch.dtype | None = None
    weights: torch.dtype = torch.float32
    tf32: bool = False

    @property
    def products(self) -> torch.dtype:
        """Type of the matrix products."""
        return self.autocast or self.weights


PRECISIONS = {
    "32": Precision("32-true"),
    "tf32": Precision("32-true", tf32=True),
    "bf16": Precision("bf16-mixed", autocast=torch.bfloat16),
    "16": Precision("16-mixed", autocast=torch.float16),
    "bf16-true": Precision("bf16-true", weights=torch.bfloat16),
}
"""By name. "bf16" and "16" are autocast, as in a trainer's mixed precision."""


def precision(name: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast as a trainer's `bf16-mixed` or `16-mixed` does it; nothing for "32"."""
    dtype = PRECISIONS[name].autocast
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def held_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model, or a copy with its weights in another type. Ours keeps its constants; torchvision's has none."""
    if dtype == torch.float32:
        return model
    copied = copy.deepcopy(model)
    return copied.cast_weights(dtype) if isinstance(copied, VideoClassifier) else copied.to(dtype)


def compiled(model: nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    """The model, run in one of the ways of `classifier.COMPILE`."""
    if how == "false":
        return model
    whole = isinstance(model, VideoClassifier)
    return torch.compile(model, fullgraph=whole, mode=None if how == "true" else how)  # type: ignore[return-value]


@dataclass(frozen=True)
class Plan:
    """How things are measured.

    Attributes:
        device: where.
        batches: clips at a time.
        precisions: names of `PRECISIONS`.
        compiles: of `classifier.COMPILE`.
        seconds: how long for each group of works that are timed in turns.
        rounds: how often each at least.
    """

    device: torch.device
    batches: Sequence[int]
    precisions: Sequence[str]
    compiles: Sequence[str]
    seconds: float
    rounds: int

    @property
    def timer(self) -> DeviceTimer | None:
        """What times the device itself, where it can."""
        return device_timer(self.device)

    def groups(self) -> Iterator[tuple[int, str, str]]:
        """Batch, precision and compilation of what is timed side by side."""
        yield from itertools.product(self.batches, self.precisions, self.compiles)


def _peak(timings: Mapping[str, Timing], products: Mapping[str, Attempt], operations: float) -> float | None:
    """Floating-point operations a second of the fastest large product; None where none ran."""
    ran = [timings[name].median for name, product in products.items() if product.failure is None]
    return operations / min(ran) if ran else None


def _products(number: str, device: torch.device) -> tuple[dict[str, Attempt], float]:
    """Large matrix products in a precision, and the floating-point operations of one."""
    works, operations = matmul(device, PRECISIONS[number].products)
    return {name: Attempt(functools.partial(_itself, work)) for name, work in works.items()}, operations


def _itself(work: Work) -> Work:
    return work


def _facts(one: Entrant, batch: int, number: str, how: str, device: torch.device) -> Row:
    """What a row says of how it was measured."""
    kernels = "none"
    if isinstance(one.model, VideoClassifier):
        kernels = in_use(one.model.backbone, device, PRECISIONS[number].trainer, compiled=how != "false")
    return {
        "model": one.name,
        "batch": batch,
        "precision": number,
        "tf32": "on" if PRECISIONS[number].tf32 else "off",
        "compile": how,
        "kernels": kernels,
        "gflops": one.gflops,
    }


def _row(
    one: Entrant, entrants: Sequence[Entrant], timings: Mapping[str, Timing], batch: int, passes: float, peak: float | None
) -> Row:
    """Figures of an entrant, compared with the first one and with the unpruned model of its family.

    Args:
        timings: of entrants that did not fail, this one among them.
        passes: how many forward passes its GFLOPs are counted for.
        peak: floating-point operations a second of the fastest large product.
    """
    timing = timings[one.name]
    unpruned = next((p for p in entrants if p.family == one.family and p.unpruned and p.name in timings), None)
    speedup = timings[unpruned.name].median / timing.median if unpruned else None
    first = timings.get(entrants[0].name)
    return {
        **times(timing),
        "clips_per_second": batch / timing.median,
        "share_of_peak": passes * 2e9 * one.gflops * batch / timing.median / peak if peak else None,
        "peak_tflops": peak / 1e12 if peak else None,
        "times_the_first": first.median / timing.median if first else None,
        "over_unpruned": speedup,
        "of_ideal": speedup * one.gflops / unpruned.gflops if unpruned and speedup else None,
        "difference": one.difference,
    }


def times(timing: Timing) -> Row:
    """Milliseconds of a row: `ms` is the wall clock, what a user waits; `device_ms` what the device took."""
    row = {"ms": 1e3 * timing.median, "ms_low": 1e3 * timing.low, "ms_high": 1e3 * timing.high}
    if timing.device:
        device = timing.device
        row |= {"device_ms": 1e3 * device.median, "device_ms_low": 1e3 * device.low, "device_ms_high": 1e3 * device.high}
    return {**row, "bound_by": timing.bound_by, "rounds": timing.rounds}


def mib(size: int | None) -> float | None:
    """Bytes in MiB."""
    return None if size is None else size / 2**20


def _memory(work: Attempt, how: str, device: torch.device) -> Row:
    """Most memory that a piece of work holds, and what CUDA graphs keep, those of the group's earlier entrants included."""
    graphs = how in GRAPHS and device.type == "cuda"
    held = peak_memory(work, device, CAPTURED if graphs else 1)
    return {"memory_mib": mib(held), "graphs_mib": mib(graph_memory(device)) if graphs and work.failure is None else None}


def flaw(outputs: Tensor | None, expected: Tensor | None) -> Row:
    """How far outputs are from those expected, and a remark if that is too far.

    Args:
        outputs: logits of a row, or its loss; None where they were not to be had.
        expected: the same in float32; None if they need only be finite.
    """
    if outputs is None:
        return {}
    if not bool(outputs.isfinite().all()):
        return {"remark": "outputs are not finite"}
    if expected is None:
        return {}
    off = peers.relative_difference(outputs, expected)
    return {"output_difference": off, "remark": None if off <= TOLERANCE else f"outputs differ by {off:.0%}"}


COMPARED = 4
"""Clips of a batch whose outputs are compared; what the others give does not depend on them."""


def forward(entrants: Sequence[Entrant], plan: Plan) -> Iterator[Row]:
    """Forward passes in evaluation, hard selection; outputs are compared with the same model's in float32, on the device."""
    for batch, number, how in plan.groups():
        settings = batch, number, how, plan.device
        works = {one.name: Attempt(functools.partial(_forward, one, *settings)) for one in entrants}
        products, operations = _products(number, plan.device)
        seen: dict[str, Row] = {}
        with prepacked_weights(), float32_products(PRECISIONS[number].tf32):
            for one in entrants:
                seen[one.name] = _memory(works[one.name], how, plan.device)
                outputs = works[one.name]()
                if isinstance(outputs, Tensor):
                    # A copy: the memory of a graph's outputs is written again.
                    seen[one.name] |= flaw(outputs[:COMPARED].float().clone(), _expected(one, batch, plan.device))
            timings = in_turns({**works, **products}, plan.device, plan.seconds, plan.rounds, on_device=plan.timer)
        peak = _peak(timings, products, operations)
        yield from _rows(entrants, works, timings, seen, 1, peak, *settings)
        del works, products
        release()


def _rows(
    entrants: Sequence[Entrant],
    works: Mapping[str, Attempt],
    timings: Mapping[str, Timing],
    seen: Mapping[str, Row],
    passes: float,
    peak: float | None,
    *settings: Any,
) -> Iterator[Row]:
    """A row for each entrant: its figures, or why there are none."""
    timings = {name: timing for name, timing in timings.items() if name not in works or works[name].failure is None}
    for one in entrants:
        facts = _facts(one, *settings)
        if failure := works[one.name].failure:
            yield {**facts, "remark": failure}
        else:
            yield {**facts, **_row(one, entrants, timings, settings[0], passes, peak), **seen[one.name]}


def _clip(one: Entrant, batch: int, device: torch.device) -> Tensor:
    """Normalised clips `(batch, 3, T, H, W)`, float32, the same at each call."""
    return torch.randn(batch, 3, *one.clip, device=device, generator=torch.Generator(device).manual_seed(0))


@torch.no_grad()
def _expected(one: Entrant, batch: int, device: torch.device) -> Tensor | None:
    """Logits of the first clips in float32: without TF32, kernels or compilation. None where memory does not suffice."""
    backbone = one.model.backbone if isinstance(one.model, VideoClassifier) else None
    kernels = backbone.kernels if backbone else None
    try:
        if backbone:
            backbone.kernels = None
        with float32_products(tf32=False):
            return one.model(_clip(one, batch, device)[:COMPARED])
    except torch.OutOfMemoryError:
        return None
    finally:
        if backbone:
            backbone.kernels = kernels


def _forward(one: Entrant, batch: int, number: str, how: str, device: torch.device) -> Work:
    dtype = PRECISIONS[number].weights
    run = compiled(held_in(one.model.eval(), dtype), how)
    clip = _clip(one, batch, device).to(dtype)

    @torch.no_grad()
    def work() -> Tensor:
        with precision(number, device):
            return run(clip)

    return work


def training(entrants: Sequence[Entrant], plan: Plan) -> Iterator[Row]:
    """Training steps: forward, cross-entropy, backward, AdamW; and the selectors' part of each, measured by itself.

    Clips are uint8 and on the device, but for torchvision's models, which do not normalise by themselves. Of the selectors'
    memory, the most that one holds besides the grid that comes out and the gradient of the one that went in.
    """
    for batch, number, how in plan.groups():
        settings = batch, number, how, plan.device
        works = {one.name: Attempt(functools.partial(_step, one, *settings)) for one in entrants}
        parts: dict[str, Attempt] = {}
        products, operations = _products(number, plan.device)
        seen: dict[str, Row] = {}
        with float32_products(PRECISIONS[number].tf32):
            for one in entrants:
                seen[one.name] = _memory(works[one.name], how, plan.device)
                loss = works[one.name]()
                seen[one.name] |= flaw(loss.detach() if isinstance(loss, Tensor) else None, None)
                if works[one.name].failure is None and isinstance(one.model, VideoClassifier) and not one.unpruned:
                    held: list[int] = []
                    parts[one.name] = Attempt(functools.partial(_selectors, one.model, batch, plan.device, held))
                    parts[one.name]()
                    whole = seen[one.name]["memory_mib"]
                    seen[one.name]["selectors_memory"] = max(held) / 2**20 / whole if held and whole else None
            selecting = {f"selectors of {name}": part for name, part in parts.items()}
            timings = in_turns({**works, **products, **selecting}, plan.device, plan.seconds, plan.rounds, on_device=plan.timer)
        for name, part in parts.items():
            alone = timings[f"selectors of {name}"].median
            seen[name]["selectors_time"] = alone / timings[name].median if part.failure is None else None
        yield from _rows(entrants, works, timings, seen, 3, _peak(timings, products, operations), *settings)
        del works, products, parts, selecting
        release()


def _step(one: Entrant, batch: int, number: str, how: str, device: torch.device) -> Work:
    model, run = one.model.train(), compiled(one.model, how)
    ours = model if isinstance(model, VideoClassifier) else None
    clip = torch.randint(256, (batch, 3, *one.clip), dtype=torch.uint8, device=device) if ours else _clip(one, batch, device)
    label = torch.arange(batch, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    steps = itertools.count()

    def work() -> Tensor:
        if ours:
            step = next(steps)
            # Seeds are the host's, so that no step waits for the device.
            ours.slots.seed_noise([step * batch + i for i in range(batch)])
        try:
            with precision(number, device):
                loss = F.cross_entropy(run(clip).float(), label)
            loss.backward()
            optimizer.step()
        finally:  # Where memory does not suffice, gradients would stay with the model.
            optimizer.zero_grad()
        return loss.detach()

    return work


def _selectors(model: VideoClassifier, batch: int, device: torch.device, held: list[int]) -> Work:
    """Forward and backward passes of the selectors, on grids like those that reach them.

    Args:
        held: gets the most bytes that each selector holds besides its result and the gradient of its grid.
    """
    works: list[Work] = []

    def passes(selector: Selector, grid: Tensor, grad_output: Tensor) -> None:
        kept, _ = selector(grid, model.slots.sigma, Noise.of(range(batch)))
        kept.backward(grad_output)
        grid.grad = None
        for parameter in selector.parameters():
            parameter.grad = None

    for name in itertools.chain(*model.slots.at_block.values()):
        selector = model.slots.get_submodule(f"selectors.{name}")
        assert isinstance(selector, Selector)
        grid = torch.randn(batch, *selector.in_size, selector.dim, device=device, requires_grad=True)
        grad_output = torch.randn(batch, *selector.out_size, selector.dim, device=device)
        works.append(functools.partial(passes, selector, grid, grad_output))
        held.append((peak_memory(works[-1], device) or 0) - grid.nbytes - grad_output.nbytes)

    def work() -> None:
        for one in works:
            one()

    return work
