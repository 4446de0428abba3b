"""Can a scorer see the action where a slot stands? It is told the truth here, which no training does.

    python scripts/probe_selection.py runs/study demo_both
    python scripts/probe_selection.py runs/study NAME --data NAME=FOLDER

On the grid that reaches a block of an unpruned model of the study, new scorers learn to tell frames with the action from others,
and tokens of the action from others of these frames. Printed is how well they do so on test videos: the area under the ROC curve
in percent, of which 50 is chance; and how many of the action's frames lie in the segment of half of the frames with the best mean
score. What cannot be seen when it is told will hardly be learned from labels of classes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from pages import header, line
from study_plan import COMMON, data_sets, plain_folder
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc

from stts_lightning import assembly
from stts_lightning.classifier import VideoClassifier
from stts_lightning.configuration import conf_dir
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.selection.scorer import SCORERS
from stts_lightning.selection.truth import of_grid, tokens_shown

BLOCKS = (0, 1, 2, 3)
CLIPS = 600
"""Training and test clips at most."""

Seen = dict[int, tuple[Tensor, Tensor]]
"""Grids `(N, T, H, W, C)` that reach each block, and the truth `(N, T, 4)` of their frames."""


@torch.no_grad()
def grids(model: VideoClassifier, data: VideoDataModule, split: str) -> Seen:
    """What reaches each block, of some clips."""
    kept: dict[int, list[Tensor]] = {block: [] for block in BLOCKS}
    for block in BLOCKS:
        slot = model.slots.selectors[f"t{block}"]
        slot.register_forward_pre_hook(lambda _, inputs, block=block: kept[block].append(inputs[0].half()))
    truths: list[Tensor] = []
    for batch in data.train_dataloader() if split == "train" else data.val_dataloader():
        model(batch.clip[:, 0])
        truths.append(batch.truth[:, 0])
        if sum(map(len, truths)) >= CLIPS:
            break
    for selector in model.slots.selectors.values():
        selector._forward_pre_hooks.clear()
    truth = torch.cat(truths)
    return {block: (torch.cat(found), of_grid(truth, found[0].shape[1])) for block, found in kept.items()}


def candidates(seen: tuple[Tensor, Tensor], scorer: str, axis: str) -> tuple[Tensor, Tensor]:
    """What a scorer sees, `(rows, N, E)`, and whether each is of the action, `(rows, N)`."""
    grid, boxes = seen[0].float(), seen[1]
    action = ~boxes[..., 0].isnan()
    if axis == "t":
        return SCORERS[scorer].describe_frames(grid), action
    shown = tokens_shown(boxes, (grid.shape[1], grid.shape[2], grid.shape[3])).unflatten(1, (grid.shape[1], -1)) > 0.5
    return grid.flatten(2, 3)[action], shown[action]


def probed(train: Seen, test: Seen, block: int, scorer: str, axis: str, steps: int = 300) -> tuple[float, float]:
    """Of a scorer that was told the truth, on test clips: area under the ROC curve, and share of the action in the best half."""
    inputs, labels = candidates(train[block], scorer, axis)
    torch.manual_seed(0)
    made = SCORERS[scorer](inputs.shape[-1])
    optimizer = torch.optim.AdamW(made.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (32,))
        loss = binary_cross_entropy_with_logits(made(inputs[rows]), labels[rows].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, labels = candidates(test[block], scorer, axis)
    with torch.no_grad():
        scores = made(inputs)
    half = scores.shape[1] // 2
    first = scores.unfold(1, half, 1).mean(-1).argmax(-1)
    found = labels.unfold(1, half, 1).sum(-1)[torch.arange(len(first)), first] / labels.sum(1)
    return float(binary_auroc(scores.flatten(), labels.flatten().int())), float(found.nanmean())


def table(root: Path, name: str, own: Sequence[str], seed: int) -> list[str]:
    """The table in Markdown."""
    found = data_sets(own)[name]
    file = plain_folder(root, name, seed) / "checkpoints" / "last.ckpt"
    slots = [f"+selection.slots.t{block}.ratio=1.0" for block in BLOCKS]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", [*COMMON, *found.data, "selection=none", *slots, "recipe=none", f"pretrained={file}", "run_dir=."])
    cfg.selection.selector = "uniform"
    model = assembly.build_body(cfg).eval()
    data = assembly.build_data(cfg, model.backbone.clip_size)
    data.setup("fit")
    train, test = (grids(model, data, split) for split in ("train", "val"))
    lines = header("scorer", *(f"block {block}" for block in BLOCKS))
    of_tokens = ("paper", "official")  # Which deviation scores as official does.
    for axis, what, scorers in (("t", "frames", (*of_tokens, "deviation")), ("s", "tokens of a frame", of_tokens)):
        for scorer in scorers:
            results = [probed(train, test, block, scorer, axis) for block in BLOCKS]
            lines.append(line(f"{what}, {scorer}", *(f"{100 * area:.0f}" for area, _ in results)))
            if axis == "t":
                lines.append(line("found in a segment, %", *(f"{100 * found:.0f}" for _, found in results)))
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the study's runs")
    parser.add_argument("name", help="of the data set")
    parser.add_argument("--seed", type=int, default=0, help="of the unpruned model")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="as in study.py")
    options = parser.parse_args()
    print("\n".join(table(options.root.resolve(), options.name, options.data, options.seed)))


if __name__ == "__main__":
    main()
