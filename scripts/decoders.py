"""Decoders beside each other on one core, torchcodec too, and whether it says the same: why decord is the default.

    pip install torchcodec        # the release that fits torch's; and FFmpeg's libraries
    python scripts/decoders.py FOLDER [FOLDER ...]

torchcodec is no decoder of the package: see docs/performance.md.
"""

import argparse
import importlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stts_lightning.analysis.loader_speed import loading
from stts_lightning.data.decode import DECODERS, DecodeError, Frames, open_video


class TorchCodecReader:
    """A `Reader` of torchcodec's, on one thread."""

    def __init__(self, path: Path) -> None:
        decoders = importlib.import_module("torchcodec.decoders")
        self._decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)

    def __len__(self) -> int:
        return int(self._decoder.metadata.num_frames or 0)

    @property
    def rate(self) -> float:
        """See `Reader.rate`."""
        return float(self._decoder.metadata.average_fps or 0)

    def frames(self, indices: NDArray[np.int64]) -> Frames:
        """See `Reader.frames`."""
        wanted, places = np.unique(indices, return_inverse=True)
        return self._decoder.get_frames_at(indices=wanted.tolist()).data.numpy()[places]

    def close(self) -> None:
        """See `Reader.close`."""
        del self._decoder


def read(path: Path, decoder: str) -> Frames | str:
    """Sixteen frames of a video, or what the decoder says of it."""
    try:
        with open_video(path, decoder) as reader:
            return reader.frames(np.linspace(0, len(reader) - 1, 16).round().astype(np.int64))
    except DecodeError as error:
        return str(error)


def disagreement(path: Path) -> str:
    """How torchcodec's frames differ from PyAV's; empty where they do not."""
    ours, theirs = read(path, "pyav"), read(path, "torchcodec")
    if isinstance(ours, str) or isinstance(theirs, str):
        words = {True: "fails", False: "reads it"}
        same = isinstance(ours, str) == isinstance(theirs, str)
        return "" if same else f"pyav {words[isinstance(ours, str)]}, torchcodec {words[isinstance(theirs, str)]}"
    if ours.shape != theirs.shape:
        return f"frames of {ours.shape[1:3]} and of {theirs.shape[1:3]}"
    apart = np.abs(ours.astype(int) - theirs.astype(int)).mean(axis=(1, 2, 3))
    return f"{(apart > 6).sum()} of 16 frames differ, by {apart.max():.0f} levels at most" if apart.max() > 6 else ""


def main() -> None:
    """Print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure each folder for; 0 compares frames alone")
    options = parser.parse_args()
    DECODERS["torchcodec"] = TorchCodecReader
    for folder in options.folders:
        videos = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in videos:
            if said := disagreement(path):
                print(f"{path.name}: {said}")
        if not options.seconds:
            continue
        print(f"\n| {folder} | decode, ms | train crop, ms | clips/s a core |\n|---|---|---|---|")
        for row in loading(videos, ["decord", "pyav", "torchcodec"], (16, 224, 224), 4, options.seconds, 24):
            figures = (row["decode_ms"], row["train_ms"], row["clips_per_second_per_core"])
            print(f"| {row['decoder']} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
