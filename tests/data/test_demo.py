import json
from pathlib import Path

import numpy as np
import pytest

from stts_lightning.data.annotations import read_list
from stts_lightning.data.decode import open_video
from stts_lightning.data.demo import MOTIONS, DemoSpec, direction, make_demo, render

SPEC = DemoSpec(train=1, val=1)


def test_files_lists_and_truth(tmp_path: Path) -> None:
    make_demo(tmp_path, SPEC)
    videos = read_list(tmp_path / "train.csv")
    assert videos.classes == MOTIONS
    assert [v.label for v in videos.videos] == list(range(8))
    truth = json.loads(videos.videos[3].path.with_suffix(".json").read_text())
    first, end = truth["frames"]
    assert truth["motion"] == MOTIONS[3]
    assert end - first == SPEC.action == len(truth["boxes"])
    with open_video(videos.videos[3].path) as reader:
        assert len(reader) == SPEC.frames
        frames = reader.frames(np.arange(SPEC.frames)).astype(int)
    # The warm disk shows in its frames, at its place, and only there.
    warmth = (frames[..., 0] - frames[..., 2] > 70).sum(axis=(1, 2))
    assert warmth[first + 1 : end - 1].min() > 20
    assert max(warmth[:first].max(initial=0), warmth[end:].max(initial=0)) < 10
    x0, y0, x1, y1 = (int(v) for v in truth["boxes"][6])
    inside = frames[first + 6, max(y0, 0) : y1, max(x0, 0) : x1]
    assert (inside[..., 0] - inside[..., 2]).mean() > 40


def test_made_once_and_taken_up_where_it_stopped(tmp_path: Path) -> None:
    make_demo(tmp_path, SPEC)
    file = tmp_path / "train" / "left" / "0000.mp4"
    before = file.stat().st_mtime_ns
    make_demo(tmp_path, SPEC)
    assert file.stat().st_mtime_ns == before
    (tmp_path / "demo.json").rename(tmp_path / "building.json")
    (tmp_path / "val" / "left" / "0000.mp4").unlink()
    make_demo(tmp_path, SPEC)
    assert (tmp_path / "val" / "left" / "0000.mp4").is_file()
    assert file.stat().st_mtime_ns == before


def test_same_seed_same_pixels_other_seed_others() -> None:
    first, again = (render(SPEC, "val", 2, 0)[0] for _ in range(2))
    other = render(DemoSpec(seed=1), "val", 2, 0)[0]
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("label", range(len(MOTIONS)))
def test_the_disk_moves_as_its_class_says(label: int) -> None:
    boxes = np.array(render(SPEC, "val", label, 0)[1]["boxes"])
    assert (boxes >= 0).all()
    assert (boxes <= SPEC.side).all(), "the disk stays in the picture"
    moved = boxes[-1, :2] - boxes[0, :2]
    assert np.hypot(*moved) > 0.15 * SPEC.side
    assert moved / np.hypot(*moved) == pytest.approx(direction(MOTIONS[label]), abs=0.05)
    named = {"right": moved[0] > 5, "left": moved[0] < -5, "down": moved[1] > 5, "up": moved[1] < -5}
    assert {word for word, holds in named.items() if holds} == set(MOTIONS[label].split("_"))


def test_unknown_motion_is_refused() -> None:
    with pytest.raises(ValueError, match="motion 'spin': allowed are right"):
        direction("spin")
