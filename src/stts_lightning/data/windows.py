"""Any videos, without labels, as windows over time."""

import glob
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from stts_lightning.data.annotations import VIDEO_SUFFIXES, AnnotationError, is_hidden
from stts_lightning.data.dataset import ClipSpec, Transform
from stts_lightning.data.decode import DecodeError, Frames
from stts_lightning.data.isolation import can_isolate, open_isolated
from stts_lightning.data.list_formats import PATH_COLUMNS, read_rows, text_lines
from stts_lightning.data.readers import is_frame_folder
from stts_lightning.data.sampling import SAMPLINGS

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".json")


class Window(NamedTuple):
    """A clip of a video, or why there is none.

    Attributes:
        video: number of the video among those asked for.
        number: of the window in the video, from 0.
        of: windows of the video.
        start: seconds of its first frame; 0 where the file tells no rate.
        end: seconds of the end of its last frame.
        clip: `(crops, 3, T, H, W)` uint8; None where the video cannot be decoded, and in a batch, which stacks them.
        pictures: `(T, H, W, 3)` to look at, of the same part of the frames as the centre crop, if those were wanted.
        failure: why there is no clip; empty where there is one.
        note: why another decoder than the one asked for reads the video; empty otherwise.
    """

    video: int
    number: int
    of: int
    start: float
    end: float
    clip: Tensor | None
    pictures: Frames | None  # No tensor: Lightning would take it to the device.
    failure: str
    note: str = ""


class WindowBatch(NamedTuple):
    """Windows of one step; `clip` `(B, crops, 3, T, H, W)` stacks those that there are, None where there is none."""

    windows: tuple[Window, ...]
    clip: Tensor | None


def find_videos(asked: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files behind names: of videos, of folders (all videos in them, at any depth), of lists, or patterns as `a/*.mp4`.

    A list is any that a data set takes, or a path on each line; its paths start from its own folder, and labels are left aside.

    Raises:
        AnnotationError: for a name behind which there is no video, or a list that names one that is not there.
    """
    files: list[Path] = []
    if not asked:
        raise AnnotationError("videos=[]: give at least one file, folder or pattern")
    for name in [asked] if isinstance(asked, str | Path) else asked:
        path = Path(name)
        if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
            here = _listed(path)
        elif path.is_file() or is_frame_folder(path):
            here = [path]
        elif path.is_dir():
            here = list(_videos_below(path))
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
            here = [match for match in matches if match.is_file() or is_frame_folder(match)]
        if not here:
            raise AnnotationError(
                f"videos={name}: no video there; give a file, a folder with videos, or a pattern as 'DIR/*.mp4'"
            )
        files += here
    return list(dict.fromkeys(files))


def _listed(file: Path) -> list[Path]:
    """Videos of a list, with labels or without."""
    names: list[str] = []
    if file.suffix.lower() != ".json":
        lines = [line.strip() for _, line in text_lines(file)]
        names = lines[1:] if lines and lines[0].lower() in PATH_COLUMNS else lines
    if not names or any(Path(name).suffix.lower() not in VIDEO_SUFFIXES for name in names):
        names = [row.path for row in read_rows(file)]
    found = [file.parent / name for name in names]
    missing = [path for path in found if not (path.is_file() or is_frame_folder(path))]
    if missing:
        raise AnnotationError(
            f"videos={file}: {len(missing)} of {len(found)} listed videos do not exist, first {missing[0]}; paths in a list "
            "start from its own folder"
        )
    return found


def _videos_below(folder: Path) -> Iterator[Path]:
    """Video files and frame folders at any depth, in order of their paths."""
    for path in sorted(folder.iterdir()):
        if is_hidden(path):
            continue
        if path.is_dir():
            yield from [path] if is_frame_folder(path) else _videos_below(path)
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            yield path


@dataclass(frozen=True)
class WindowRule:
    """How videos are cut.

    Attributes:
        clip: frames, stride and sampling.
        every: seconds from one window to the next, about; None is the length of a clip (with segments, of the video).
        transform: from `(T, 3, H, W)` uint8 to `(crops, T, 3, H, W)`.
        pictures: the same at a size to look at, or None.
        decoder: see `open_video`.
        decode_timeout: see `Reading`.
    """

    clip: ClipSpec
    transform: Transform
    every: float | None = None
    pictures: Callable[[Tensor], Tensor] | None = None
    decoder: str = "decord"
    decode_timeout: float | None = None

    def __post_init__(self) -> None:
        if self.every is not None and self.every <= 0:
            raise ValueError(f"every={self.every}: must be more than 0 seconds")
        if self.decode_timeout is not None:
            can_isolate()  # Said in the main process, before there are workers.

    def question(self) -> str:
        """What windows follow from, besides the video."""
        pictures = None if self.pictures is None else vars(self.pictures)
        return f"{self.clip} {vars(self.transform)} {self.every} {pictures} {self.decoder}"


class WindowDataset(IterableDataset[Window]):
    """Windows of videos, a video after the other; a worker, and a process, takes every so manieth video.

    Few windows are in memory at a time, however long a video is. A video that does not decode gives one window that says so;
    one that breaks off half-way gives that after its good ones.
    """

    at_once = 4

    def __init__(
        self, videos: Sequence[Path], rule: WindowRule, rank: int = 0, processes: int = 1, without: Collection[int] = ()
    ) -> None:
        self.videos, self.rule = list(videos), rule
        self.numbers = [number for number in range(len(self.videos)) if number not in without][rank::processes]
        """Of the videos of this process."""

    def __iter__(self) -> Iterator[Window]:
        """Windows of this worker's videos, in order."""
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for video in self.numbers[worker_id::workers]:
            yield from self._of(video)

    def _of(self, video: int) -> Iterator[Window]:
        rule, done = self.rule, 0
        sampling = SAMPLINGS[rule.clip.sampling](rule.clip.frames, rule.clip.stride)
        try:
            with open_isolated(self.videos[video], rule.decoder, rule.decode_timeout) as reader:
                rate = reader.rate
                every = max(round(rule.every * rate), 1) if rule.every and rate else None
                views = sampling.over_time(len(reader), every, rate)
                for first in range(0, len(views), self.at_once):
                    some = views[first : first + self.at_once]
                    pixels = torch.from_numpy(reader.frames(some.ravel())).permute(0, 3, 1, 2)
                    for frames, indices in zip(pixels.split(rule.clip.frames), some, strict=True):
                        clip = rule.transform(frames).permute(0, 2, 1, 3, 4).contiguous()
                        shown = rule.pictures(frames)[0].permute(0, 2, 3, 1).contiguous().numpy() if rule.pictures else None
                        start, end = (indices[0] / rate, (indices[-1] + 1) / rate) if rate else (0.0, 0.0)
                        yield Window(video, done, len(views), float(start), float(end), clip, shown, "", reader.note)
                        done += 1
        except DecodeError as error:
            yield Window(video, done, done + 1, 0.0, 0.0, None, None, str(error))


def collate_windows(windows: list[Window]) -> WindowBatch:
    """Stack the clips that there are."""
    clips = [window.clip for window in windows if window.clip is not None]
    return WindowBatch(tuple(window._replace(clip=None) for window in windows), torch.stack(clips) if clips else None)
