"""Which frames make a clip: pure index arithmetic, a class for each way that the field samples videos."""

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Sampling(ABC):
    """From the number of a video's frames, and their rate, to the frames of clips.

    Args:
        frames: frames of a clip.
        stride: source frames from one frame of a clip to the next; of `SlowFast`, in frames of a video of 30 a second.
    """

    def __init__(self, frames: int, stride: int) -> None:
        self.frames, self.stride = frames, stride

    def train(self, total: int, rng: np.random.Generator, rate: float = 0.0) -> Indices:
        """One random clip, `(frames,)`, each in 0..total-1. Raises ValueError for a video without frames.

        Args:
            total: frames of the video.
            rng: where the choice comes from.
            rate: frames of the video a second; 0 where the file does not say.
        """
        return self._train(_some(total), rng, rate)

    def views(self, total: int, views: int, rate: float = 0.0) -> Indices:
        """Clips of a test, `(views, frames)`, each in 0..total-1. Raises ValueError for a video without frames."""
        return self._views(_some(total), views, rate)

    def over_time(self, total: int, every: int | None = None, rate: float = 0.0) -> Indices:
        """Clips one after the other from a video's start to its end, `(windows, frames)`.

        A clip more is taken as soon as a quarter of one would go unseen.

        Args:
            total: frames of the video.
            every: source frames from one clip to the next, about; None is the length of a clip. Raises ValueError below 1.
            rate: as in `train`.
        """
        if every is not None and every < 1:
            raise ValueError(f"clips every {every} frames: must be 1 or more")
        return self._over_time(_some(total), every, rate)

    def _over_time(self, total: int, every: int | None, rate: float) -> Indices:
        return self._views(total, _windows(total, every or self.frames * self.stride), rate)

    @abstractmethod
    def _train(self, total: int, rng: np.random.Generator, rate: float) -> Indices: ...

    @abstractmethod
    def _views(self, total: int, views: int, rate: float) -> Indices: ...


def _windows(total: int, step: float) -> int:
    """How many clips, `step` frames apart, cover a video but for a quarter of a step."""
    return max(math.ceil((total - step / 4) / step), 1)


def _some(total: int) -> int:
    if total < 1:
        raise ValueError("the video has no frames")
    return total


class SlowFast(Sampling):
    """SlowFast's way, and so that of the released code and of all published MViT checkpoints: a clip is a span of time.

    The span is `frames * stride / 30` seconds, whatever the video's rate, and a clip's frames are spread over it evenly, as
    if the video had been resampled to 30 frames a second. Test clips start `floor(rest / (views - 1))` frames apart, where
    `rest` is what a clip leaves of the video; a single one lies in the middle. Past the end of a short video its last frame
    is held. A video whose rate is not known is taken for one of 30.
    """

    target = 30.0

    def _span(self, rate: float) -> float:
        """Length of a clip in frames of the video."""
        return self.frames * self.stride / self.target * (rate or self.target)

    def _clip(self, first: int, total: int, rate: float) -> Indices:
        # torch's linspace(0, span - 1, frames): in float32, from both ends to the middle. A whole number may fall short.
        end = np.float32(self._span(rate) - 1)
        step = np.float32(end / np.float32(max(self.frames - 1, 1)))
        at = np.arange(self.frames, dtype=np.float32)
        offsets = np.where(at < max(self.frames // 2, 1), step * at, end - step * at[::-1])
        return np.clip(first + np.maximum(offsets, 0).astype(np.int64), 0, total - 1)

    def _train(self, total: int, rng: np.random.Generator, rate: float) -> Indices:
        # Decoding begins at the first frame at or after the time that was drawn.
        return self._clip(math.ceil(rng.uniform(0, max(total - self._span(rate), 0.0))), total, rate)

    def _views(self, total: int, views: int, rate: float) -> Indices:
        rest = max(total - self._span(rate), 0.0)
        firsts = [math.floor(rest / 2)] if views == 1 else [i * math.floor(rest / (views - 1)) for i in range(views)]
        return np.stack([self._clip(first, total, rate) for first in firsts])

    def _over_time(self, total: int, every: int | None, rate: float) -> Indices:
        span = self._span(rate)
        windows, rest = _windows(total, every or span), max(total - span, 0.0)
        firsts = [rest / 2] if windows == 1 else np.linspace(0, rest, windows)
        return np.stack([self._clip(int(first), total, rate) for first in firsts])


class Spread(Sampling):
    """A stride in frames of the video, training clips anywhere, test clips from the start of the video to its end.

    One test clip is the centre. Past the end of a short video its last frame is held.
    """

    def _clip(self, offset: int, total: int) -> Indices:
        return np.minimum(offset + self.stride * np.arange(self.frames, dtype=np.int64), total - 1)

    def _room(self, total: int) -> int:
        """Number of the last offset at which a whole clip fits."""
        return max(total - (self.frames - 1) * self.stride - 1, 0)

    def _train(self, total: int, rng: np.random.Generator, rate: float) -> Indices:
        return self._clip(int(rng.integers(self._room(total) + 1)), total)

    def _views(self, total: int, views: int, rate: float) -> Indices:
        room = self._room(total)
        offsets = [room / 2] if views == 1 else np.linspace(0, room, views)
        return np.stack([self._clip(int(offset), total) for offset in offsets])


class Parts(Sampling):
    """Video-Swin's way on Kinetics: a stride, test clips in the middle of equal parts, short videos played in a loop."""

    def _clip(self, offset: int, total: int) -> Indices:
        return (offset + self.stride * np.arange(self.frames, dtype=np.int64)) % total

    def _train(self, total: int, rng: np.random.Generator, rate: float) -> Indices:
        return self._clip(int(rng.integers(max(total - self.frames * self.stride, 0) + 1)), total)

    def _views(self, total: int, views: int, rate: float) -> Indices:
        step = max(total - self.frames * self.stride + 1, 0) / views
        return np.stack([self._clip(int(i * step + step / 2), total) for i in range(views)])


class Segments(Sampling):
    """Video-Swin's way on Something-Something: one frame of each of as many equal segments of the whole video.

    A random one in training, the middle one in a test, whose views are all the same clip. The stride has no part in it.
    """

    def _bounds(self, total: int) -> tuple[Indices, Indices]:
        edges = np.round(np.arange(self.frames + 1) * ((total - 1) / self.frames)).astype(np.int64)  # Halves to even.
        return edges[:-1], edges[1:]

    def _train(self, total: int, rng: np.random.Generator, rate: float) -> Indices:
        first, last = self._bounds(total)
        return rng.integers(first, last, endpoint=True)

    def _views(self, total: int, views: int, rate: float) -> Indices:
        first, last = self._bounds(total)
        return np.tile((first + last) // 2, (views, 1))

    def _over_time(self, total: int, every: int | None, rate: float) -> Indices:
        edges = np.linspace(0, total, max(round(total / (every or total)), 1) + 1).astype(np.int64)
        return np.stack([start + self._views(end - start, 1, rate)[0] for start, end in zip(edges[:-1], edges[1:], strict=True)])


class VideoMAE(Sampling):
    """VideoMAE's way on Kinetics: a stride, test clips of every `stride`-th frame from the start of the video to its end.

    In training the frames are spread over `frames * stride` frames and the one after: their step is a little more than the
    stride (64 / 15 for 16 frames 4 apart). Past the end of a short video its last frame is held.
    """

    def _train(self, total: int, rng: np.random.Generator, rate: float) -> Indices:
        span = self.frames * self.stride
        if total > span:
            end = int(rng.integers(span, total))
            at = np.linspace(end - span, end, self.frames).clip(end - span, end - 1)
        else:
            some = np.linspace(0, total, total // self.stride)
            at = np.concatenate((some, np.full(self.frames - len(some), total)))
        return np.clip(at.astype(np.int64), 0, total - 1)

    def _views(self, total: int, views: int, rate: float) -> Indices:
        # Counted in every `stride`-th frame of the video.
        rest = max(math.ceil(total / self.stride) - self.frames, 0)
        firsts = [rest // 2] if views == 1 else [int(i * (rest / (views - 1))) for i in range(views)]
        at = self.stride * (np.asarray(firsts)[:, None] + np.arange(self.frames, dtype=np.int64))
        return np.minimum(at, (total - 1) // self.stride * self.stride)


class Ticks(Segments):
    """VideoMAE's way on Something-Something: the whole video in as many ticks as a clip has frames.

    A random frame of each tick in training; view v of V takes the frame at share v / V of each tick. The stride has no part.
    """

    def _train(self, total: int, rng: np.random.Generator, rate: float) -> Indices:
        tick = total // self.frames
        if tick:
            return tick * np.arange(self.frames) + rng.integers(tick, size=self.frames)
        return self._views(total, 1, rate)[0]

    def _views(self, total: int, views: int, rate: float) -> Indices:
        tick = total / self.frames
        return (np.arange(views)[:, None] * (tick / views) + tick * np.arange(self.frames)).astype(np.int64)


SAMPLINGS: dict[str, type[Sampling]] = {
    "slowfast": SlowFast, "spread": Spread, "parts": Parts, "segments": Segments, "videomae": VideoMAE, "ticks": Ticks,
}  # fmt: skip
