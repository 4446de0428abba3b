"""Demo videos from a seed: real H.264 files in which only some frames, or one part of the picture, tell the class.

A warm-coloured disk moves in one of eight directions: that is the action. All the while cool-coloured disks of the same kind
move in directions of their own over a drifting texture, so that a model must find *when* and *where* to look. Three settings
say where the action is:

- `when`: a large disk, in less than a quarter of the video. A few evenly spaced frames miss most of it.
- `where`: a small disk, anywhere in the picture, all the time. A small window in the middle misses half of them.
- `both`: a small disk, anywhere, in a third of the video.

The truth lies beside each video as JSON: see `data.truth`.
"""

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from stts_lightning.data.encode import write_mp4
from stts_lightning.progress import counting

MOTIONS = ("right", "down_right", "down", "down_left", "left", "up_left", "up", "up_right")

SPAN = 32
"""Frames within which all that tells the class happens: those that any clip of 16 frames at a stride of 2 sees."""

WAY = 16
"""Frames of one way of a cool-coloured disk along its path."""

WORTH_PROCESSES = 200
"""Videos from which on processes that share the work make up for the time that they take to start."""

Image = NDArray[np.float32]
Job = tuple[str, int, int]
"""A video to make: split, label and number."""


@dataclass(frozen=True)
class Setting:
    """How large and long the action is. Lengths are shares of the picture's side, from the least to the most.

    Attributes:
        radius: of the disk.
        reach: from the middle of its path to either end.
        frames: frames that the action lasts.
        period: frames of one way along the path; then the disk starts anew.
        others: radius and reach of the cool-coloured disks.
        front: whether the front of a disk, in the direction in which it moves, is lighter: small motions are hard to learn alone.
    """

    radius: tuple[float, float]
    reach: tuple[float, float]
    frames: int
    period: int
    others: tuple[tuple[float, float], tuple[float, float]] = ((0.08, 0.14), (0.06, 0.12))
    front: bool = False


SMALL = ((0.055, 0.1), (0.04, 0.08))
"""Others that leave room around a small disk."""

SETTINGS = {
    "when": Setting(radius=(0.18, 0.22), reach=(0.1, 0.14), frames=8, period=8),
    "where": Setting(radius=(0.09, 0.11), reach=(0.05, 0.06), frames=SPAN + 4, period=8, others=SMALL, front=True),
    "both": Setting(radius=(0.11, 0.14), reach=(0.07, 0.09), frames=12, period=12, others=SMALL, front=True),
}


@dataclass(frozen=True)
class DemoSpec:
    """Size of the demo.

    Attributes:
        setting: where the action is; a name of `SETTINGS`.
        seed: everything follows from it.
        train: training videos a class.
        val: validation videos a class.
        side: height and width in pixels, even.
        distractors: number of cool-coloured disks.
        crf: quality of the H.264 files; less is better, larger and slower to decode.
    """

    setting: str = "when"
    seed: int = 0
    train: int = 300
    val: int = 50
    side: int = 64
    distractors: int = 4
    crf: int = 20

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"dataset.setting={self.setting!r}: allowed are {', '.join(SETTINGS)}")

    @property
    def frames(self) -> int:
        """Frames of a video."""
        return SPAN + 4


def direction(name: str) -> tuple[float, float]:
    """Unit vector of a motion, right and down."""
    if name not in MOTIONS:
        raise ValueError(f"motion {name!r}: allowed are {', '.join(MOTIONS)}")
    angle = MOTIONS.index(name) * math.pi / 4
    return math.cos(angle), math.sin(angle)


def _texture(rng: np.random.Generator, side: int, cells: int) -> Image:
    """Smooth noise `(side, side, 1)` in -1..1: a coarse random grid, enlarged."""
    coarse = rng.uniform(-1, 1, (cells + 1, cells + 1))
    at = np.linspace(0, cells, side, endpoint=False)
    low, part = at.astype(int), at % 1
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    image = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return image[..., None].astype(np.float32)


class _Disk:
    """A disk with a texture of its own that moves along with it."""

    def __init__(self, rng: np.random.Generator, side: int, radius: float, reach: float, warm: bool, front: bool = False) -> None:
        self.radius, self.front = side * radius, front
        # Pixels from the middle of its path to either end.
        self.reach = side * reach
        margin = self.radius + self.reach  # The disk stays in the picture.
        self.x, self.y = rng.uniform(margin, side - margin, 2)
        low, high = ((0.75, 0.3, 0.0), (1.0, 0.55, 0.25)) if warm else ((0.1, 0.4, 0.5), (0.45, 0.75, 0.9))
        self.colour = rng.uniform(low, high).astype(np.float32) * 255
        self.texture = _texture(rng, 2 * side, 28) * 60

    def paint(self, image: Image, name: str, phase: float) -> tuple[float, float, float]:
        """Paint the disk at phase 0 to 1 of its path; returns its place and radius in pixels."""
        side = image.shape[0]
        right, down = direction(name)
        along = (2 * phase - 1) * self.reach
        dx, dy = along * right, along * down
        x, y = self.x + dx, self.y + dy
        # The square around the disk; nothing changes outside of it.
        (x0, x1), (y0, y1) = ((max(int(at - self.radius), 0), min(int(at + self.radius) + 2, side)) for at in (x, y))
        across, rows = (np.arange(*ends, dtype=np.float32) for ends in ((x0, x1), (y0, y1)))
        cover = np.clip(self.radius + 0.5 - np.hypot(across - x, (rows - y)[:, None]), 0, 1)[..., None]
        colour: Image = self.colour
        if self.front:
            ahead = np.clip(((across - x) * right + (rows - y)[:, None] * down) / 2 + 0.5, 0, 1)[..., None]
            colour = colour + ahead * 0.75 * (255 - colour)
        top, left = round(side / 2 - dy), round(side / 2 - dx)
        part = image[y0:y1, x0:x1]
        part += cover * (colour + self.texture[top + y0 : top + y1, left + x0 : left + x1] - part)
        return x, y, self.radius


def render(spec: DemoSpec, split: str, label: int, number: int) -> tuple[list[NDArray[np.uint8]], dict[str, Any]]:
    """One video and its truth.

    Returns:
        Frames `(H, W, 3)` uint8, and the truth: {"label", "motion", "length", "frames": [first, end), "size": [height, width],
        "boxes": [[x0, y0, x1, y1], ...]} with a box in pixels for each action frame.
    """
    rng = np.random.default_rng((spec.seed, ["train", "val"].index(split), label, number))
    side, setting = spec.side, SETTINGS[spec.setting]
    background = _texture(rng, 2 * side, 12) * 25 + _texture(rng, 2 * side, 40) * 15 + rng.uniform(40, 70)
    tint = rng.uniform(0.85, 1.1, 3).astype(np.float32)
    drift = rng.uniform(-0.8, 0.8, 2)
    hero = _Disk(rng, side, rng.uniform(*setting.radius), rng.uniform(*setting.reach), True, setting.front)
    others: list[tuple[_Disk, int, float]] = []
    for _ in range(spec.distractors):
        radius, reach = (rng.uniform(*ends) for ends in setting.others)
        others.append((_Disk(rng, side, radius, reach, False, setting.front), int(rng.integers(len(MOTIONS))), rng.uniform()))
    # Inside the span that any clip sees; of a training clip's two offsets each sees as many of its frames.
    room = spec.frames - SPAN
    first = int(rng.integers(room, SPAN - setting.frames + 1)) if setting.frames < SPAN else 0
    images, boxes = [], []
    for t in range(spec.frames):
        top, left = (int(side / 2 + d * (t - spec.frames / 2)) for d in drift)
        image = background[top : top + side, left : left + side] * tint
        for disk, kind, start in others:
            disk.paint(image, MOTIONS[kind], (start + t / WAY) % 1)
        if first <= t < first + setting.frames:
            phase = (t - first) % setting.period / (setting.period - 1)
            x, y, r = hero.paint(image, MOTIONS[label], phase)
            boxes.append([round(v, 1) for v in (x - r, y - r, x + r, y + r)])
        noisy = image + 4 * rng.standard_normal(image.shape, dtype=np.float32)
        images.append(np.clip(noisy, 0, 255).astype(np.uint8))
    truth = {
        "label": label,
        "motion": MOTIONS[label],
        "length": spec.frames,
        "frames": [first, first + setting.frames],
        "size": [side, side],
        "boxes": boxes,
    }
    return images, truth


def _jobs(spec: DemoSpec) -> Iterator[Job]:
    for split, count in (("train", spec.train), ("val", spec.val)):
        yield from ((split, label, number) for label in range(len(MOTIONS)) for number in range(count))


def _file(root: Path, job: Job) -> Path:
    split, label, number = job
    return root / split / MOTIONS[label] / f"{number:04d}.mp4"


def _make_video(root: Path, spec: DemoSpec, resumed: bool, job: Job) -> None:
    file = _file(root, job)
    if resumed and file.is_file() and file.with_suffix(".json").is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    images, truth = render(spec, *job)
    file.with_suffix(".json").write_text(json.dumps(truth))
    write_mp4(file, images, crf=spec.crf)


def make_demo(root: str | Path, spec: DemoSpec) -> None:
    """Generate the videos, lists and class names in a folder, unless they are there already.

    A folder made from other values is made anew; a broken-off generation is taken up where it stopped.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):  # Processes that start together must not both make it.
        _make_demo(root, spec)


def _make_demo(root: Path, spec: DemoSpec) -> None:
    stamp = root / "demo.json"
    wanted = json.dumps(asdict(spec))
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    building = root / "building.json"
    resumed = building.is_file() and building.read_text() == wanted
    stamp.unlink(missing_ok=True)
    building.write_text(wanted)
    jobs = list(_jobs(spec))
    make = partial(_make_video, root, spec, resumed)
    with ExitStack() as stack:
        one_more = stack.enter_context(counting("demo videos made", len(jobs)))
        mapped = map(make, jobs)
        if len(jobs) >= WORTH_PROCESSES:
            # Spawned: the caller may hold threads, which a fork would not survive.
            pool = stack.enter_context(ProcessPoolExecutor(min(os.cpu_count() or 1, 8), get_context("spawn")))
            mapped = pool.map(make, jobs, chunksize=8)
        for _ in mapped:
            one_more()
    for split in ("train", "val"):
        lines = [f"{_file(root, job).relative_to(root)} {job[1]}\n" for job in jobs if job[0] == split]
        (root / f"{split}.csv").write_text("".join(lines))
    (root / "classes.txt").write_text("\n".join(MOTIONS) + "\n")
    building.unlink()
    stamp.write_text(wanted)
