"""Boxes of the action: followed through slots, read by the oracle, compared with what was kept."""

import pytest
import torch
from torch import Tensor

from stts_lightning import create_model
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.oracle import OracleFrames, OracleWindow
from stts_lightning.selection.selector import Selection, SlotContext
from stts_lightning.selection.spec import SelectionSpec, SlotSpec
from stts_lightning.selection.truth import area, follow, found, joined, of_grid, seen

NAN = float("nan")


def truth(frames: int, boxes: dict[int, tuple[float, float, float, float]]) -> Tensor:
    """Of one clip: boxes of some frames."""
    out = torch.full((1, frames, 4), NAN)
    for frame, box in boxes.items():
        out[0, frame] = torch.tensor(box)
    return out


def test_a_grid_frame_has_the_box_around_those_of_its_frames() -> None:
    boxes = of_grid(truth(6, {0: (0.1, 0.2, 0.3, 0.4), 1: (0.2, 0.1, 0.5, 0.3), 5: (0, 0, 1, 1)}), 3)
    assert boxes.shape == (1, 3, 4)
    assert torch.allclose(boxes[0, 0], torch.tensor([0.1, 0.1, 0.5, 0.4]))
    assert boxes[0, 1].isnan().all()
    assert torch.equal(boxes[0, 2], torch.tensor([0.0, 0, 1, 1]))
    assert joined(truth(2, {}), 1).isnan().all()


def test_a_window_shows_its_part_of_a_box() -> None:
    boxes = truth(2, {0: (0.0, 0.0, 0.5, 0.5), 1: (0.0, 0.0, 0.2, 0.2)})
    windows = torch.tensor([[[2, 2, 4, 4], [4, 4, 4, 4]]])  # The second frame's window lies elsewhere.
    shown = seen(boxes, windows, (2, 8, 8))
    assert torch.allclose(shown[0, 0], torch.tensor([0.0, 0.0, 0.5, 0.5]))
    assert shown[0, 1].isnan().all()
    assert area(shown).tolist() == [[0.25, 0.0]]


def test_found_counts_frames_then_areas_of_what_is_left() -> None:
    boxes = truth(8, {2: (0, 0, 0.5, 1), 3: (0, 0, 0.5, 1), 6: (0, 0, 0.5, 1)})
    t = Selection("t0", torch.tensor([[1, 2]]), None, torch.zeros(1, 4), None)
    s = Selection("s0", torch.zeros(1, 2).long(), torch.tensor([[[0, 0, 4, 2], [0, 0, 4, 1]]]), torch.zeros(1, 2, 4), None)
    shares = found(boxes, [t, s], {"t0": (4, 4, 4), "s0": (2, 4, 4)})
    assert shares["t0"].tolist() == [0.5], "of grid frames 1 and 3 the second was dropped"
    assert shares["s0"].tolist() == [1.0], "the one action frame that is left is the first"
    half = s._replace(windows=torch.tensor([[[0, 1, 4, 1], [0, 0, 4, 4]]]))
    assert found(boxes, [t, half], {"t0": (4, 4, 4), "s0": (2, 4, 4)})["s0"].tolist() == [0.5]
    assert found(truth(8, {}), [t], {"t0": (4, 4, 4)})["t0"].isnan().all()


def test_single_tokens_leave_boxes_as_they_are() -> None:
    boxes = truth(2, {0: (0, 0, 0.5, 1)})
    tokens = Selection("s0", torch.zeros(1, 2, 3).long(), None, torch.zeros(1, 2, 4), None)
    assert torch.equal(follow(boxes, tokens, (2, 2, 2)).nan_to_num(9), boxes.nan_to_num(9))
    assert found(boxes, [tokens], {"s0": (2, 2, 2)}) == {}


def oracle(kind: type, slot: SlotSpec, **selection: str) -> OracleFrames | OracleWindow:
    return kind(SlotContext(slot, (4, 8, 8), 4, SelectionSpec(**selection)))


def test_the_oracle_keeps_the_frames_of_the_action() -> None:
    selector = oracle(OracleFrames, SlotSpec("t0", keep=2))
    grid = torch.randn(3, 4, 8, 8, 4)
    selector.boxes = torch.cat([truth(4, {2: (0, 0, 1, 1), 3: (0, 0, 1, 1)}), truth(4, {0: (0, 0, 1, 1)}), truth(4, {})])
    assert selector(grid, torch.tensor(0.1), Noise())[1].indices.tolist() == [[2, 3], [0, 1], [1, 2]]


def test_the_oracle_keeps_the_window_of_the_action_of_a_frame_or_of_the_clip() -> None:
    grid = torch.randn(2, 4, 8, 8, 4)
    boxes = torch.cat([truth(4, {0: (0, 0, 0.2, 0.2), 1: (0.8, 0.8, 1, 1)}), truth(4, {})])
    slot = SlotSpec("s0", side=4)
    each, whole = oracle(OracleWindow, slot), oracle(OracleWindow, slot, windows="clip")
    each.boxes = whole.boxes = boxes
    corners = each(grid, torch.tensor(0.1), Noise())[1].windows[..., :2]
    assert corners[0].tolist() == [[0, 0], [4, 4], [2, 2], [2, 2]], "frames without action show the middle of the whole action"
    assert corners[1].tolist() == [[2, 2]] * 4
    assert whole(grid, torch.tensor(0.1), Noise())[1].windows[0, :, :2].tolist() == [[2, 2]] * 4


@pytest.mark.parametrize("backbone", ["mvit_tiny", "video_swin_tiny"])
def test_the_slots_tell_the_oracle_where_the_action_is_in_what_is_left(backbone: str) -> None:
    model = create_model(backbone, {"slots": {"t0": 0.5, "s1": 0.25}, "selector": "oracle"}, 3, frames=16, size=64).eval()
    assert model.slots.wants_truth
    corner = (0.8, 0.8, 0.95, 0.95)
    boxes = torch.cat([truth(16, {12: corner, 13: corner}), truth(16, {0: (0.0, 0.7, 0.2, 0.9)})])
    clip = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8)
    for _ in range(2):  # A second pass begins with the whole truth again.
        model.slots.tell_truth(boxes)
        _, kept = model(clip, return_selection=True)
        sizes = {name: selector.in_size for name, selector in model.slots.selectors.items()}
        assert all(share.tolist() == [1.0, 1.0] for share in found(boxes, list(kept.values()), sizes).values())
    # It holds for one pass: the next may have other clips.
    assert not torch.equal(model(clip, return_selection=True)[1]["t0"].indices, kept["t0"].indices)
    assert model(clip[:1]).shape == (1, 3)
