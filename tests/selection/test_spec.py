import pytest
import torch

from stts_lightning import create_model
from stts_lightning.selection.spatial import anchor_starts
from stts_lightning.selection.spec import SelectionError, SelectionSpec, frames_kept, side_kept


@pytest.mark.parametrize(("ratio", "frames"), [(0.9, 7), (0.8, 6), (0.6, 5), (0.5, 4), (0.4, 3), (0.3, 2)])
def test_frames_of_the_papers_names(ratio: float, frames: int) -> None:
    assert frames_kept(8, ratio) == frames


@pytest.mark.parametrize(("ratio", "side"), [(0.9, 13), (0.7, 12), (0.6, 11)])
def test_sides_of_the_papers_names(ratio: float, side: int) -> None:
    assert side_kept(14, ratio) == side


@pytest.mark.parametrize(("margin", "anchors"), [(0, 1), (1, 4), (2, 9), (3, 16), (4, 9), (5, 9), (9, 9)])
def test_number_of_anchors(margin: int, anchors: int) -> None:
    assert len(anchor_starts(14, 14 - margin)) ** 2 == anchors


def test_multi_step_integers() -> None:
    model = create_model("mvit_b16", "t4_0.6_s4_0.7_t8_0.4_s8_0.7")
    assert {k: v.split(",")[0] for k, v in model.slots.describe().items()} == {
        "t4": "5 of 8 frames",
        "s4": "12x12 of 14x14",
        "t8": "2 of 5 frames",
        "s8": "10x10 of 12x12",
    }


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("t0_0", r"slots.t0.ratio=0.0: must lie in \(0, 1\]"),
        ("s4_1.2", r"slots.s4.ratio=1.2: must lie in \(0, 1\]"),
        ("t99_0.5", r"slots.t99: no block 99; this backbone has 0 to 5"),
        ("t0_0.01", r"slots.t0.ratio=0.01 \(that is 0 frames\): must keep 1 to 8 frames"),
        ("x0_0.5", r"expected none, or slots as in t0_0.6_s4_0.9"),
        ("t0_0.5_t0_0.4", "t0 named twice"),
        ({"slots": {"t0": {"keep": 9}}}, r"slots.t0.keep=9: must keep 1 to 8 frames"),
        ({"slots": {"s0": {"side": 0}}}, r"slots.s0.side=0: must keep 1 to 16 tokens"),
        ({"slots": {"s0": {"keep": 3}}}, "slots.s0.keep=3: slots s take ratio or side"),
        ({"slots": {"t0": {"rato": 0.5}}}, "slots.t0.rato: unknown key; allowed are ratio"),
        ({"slots": {"t0": {}}}, "slots.t0: give ratio or keep"),
        ({"slots": {"t0": {"ratio": 0.5, "_target_": "no.such.Thing"}}}, "no selector class 'no.such.Thing'"),
        ({"sigm": 0.1}, r"selection.sigm: unknown key; allowed are estimator"),
        ({"slots": {"t0": 0.5}, "scorer": "best"}, "scorer='best': allowed are paper, context, official"),
        ({"slots": {"t0": 0.5}, "estimator": "best"}, "estimator='best': allowed are monte_carlo"),
        ({"sigma": -1}, "sigma=-1: must be 0 or more"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(selection: object, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        create_model("mvit_tiny", selection, size=64)  # type: ignore[arg-type]


def test_keep_and_side_override_the_ratio() -> None:
    model = create_model("mvit_tiny", {"slots": {"t0": {"ratio": 0.9, "keep": 2}, "s0": {"ratio": 0.9, "side": 10}}}, size=64)
    assert model.backbone.block_sizes[0] == (2, 10, 10)


def test_non_square_grid_keeps_a_window_of_its_shape() -> None:
    model = create_model("mvit_tiny", "s0_0.5", 3, size=(64, 96)).eval()
    assert model.backbone.block_sizes[0] == (8, 11, 17)
    assert model(torch.randn(1, 3, 16, 64, 96)).shape == (1, 3)


def test_own_selector_by_target() -> None:
    target = "stts_lightning.selection.temporal.TemporalSelector"
    model = create_model("mvit_tiny", {"slots": {"t0": {"ratio": 0.5, "_target_": target}}}, size=64)
    assert model.slots.describe() == {"t0": "4 of 8 frames (TemporalSelector)"}, "one that is not the default is named"


def test_notation_round_trip() -> None:
    assert str(SelectionSpec.of("t0_0.6_s4_0.9")) == "t0_0.6_s4_0.9"
    assert str(SelectionSpec.of(None)) == "none"
