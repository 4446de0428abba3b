from pathlib import Path

import numpy as np
import pytest
import torch

from stts_lightning import read_clips
from stts_lightning.data.annotations import AnnotationError, Video, VideoList, Videos
from stts_lightning.data.dataset import ClipDataset, ClipSpec
from stts_lightning.data.decode import write_mp4
from stts_lightning.data.transforms import EvalTransform
from stts_lightning.data.windows import find_videos


def test_clips_are_those_of_the_test(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_mp4(tmp_path / "v.mp4", rng.integers(0, 256, (40, 48, 64, 3), np.uint8))
    videos = VideoList(Videos([Video(tmp_path / "v.mp4", 0)]), ("a",))
    spec = ClipSpec(frames=8, stride=2, views=4, sampling="slowfast")
    expected = ClipDataset(videos, spec, EvalTransform((32, 32), 36, 3), train=False)[0].clip
    clips = read_clips(tmp_path / "v.mp4", (8, 32, 32), views=4, crops=3, stride=2, short_side=36)
    assert clips.dtype == torch.uint8 and torch.equal(clips, expected)


def test_lists_name_videos_to_predict(tmp_path: Path) -> None:
    for name in ("a.mp4", "b c.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "bare.txt").write_text("a.mp4\nb c.mp4\n")
    (tmp_path / "labelled.txt").write_text("a.mp4 3\nb c.mp4 1\n")
    (tmp_path / "head.csv").write_text("path\na.mp4\nb c.mp4\n")
    (tmp_path / "both.csv").write_text("path,label\na.mp4,x\nb c.mp4,y\n")
    (tmp_path / "kinds.json").write_text('[{"id": "a.mp4", "template": "x"}, {"id": "b c.mp4", "template": "y"}]')
    expected = [tmp_path / "a.mp4", tmp_path / "b c.mp4"]
    for name in ("bare.txt", "labelled.txt", "head.csv", "both.csv"):
        assert find_videos(tmp_path / name) == expected, name
    (tmp_path / "missing.csv").write_text("path,label\na.mp4,x\nnone.mp4,y\n")
    with pytest.raises(AnnotationError, match=r"missing.csv: 1 of 2 listed videos do not exist, first .*none.mp4"):
        find_videos(tmp_path / "missing.csv")
