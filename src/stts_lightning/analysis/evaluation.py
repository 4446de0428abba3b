"""What a test left on disk, and what can be asked of it without another pass: accuracies, intervals, calibration."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from stts_lightning.files import replacing

FILE = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """Logits of every view of every video, in the order of the list.

    Attributes:
        logits: `(N, V, classes)` float32, the crops of a clip one after the other.
        label: `(N,)` int64.
        video: `(N,)` int64, numbers in the list.
        valid: `(N,)` bool; False where a video could not be decoded.
    """

    logits: NDArray[np.float32]
    label: NDArray[np.int64]
    video: NDArray[np.int64]
    valid: NDArray[np.bool_]

    def save(self, path: str | Path) -> None:
        """Write to one file, as a whole."""
        with replacing(path) as part:
            np.savez_compressed(part, logits=self.logits, label=self.label, video=self.video, valid=self.valid)

    def only(self, chosen: NDArray[np.bool_]) -> Self:
        """Those of some videos."""
        return type(self)(self.logits[chosen], self.label[chosen], self.video[chosen], self.valid[chosen])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, given the file or its folder. Raises FileNotFoundError."""
        path = Path(path)
        with np.load(path / FILE if path.is_dir() else path) as content:
            return cls(content["logits"], content["label"], content["video"], content["valid"])

    @classmethod
    def merged(cls, parts: Sequence["Predictions"], videos: int | None) -> Self:
        """All parts of a test by several processes, in the order of the list.

        Args:
            parts: what each process found.
            videos: of the list; None where only some were to be tested.

        Raises:
            ValueError: unless each of the list's videos stands in exactly one part.
        """
        numbers = np.concatenate([part.video for part in parts])
        expected = np.unique(numbers) if videos is None else np.arange(videos)
        if not np.array_equal(np.sort(numbers), expected):
            raise ValueError(f"a test of {videos} videos left {len(numbers)} predictions of {len(set(numbers.tolist()))} videos")
        order = np.argsort(numbers)
        logits, label, valid = (np.concatenate([getattr(p, name) for p in parts])[order] for name in ("logits", "label", "valid"))
        return cls(logits, label, numbers[order], valid)


def probabilities(predictions: Predictions, views: Sequence[int] | None = None) -> Tensor:
    """Mean softmax over views (all, or those numbered), `(N, classes)`: how the paper averages a video's views."""
    logits = torch.from_numpy(predictions.logits)
    return (logits if views is None else logits[:, list(views)]).softmax(-1).mean(1)


def check_question(views: Sequence[int] | None, missing: str, available: int) -> None:
    """Raise ValueError unless `score` can answer this of a test of so many views."""
    if missing not in ("skip", "wrong"):
        raise ValueError(f"missing={missing!r}: allowed are skip, wrong")
    if views is not None and (not views or not all(0 <= view < available for view in views)):
        raise ValueError(f"views={list(views)}: allowed are numbers from 0 to {available - 1}")


def bootstrap(values: Tensor, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over videos, `(N,)` float64, from as many means of videos drawn with replacement."""
    draws = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def score(
    predictions: Predictions, views: Sequence[int] | None = None, missing: str = "skip", resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Figures of a test.

    Args:
        predictions: logits of every view.
        views: which views to average; None is all.
        missing: videos that could not be decoded: "skip" leaves them out, "wrong" counts them as errors.
        resamples: of the bootstrap over videos that gives the 95 % interval of top-1.
        seed: of the bootstrap.

    Returns:
        top1, top5 (where there are more than 5 classes), mean_class_accuracy, calibration_error (15 bins, of the most
        likely class), top1_interval, videos, missing, views.
    """
    check_question(views, missing, predictions.logits.shape[1])
    valid = torch.from_numpy(predictions.valid)
    odd = predictions.valid & ~np.isfinite(predictions.logits).all((1, 2))
    if odd.any():
        raise ValueError(f"logits of {odd.sum()} videos are NaN or infinite; the first is number {predictions.video[odd][0]}")
    label = torch.from_numpy(predictions.label)
    chances = probabilities(predictions, views)
    classes = chances.shape[1]
    counted = valid if missing == "skip" else torch.ones_like(valid)
    if not bool(counted.any()):
        raise ValueError("no video of the test could be decoded")
    ranked = chances.topk(min(5, classes)).indices
    hits = (ranked == label[:, None]) & valid[:, None]
    first, five = hits[counted, 0].double(), hits[counted].any(1).double()
    per_class = [float(first[label[counted] == c].mean()) for c in range(classes) if bool((label[counted] == c).any())]
    error = multiclass_calibration_error(chances[valid], label[valid], classes, n_bins=15) if bool(valid.any()) else torch.nan
    return {
        "top1": float(first.mean()),
        **({"top5": float(five.mean())} if classes > 5 else {}),
        "mean_class_accuracy": float(np.mean(per_class)),
        "calibration_error": float(error),
        "top1_interval": list(bootstrap(first, resamples, seed)),
        "videos": int(counted.sum()),
        "missing": int((~valid).sum()),
        "views": len(views) if views is not None else predictions.logits.shape[1],
    }


def confusion(predictions: Predictions) -> NDArray[np.int64]:
    """How often a class (row) was taken for a class (column), `(classes, classes)`, over the videos that decoded."""
    classes = predictions.logits.shape[2]
    guess = probabilities(predictions).argmax(1).numpy()
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (predictions.label[predictions.valid], guess[predictions.valid]), 1)
    return table


def write_tables(predictions: Predictions, classes: Sequence[str], folder: str | Path) -> None:
    """Write `per_class.csv` (class, videos, right, accuracy, most_taken_for), `confusion.csv` and `.png` into a folder."""
    from stts_lightning.analysis import charts  # Late: matplotlib is slow to import, and most commands draw nothing.

    table = confusion(predictions)
    with charts.style():
        title = f"{int(table.trace())} of {int(table.sum())} right"
        charts.confusion(table, classes, title).savefig(Path(folder) / "confusion.png", dpi=110)
    with (Path(folder) / "per_class.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "videos", "right", "accuracy", "most_taken_for"])
        for name, row, number in zip(classes, table, range(len(classes)), strict=True):
            others = np.delete(row, number)
            other = np.delete(np.array(classes, dtype=object), number)[others.argmax()] if others.any() else ""
            accuracy = f"{row[number] / row.sum():.4f}" if row.sum() else ""
            writer.writerow([name, row.sum(), row[number], accuracy, other])
    with (Path(folder) / "confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, table.tolist(), strict=True))
