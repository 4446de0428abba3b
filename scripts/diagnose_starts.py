"""Count how often new selectors lose the action, so that the network unlearns what it knew.

    python scripts/diagnose_starts.py runs/study --seed 3

The first fifth of a tuning of the study, with ten new selectors for each way to learn. The unpruned model, the data and the rates
are those of the study; the weights of the selectors and the order of the clips are drawn anew each time. A start counts as lost
if a slot then keeps less of the action than chance. Written into docs/study_details.md.

    python scripts/diagnose_starts.py runs/study --seed 3 --share 1 --ways "STTS, sigma 0.1, the paper's rates" --settings when

does so at the end of the tuning, and for some ways alone; other settings than those of the page are printed, not written.
"""

import argparse
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from pages import fill, header, line
from study_plan import DETAILS, METHODS, Method, Row, composed, data_sets, job
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from stts_lightning import assembly
from stts_lightning.classifier import VideoClassifier
from stts_lightning.data.dataset import Batch
from stts_lightning.selection.truth import found
from stts_lightning.training.callbacks import annealed_sigma
from stts_lightning.training.optim import build_optimizer
from stts_lightning.training.starts import Starts

MARKS = ("<!-- starts: written by scripts/diagnose_starts.py -->", "<!-- end of starts -->")
TESTED = 8
"""Batches on which it is looked what is kept."""
SHARE = 0.2
"""Of the steps of a tuning."""
SETTINGS = ("when", "both")
"""In `where` no training of the study failed."""
WAYS = (
    "STTS, sigma 0.1",
    "STTS, sigma 0.5",
    "STTS, sigma 0.1, the paper's rates",
    "recipe, frames=each, network learns at once",
    "recipe, frames=each, network frozen for a quarter",
    "recipe=learn_selection",
)
"""Of the study's methods: the paper's, two by how the network learns while the selectors know nothing, and the recipe."""


class Case(NamedTuple):
    """One way to learn on one setting of the demo."""

    root: Path
    setting: str
    seed: int
    way: Method
    starts: int
    share: float


def configured(case: Case) -> DictConfig:
    """The configuration of the study's run."""
    name = f"demo_{case.setting}"
    data = data_sets([])[name]
    return composed(job(case.root, Row(name, data.budgets[-1], case.way), data, case.seed))


def tuned(model: VideoClassifier, cfg: DictConfig, batches: list[Batch], steps: int) -> None:
    """The first steps of `steps`, one a batch."""
    optimizer, schedule = build_optimizer(model, assembly.build_optim(cfg), steps)
    teacher = assembly.build_teacher(cfg, model)
    model.train()
    for step, batch in enumerate(batches):
        model.slots.sigma.fill_(annealed_sigma(cfg.selection.sigma, step, steps, cfg.callbacks.sigma.until))
        model.slots.seed_noise(batch.draws)
        logits = model(batch.clip[:, 0])
        loss = cross_entropy(logits, batch.label)
        if teacher:
            loss = loss + teacher.loss(batch.clip[:, 0], logits)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), cfg.trainer.gradient_clip_val)
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def kept(model: VideoClassifier, batches: list[Batch]) -> dict[str, float]:
    """Share of the action that each slot keeps, in percent."""
    model.eval()
    shares: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        _, chosen = model(batch.clip[:, 0], return_selection=True)
        assert batch.truth is not None
        for name, share in found(batch.truth[:, 0], list(chosen.values()), model.slots.sizes).items():
            shares.setdefault(name, []).append(share)
    return {name: 100 * float(torch.cat(of).nanmean()) for name, of in shares.items()}


def looked_at(case: Case) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What a random choice keeps, and each of the new selectors."""
    torch.set_num_threads(1)
    cfg = configured(case)
    data = assembly.build_data(cfg, assembly.build_body(cfg).backbone.clip_size)
    data.prepare_data()
    data.setup("fit")
    epoch = data.train_dataloader()
    steps = len(epoch) * cfg.trainer.max_epochs
    training = list(islice(epoch, int(case.share * steps)))
    testing = list(islice(data.val_dataloader(), TESTED))
    by_chance = configured(case)
    by_chance.selection.selector = "random"
    chance = kept(assembly.build_body(by_chance), testing)
    outcomes: list[dict[str, float]] = []
    for start in range(case.starts):
        torch.manual_seed(1000 + start)
        model = assembly.build_body(cfg)
        order = [training[at % len(training)] for at in torch.randperm(int(case.share * steps))]
        Starts(model, 1000 + start).keep_best(cfg.callbacks.starts.draws, data.first_batches(cfg.callbacks.starts.clips))
        tuned(model, cfg, order, steps)
        outcomes.append(kept(model, testing))
        shares = ", ".join(f"{name} {share:.0f} %" for name, share in outcomes[-1].items())
        print(f"{case.way.label}, {case.setting}, start {start}: {shares}", flush=True)
    return chance, outcomes


def told(chance: dict[str, float], outcomes: list[dict[str, float]]) -> str:
    """A cell: how many starts lost the action, and what is kept."""
    lost = sum(any(share < chance[name] for name, share in outcome.items()) for outcome in outcomes)
    shares = ", ".join(f"{name} {statistics.median(outcome[name] for outcome in outcomes):.0f} %" for name in outcomes[0])
    return f"{lost} of {len(outcomes)} ({shares})"


def main() -> None:
    """Print the table, and write it into docs/study_details.md."""
    every = [method.label for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the study's runs")
    parser.add_argument("--seed", type=int, default=0, help="whose unpruned models")
    parser.add_argument("--starts", type=int, default=10, help="new selectors for each way")
    parser.add_argument("--settings", nargs="*", default=SETTINGS, choices=SETTINGS, help="of the demo")
    parser.add_argument("--share", type=float, default=SHARE, help="of a tuning's steps")
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=every, metavar="WAY", help="of the study's methods")
    options = parser.parse_args()
    picked = [method for method in METHODS if method.label in options.ways]
    cases = [
        Case(options.root.resolve(), setting, options.seed, way, options.starts, options.share)
        for way in picked
        for setting in options.settings
    ]
    lines = header("way", *(f"`{setting}`" for setting in options.settings))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        cells = pool.map(looked_at, cases)
        for way in picked:
            row = [told(*cell) for cell in islice(cells, len(options.settings))]
            lines.append(line(way.label, *row))
            print(lines[-1], flush=True)
    if tuple(options.ways) != WAYS or options.share != SHARE or tuple(options.settings) != SETTINGS:
        return
    fill(DETAILS, MARKS, "\n".join(lines))


if __name__ == "__main__":
    main()
