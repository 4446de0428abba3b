"""What the methods of the study keep of a test video, beside the truth: pictures for docs/study.md.

    python scripts/study_pictures.py runs/study
    python scripts/study_pictures.py runs/study --data NAME=FOLDER --video 5

One picture for each data set, of the runs of a seed that are finished: a row of frames for each method, what is dropped dark, the
kept window framed in yellow, the action in blue.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from study_plan import COMMON, METHODS, PAGE, DataSet, Row, data_sets

from stts_lightning import assembly, load_model
from stts_lightning.analysis.kept import shown_boxes, trace
from stts_lightning.analysis.overlay import Pictures, contact_sheet
from stts_lightning.configuration import conf_dir
from stts_lightning.data.dataset import Batch

SHOWN = ("oracle", "random", "fixed (uniform, centre)", "STTS, sigma 0.1, the paper's rates", "recipe=learn_selection")


def video(of: DataSet, number: int) -> tuple[Batch, list[str]]:
    """A test video of a data set, as a batch of one, and the names of the classes."""
    cfg = compose("train", [*COMMON, *of.data, "selection=none", "loader.num_workers=0", "loader.batch_size=1", "run_dir=."])
    data = assembly.build_data(cfg, assembly.build_body(cfg).backbone.clip_size)
    data.prepare_data()
    data.setup("fit")
    dataset = data.val_dataloader().dataset
    return torch.utils.data.default_collate([dataset[number]]), list(data.classes)


@torch.no_grad()
def row(label: str, folder: Path, batch: Batch, classes: list[str]) -> Pictures:
    """The frames of the video, and what a run's model keeps of them."""
    model = load_model(folder / "checkpoints" / "last.ckpt").eval()
    assert batch.truth is not None
    model.slots.tell_truth(batch.truth[:, 0])
    model.slots.seed_noise([0])
    logits, kept = model(batch.clip[:, 0], return_selection=True)
    traced = trace(list(kept.values()), model.slots.sizes, 0)
    guess = int(logits.argmax())
    right = "right" if guess == int(batch.label[0]) else "wrong"
    title = f"{label}: {classes[guess]}, {right} ({float(logits.softmax(-1).max()):.0%})"
    frames = batch.clip[0, 0].permute(1, 2, 3, 0).numpy()
    return contact_sheet(frames, traced, title, width=110, truth=shown_boxes(batch.truth[0, 0], traced.frames))


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the study's runs")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="as in study.py; then of these alone")
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    parser.add_argument("--video", type=int, default=60, help="number of the test video")
    options = parser.parse_args()
    for name, data in data_sets(options.data).items():
        if options.data and name.startswith("demo_"):
            continue
        rows = [Row(name, data.budgets[-1], method) for label in SHOWN for method in METHODS if method.label == label]
        found = [(one.method.label, one.folder(options.root.resolve(), options.seed)) for one in rows]
        found = [(label, folder) for label, folder in found if (folder / "result.json").is_file()]
        if not found:
            continue
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            batch, classes = video(data, options.video)
        page = np.concatenate([row(label, folder, batch, classes) for label, folder in found])
        target = PAGE.parent / "pictures" / f"study_{name.removeprefix('demo_')}.png"
        Image.fromarray(page).save(target, optimize=True)
        print(f"{target}: {', '.join(label for label, _ in found)}")


if __name__ == "__main__":
    main()
