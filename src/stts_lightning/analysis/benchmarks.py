"""What is measured, and the rows that come of it: forward passes, training steps, the operator, loading."""

import ast
import contextlib
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.analysis import peers
from stts_lightning.analysis.flops import count_gflops
from stts_lightning.analysis.speed import Timing, Work, in_turns, matmul, peak_memory
from stts_lightning.classifier import VideoClassifier, create_model
from stts_lightning.data.decode import open_video
from stts_lightning.data.sampling import Spread
from stts_lightning.data.transforms import EvalTransform, TrainTransform
from stts_lightning.kernels import prepacked_weights
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import Selector
from stts_lightning.selection.topk import ESTIMATORS, Estimator, Exact

Row = dict[str, Any]

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16, "bf16-true": torch.bfloat16}
"""By name: what autocast works in, or with "-true" what the weights are held in."""


@dataclass(frozen=True)
class Entrant:
    """A model that is measured.

    Attributes:
        name: as it was asked for.
        model: on its device, in evaluation.
        clip: frames, height, width.
        gflops: of one clip in evaluation.
        family: models of one family differ in selection alone.
        unpruned: whether it keeps all tokens.
        difference: largest difference of logits from its counterpart of ours, for a peer.
    """

    name: str
    model: nn.Module
    clip: tuple[int, int, int]
    gflops: float
    family: str
    unpruned: bool
    difference: float | None = None


def entrant(text: str, device: torch.device) -> Entrant:
    """Build what a text names.

    Args:
        text: `backbone`, `backbone:selection`, and `:key=value` for each argument of the backbone; after `plain:`, without
            kernels. Or `torchvision:name`, of which no part may be chosen.
        device: where it is put.

    Raises:
        BackboneError, SelectionError: for what there is not.
    """
    torch.manual_seed(0)
    if text.startswith("torchvision:"):
        name = text.removeprefix("torchvision:")
        theirs, ours = peers.torchvision_model(name)
        size = ours.backbone.clip_size
        difference = peers.difference(theirs, ours, torch.randn(1, 3, *size))
        return Entrant(text, theirs.to(device), size, count_gflops(ours), text, True, difference)
    kernels = "none" if text.startswith("plain:") else "auto"
    backbone, *parts = text.removeprefix("plain:").split(":")
    arguments = {key: _value(value) for key, _, value in (part.partition("=") for part in parts if "=" in part)}
    selections = [part for part in parts if "=" not in part] or ["none"]
    model = create_model(backbone, selections[0], kernels=kernels, **arguments).eval()
    family = ":".join([kernels, backbone, *(part for part in parts if "=" in part)])
    gflops = count_gflops(model)
    return Entrant(text, model.to(device), model.backbone.clip_size, gflops, family, not model.slots.at_block)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def precision(name: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast as a trainer's `bf16-mixed` or `16-mixed` does it; nothing for "32"."""
    dtype = PRECISIONS[name]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


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

    def groups(self) -> Iterator[tuple[int, str, str]]:
        """Batch, precision and compilation of what is timed side by side."""
        yield from itertools.product(self.batches, self.precisions, self.compiles)


def _peak(timings: Mapping[str, Timing], operations: float) -> float:
    """Floating-point operations a second of the fastest large product."""
    return operations / min(timings[name].median for name in ("matmul", "linear") if name in timings)


def _rows(
    entrants: Sequence[Entrant],
    timings: Mapping[str, Timing],
    memory: Mapping[str, int | None],
    batch: int,
    passes: float,
    peak: float,
    **facts: Any,
) -> Iterator[Row]:
    """A row for each entrant, compared with the first one and with the unpruned model of its family."""
    for one in entrants:
        timing = timings[one.name]
        unpruned = next((p for p in entrants if p.family == one.family and p.unpruned), None)
        speedup = timings[unpruned.name].median / timing.median if unpruned else None
        held = memory[one.name]
        yield {
            "model": one.name,
            **facts,
            "batch": batch,
            "ms": 1e3 * timing.median,
            "ms_low": 1e3 * timing.low,
            "ms_high": 1e3 * timing.high,
            "rounds": timing.rounds,
            "clips_per_second": batch / timing.median,
            "gflops": one.gflops,
            "share_of_peak": passes * 2e9 * one.gflops * batch / timing.median / peak,
            "times_the_first": timings[entrants[0].name].median / timing.median,
            "over_unpruned": speedup,
            "of_ideal": speedup * one.gflops / unpruned.gflops if unpruned and speedup else None,
            "memory_mib": None if held is None else held / 2**20,
            "difference": one.difference,
        }


def forward(entrants: Sequence[Entrant], plan: Plan) -> Iterator[Row]:
    """Forward passes in evaluation, hard selection."""
    for batch, number, how in plan.groups():
        works: dict[str, Work] = {}
        for one in entrants:
            works[one.name] = _forward(compiled(one.model.eval(), how), one.clip, batch, number, plan.device)
        products, operations = matmul(plan.device, PRECISIONS[number] or torch.float32)
        with prepacked_weights():
            memory = {name: peak_memory(work, plan.device) for name, work in works.items()}
            timings = in_turns({**works, **products}, plan.device, plan.seconds, plan.rounds)
        peak = _peak(timings, operations)
        facts = {"precision": number, "compile": how, "peak_tflops": peak / 1e12}
        yield from _rows(entrants, timings, memory, batch, 1, peak, **facts)
        del works, products
        _release()


def _forward(run: Callable[[Tensor], Tensor], size: Sequence[int], batch: int, number: str, device: torch.device) -> Work:
    clip = torch.randn(batch, 3, *size, device=device)

    @torch.no_grad()
    def work() -> Tensor:
        with precision(number, device):
            return run(clip)

    return work


def training(entrants: Sequence[Entrant], plan: Plan) -> Iterator[Row]:
    """Training steps: forward, cross-entropy, backward, AdamW; and the selectors' part of each, measured by itself.

    Of their memory, the most that one holds besides the grid that comes out and the gradient of the one that went in.
    """
    for batch, number, how in plan.groups():
        works: dict[str, Work] = {}
        held: dict[str, int] = {}
        for one in entrants:
            works[one.name] = _step(one.model.train(), compiled(one.model, how), one.clip, batch, number, plan.device)
            if isinstance(one.model, VideoClassifier) and not one.unpruned:
                works[f"selectors of {one.name}"], held[one.name] = _selectors(one.model, batch, plan.device)
        memory = {name: peak_memory(work, plan.device) for name, work in works.items()}
        products, operations = matmul(plan.device, PRECISIONS[number] or torch.float32)
        timings = in_turns({**works, **products}, plan.device, plan.seconds, plan.rounds)
        peak = _peak(timings, operations)
        facts = {"precision": number, "compile": how, "peak_tflops": peak / 1e12}
        for row in _rows(entrants, timings, memory, batch, 3, peak, **facts):
            name, of_all = row["model"], memory[row["model"]]
            share = timings[f"selectors of {name}"].median * 1e3 / row["ms"] if name in held else None
            yield {**row, "selectors_time": share, "selectors_memory": held[name] / of_all if name in held and of_all else None}
        del works, products
        _release()


def _step(
    model: nn.Module, run: Callable[[Tensor], Tensor], size: Sequence[int], batch: int, number: str, device: torch.device
) -> Work:
    clip = torch.randn(batch, 3, *size, device=device)
    label = torch.arange(batch, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    steps = itertools.count()

    def work() -> Tensor:
        if isinstance(model, VideoClassifier):
            step = next(steps)
            model.slots.seed_noise([step * batch + i for i in range(batch)])
        with precision(number, device):
            loss = F.cross_entropy(run(clip).float(), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return work


def _selectors(model: VideoClassifier, batch: int, device: torch.device) -> tuple[Work, int]:
    """Forward and backward passes of the selectors, on grids like those that reach them.

    Returns:
        The passes of all, and the most bytes that one holds besides its result and the gradient of its grid.
    """
    works: list[Work] = []
    most = [0]

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
        most.append((peak_memory(works[-1], device) or 0) - grid.nbytes - grad_output.nbytes)

    def work() -> None:
        for one in works:
            one()

    return work, max(most)


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

    works = {kind: work(estimate) for kind, estimate in estimators.items()}
    memory = {kind: peak_memory(run, plan.device) for kind, run in works.items()}
    for kind, timing in in_turns(works, plan.device, plan.seconds, plan.rounds).items():
        held = memory[kind]
        yield {
            "model": name,
            "estimator": kind,
            "rows": rows,
            "candidates": candidates,
            "kept": keep,
            "samples": samples,
            "ms": 1e3 * timing.median,
            "ms_low": 1e3 * timing.low,
            "ms_high": 1e3 * timing.high,
            "memory_mib": None if held is None else held / 2**20,
        }


def loading(
    videos: Sequence[Path],
    decoders: Sequence[str],
    size: tuple[int, int, int],
    stride: int,
    seconds: float,
    rounds: int,
    copies: int = 1,
) -> Iterator[Row]:
    """Decode, resize and crop clips on one core, decoders in turns over the same clips; times are of the processor.

    Args:
        videos: files, all of which decode.
        decoders: names as in `clip.decoder`.
        size: frames, height and width of a clip.
        stride: frames from one of a clip's to the next.
        seconds: how long to go on, over all decoders.
        rounds: clips of each decoder at least.
        copies: differently cropped clips of each decoded one, as in training.
    """
    frames, *sides = size
    sampling, rng = Spread(frames, stride), np.random.default_rng(0)
    transforms = {
        "test": EvalTransform(sides),
        "train": TrainTransform(sides, copies=copies),
        "train_randaugment": TrainTransform(sides, randaugment="rand-m7-n4-mstd0.5-inc1", copies=copies),
    }
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in decoders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    try:
        for number in itertools.count():
            if number >= rounds and time.perf_counter() - begun > seconds:
                break
            path, place = videos[number % len(videos)], int(rng.integers(2**31))
            for decoder in [*decoders[number % len(decoders) :], *decoders[: number % len(decoders)]]:
                start = time.process_time()
                with open_video(path, decoder) as reader:
                    clip = reader.frames(sampling.train(len(reader), np.random.default_rng(place), reader.rate))
                taken[decoder].setdefault("decode", []).append(time.process_time() - start)
                for name, transform in transforms.items():
                    start = time.process_time()
                    transform(torch.from_numpy(clip).permute(0, 3, 1, 2))
                    taken[decoder].setdefault(name, []).append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    for decoder, times in taken.items():
        middle = {name: statistics.median(values) for name, values in times.items()}
        yield {
            "decoder": decoder,
            "clips": len(times["decode"]),
            **{f"{name}_ms": 1e3 * value for name, value in middle.items()},
            "clips_per_second_per_core": copies / (middle["decode"] + middle["train"]),
            "clips_per_second_per_core_randaugment": copies / (middle["decode"] + middle["train_randaugment"]),
            "clips_per_second_per_core_test": 1 / (middle["decode"] + middle["test"]),
        }


def _release() -> None:
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
