"""Draw the pictures of docs/how_it_works.md with this project's own operators.

python scripts/concept_pictures.py docs/pictures
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from stts_lightning import create_model
from stts_lightning.analysis import charts
from stts_lightning.analysis.flops import count_gflops
from stts_lightning.selection.spatial import anchor_starts
from stts_lightning.selection.topk import exact_topk, hard_topk

BLUE, ORANGE, GREY = charts.COLOURS[0], charts.COLOURS[1], "#ced4da"


def figure(width: float, height: float) -> Figure:
    """An empty figure."""
    empty = Figure((width, height), layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def grid(axes: Axes, x: float, y: float, side: int, size: float, kept: tuple[int, int, int] | None, whole: bool) -> None:
    """A frame of tokens: all of them grey, or blue where they are kept."""
    for row in range(side):
        for column in range(side):
            inside = kept is not None and kept[0] <= row < kept[0] + kept[2] and kept[1] <= column < kept[1] + kept[2]
            colour = BLUE if inside or (whole and kept is None) else GREY
            place = (x + column * size, y - row * size)
            axes.add_patch(Rectangle(place, size * 0.86, size * 0.86, color=colour, lw=0))


def pipeline() -> Figure:
    """Frames, of which some are kept; windows of those; what later blocks see (the paper's Figure 1)."""
    drawn = figure(9, 1.7)
    axes = drawn.add_subplot()
    frames = [0.2, 0.5, 1.0, 0.9, 0.4, 0.8, 0.3, 0.1]
    kept = sorted(sorted(range(8), key=lambda n: -frames[n])[:4])
    for number, score in enumerate(frames):
        grid(axes, number * 0.62, 1.5, 4, 0.13, None, number in kept)
        colour = BLUE if number in kept else "#868e96"
        axes.text(number * 0.62 + 0.24, 0.9, f"{score:.1f}", ha="center", fontsize=8, color=colour)
    corners = [(0, 1, 2), (1, 1, 2), (1, 2, 2), (2, 2, 2)]
    for place, corner in enumerate(corners):
        grid(axes, 6.0 + place * 0.62, 1.5, 4, 0.13, corner, False)
    for place in range(4):
        grid(axes, 9.4 + place * 0.36, 1.3, 2, 0.13, None, True)
    for start, end in ((5.1, 5.85), (8.55, 9.25)):
        axes.add_patch(FancyArrowPatch((start, 1.35), (end, 1.35), arrowstyle="-|>", mutation_scale=12, color="#495057"))
    told = {
        2.4: "before block 0: which frames?\n8 of 4x4 tokens, a score each",
        7.2: "before block 4: where?\n4 frames, a window of each",
        10.1: "later blocks\n4 of 2x2",
    }
    for x, text in told.items():
        axes.text(x, 1.75, text, ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(-0.2, 11), ylim=(0.85, 2.15))
    axes.axis("off")
    return drawn


def anchors(side: int = 14, window: int = 10) -> Figure:
    """The windows that may be kept of a frame (the paper's Figure 2, right)."""
    starts = anchor_starts(side, window)
    drawn = figure(7.5, 2.9)
    panels = drawn.subplots(1, len(starts))
    for axes, top in zip(panels, starts, strict=True):
        grid(axes, 0, side - 1, side, 1, None, False)
        for number, left in enumerate(starts):
            corner = (left - 0.07, side - top - window - 0.07)
            axes.add_patch(Rectangle(corner, window, window, fill=False, lw=2, ec=charts.COLOURS[number]))
        axes.set(xlim=(-0.5, side + 0.3), ylim=(-0.5, side + 0.5), aspect="equal")
        axes.axis("off")
    drawn.suptitle(f"{len(starts) ** 2} windows of {window}x{window} of {side}x{side} tokens", fontsize=10)
    return drawn


def relaxation() -> Figure:
    """What the Top-K becomes under noise, for falling sigma (Eq. 7)."""
    scores = torch.tensor([[0.20, 0.55, 1.00, 0.90, 0.45, 0.60, 0.30, 0.00]])
    drawn = figure(9.6, 2.6)
    panels = drawn.subplots(1, 5, width_ratios=(1.2, 1, 1, 1, 1))
    panels[0].bar(range(8), scores[0], color=[BLUE if n in hard_topk(scores, 3)[0] else GREY for n in range(8)])
    panels[0].set_title("scores of 8 frames", fontsize=9)
    panels[0].set_xticks(range(8))
    for axes, sigma in zip(panels[1:], (0.5, 0.1, 0.03, 0.0), strict=True):
        axes.imshow(exact_topk(scores, 3, sigma)[0], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"sigma {sigma:g}", fontsize=9)
        axes.set_xticks(range(8))
        axes.set_yticks(range(3), ["1st", "2nd", "3rd"])
        axes.tick_params(labelsize=7)
    return drawn


def savings() -> Figure:
    """What each axis saves, at each place, of MViT-B16."""
    drawn = figure(6.4, 3.4)
    axes = drawn.add_subplot()
    ratios = (1.0, 0.9, 0.75, 0.6, 0.5, 0.4, 0.25)
    with torch.device("meta"):
        for number, slot in enumerate(("t0", "t4", "s0", "s4")):
            costs = [count_gflops(create_model("mvit_b16", f"{slot}_{ratio}" if ratio < 1 else None)) for ratio in ratios]
            where = f"{'frames' if slot[0] == 't' else 'window of each frame'} before block {slot[1:]}"
            axes.plot(ratios, costs, marker="o", ms=4, color=charts.COLOURS[number], label=where)
    axes.set(xlabel="share that is kept", ylabel="GFLOPs a view")
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    return drawn


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    with charts.style():
        for name, draw in (("pipeline", pipeline), ("anchors", anchors), ("relaxation", relaxation), ("savings", savings)):
            draw().savefig(folder / f"how_{name}.png", dpi=130)
