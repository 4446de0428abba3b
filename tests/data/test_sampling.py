import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stts_lightning.data.sampling import SAMPLINGS, Parts, Segments, SlowFast, Spread, Ticks, VideoMAE


def test_views_spread_from_start_to_end_and_one_is_the_centre() -> None:
    views = Spread(16, 4).views(300, 5)
    assert views[:, 0].tolist() == [0, 59, 119, 179, 239]
    assert views[-1, -1] == 299
    assert Spread(16, 4).views(300, 1)[0, 0] == (300 - 61) // 2


@pytest.mark.parametrize(("name", "last"), [("spread", 70 - 61), ("parts", 70 - 64)])
def test_training_offsets_cover_the_video(name: str, last: int) -> None:
    rng = np.random.default_rng(0)
    firsts = {int(SAMPLINGS[name](16, 4).train(70, rng)[0]) for _ in range(500)}
    assert firsts == set(range(last + 1))


@pytest.mark.parametrize("total", [1, 2, 7, 60, 61, 62])
def test_short_videos_hold_their_last_frame(total: int) -> None:
    sampling = Spread(16, 4)
    for indices in (sampling.train(total, np.random.default_rng(0)), *sampling.views(total, 3)):
        assert indices.min() >= 0
        assert indices.max() <= total - 1
        assert (np.diff(indices) >= 0).all()


def test_videomaes_test_clips_count_in_every_fourth_frame() -> None:
    """M = ceil(n / 4) frames, padded with the last; clip c of 5 starts at int(c (M - 16) / 4) of them (VideoMAE, kinetics.py)."""
    for total in (5, 64, 100, 250, 301):
        listed = list(range(0, total, 4))
        padded = listed + [listed[-1]] * max(16 - len(listed), 0)
        firsts = [int(clip * max((len(listed) - 16) / 4, 0)) for clip in range(5)]
        assert VideoMAE(16, 4).views(total, 5).tolist() == [padded[first : first + 16] for first in firsts]


def test_videomaes_training_clips_step_a_little_more_than_the_stride() -> None:
    clips = [VideoMAE(16, 4).train(70, np.random.default_rng(seed)) for seed in range(300)]
    assert {int(clip[0]) for clip in clips} == set(range(6))
    assert all((clip - clip[0]).tolist() == [int(i * 64 / 15) for i in range(15)] + [63] for clip in clips)
    short = VideoMAE(16, 4).train(40, np.random.default_rng(0))
    assert short.tolist() == np.linspace(0, 40, 10).clip(0, 39).astype(int).tolist() + [39] * 6


def test_ticks_read_the_whole_video_and_each_view_another_place_of_the_tick() -> None:
    views = Ticks(16, 1).views(48, 2)
    assert views[0].tolist() == [3 * i for i in range(16)] and views[1].tolist() == [int(1.5 + 3 * i) for i in range(16)]
    drawn = np.stack([Ticks(16, 1).train(50, np.random.default_rng(seed)) for seed in range(200)])
    assert {tuple(sorted(set(column // 3))) for column in drawn.T} == {(i,) for i in range(16)}
    assert Ticks(16, 1).train(5, np.random.default_rng(0)).tolist() == [int(5 / 16 * i) for i in range(16)]


@pytest.mark.parametrize("sampling", SAMPLINGS.values())
def test_video_without_frames_is_refused(sampling: type) -> None:
    with pytest.raises(ValueError, match="no frames"):
        sampling(16, 4).views(0, 1)
    with pytest.raises(ValueError, match="no frames"):
        sampling(16, 4).train(0, np.random.default_rng(0))


@pytest.mark.parametrize("sampling", SAMPLINGS.values())
@pytest.mark.parametrize("total", [1, 5, 31, 64, 301])
def test_every_frame_exists(sampling: type, total: int) -> None:
    rng = np.random.default_rng(0)
    clips = [sampling(32, 2).train(total, rng) for _ in range(50)] + list(sampling(32, 2).views(total, 4))
    assert all(len(clip) == 32 and clip.min() >= 0 and clip.max() < total for clip in clips)


@pytest.mark.reference
def test_the_official_codes_indices(shared: Path) -> None:
    golden = json.loads((shared / "golden/video_swin/sampling.json").read_text())
    for views, key in ((4, "k400_test_4clips"), (1, "k400_val_1clip")):
        for total, expected in golden[key].items():
            clips = Parts(32, 2).views(int(total), views)
            assert clips[:, 0].tolist() == expected["first"], total
            assert clips[:, -1].tolist() == expected["last"], total
            assert expected["frames"] is None or clips.tolist() == expected["frames"]
    for total, (first, last) in golden["k400_train_offset_range"].items():
        if int(total) > 1000:  # There the reference's range is one of draws, not of what can be drawn.
            continue
        rng = np.random.default_rng(0)
        offsets = {int(Parts(32, 2).train(int(total), rng)[0]) for _ in range(40 * (last - first + 1))}
        assert (min(offsets), max(offsets)) == (first, last), total
    for total, frames in golden["ssv2_test_uniform"].items():
        assert Segments(32, 2).views(int(total), 1)[0].tolist() == frames, total
    # Training draws within each segment, both ends included.
    clips = np.stack([Segments(32, 2).train(100, np.random.default_rng(seed)) for seed in range(300)])
    edges = np.round(np.arange(33) * (99 / 32)).astype(int)
    assert (clips.min(0) == edges[:-1]).all()
    assert (clips.max(0) == edges[1:]).all()


RATES = (8, 10, 12.5, 14.985, 23.976, 25, 30000 / 1001, 30, 50, 60000 / 1001, 60, 120, 0)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("frames", "stride"), [(16, 4), (32, 3), (8, 8), (4, 1), (1, 1)])
def test_slowfast_sampling_matches_the_official_code(frames: int, stride: int, rate: float) -> None:
    """Its arithmetic, written out: a span of frames * stride thirtieths of a second, linspace in float32, cut down."""
    span = frames * stride / 30 * (rate or 30)
    for total in (1, 17, 64, 183, 300, 1001):
        rest = max(total - span, 0)
        for views in (1, 2, 5, 10):
            firsts = [int(rest / 2)] if views == 1 else [view * int(rest / (views - 1)) for view in range(views)]
            clip = torch.linspace(0, span - 1, frames)
            wanted = [(first + clip.clamp(min=0).long()).clamp(0, total - 1).tolist() for first in firsts]
            assert SlowFast(frames, stride).views(total, views, rate).tolist() == wanted
        clips = [SlowFast(frames, stride).train(total, np.random.default_rng(seed), rate) for seed in range(50)]
        assert all(len(clip) == frames and clip.min() >= 0 and clip.max() < total for clip in clips)
        assert max(clip[0] for clip in clips) <= np.ceil(rest)


def test_a_clip_is_a_span_of_time() -> None:
    """2.1 seconds of any video, where a stride of 4 frames takes 2.4 seconds at 25 a second and one second at 60."""
    seconds = {rate: float(np.ptp(SlowFast(16, 4).views(1000, 1, rate)[0])) / rate for rate in (25.0, 30.0, 60.0)}
    assert seconds == pytest.approx({25.0: 2.08, 30.0: 2.1, 60.0: 2.1167}, abs=1e-3)
    assert SlowFast(16, 4).views(300, 5, 30)[:, 0].tolist() == [0, 59, 118, 177, 236]
    assert SlowFast(16, 4).views(300, 1, 30)[0].tolist() == [
        118 + at for at in (0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63)
    ]


def test_windows_over_time_reach_the_end_at_any_rate() -> None:
    for rate in (25.0, 60.0):
        windows = SlowFast(16, 4).over_time(3000, None, rate)
        span = 64 / 30 * rate
        assert windows[0, 0] == 0 and windows[-1, -1] >= 3000 - 2
        assert abs(len(windows) - 3000 / span) < 1.3
    assert len(SlowFast(16, 4).over_time(20, None, 25.0)) == 1
