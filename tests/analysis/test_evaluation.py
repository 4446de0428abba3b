from pathlib import Path

import numpy as np
import pytest

from stts_lightning.analysis.evaluation import Predictions, confusion, score, write_tables


def predictions(logits: np.ndarray, label: list[int], valid: list[bool] | None = None) -> Predictions:
    count = len(label)
    valid_array = np.array(valid if valid is not None else [True] * count)
    return Predictions(logits.astype(np.float32), np.array(label), np.arange(count), valid_array)


def test_views_are_averaged_as_softmax() -> None:
    # One view is sure of class 0, two lean to class 1: the mean of logits says 0, the mean of softmax 1.
    views = np.array([[[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])
    assert score(predictions(views, [1]))["top1"] == 1.0
    assert score(predictions(views, [1]), views=[0])["top1"] == 0.0


def test_metrics_match_hand_computed_values() -> None:
    logits = np.full((4, 1, 6), -20.0)
    for row, order in enumerate(([0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [2, 1, 0, 3, 4, 5], [5, 4, 3, 2, 1, 0])):
        logits[row, 0, order] = [3, 2, 1, 0, -1, -2]
    found = score(predictions(logits, [0, 0, 0, 0]))
    assert found["top1"] == 0.25
    assert found["top5"] == 0.75
    assert found["mean_class_accuracy"] == 0.25
    assert found["videos"] == 4
    low, high = found["top1_interval"]
    assert 0 <= low < 0.25 < high <= 1
    mixed = score(predictions(logits, [0, 1, 0, 0]))
    assert mixed["top1"] == 0.5
    assert mixed["mean_class_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert confusion(predictions(logits, [0, 1, 0, 0]))[0].tolist() == [1, 0, 1, 0, 0, 1]


def test_missing_videos_are_skipped_or_wrong() -> None:
    logits = np.zeros((3, 1, 2))
    logits[:, 0, 1] = 1
    some = predictions(logits, [1, 1, 1], [True, True, False])
    assert score(some)["top1"] == 1.0
    assert score(some, missing="wrong")["top1"] == pytest.approx(2 / 3)
    assert score(some)["missing"] == 1
    with pytest.raises(ValueError, match="allowed are skip, wrong"):
        score(some, missing="maybe")
    with pytest.raises(ValueError, match=r"views=\[1\]: allowed are numbers from 0 to 0"):
        score(some, views=[1])
    with pytest.raises(ValueError, match="no video of the test could be decoded"):
        score(predictions(logits, [1, 1, 1], [False] * 3))


def test_parts_of_processes_merge_to_each_video_once(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(11, 2, 3))
    whole = predictions(logits, [i % 3 for i in range(11)])
    parts = [Predictions(*(getattr(whole, n)[r::2] for n in ("logits", "label", "video", "valid"))) for r in range(2)]
    merged = Predictions.merged(parts, 11)
    assert np.array_equal(merged.logits, whole.logits)
    assert Predictions.merged([parts[0]], None).video.tolist() == [0, 2, 4, 6, 8, 10], "a limited test"
    merged.save(tmp_path / "predictions.npz")
    assert np.array_equal(Predictions.load(tmp_path).label, whole.label)
    with pytest.raises(ValueError, match="a test of 11 videos left 17 predictions of 11 videos"):
        Predictions.merged([*parts, parts[0]], 11)
    write_tables(merged, ["a", "b", "c"], tmp_path)
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == 4


def test_calibration_is_the_gap_between_confidence_and_accuracy() -> None:
    logits = np.zeros((10, 1, 2))
    logits[:, 0, 1] = np.log(4)  # 80 % sure of class 1
    assert score(predictions(logits, [1] * 8 + [0] * 2))["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert score(predictions(logits, [1] * 4 + [0] * 6))["calibration_error"] == pytest.approx(0.4, abs=1e-6)
