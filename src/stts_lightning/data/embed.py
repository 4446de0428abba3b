"""Real videos in which time and place matter: an action set into a longer and larger video, at a place and time from a seed.

Around it, in time and space, nothing happens (`idle`: its own still background, with the first and last frame held before and
after), or a video of another class is seen: its still background (`still`), or all of it, playing (`other`). The truth lies
beside each video as JSON; see `truth`.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

from stts_lightning.data.decode import open_video
from stts_lightning.data.encode import even, write_mp4
from stts_lightning.data.truth import truth_file
from stts_lightning.files import write_text

SCENES = ("idle", "still", "other")


@dataclass(frozen=True)
class Embedding:
    """How an action is set into a video.

    Attributes:
        scene: video around it, or None for an idle scene of its own.
        copy: number of the copy; each has a time and a place of its own.
        still: whether the scene's background is shown, not the scene.
        seed: with the name of the file and `copy` it settles time and place.
        larger: sides of the picture over those of the action, 1 or more.
        longer: length of the video over that of the action, 1 or more.
        short_side: of the picture, in pixels.
        crf: quality of the H.264 files.
    """

    scene: Path | None
    copy: int
    still: bool = False
    seed: int = 0
    larger: float = 2.0
    longer: float = 2.0
    short_side: int = 128
    crf: int = 20

    def settings(self, source: Path) -> dict[str, object]:
        """What a file says of how it was made."""
        return {**asdict(self), "scene": self.scene.name if self.scene else None, "source": source.name}

    def write(self, source: Path, target: Path) -> str:
        """Embed a video, unless that is done; returns nothing to say. Raises DecodeError if it or the scene does not decode."""
        if not is_embedded(source, target, self):
            embed(source, target, self)
        return ""


def is_embedded(source: Path, target: Path, embedding: Embedding) -> bool:
    """Whether a target was made from this source with these settings: its truth says so."""
    try:
        return target.is_file() and json.loads(truth_file(target).read_text())["embedding"] == embedding.settings(source)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _pixels(path: Path) -> tuple[Tensor, float]:
    """All frames of a video, `(T, 3, H, W)` uint8, and its rate."""
    with open_video(path, "pyav") as reader:
        frames = torch.from_numpy(reader.frames(np.arange(len(reader))))
        return frames.permute(0, 3, 1, 2), reader.rate


def _to_and_fro(length: int, wanted: int, start: int) -> NDArray[np.int64]:
    """Numbers of frames that play a video of a length forwards and backwards until there are as many as wanted."""
    once = np.concatenate((np.arange(length), np.arange(length - 2, 0, -1)))
    return once[(start + np.arange(wanted)) % len(once)]


def _background(video: Tensor, size: tuple[int, int]) -> Tensor:
    """What stands still in a video `(T, 3, H, W)`: the median of some of its frames, resized to cover a size, `(1, 3, *size)`."""
    some = video[torch.linspace(0, len(video) - 1, min(len(video), 16)).long()]
    return _covering(some.median(0, keepdim=True).values, size)


def _covering(video: Tensor, size: tuple[int, int]) -> Tensor:
    """A video `(T, 3, H, W)` resized and cropped to a size."""
    zoom = max(size[0] / video.shape[-2], size[1] / video.shape[-1])
    covering = [max(math.ceil(side * zoom), least) for side, least in zip(video.shape[-2:], size, strict=True)]
    return center_crop(resize(video, covering, antialias=True), list(size))


def embed(source: Path, target: Path, embedding: Embedding) -> None:
    """Write a video in which an action is embedded, and its truth beside it.

    Raises:
        DecodeError: if the source or the scene does not decode.
    """
    action, rate = _pixels(source)
    frames, _, height, width = action.shape
    zoom = embedding.short_side / embedding.larger / min(height, width)
    height, width = even(height * zoom), even(width * zoom)
    action = resize(action, [height, width], antialias=True)
    size = (even(height * embedding.larger), even(width * embedding.larger))
    rng = np.random.default_rng([embedding.seed, embedding.copy, *source.name.encode()])
    total = max(round(frames * embedding.longer), frames)
    first = int(rng.integers(total - frames + 1))
    top, left = (int(rng.integers(side - inner + 1)) for side, inner in zip(size, (height, width), strict=True))
    if embedding.scene is None:
        scene = _background(action, size).expand(total, -1, -1, -1)
        shown = np.clip(np.arange(total) - first, 0, frames - 1)  # The first and the last frame are held.
        seen = range(total)
    else:
        other, _ = _pixels(embedding.scene)
        if embedding.still:
            scene = _background(other, size).expand(total, -1, -1, -1)
        else:
            scene = _covering(other, size)[torch.from_numpy(_to_and_fro(len(other), total, int(rng.integers(len(other)))))]
        shown = np.arange(total) - first
        seen = range(first, first + frames)
    pictures = scene.clone()
    for number in seen:
        pictures[number, :, top : top + height, left : left + width] = action[int(shown[number])]
    box = [left, top, left + width, top + height]
    truth = {"frames": [first, first + frames], "size": list(size), "boxes": [box] * frames}
    write_mp4(target, pictures.permute(0, 2, 3, 1).contiguous().numpy(), rate=round(rate) or 25, crf=embedding.crf)
    write_text(truth_file(target), json.dumps({**truth, "embedding": embedding.settings(source)}))
