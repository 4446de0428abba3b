"""Tables 1 to 8 of the STTS paper as data: what is published, what the official code costs, and which experiment is which row.

Costs of the official code are its own forward pass counted with fvcore (one multiply-add is 1, LayerNorm 5 an element), with
the frames and windows that its released files say or, where there is none, that `round(M R)` and `round(H sqrt(R))` give.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

MVIT, SWIN, SWIN_SSV2 = "paper/mvit_b16", "paper/video_swin_b", "paper/video_swin_b_ssv2"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: what the paper calls it.
        top1: published, in per cent; None where the table has none.
        cost: published, in the table's unit; None where the table has none.
        experiment: the `experiment=` that regenerates it; None for models of other papers.
        official: GFLOPs of one view of the official code; None where it was not measured.
        notes: further columns of the table, by name.
    """

    label: str
    top1: float | None
    cost: float | None = None
    experiment: str | None = None
    official: float | None = None
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        title: what it shows.
        rows: its rows.
        unit: of its costs: "GFLOPs" of a view, or "TFLOPs" of a whole test.
        data: the data set, as results call it.
    """

    title: str
    rows: tuple[Row, ...]
    unit: str = "GFLOPs"
    data: str = "kinetics400"


# GFLOPs of a view of the official code, by selection.
_MVIT_OFFICIAL = {
    "none": 70.80,
    "t0_0.9_s4_0.9": 56.39,
    "t0_0.8_s4_0.9": 47.21,
    "t0_0.6_s4_0.9": 38.46,
    "t0_0.5_s4_0.7": 26.95,
    "t0_0.4_s4_0.6": 18.46,
    "t0_0.6": 41.29,
    "t0_0.5": 32.35,
    "t4_0.3": 37.49,
    "s0_0.6": 42.13,
    "s0_0.5": 33.45,
    "s4_0.3": 40.95,
    "t0_0.8_s0_0.7": 36.05,
    "t0_0.9_s0_0.9_t4_0.7_s4_0.7": 36.23,
    "t4_0.6_s4_0.7_t8_0.4_s8_0.7": 37.06,
    "t0_0.9_s0_0.9_t4_0.9_s4_0.9_t8_0.7_s8_0.8": 34.29,
}
_SWIN_OFFICIAL = {"none": 281.92, "t0_0.8": 251.30, "t0_0.6": 220.68}
_SSV2_OFFICIAL = {"none": 320.95, "t0_0.6": 182.54}


def _mvit(label: str, selection: str, top1: float | None, cost: float | None = None, how: str = "", **notes: str) -> Row:
    name = MVIT if selection == "none" else f"{MVIT}_{selection}"
    official = _MVIT_OFFICIAL[selection] if how in ("", "sigma0.05", "sigma0.2") else None
    return Row(label, top1, cost, f"{name}_{how}" if how else name, official, tuple(notes.items()))


def _swin(label: str, selection: str, top1: float, cost: float, name: str, official: Mapping[str, float]) -> Row:
    experiment = name if selection == "none" else f"{name}_{selection}"
    return Row(label, top1, cost, experiment, official.get(selection))


def _others(*rows: tuple[str, float, float]) -> tuple[Row, ...]:
    return tuple(Row(label, top1, cost) for label, cost, top1 in rows)


def _methods(label: str, selection: str, **top1: float) -> tuple[Row, ...]:
    names = {"random": "Rand.", "attention": "Atten.", "gumbel": "GS", "": "STTS"}
    figures = {how: top1.get(how or "stts") for how in names}
    return tuple(_mvit(label, selection, value, how=how, method=names[how]) for how, value in figures.items() if value)


TABLES: dict[int, PaperTable] = {
    1: PaperTable(
        "token selection methods, MViT-B16",
        (
            *_methods("T0:0.5", "t0_0.5", random=75.5, gumbel=75.8, stts=77.3),
            *_methods("T4:0.3", "t4_0.3", random=74.6, attention=76.2, gumbel=74.7, stts=77.3),
            *_methods("S0:0.5", "s0_0.5", random=75.6, stts=76.2),
            *_methods("S4:0.3", "s4_0.3", random=73.6, attention=75.6, stts=76.8),
            *_methods("T0:0.8 S0:0.7", "t0_0.8_s0_0.7", random=75.7, stts=76.4),
            *_methods("T0:0.6 S4:0.9", "t0_0.6_s4_0.9", random=76.4, stts=77.5),
        ),
    ),
    2: PaperTable(
        "comparison on Kinetics-400",
        (
            *_others(("X3D-L", 0.74, 77.5), ("TimeSformer", 0.59, 78.0)),
            _mvit("MViT-B16", "none", 78.4, 0.35),
            _mvit("MViT-B16 T0:0.8 S4:0.9", "t0_0.8_s4_0.9", 77.9, 0.24),
            _mvit("MViT-B16 T0:0.9 S4:0.9", "t0_0.9_s4_0.9", 78.1, 0.28),
            *_others(("SlowFast 8x8", 3.18, 77.9), ("CorrNet-101", 6.72, 79.2), ("ViT-B-VTN", 4.22, 78.6)),
            *_others(("TimeSformer-HR", 5.11, 79.7), ("Mformer-HR", 28.76, 81.1)),
            _swin("VideoSwin-B", "none", 82.7, 3.38, SWIN, _SWIN_OFFICIAL),
            _swin("VideoSwin-B T0:0.6", "t0_0.6", 81.4, 2.17, SWIN, _SWIN_OFFICIAL),
            _swin("VideoSwin-B T0:0.8", "t0_0.8", 81.9, 3.02, SWIN, _SWIN_OFFICIAL),
        ),
        "TFLOPs",
    ),
    3: PaperTable(
        "comparison on Something-Something-v2",
        (
            *_others(("TSM", 0.37, 63.3), ("STM", 2.00, 64.2), ("TEA", 2.10, 65.1), ("blVNet", 3.86, 65.2)),
            *_others(("SlowFast 8x8", 0.32, 63.1), ("TimeSformer-HR", 5.11, 62.5), ("ViViT-L", 47.90, 65.4)),
            *_others(("MViT-B16", 0.51, 67.1), ("Mformer-HR", 2.88, 67.1)),
            _swin("VideoSwin-B", "none", 69.6, 0.96, SWIN_SSV2, _SSV2_OFFICIAL),
            _swin("VideoSwin-B T0:0.6", "t0_0.6", 68.1, 0.57, SWIN_SSV2, _SSV2_OFFICIAL),
            _swin("VideoSwin-B T0:0.7", "t0_0.7", 68.7, 0.71, SWIN_SSV2, _SSV2_OFFICIAL),
        ),
        "TFLOPs",
        "ssv2",
    ),
    4: PaperTable(
        "selection at different locations",
        (
            _mvit("MViT-B16", "none", 78.4, 70.5),
            _mvit("S0:0.6", "s0_0.6", 76.2, 31.2),
            _mvit("S4:0.3", "s4_0.3", 76.8, 35.2),
            _mvit("T0:0.6", "t0_0.6", 77.5, 41.3),
            _mvit("T4:0.3", "t4_0.3", 77.3, 37.5),
            _mvit("T0:0.8 S0:0.7", "t0_0.8_s0_0.7", 76.4, 36.0),
            _mvit("T0:0.6 S4:0.9", "t0_0.6_s4_0.9", 77.5, 38.1),
        ),
    ),
    5: PaperTable(
        "selection in several steps",
        (
            _mvit("T0,4:0.9,0.7 S0,4:0.9,0.7", "t0_0.9_s0_0.9_t4_0.7_s4_0.7", 76.4, 35.8),
            _mvit("T4,8:0.6,0.4 S4,8:0.7,0.7", "t4_0.6_s4_0.7_t8_0.4_s8_0.7", 76.5, 36.0),
            _mvit("T0,4,8:0.9,0.9,0.7 S0,4,8:0.9,0.9,0.8", "t0_0.9_s0_0.9_t4_0.9_s4_0.9_t8_0.7_s8_0.8", 76.6, 36.6),
            _mvit("T0:0.6 S4:0.9", "t0_0.6_s4_0.9", 77.5, 37.5),
        ),
    ),
    6: PaperTable(
        "anchors in spatial selection, S0:0.5",
        (
            _mvit("Rand.", "s0_0.5", 16.7, how="random_tokens", anchor="no", score="-"),
            _mvit("Rand.", "s0_0.5", 75.6, how="random", anchor="yes", score="-"),
            _mvit("STTS", "s0_0.5", 57.6, how="tokens", anchor="no", score="tokens"),
            _mvit("STTS", "s0_0.5", 75.4, how="anchor_features", anchor="yes", score="anchors"),
            _mvit("STTS", "s0_0.5", 76.2, anchor="yes", score="tokens"),
        ),
    ),
    7: PaperTable(
        "throughput, 8 RTX 3090",
        (
            _mvit("MViT-B16", "none", None, 70.5, **{"videos/s": "79.3"}),
            _mvit("T0:0.9 S4:0.9", "t0_0.9_s4_0.9", None, 56.4, **{"videos/s": "96.5"}),
            _mvit("T0:0.8 S4:0.9", "t0_0.8_s4_0.9", None, 47.2, **{"videos/s": "112.9"}),
            _mvit("T0:0.6 S4:0.9", "t0_0.6_s4_0.9", None, 38.1, **{"videos/s": "129.7"}),
        ),
    ),
    8: PaperTable(
        "sigma, T0:0.5",
        (
            _mvit("Rand.", "t0_0.5", 75.5, how="random", sigma="-"),
            _mvit("T0:0.5", "t0_0.5", 77.2, how="sigma0.05", sigma="0.05"),
            _mvit("T0:0.5", "t0_0.5", 77.3, sigma="0.1"),
            _mvit("T0:0.5", "t0_0.5", 77.1, how="sigma0.2", sigma="0.2"),
        ),
    ),
}

FIGURE_3 = PaperTable(
    "accuracy against cost, MViT-B16",
    (
        _mvit("MViT-B16", "none", 78.4, 70.5, method="unpruned"),
        _mvit("T0:0.9 S4:0.9", "t0_0.9_s4_0.9", 78.1, 56.4, method="STTS"),
        _mvit("T0:0.8 S4:0.9", "t0_0.8_s4_0.9", 77.9, 47.2, method="STTS"),
        _mvit("T0:0.6 S4:0.9", "t0_0.6_s4_0.9", 77.5, 38.1, method="STTS"),
        _mvit("T0:0.5 S4:0.7", "t0_0.5_s4_0.7", 76.6, 23.3, method="STTS", remark="published with the checkpoint"),
        _mvit("T0:0.4 S4:0.6", "t0_0.4_s4_0.6", 75.6, 12.1, method="STTS", remark="published with the checkpoint"),
        _mvit("T0:0.9 S4:0.9", "t0_0.9_s4_0.9", None, how="random", method="Rand."),
        _mvit("T0:0.8 S4:0.9", "t0_0.8_s4_0.9", None, how="random", method="Rand."),
        _mvit("T0:0.6 S4:0.9", "t0_0.6_s4_0.9", 76.4, how="random", method="Rand."),
        _mvit("T0:0.5 S4:0.7", "t0_0.5_s4_0.7", None, how="random", method="Rand."),
        _mvit("T0:0.4 S4:0.6", "t0_0.4_s4_0.6", 69.9, how="random", method="Rand.", remark="by the text, 5.7 below STTS"),
    ),
)
"""What Figure 3 draws. Its curves have no numbers in the paper: what text and tables say of them is here."""


def published_curves() -> dict[str, list[tuple[float, float]]]:
    """Points of Figure 3 that are published, by method: cost in GFLOPs as published for STTS, and top-1 in per cent."""
    costs = {row.label: row.cost for row in FIGURE_3.rows if row.cost}
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in FIGURE_3.rows:
        if row.top1 is not None and (cost := costs[row.label]):
            curves.setdefault(dict(row.notes)["method"], []).append((cost, row.top1))
    return curves


def figure_curves(results: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points of Figure 3, published and of runs of its experiments, by method: GFLOPs of a view, and top-1 in per cent."""
    curves = {f"{method} (paper)": points for method, points in published_curves().items()}
    for row in FIGURE_3.rows:
        for found in measured(results, str(row.experiment), MVIT.removeprefix("paper/")):
            curves.setdefault(f"{dict(row.notes)['method']} ({found.where})", []).append((found.gflops, found.top1))
    return curves


SPEED = "videos/s"
"""The column of Table 7 that is measured."""


def model_of(row: Row) -> str:
    """The model of a row of MViT-B16's, as `benchmark` names it: "mvit_b16:t0_0.6_s4_0.9"."""
    return str(row.experiment).removeprefix("paper/").replace("mvit_b16_", "mvit_b16:")


def speedup(row: Row) -> float:
    """Published videos a second of a row of Table 7, over those of the unpruned model in its first row."""
    return float(dict(row.notes)[SPEED]) / float(dict(TABLES[7].rows[0].notes)[SPEED])


def beside_speed(measured: Mapping[str, Any], row: Row, views: int) -> dict[str, Any]:
    """A measured row of Table 7, with videos a second and what the paper says.

    The paper does not say what it counts as a video, in which precision and at which batch. Here a video is all views of its
    test; the ratio to the unpruned model does not depend on that.

    Args:
        measured: of `analysis.benchmarks.forward`.
        row: of the paper.
        views: clips of a video in a test.
    """
    clips = measured.get("clips_per_second")
    return {
        **measured,
        "views": views,
        "videos_per_second": None if clips is None else clips / views,
        "paper_videos_per_second": float(dict(row.notes)[SPEED]),
        "paper_over_unpruned": speedup(row),
    }


def speeds(row: Row, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Columns of Table 7 that were measured, for a row: videos a second, and the ratio to the unpruned model.

    Args:
        row: of the paper.
        rows: of `beside_speed`; each batch, precision and way to compile makes two columns.
    """
    columns: dict[str, str] = {"x unpruned, paper": f"{speedup(row):.2f}"}
    for one in rows:  # A benchmark that was stopped has no row of some models in its last columns.
        compiled = "" if one["compile"] == "false" else f", compiled: {one['compile']}"
        name = f"ours: batch {one['batch']}, {one['precision']}{compiled}"
        columns.setdefault(f"{SPEED}, {name}", "")
        columns.setdefault(f"x unpruned, {name}", "")
        if one["model"] == model_of(row):
            speed, ratio = one.get("videos_per_second"), one.get("over_unpruned")
            columns[f"{SPEED}, {name}"] = f"{speed:.1f}" if speed else str(one.get("remark", ""))
            columns[f"x unpruned, {name}"] = f"{ratio:.2f}" if ratio else ""
    return columns


@dataclass(frozen=True)
class Measured:
    """Our accuracy for a row: mean over runs of one data set and model.

    Attributes:
        top1: mean, in per cent.
        gflops: of a view of these runs, mean.
        runs: how many runs it is of.
        where: data set, and backbone where it is not the row's.
    """

    top1: float
    gflops: float
    runs: int
    where: str

    def __str__(self) -> str:
        runs = f", {self.runs} runs" if self.runs > 1 else ""
        return f"{self.top1:.1f} ({self.where}{runs})"


def measured(results: Sequence[Mapping[str, Any]], experiment: str, backbone: str) -> list[Measured]:
    """What runs of an experiment reached, apart by data set and backbone; results without an accuracy are left aside."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if result.get("experiment") == experiment and "top1" in result:
            name, model = result["dataset"]["name"], result["backbone"]
            groups.setdefault(name if model == backbone else f"{name}, {model}", []).append(result)
    means = {
        where: [mean(float(one[key]) for one in group) for key in ("top1", "gflops_per_view")] for where, group in groups.items()
    }
    return [Measured(100 * top1, gflops, len(groups[where]), where) for where, (top1, gflops) in means.items()]
