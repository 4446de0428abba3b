import json
import math
from pathlib import Path

import numpy as np
import pytest

from stts_lightning.data.annotations import read_list
from stts_lightning.data.decode import open_video
from stts_lightning.data.demo import MOTIONS, SETTINGS, SPAN, DemoSpec, direction, make_demo, render
from stts_lightning.selection.baselines import CentreFrames, GivenFrames, UniformFrames
from stts_lightning.selection.selector import SlotContext
from stts_lightning.selection.spec import SelectionSpec, SlotSpec

SPEC = DemoSpec(train=1, val=1)


def test_files_lists_and_truth(tmp_path: Path) -> None:
    make_demo(tmp_path, SPEC)
    videos = read_list(tmp_path / "train.csv")
    assert videos.classes == MOTIONS
    assert [v.label for v in videos.videos] == list(range(8))
    truth = json.loads(videos.videos[3].path.with_suffix(".json").read_text())
    first, end = truth["frames"]
    assert truth["motion"] == MOTIONS[3]
    assert end - first == SETTINGS[SPEC.setting].frames == len(truth["boxes"])
    with open_video(videos.videos[3].path) as reader:
        assert len(reader) == SPEC.frames
        frames = reader.frames(np.arange(SPEC.frames)).astype(int)
    # The warm disk shows in its frames, at its place, and only there.
    warmth = (frames[..., 0] - frames[..., 2] > 70).sum(axis=(1, 2))
    assert warmth[first + 1 : end - 1].min() > 20
    assert max(warmth[:first].max(initial=0), warmth[end:].max(initial=0)) < 10
    x0, y0, x1, y1 = (int(v) for v in truth["boxes"][3])
    inside = frames[first + 3, max(y0, 0) : y1, max(x0, 0) : x1]
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


def covered(setting: str, ratio: float, fixed: type[GivenFrames] = UniformFrames) -> tuple[float, float]:
    """What fixed choices see: the share of actions with half of their frames, and of frames with the middle of the disk."""
    spec = DemoSpec(setting=setting)
    chosen = fixed(SlotContext(SlotSpec("t0", ratio=ratio), (8, 16, 16), 4, SelectionSpec())).chosen.tolist()
    half = math.sqrt(ratio) / 2
    in_time, in_space = [], []
    for number in range(96):
        truth = render(spec, "val", number % 8, number)[1]
        first, end = truth["frames"]
        # A clip takes every second frame, and a frame of its grid is two of the clip.
        shown = [min((frame - 2) // 4, 7) in chosen for frame in range(first, end) if frame >= 2]
        in_time.append(np.mean(shown) >= 0.5)
        boxes = np.array(truth["boxes"]) / spec.side
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        in_space.append((np.abs(middle - 0.5) < half).all(1).mean())
    return float(np.mean(in_time)), float(np.mean(in_space))


def test_fixed_choices_miss_the_action_by_construction() -> None:
    assert covered("when", 0.25)[0] < 0.6
    assert covered("when", 0.25, CentreFrames)[0] < 0.6
    assert covered("where", 0.25)[1] < 0.65
    assert covered("where", 1.0) == (1.0, 1.0)


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_settings_say_how_large_and_long_the_action_is(setting: str) -> None:
    spec = DemoSpec(setting=setting)
    truth = render(spec, "train", 1, 5)[1]
    first, end = truth["frames"]
    boxes = np.array(truth["boxes"])
    assert end - first == len(boxes) == SETTINGS[setting].frames
    low, high = SETTINGS[setting].radius
    assert 2 * low * spec.side - 0.2 <= (boxes[:, 2] - boxes[:, 0]).mean() <= 2 * high * spec.side + 0.2
    if setting != "where":
        assert first >= spec.frames - SPAN and end <= SPAN, "any clip of 16 frames at a stride of 2 sees all of it"


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="dataset.setting='here': allowed are when, where, both"):
        DemoSpec(setting="here")


def test_unknown_motion_is_refused() -> None:
    with pytest.raises(ValueError, match="motion 'spin': allowed are right"):
        direction("spin")
