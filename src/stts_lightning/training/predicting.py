"""Prediction: labels over time of any videos, and pictures of what was kept, under any number of processes."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from stts_lightning.analysis.kept import Kept, trace
from stts_lightning.analysis.overlay import contact_sheet, film
from stts_lightning.analysis.results import printable
from stts_lightning.data.encode import write_mp4
from stts_lightning.data.windows import Window, WindowBatch, WindowDataset, WindowRule, collate_windows
from stts_lightning.data.workers import LoaderOptions, begin_worker
from stts_lightning.files import write_json
from stts_lightning.kernels import prepacked_weights
from stts_lightning.progress import counting
from stts_lightning.run_folders import exit_status, how_to_resume
from stts_lightning.selection.reducer import Record
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.partial import Asked, PartialResults, listening, read_records, write_records

log = logging.getLogger(__name__)


class WindowData(pl.LightningDataModule):
    """Windows of videos, each video on one process."""

    def __init__(self, videos: Sequence[Path], rule: WindowRule, loader: LoaderOptions) -> None:
        super().__init__()
        self.videos, self.rule, self.options = list(videos), rule, loader
        self.done: Collection[int] = ()
        """Numbers of videos that need no windows: they were predicted before."""

    def predict_dataloader(self) -> DataLoader[WindowBatch]:
        """Windows of this process's videos."""
        assert self.trainer is not None
        processes = self.trainer.world_size
        dataset = WindowDataset(self.videos, self.rule, self.trainer.global_rank, processes, self.done)
        size = self.options.eval_batch_size or self.options.batch_size
        workers = min(self.options.workers(self.trainer), -(-len(self.videos) // processes))
        timeout = self.options.timeout if workers else 0
        return DataLoader(  # type: ignore[arg-type]
            dataset,
            max(size // processes, 1),
            num_workers=workers,
            prefetch_factor=self.options.prefetch_factor if workers else None,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            collate_fn=collate_windows,
            timeout=timeout,
            worker_init_fn=begin_worker,
        )


def ranked(chances: torch.Tensor, classes: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The most likely classes of `(classes,)`, the likeliest first."""
    values, labels = chances.topk(min(count, len(chances)))
    pairs = zip(labels.tolist(), values.tolist(), strict=True)
    return [{"label": label, "class": classes[label], "probability": round(value, 6)} for label, value in pairs]


def overlay_names(videos: Sequence[Path]) -> list[str]:
    """A name for the overlay of each video, no two alike: its stem; its folder too where others have that; then a number too.

    Case does not count: some file systems take `A.mp4` and `a.mp4` for one file.
    """
    stems = Counter(video.stem.casefold() for video in videos)
    names = [video.stem if stems[video.stem.casefold()] == 1 else f"{video.parent.name}_{video.stem}" for video in videos]
    counts = Counter(name.casefold() for name in names)
    taken = {name for name, count in counts.items() if count == 1}
    for number, name in enumerate(names):
        if counts[name.casefold()] > 1:
            name = f"{name}_{number}"
            while name.casefold() in taken:
                name += "_"
            taken.add(name.casefold())
            names[number] = name
    return names


class Predictor(pl.Callback):
    """Gathers labels of windows and videos, and draws overlays; videos are written as they are finished.

    Args:
        folder: of the outcome.
        videos: files.
        classes: names by label.
        top: how many classes of each window.
        overlays: windows of each video that are drawn; 0 draws none.
        quiet: show no progress.
    """

    every_seconds = 10.0

    def __init__(
        self, folder: Path, videos: Sequence[Path], classes: Sequence[str], top: int, overlays: int, quiet: bool
    ) -> None:
        self.folder, self.videos, self.classes, self.top, self.overlays = folder, list(videos), classes, top, overlays
        self.chances: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.drawn: dict[int, list[tuple[np.ndarray, Kept, str, float]]] = defaultdict(list)
        self.lines: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self.finished: dict[int, dict[str, Any]] = {}
        """Videos that are not written yet."""
        self.written = time.monotonic()
        self.partial: PartialResults | None = None
        self.asked = Asked()
        self.overlay_names = overlay_names(self.videos)
        self.quiet, self.shown = quiet, ExitStack()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the progress of the first process's videos."""
        share = len(range(0, len(self.videos), trainer.world_size))
        self.one_more = self.shown.enter_context(counting("videos", share, self.quiet or not trainer.is_global_zero))

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: WindowBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take in the windows of a batch."""
        logits, kept = outputs
        chances = [] if logits is None else list(logits.softmax(-1).mean(1).cpu())
        crops = 1 if logits is None else logits.shape[1]
        sizes = pl_module.model.slots.sizes
        row = 0
        for window in batch.windows:
            if not window.failure:
                self._take(window, chances[row], kept, sizes, row * crops + crops // 2)
                row += 1
            if window.failure or window.number == window.of - 1:
                self._finish(window)
                self.one_more()
        if self.asked or time.monotonic() - self.written > self.every_seconds:
            self._write()
        if self.asked:
            log.warning("asked to end: %s holds the videos that are done; %s", self.folder, how_to_resume(self.folder))
            raise SystemExit(exit_status(self.asked.number))

    def _take(self, window: Window, chances: torch.Tensor, kept: list[Record], sizes: dict[str, Any], row: int) -> None:
        best = ranked(chances, self.classes, self.top)
        self.chances[window.video].append(chances)
        self.lines[window.video].append({"start": round(window.start, 3), "end": round(window.end, 3), "top": best})
        if window.pictures is not None and len(self.drawn[window.video]) < self.overlays:
            text = f"{window.start:.1f}-{window.end:.1f} s   {best[0]['class']} {best[0]['probability']:.0%}"
            rate = len(window.pictures) / max(window.end - window.start, 0.1)
            self.drawn[window.video].append((window.pictures, trace(kept, sizes, row), text, rate))

    def _finish(self, window: Window) -> None:
        video = window.video
        record: dict[str, Any] = {"video": str(self.videos[video])}
        if window.note:
            record["decoder"] = f"pyav: {window.note}"
        if window.failure:
            log.warning("%s", printable(window.failure))
            record["error"] = window.failure
        chances, windows = self.chances.pop(video, []), self.lines.pop(video, [])
        if chances:
            record |= {"top": ranked(torch.stack(chances).mean(0), self.classes, self.top), "windows": windows}
        if drawn := self.drawn.pop(video, []):
            record |= self._draw(video, drawn)
        self.finished[video] = record

    def _draw(self, video: int, drawn: list[tuple[np.ndarray, Kept, str, float]]) -> dict[str, Any]:
        folder = self.folder / "overlays"
        folder.mkdir(exist_ok=True)
        name, title = self.overlay_names[video], printable(self.videos[video].name)
        sheets = [contact_sheet(pictures, kept, f"{title}   {text}") for pictures, kept, text, _ in drawn]
        Image.fromarray(np.concatenate(sheets)).save(folder / f"{name}.png")
        frames = (
            frame
            for pictures, kept, text, _ in drawn
            for frame in film(pictures, kept, [text, f"{kept.share:.0%} of tokens kept"])
        )
        rate = min(max(round(drawn[0][3]), 1), 30)
        write_mp4(folder / f"{name}.mp4", frames, rate=rate)
        return {"overlay": [f"overlays/{name}.png", f"overlays/{name}.mp4"]}

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what is left."""
        self.shown.close()
        self._write()
        trainer.strategy.barrier("predictions")

    def _write(self) -> None:
        self.written = time.monotonic()
        if self.finished and self.partial:
            write_records(self.partial, {str(video): record for video, record in self.finished.items()})
            self.finished.clear()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self.shown.close()


def run_predict(
    trainer: pl.Trainer, module: ClassificationModule, data: WindowData, predictor: Predictor, asked: str = ""
) -> list[dict[str, Any]] | None:
    """Predict all videos; `predictions.json` in the predictor's folder holds what is returned, unless no video decoded.

    A prediction that was ended goes on with the videos that are left.

    Args:
        trainer: runs it.
        module: the model.
        data: the videos.
        predictor: gathers.
        asked: what tells the question from others; empty predicts all videos anew.

    Returns:
        On the first process a dictionary a video, in the order asked: video, top (class and probability, over all windows),
        windows (start, end and top of each), overlay (files), error (where it did not decode, or broke off). None on others.
    """
    predictor.folder.mkdir(parents=True, exist_ok=True)
    partial = predictor.partial = PartialResults(predictor.folder / "partial", asked)
    if trainer.is_global_zero:
        if not asked:
            partial.clear()
        partial.open()
    trainer.strategy.barrier("partial results")
    data.done = {int(number) for number in read_records(partial)}
    if data.done and trainer.is_global_zero:
        log.info("%d of %d videos were predicted before; it goes on", len(data.done), len(predictor.videos))
    trainer.callbacks.append(predictor)  # type: ignore[attr-defined]
    with listening() as predictor.asked, prepacked_weights():
        if len(data.done) < len(predictor.videos):
            trainer.predict(module, data, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    records = read_records(partial)
    everything = [records[str(number)] for number in range(len(predictor.videos))]
    if any("top" in record for record in everything):  # Else an earlier prediction is worth more.
        write_json(predictor.folder / "predictions.json", everything)
    partial.clear()
    return everything
