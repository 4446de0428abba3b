"""What was kept, traced back to the picture: compared with clips whose kept part is known."""

import numpy as np
import pytest
import torch

from stts_lightning.analysis.kept import shown_boxes, trace
from stts_lightning.analysis.overlay import TRUTH, contact_sheet, dimmed, film
from stts_lightning.classifier import create_model
from stts_lightning.selection.selector import Selection


def test_frames_then_windows_then_frames() -> None:
    kept = [
        Selection("t0", torch.tensor([[1, 2, 3]]), None, torch.tensor([[0.0, 1, 0.5, 0.9]]), None),
        Selection(
            "s0", torch.tensor([[0, 1, 2]]), torch.tensor([[[0, 0, 2, 2], [2, 2, 2, 2], [1, 2, 2, 2]]]), torch.rand(1, 3, 9), None
        ),
        # The backbone has pooled 2x2 tokens to one.
        Selection("t2", torch.tensor([[0, 2]]), None, torch.tensor([[0.4, 0.1, 0.2]]), None),
    ]
    found = trace(kept, {"t0": (4, 4, 4), "s0": (3, 4, 4), "t2": (3, 1, 1)}, 0)
    assert found.boxes == {1: (0.0, 0.0, 0.5, 0.5), 3: (0.25, 0.5, 0.75, 1.0)}
    assert found.mask.sum((1, 2)).tolist() == [0, 4, 0, 4]
    assert found.mask[3, 1:3, 2:4].all()
    assert found.share == 8 / 64
    assert found.slots[0].kept == (False, True, True, True) and found.slots[0].frames == (0, 1, 2, 3)
    assert found.slots[2].frames == (1, 2, 3) and found.slots[2].kept == (True, False, True)
    assert found.slots[2].scores == pytest.approx((0.4, 0.1, 0.2))


def test_odd_sides_stay_in_the_picture() -> None:
    # 7 tokens a side are merged to 4: the last one covers one row only.
    kept = [
        Selection("t0", torch.tensor([[0, 1]]), None, torch.zeros(1, 2), None),
        Selection("s2", torch.tensor([[3, 0]]), torch.tensor([[[2, 2, 2, 2], [0, 0, 2, 2]]]), torch.zeros(1, 2, 4), None),
    ]
    found = trace(kept, {"t0": (2, 7, 7), "s2": (2, 4, 4)}, 0)
    assert found.boxes[0] == pytest.approx((4 / 7, 4 / 7, 1.0, 1.0))
    assert found.mask[0].sum() == 9 and found.mask[1].sum() == 16


def test_sides_that_are_odd_after_the_first_of_two_poolings() -> None:
    # 10 tokens a side become 5, then 3: tokens 0 to 3, 4 to 7, 8 and 9.
    window = Selection("s0", torch.zeros(1, 1), torch.tensor([[[1, 0, 10, 10]]]), torch.zeros(1, 1, 4), None)
    corner = Selection("s4", torch.zeros(1, 1), torch.tensor([[[1, 2, 1, 1]]]), torch.zeros(1, 1, 4), None)
    found = trace([window, corner], {"s0": (1, 12, 12), "s4": (1, 3, 3)}, 0)
    assert found.boxes[0] == pytest.approx((5 / 12, 8 / 12, 9 / 12, 10 / 12))
    assert found.mask.sum() == 4 * 2


def test_single_tokens() -> None:
    kept = [Selection("s0", torch.tensor([[[0, 5, 15, 10]]]), None, torch.rand(1, 1, 16), None)]
    found = trace(kept, {"s0": (1, 4, 4)}, 0)
    assert np.flatnonzero(found.mask).tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize(("name", "selection", "arguments"), [
    ("mvit_tiny", "t0_0.5_s0_0.5_s4_0.5", {"size": 64}),
    ("mvit_tiny", "t0_0.6_s0_0.7_t4_0.7_s4_0.5", {"size": 48}),
    ("video_swin_tiny", "t0_0.6_s2_0.5", {}),
    ("video_swin_tiny", "s0_0.4_s4_0.5", {"size": 80}),
])  # fmt: skip
def test_a_model_uses_exactly_what_the_mask_shows(name: str, selection: str, arguments: dict[str, int]) -> None:
    """Pixels under dropped frames change nothing; of kept ones they do. Centre selectors do not look at pixels."""
    torch.manual_seed(0)
    fixed = {"slots": {}, "selector": "learned"}
    fixed["slots"] = {
        part[0]: {"ratio": float(part[1]), "selector": "uniform" if part[0][0] == "t" else "centre"}
        for part in zip(selection.split("_")[::2], selection.split("_")[1::2], strict=True)
    }
    model = create_model(name, fixed, 5, **arguments).eval()
    clip = torch.randint(0, 256, (1, 3, *model.backbone.clip_size), dtype=torch.uint8)
    logits, kept = model(clip, return_selection=True)
    found = trace(list(kept.values()), model.slots.sizes, 0)
    step = clip.shape[2] // found.frames
    # Where a stem's kernels overlap frames, neighbours of kept ones count too.
    near = {f + d for f in found.boxes for d in ((-1, 0, 1) if "mvit" in name else (0,))}
    far = [f for f in range(found.frames) if f not in near]
    for frames, same in ((far, True), (list(found.boxes), False)):
        other = clip.clone()
        for frame in frames:
            other[:, :, frame * step : (frame + 1) * step] = 0
        if frames:
            assert torch.allclose(model(other), logits, atol=1e-6) is same


def test_overlay_pictures_show_what_was_kept(tmp_path: object) -> None:
    frames = np.full((8, 48, 64, 3), 200, np.uint8)
    kept = [
        Selection("t0", torch.tensor([[1, 3]]), None, torch.tensor([[0.1, 0.9, 0.2, 1.0]]), None),
        Selection("s0", torch.tensor([[0, 1]]), torch.tensor([[[0, 0, 2, 2], [2, 2, 2, 2]]]), torch.rand(1, 2, 4), None),
    ]
    found = trace(kept, {"t0": (4, 4, 4), "s0": (2, 4, 4)}, 0)
    shown = dimmed(frames[0], found.mask[3])
    assert (shown[24:, 32:] == 200).all() and (shown[:24] < 110).all()
    sheet = contact_sheet(frames, found, "a title")
    assert sheet.shape == contact_sheet(frames, found, "another").shape and sheet.dtype == np.uint8
    truth = shown_boxes(torch.tensor([[0.5, 0.0, 1.0, 0.25]] * 2 + [[torch.nan] * 4] * 6), found.frames)
    assert truth == [(0.0, 0.5, 0.25, 1.0), None, None, None]
    marked = (contact_sheet(frames, found, "a title", truth=truth) == TRUTH).all(-1)
    across = marked.any(0).nonzero()[0]
    assert not (sheet == TRUTH).all(-1).any() and marked.any(1).sum() == 112 // 4, "the height of a quarter of a picture"
    assert (across.min(), across.max()) == (56 + 75, 56 + 149), "the right half of the first picture"
    movie = list(film(frames, found, ["x"]))
    assert len(movie) == 8
    assert len({frame.shape for frame in movie}) == 1
    height, width, _ = movie[0].shape
    assert width >= 320 and width % 2 == height % 2 == 0
