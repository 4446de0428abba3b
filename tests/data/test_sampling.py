import json
from pathlib import Path

import numpy as np
import pytest

from stts_lightning.data.sampling import SAMPLINGS, Parts, Segments, Spread


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


@pytest.mark.parametrize("sampling", SAMPLINGS.values())
def test_no_frames(sampling: type) -> None:
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
