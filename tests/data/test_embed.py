"""`prepare_data task=embed`: the action lies where the truth says, all else is the scene."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from warm import python_m

from stts_lightning.data.decode import open_video
from stts_lightning.data.embed import Embedding, embed, is_embedded
from stts_lightning.data.encode import write_mp4

FRAMES = 12


def film(path: Path, colour: tuple[int, int, int], frames: int = FRAMES) -> Path:
    """Frames of one colour with a bright bar that moves down."""
    images = np.full((frames, 32, 48, 3), colour, np.uint8)
    for frame in range(frames):
        images[frame, 2 * frame : 2 * frame + 4] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, images)
    return path


def frames_of(path: Path) -> NDArray[np.int64]:
    with open_video(path, "pyav") as reader:
        return reader.frames(np.arange(len(reader))).astype(int)


@pytest.mark.parametrize("scene", ["idle", "still", "other"])
def test_the_action_lies_where_the_truth_says(tmp_path: Path, scene: str) -> None:
    action, other = film(tmp_path / "a.mp4", (200, 40, 40)), film(tmp_path / "b.mp4", (30, 30, 160), 5)
    around = None if scene == "idle" else other
    how = Embedding(around, 0, scene == "still", larger=2.0, longer=2.5, short_side=64)
    embed(action, tmp_path / "out.mp4", how)
    truth, found = json.loads((tmp_path / "out.json").read_text()), frames_of(tmp_path / "out.mp4")
    (first, end), (x0, y0, x1, y1) = truth["frames"], truth["boxes"][0]
    assert found.shape == (30, 64, 96, 3) == (30, *truth["size"], 3)
    assert end - first == FRAMES and (x1 - x0, y1 - y0) == (48, 32) and len(truth["boxes"]) == FRAMES
    window = found[first:end, y0:y1, x0:x1]
    assert np.abs(window - frames_of(action)).mean() < 8, "the action's own frames, in order"
    bar = [int((picture.mean((1, 2)) > 200).nonzero()[0].mean()) for picture in window]
    assert bar[-1] - bar[0] > 15
    outside = found.copy()
    outside[:, y0:y1, x0:x1] = 0
    blue = outside[..., 2].sum() > outside[..., 0].sum()
    assert blue == (scene != "idle"), "around it its own colour, or that of the other video"
    before = found[: first - 1, y0:y1, x0:x1] if first > 1 else found[end + 1 :, y0:y1, x0:x1]
    if scene != "other":
        assert before.std(0).mean() < 4, "nothing happens before and after"
        assert outside[first:end].std(0).mean() < 4, "nor around it"
    else:
        assert outside[first:end].std(0).mean() > 4, "the bar of the other video moves"
    if scene != "idle":
        assert before[..., 2].mean() > before[..., 0].mean(), "the scene goes on where the action will be"


def test_copies_differ_in_time_and_place_and_are_made_once(tmp_path: Path) -> None:
    action = film(tmp_path / "a.mp4", (200, 40, 40))
    truths = []
    for copy in range(4):
        how, target = Embedding(None, copy, short_side=64), tmp_path / f"{copy}.mp4"
        assert not is_embedded(action, target, how)
        embed(action, target, how)
        assert is_embedded(action, target, how) and not is_embedded(action, target, Embedding(None, copy, short_side=32))
        truth = json.loads((tmp_path / f"{copy}.json").read_text())
        truths.append((truth["frames"][0], *truth["boxes"][0][:2]))
    assert len(set(truths)) == 4


def test_the_command_makes_a_data_set_with_its_truth(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            film(tmp_path / "own" / split / name / "v.mp4", colour)
    asked = ["task=embed", "dataset=folder", "dataset.root=own", "out=made", "short_side=64", "embed.copies=2", "jobs=2"]
    for scene in ("idle", "still", "other"):
        done = python_m("stts_lightning.prepare_data", [*asked, f"embed.scene={scene}"], tmp_path, dict(os.environ))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "dataset.truth=true" in done.stdout
    names = sorted(str(file.relative_to(tmp_path / "made")) for file in (tmp_path / "made").rglob("*.mp4"))
    assert names == sorted(f"{s}/{c}/v_{n}.mp4" for s in ("train", "val") for c in ("blue", "red") for n in range(2))
    assert (tmp_path / "made" / "train.csv").read_text().splitlines()[1:] == [
        "train/blue/v_0.mp4,0", "train/blue/v_1.mp4,0", "train/red/v_0.mp4,1", "train/red/v_1.mp4,1"
    ]  # fmt: skip
    truth = json.loads((tmp_path / "made/val/red/v_1.json").read_text())
    assert truth["embedding"]["scene"] == "v.mp4"
    done = python_m("stts_lightning.prepare_data", [*asked, "embed.scene=none"], tmp_path, dict(os.environ))
    assert done.returncode and "error: embed.scene=none: allowed are idle, still, other" in done.stderr
