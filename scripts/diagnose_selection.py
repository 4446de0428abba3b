"""What new selectors do before they have learned anything: the cheapest look at each way to learn a selection.

    python scripts/diagnose_selection.py runs/study

For the demo's setting `both`, the unpruned model of a seed, and five new scorers for each way: how many
candidates a kept one is mixed of in training (the exponential of the entropy of its weights), the largest of these weights, how
far the scores of a row lie apart, the share of the action that is kept at first (mean, and the least of the scorers), the loss,
and the gradients that reach scorers and the rest. Written into docs/study_details.md.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from pages import fill, header, line
from study_plan import DETAILS, METHODS, OPTIONS, Method
from torch.nn.functional import cross_entropy

from stts_lightning import assembly
from stts_lightning.configuration import conf_dir
from stts_lightning.selection.selector import Selection
from stts_lightning.selection.truth import found
from stts_lightning.training.optim import part_parameters
from stts_lightning.training.starts import Starts

MARKS = ("<!-- diagnosis: written by scripts/diagnose_selection.py -->", "<!-- end of diagnosis -->")
SLOTS = ("+selection.slots.t0.ratio=0.5", "+selection.slots.s0.ratio=0.25")
PAPER = tuple(Method(f"the paper's way, sigma {sigma}", (f"selection.sigma={sigma}",)) for sigma in (0.1, 0.5))
LATER = ("network frozen for the first half", "the network's rate rises over the first half", "sigma until 0.6", "distilled")
"""Options that change nothing before the first step."""
RECIPE = next(method for method in METHODS if method.label == "recipe=learn_selection")


def mixed(selection: Selection) -> tuple[float, float, float]:
    """Candidates that a kept one is mixed of, largest weight, and range of the scores; means over a batch."""
    assert selection.indicator is not None
    weights = selection.indicator.detach().clamp_min(1e-12)
    entropy = -(weights * weights.log()).sum(-1)
    spread = selection.scores.amax(-1) - selection.scores.amin(-1)
    return float(entropy.exp().mean()), float(weights.amax(-1).mean()), float(spread.detach().mean())


def norm(parameters: Any) -> float:
    """Norm of all gradients."""
    return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())


def looked_at(method: Method, plain: Path, seed: int) -> dict[str, float]:
    """Figures of one new scorer."""
    base = ["backbone=mvit_tiny", "dataset=demo", "dataset.setting=both", "loader.batch_size=64", "loader.num_workers=0"]
    cfg = compose(
        "train",
        [*base, "selection=none", *SLOTS, f"recipe={method.recipe}", *method.overrides, f"pretrained={plain}", "run_dir=."],
    )
    torch.manual_seed(seed)
    model = assembly.build_body(cfg)
    data = assembly.build_data(cfg, model.backbone.clip_size)
    data.prepare_data()
    data.setup("fit")
    Starts(model, seed).keep_best(cfg.callbacks.starts.draws, data.first_batches(cfg.callbacks.starts.clips))
    batch = next(iter(data.val_dataloader()))
    model.eval().slots.train()
    model.slots.seed_noise(range(len(batch.label)))
    logits, kept = model(batch.clip[:, 0], return_selection=True)
    loss = cross_entropy(logits, batch.label)
    loss.backward()
    parts = part_parameters(model)
    figures: dict[str, float] = {}
    for name, selection in kept.items():
        values = mixed(selection)
        figures |= dict(zip((f"{name} mixed of", f"{name} largest weight", f"{name} range of scores"), values, strict=True))
    for name, shares in found(batch.truth[:, 0], list(kept.values()), model.slots.sizes).items():
        figures[f"{name} found"] = 100 * float(shares.nanmean())
    return {
        **figures,
        "loss": loss.item(),
        "gradient, scorers": norm(parts["selectors"]),
        "gradient, the rest": norm([*parts["backbone"], *parts["head"]]),
    }


def main() -> None:
    """Print the table, and write it into docs/study_details.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the study's runs")
    parser.add_argument("--seeds", type=int, default=5, help="new scorers for each way")
    parser.add_argument("--seed", type=int, default=0, help="whose unpruned model")
    options = parser.parse_args()
    plain = options.root.resolve() / "demo_both" / f"plain_seed{options.seed}" / "checkpoints" / "last.ckpt"
    lines: list[str] = []
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for method in (*PAPER, *(option for option in OPTIONS if option.label not in LATER), RECIPE):
            runs = [looked_at(method, plain, seed) for seed in range(options.seeds)]
            if not lines:
                lines = header("way", *runs[0])
            cells = []
            for key in runs[0]:
                values = [run[key] for run in runs]
                text = f"{statistics.mean(values):.3g}"
                cells.append(f"{text} (least {min(values):.3g})" if key.endswith("found") else text)
            lines.append(line(method.label, *cells))
            print(lines[-1], flush=True)
    fill(DETAILS, MARKS, "\n".join(lines))


if __name__ == "__main__":
    main()
