import numpy as np
import pytest

from stts_lightning.data.sampling import clip_span, train_indices, view_indices


def test_views_spread_from_start_to_end_and_one_is_the_centre() -> None:
    views = view_indices(300, 16, 4, 5)
    assert views[:, 0].tolist() == [0, 59, 119, 179, 239]
    assert views[-1, -1] == 299
    assert view_indices(300, 16, 4, 1)[0, 0] == (300 - clip_span(16, 4)) // 2


def test_training_offsets_cover_the_video() -> None:
    rng = np.random.default_rng(0)
    firsts = {int(train_indices(70, 16, 4, rng)[0]) for _ in range(500)}
    assert firsts == set(range(70 - 61 + 1))


@pytest.mark.parametrize("total", [1, 2, 7, 60, 61, 62])
def test_short_videos_hold_their_last_frame(total: int) -> None:
    for indices in (train_indices(total, 16, 4, np.random.default_rng(0)), *view_indices(total, 16, 4, 3)):
        assert indices.min() >= 0
        assert indices.max() <= total - 1
        assert (np.diff(indices) >= 0).all()


def test_no_frames() -> None:
    with pytest.raises(ValueError, match="no frames"):
        view_indices(0, 16, 4, 1)
