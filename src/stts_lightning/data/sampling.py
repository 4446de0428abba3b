"""Which frames make a clip: pure index arithmetic, a class for each way that the field samples videos."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Sampling(ABC):
    """From the number of a video's frames to the frames of clips.

    Args:
        frames: frames of a clip.
        stride: source frames from one frame of a clip to the next.
    """

    def __init__(self, frames: int, stride: int) -> None:
        self.frames, self.stride = frames, stride

    def train(self, total: int, rng: np.random.Generator) -> Indices:
        """One random clip, `(frames,)`, each in 0..total-1. Raises ValueError for a video without frames."""
        return self._train(_some(total), rng)

    def views(self, total: int, views: int) -> Indices:
        """Clips of a test, `(views, frames)`, each in 0..total-1. Raises ValueError for a video without frames."""
        return self._views(_some(total), views)

    def over_time(self, total: int, every: int | None = None) -> Indices:
        """Clips one after the other from a video's start to its end, `(windows, frames)`.

        A clip more is taken as soon as a quarter of one would go unseen.

        Args:
            total: frames of the video.
            every: source frames from one clip to the next, about; None is the length of a clip. Raises ValueError below 1.
        """
        if every is not None and every < 1:
            raise ValueError(f"clips every {every} frames: must be 1 or more")
        return self._over_time(_some(total), every)

    def _over_time(self, total: int, every: int | None) -> Indices:
        step = every or self.frames * self.stride
        return self._views(total, max(-(-(4 * total - step) // (4 * step)), 1))

    @abstractmethod
    def _train(self, total: int, rng: np.random.Generator) -> Indices: ...

    @abstractmethod
    def _views(self, total: int, views: int) -> Indices: ...


def _some(total: int) -> int:
    if total < 1:
        raise ValueError("the video has no frames")
    return total


class Spread(Sampling):
    """SlowFast's and MViT's way: a stride, training clips anywhere, test clips from the start of the video to its end.

    One test clip is the centre. Past the end of a short video its last frame is held.
    """

    def _clip(self, offset: int, total: int) -> Indices:
        return np.minimum(offset + self.stride * np.arange(self.frames, dtype=np.int64), total - 1)

    def _room(self, total: int) -> int:
        """Number of the last offset at which a whole clip fits."""
        return max(total - (self.frames - 1) * self.stride - 1, 0)

    def _train(self, total: int, rng: np.random.Generator) -> Indices:
        return self._clip(int(rng.integers(self._room(total) + 1)), total)

    def _views(self, total: int, views: int) -> Indices:
        room = self._room(total)
        offsets = [room / 2] if views == 1 else np.linspace(0, room, views)
        return np.stack([self._clip(int(offset), total) for offset in offsets])


class Parts(Sampling):
    """Video-Swin's way on Kinetics: a stride, test clips in the middle of equal parts, short videos played in a loop."""

    def _clip(self, offset: int, total: int) -> Indices:
        return (offset + self.stride * np.arange(self.frames, dtype=np.int64)) % total

    def _train(self, total: int, rng: np.random.Generator) -> Indices:
        return self._clip(int(rng.integers(max(total - self.frames * self.stride, 0) + 1)), total)

    def _views(self, total: int, views: int) -> Indices:
        step = max(total - self.frames * self.stride + 1, 0) / views
        return np.stack([self._clip(int(i * step + step / 2), total) for i in range(views)])


class Segments(Sampling):
    """Video-Swin's way on Something-Something: one frame of each of as many equal segments of the whole video.

    A random one in training, the middle one in a test, whose views are all the same clip. The stride has no part in it.
    """

    def _bounds(self, total: int) -> tuple[Indices, Indices]:
        edges = np.round(np.arange(self.frames + 1) * ((total - 1) / self.frames)).astype(np.int64)  # Halves to even.
        return edges[:-1], edges[1:]

    def _train(self, total: int, rng: np.random.Generator) -> Indices:
        first, last = self._bounds(total)
        return rng.integers(first, last, endpoint=True)

    def _views(self, total: int, views: int) -> Indices:
        first, last = self._bounds(total)
        return np.tile((first + last) // 2, (views, 1))

    def _over_time(self, total: int, every: int | None) -> Indices:
        edges = np.linspace(0, total, max(round(total / (every or total)), 1) + 1).astype(np.int64)
        return np.stack([start + self._views(end - start, 1)[0] for start, end in zip(edges[:-1], edges[1:], strict=True)])


SAMPLINGS: dict[str, type[Sampling]] = {"spread": Spread, "parts": Parts, "segments": Segments}
