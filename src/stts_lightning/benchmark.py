"""`python -m stts_lightning.benchmark`: how fast models, the operator and loading are, in turns beside their peers."""

import csv
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stts_lightning import command_line
from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.files import replacing, write_json
from stts_lightning.overrides import for_hydra

if TYPE_CHECKING:
    import torch

    from stts_lightning.analysis import benchmarks

Row = dict[str, Any]

COLUMNS: dict[str, Mapping[str, tuple[str, str]]] = {
    "models": {
        "model": ("model", ""),
        "batch": ("batch", "d"),
        "precision": ("precision", ""),
        "tf32": ("TF32", ""),
        "compile": ("compiled", ""),
        "kernels": ("kernels", ""),
        "ms": ("ms", ".1f"),
        "spread": ("quartiles", ""),
        "device_ms": ("device, ms", ".2f"),
        "bound_by": ("bound by", ""),
        "clips_per_second": ("clips/s", ".2f"),
        "gflops": ("GFLOPs", ".2f"),
        "share_of_peak": ("of peak", ".0%"),
        "times_the_first": ("x the first", ".2f"),
        "over_unpruned": ("x unpruned", ".2f"),
        "of_ideal": ("of ideal", ".2f"),
        "memory_mib": ("MiB", ".0f"),
        "graphs_mib": ("graphs keep, MiB", ".0f"),
        "selectors_time": ("selectors: time", ".2%"),
        "selectors_memory": ("memory", ".2%"),
        "difference": ("logits differ from ours", ".0e"),
        "output_difference": ("from float32", ".1%"),
        "remark": ("remark", ""),
    },
    "table7": {
        "model": ("model", ""),
        "batch": ("batch", "d"),
        "precision": ("precision", ""),
        "tf32": ("TF32", ""),
        "compile": ("compiled", ""),
        "kernels": ("kernels", ""),
        "gflops": ("GFLOPs a view", ".2f"),
        "ms": ("ms", ".1f"),
        "spread": ("quartiles", ""),
        "device_ms": ("device, ms", ".2f"),
        "bound_by": ("bound by", ""),
        "views": ("views a video", "d"),
        "videos_per_second": ("videos/s", ".2f"),
        "paper_videos_per_second": ("paper (8 GPUs)", ".1f"),
        "over_unpruned": ("x unpruned", ".2f"),
        "paper_over_unpruned": ("paper", ".2f"),
        "of_ideal": ("of ideal", ".2f"),
        "memory_mib": ("MiB", ".0f"),
        "output_difference": ("from float32", ".1%"),
        "remark": ("remark", ""),
    },
    "launches": {
        "model": ("model", ""),
        "batch": ("batch", "d"),
        "precision": ("precision", ""),
        "launches": ("launches", "d"),
        "gigabytes": ("GB", ".1f"),
        "waits": ("waits", "d"),
        "host_ms": ("host, ms", ".1f"),
        "arithmetic_ms": ("device, ms", ".1f"),
        "bound_by": ("bound by", ""),
        "training_launches": ("training: launches", "d"),
        "training_gigabytes": ("GB, of training", ".1f"),
    },
    "operator": {
        "model": ("slot", ""),
        "estimator": ("estimator", ""),
        "rows": ("rows", "d"),
        "candidates": ("candidates", "d"),
        "kept": ("kept", "d"),
        "samples": ("samples", "d"),
        "ms": ("ms", ".2f"),
        "spread": ("quartiles", ""),
        "device_ms": ("device, ms", ".2f"),
        "bound_by": ("bound by", ""),
        "memory_mib": ("MiB", ".1f"),
        "remark": ("remark", ""),
    },
    "loader": {
        "decoder": ("decoder", ""),
        "clips": ("clips", "d"),
        "decode_ms": ("decode, ms", ".1f"),
        "train_ms": ("train crop, ms", ".1f"),
        "train_randaugment_ms": ("and RandAugment, ms", ".1f"),
        "test_ms": ("test crop, ms", ".1f"),
        "clips_per_second_per_core": ("train clips/s a core", ".1f"),
        "clips_per_second_per_core_test": ("test clips/s a core", ".1f"),
        "cores": ("cores the device needs", ".1f"),
    },
}

SAME = ("batch", "precision", "tf32", "compile", "kernels", "samples", "views")
"""Columns that go to the title where all rows have the same."""

SAID = (
    "model",
    "decoder",
    "estimator",
    "batch",
    "precision",
    "compile",
    "launches",
    "ms",
    "device_ms",
    "clips_per_second",
    "memory_mib",
)
"""What is printed of a row as soon as it is measured, besides its remark."""


def chosen_device(name: str) -> "torch.device":
    """The device of a name; auto is a GPU where there is one. Raises ConfigError for one that is not there."""
    import torch

    from stts_lightning.run_config import ConfigError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={name}: not to be had here ({str(error).splitlines()[0]}); auto takes what there is"
        ) from error
    return device


def names(values: Sequence[Any]) -> list[str]:
    """Values as words: 32 is "32", true is "true"."""
    return [str(value).lower() for value in values]


def check(cfg: DictConfig) -> None:
    """Refuse values that cannot be measured, before anything is built. Raises ConfigError."""
    from stts_lightning.analysis.benchmarks import PRECISIONS
    from stts_lightning.classifier import COMPILE
    from stts_lightning.data.decode import DECODERS
    from stts_lightning.run_config import ConfigError

    def among(key: str, values: Sequence[Any], allowed: Sequence[str]) -> None:
        if wrong := [value for value in values if str(value) not in allowed]:
            raise ConfigError(f"{key}={wrong[0]}: allowed are {', '.join(allowed)}")

    among("what", [cfg.what], ["forward", "training", "operator", "loader", "launches", "table7"])
    among("precision", names(cfg.precision or []), list(PRECISIONS))
    among("compile", names(cfg.compile), COMPILE)
    weights = [name for name in names(cfg.precision or []) if name.endswith("-true")]
    if cfg.what == "training" and weights:
        raise ConfigError(f"precision={weights[0]}: holds the weights in bfloat16, which is for tests; what=training takes bf16")
    if cfg.what == "launches":
        among("precision", names(cfg.precision or []), ["32", "bf16", "bf16-true"])
    if any(batch < 1 for batch in cfg.batch or []):
        raise ConfigError(f"batch={list(cfg.batch)}: must be 1 or more")
    if cfg.rounds < 2:
        raise ConfigError(f"rounds={cfg.rounds}: must be 2 or more")
    if not cfg.models or len(set(cfg.models)) < len(cfg.models):
        raise ConfigError(f"models={list(cfg.models)}: must be one or more, each once")
    among("decoders", cfg.decoders, list(DECODERS))
    if cfg.what == "loader" and cfg.videos is None:
        raise ConfigError("videos: must be given, as in videos=FOLDER")


def measured(cfg: DictConfig) -> Iterator[Row]:
    """Rows of what was asked for."""
    import torch

    from stts_lightning.analysis import benchmarks, launches, operator_speed
    from stts_lightning.analysis.entrants import entrant
    from stts_lightning.run_config import ConfigError

    if cfg.what == "loader":
        yield from loaded(cfg)
        return
    if cfg.what == "launches":
        entrants = [entrant(text, torch.device("cpu"), compare=False) for text in cfg.models]
        yield from launches.counted(entrants, cfg.batch or [8], names(cfg.precision or ["bf16", "bf16-true"]))
        return
    device = chosen_device(cfg.device)
    if "tf32" in names(cfg.precision or []) and device.type != "cuda":
        raise ConfigError(f"precision=tf32: device {device} has no TF32")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    gpu = device.type == "cuda"
    # As many clips as keep a GPU at work; and as `trainer=gpu` trains.
    batches = cfg.batch or [32 if gpu and cfg.what == "table7" else 1]
    precisions = names(cfg.precision or ["bf16" if gpu and cfg.what == "training" else "32"])
    plan = benchmarks.Plan(device, batches, precisions, names(cfg.compile), cfg.seconds, cfg.rounds)
    if cfg.what == "table7":
        yield from table7(plan)
        return
    measure: dict[str, Callable[..., Iterator[Row]]] = {
        "forward": benchmarks.forward,
        "training": benchmarks.training,
        "operator": operator_speed.operator,
    }
    yield from measure[cfg.what]([entrant(text, device) for text in cfg.models], plan)


def table7(plan: "benchmarks.Plan") -> Iterator[Row]:
    """Rows of the paper's Table 7, with videos a second: a video is as many clips as a test takes of it."""
    from stts_lightning import assembly
    from stts_lightning.analysis import benchmarks, paper
    from stts_lightning.analysis.entrants import entrant

    rows = {paper.model_of(row): row for row in paper.TABLES[7].rows}
    views = {name: assembly.experiment_cost(str(row.experiment)).views for name, row in rows.items()}
    for row in benchmarks.forward([entrant(name, plan.device) for name in rows], plan):
        yield paper.beside_speed(row, rows[row["model"]], views[row["model"]])


def loaded(cfg: DictConfig) -> Iterator[Row]:
    """Rows of decoders."""
    from stts_lightning.analysis.loader_speed import loading
    from stts_lightning.run_config import ConfigError

    place = Path(cfg.videos)
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    if not files:
        raise ConfigError(f"videos={cfg.videos}: there is no such file, or no file in it")
    for row in loading(files, cfg.decoders, (cfg.frames, cfg.size, cfg.size), cfg.stride, cfg.seconds, cfg.rounds, cfg.copies):
        if cfg.device_clips_per_second:
            row["cores"] = cfg.device_clips_per_second / row["clips_per_second_per_core"]
        yield row


def cores(row: Row, wanted: float | None) -> str:
    """How many cores keep a device busy, as a sentence.

    Args:
        row: of a decoder.
        wanted: clips a second of the device; None is 100, of any device.
    """
    device = f"a device of {wanted:g} clips/s" if wanted else "each 100 clips/s of a device"
    plain, workers = (row[f"clips_per_second_per_core{way}"] for way in ("", "_randaugment"))
    return (
        f"{row['decoder']}: {plain:.1f} clips/s a core; {device} takes {math.ceil((wanted or 100) / plain)} cores, and one for "
        f"the process that drives it. RandAugment is the device's (augment.randaugment); in the workers: {workers:.1f} clips/s a "
        f"core, {math.ceil((wanted or 100) / workers)} cores"
    )


def cell(row: Row, key: str, form: str) -> str:
    """A figure as the table shows it."""
    if key == "spread":
        return f"{row['ms_low']:.1f}-{row['ms_high']:.1f}" if "ms_low" in row else ""
    value = row.get(key)
    return "" if value is None else format(value, form)


def line(row: Row, kind: str) -> str:
    """A row in a line, to be read while the others are measured."""
    known = [(key, COLUMNS[kind][key]) for key in SAID if key in COLUMNS[kind] and row.get(key) is not None]
    said = [f"{name} {cell(row, key, form)}".removeprefix("model ") for key, (name, form) in known]
    return ", ".join(said) + (f": {row['remark']}" if row.get("remark") else "")


def table(rows: Sequence[Row], kind: str) -> tuple[str, list[dict[str, str]]]:
    """Rows as lines of texts by column: empty columns are left out, and what is the same in all is said once, in words."""
    columns = {key: head for key, head in COLUMNS[kind].items() if any(cell(row, key, head[1]) for row in rows)}
    same = [key for key in SAME if key in columns and len({row.get(key) for row in rows}) == 1]
    said = [f"{columns[key][0]}: {cell(rows[0], key, columns[key][1])}" for key in same]
    lines = [{name: cell(row, key, form) for key, (name, form) in columns.items() if key not in same} for row in rows]
    return ", ".join(said), lines


def show(rows: Sequence[Row], kind: str, title: str) -> None:
    """Print a table with a line for each row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    same, lines = table(rows, kind)
    shown = Table(title=Text(f"{title}, {same}" if same else title), title_justify="left")
    numbers = {name for name, form in COLUMNS[kind].values() if form}
    for name in lines[0]:
        shown.add_column(Text(name), justify="right" if name in numbers else "left", no_wrap=name not in numbers)
    for texts in lines:
        shown.add_row(*map(Text, texts.values()))
    screen = Console()
    (screen if screen.width >= 120 else Console(width=150)).print(shown)


def write(rows: Sequence[Row], facts: Mapping[str, Any], json_file: str | None, csv_file: str | None) -> None:
    """Write all figures so far, with what they were measured on: each file as a whole, so that it can be read at any time."""
    if json_file:
        write_json(json_file, {**facts, "rows": rows})
    if csv_file:
        with replacing(csv_file) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)


def record(
    measured: Iterable[Row], kind: str, facts: Mapping[str, Any], json_file: str | None, csv_file: str | None
) -> list[Row]:
    """Print and write each row as soon as it is measured: what is cut off keeps what it has."""
    rows: list[Row] = []
    for row in measured:
        rows.append(row)
        print(line(row, kind), flush=True)
        write(rows, {**facts, "complete": False}, json_file, csv_file)
    write(rows, {**facts, "complete": True}, json_file, csv_file)
    return rows


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Measure, print, write."""
    check_installation()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # The profiler, which tells peaks of memory, tells of itself.
    import torch

    from stts_lightning import console, run_config

    with console.one_line_errors():
        console.quiet()
        if cfg.run:
            from stts_lightning.analysis.entrants import texts_of_run

            with console.as_user_errors():
                cfg.models = texts_of_run(cfg.run)
        check(cfg)
        run_config.check_numbers(cfg)
        with console.as_user_errors():
            from stts_lightning.analysis.speed import device_name

            kind = cfg.what if cfg.what in COLUMNS else "models"
            device = torch.device("cpu") if kind in ("loader", "launches") else chosen_device(cfg.device)
            facts = {
                "what": cfg.what,
                "device": device_name(device),
                "torch": torch.__version__,
                "command": shlex.join(["python", "-m", "stts_lightning.benchmark", *HydraConfig.get().overrides.task]),
            }
            # Where `report paper_table=7` looks for it.
            json_file = cfg.json or (f"{cfg.paths.runs}/table7.json" if kind == "table7" else None)
            rows = record(measured(cfg), kind, facts, json_file, cfg.csv)
        peaks = dict.fromkeys(f"{r['peak_tflops']:.2f} in {r['precision']}" for r in rows if r.get("peak_tflops"))
        title = f"{cfg.what}, {facts['device']}, torch {facts['torch']}"
        show(rows, kind, title + (f"; matrix peak, TFLOP/s: {', '.join(peaks)}" if peaks else ""))
        for row in rows if kind == "loader" else ():
            print(cores(row, cfg.device_clips_per_second))
        figures = [row for row in rows if row.get("clips_per_second")]
        if cfg.plot and kind in ("models", "table7") and figures:
            from stts_lightning.analysis import charts

            with charts.style():
                charts.speeds(figures, title).savefig(cfg.plot, dpi=130)


if __name__ == "__main__":
    sys.argv[1:] = for_hydra(sys.argv[1:])
    command_line.check("benchmark", sys.argv[1:])
    main()
