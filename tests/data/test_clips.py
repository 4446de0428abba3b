from pathlib import Path

import numpy as np
import torch

from stts_lightning import read_clips
from stts_lightning.data.annotations import Video, VideoList, Videos
from stts_lightning.data.dataset import ClipDataset, ClipSpec
from stts_lightning.data.decode import write_mp4
from stts_lightning.data.transforms import EvalTransform


def test_clips_are_those_of_the_test(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_mp4(tmp_path / "v.mp4", rng.integers(0, 256, (40, 48, 64, 3), np.uint8))
    videos = VideoList(Videos([Video(tmp_path / "v.mp4", 0)]), ("a",))
    spec = ClipSpec(frames=8, stride=2, views=4, sampling="slowfast")
    expected = ClipDataset(videos, spec, EvalTransform((32, 32), 36, 3), train=False)[0].clip
    clips = read_clips(tmp_path / "v.mp4", (8, 32, 32), views=4, crops=3, stride=2, short_side=36)
    assert clips.dtype == torch.uint8 and torch.equal(clips, expected)
