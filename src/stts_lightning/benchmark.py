"""`python -m stts_lightning.benchmark`: how fast models, the operator and loading are, in turns beside their peers."""

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.overrides import for_hydra

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]

COLUMNS: dict[str, Mapping[str, tuple[str, str]]] = {
    "models": {
        "model": ("model", ""),
        "batch": ("batch", "d"),
        "precision": ("precision", ""),
        "compile": ("compiled", ""),
        "ms": ("ms", ".1f"),
        "spread": ("quartiles", ""),
        "clips_per_second": ("clips/s", ".2f"),
        "gflops": ("GFLOPs", ".2f"),
        "share_of_peak": ("of peak", ".0%"),
        "times_the_first": ("x the first", ".2f"),
        "over_unpruned": ("x unpruned", ".2f"),
        "of_ideal": ("of ideal", ".2f"),
        "memory_mib": ("MiB", ".0f"),
        "selectors_time": ("selectors: time", ".2%"),
        "selectors_memory": ("memory", ".2%"),
        "difference": ("logits differ", ".0e"),
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
        "memory_mib": ("MiB", ".1f"),
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

    among("what", [cfg.what], ["forward", "training", "operator", "loader"])
    among("precision", names(cfg.precision), list(PRECISIONS))
    among("compile", names(cfg.compile), COMPILE)
    if any(batch < 1 for batch in cfg.batch):
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

    from stts_lightning.analysis import benchmarks

    if cfg.what == "loader":
        yield from loaded(cfg)
        return
    device = chosen_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    plan = benchmarks.Plan(device, cfg.batch, names(cfg.precision), names(cfg.compile), cfg.seconds, cfg.rounds)
    measure: dict[str, Callable[..., Iterator[Row]]] = {
        "forward": benchmarks.forward,
        "training": benchmarks.training,
        "operator": benchmarks.operator,
    }
    yield from measure[cfg.what]([benchmarks.entrant(text, device) for text in cfg.models], plan)


def loaded(cfg: DictConfig) -> Iterator[Row]:
    """Rows of decoders."""
    from stts_lightning.analysis.benchmarks import loading
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
        return f"{row['ms_low']:.1f}-{row['ms_high']:.1f}"
    value = row.get(key)
    return "" if value is None else format(value, form)


def show(rows: Sequence[Row], kind: str, title: str) -> None:
    """A table with a line for each row; what is the same in all goes to the title, empty columns are left out."""
    from rich.console import Console
    from rich.table import Table

    columns = {key: head for key, head in COLUMNS[kind].items() if key == "spread" or any(r.get(key) is not None for r in rows)}
    for key in ("batch", "precision", "compile", "samples"):
        if key in columns and len({row[key] for row in rows}) == 1:
            title += f", {columns.pop(key)[0]}: {rows[0][key]}"
    table = Table(title=title, title_justify="left")
    for name, form in columns.values():
        table.add_column(name, justify="right" if form else "left", no_wrap=not form)
    for row in rows:
        table.add_row(*(cell(row, key, form) for key, (_, form) in columns.items()))
    screen = Console()
    (screen if screen.width >= 120 else Console(width=150)).print(table)


def write(rows: Sequence[Row], facts: Mapping[str, Any], json_file: str | None, csv_file: str | None) -> None:
    """Write all figures, with what they were measured on."""
    if json_file:
        Path(json_file).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    if csv_file:
        with Path(csv_file).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Measure, print, write."""
    check_installation()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # The profiler, which tells peaks of memory, tells of itself.
    import torch

    from stts_lightning import console, run_config

    with console.one_line_errors():
        console.quiet_libraries()
        check(cfg)
        run_config.check_numbers(cfg)
        with console.as_user_errors():
            rows = list(measured(cfg))
        from stts_lightning.analysis.speed import device_name

        kind = cfg.what if cfg.what in COLUMNS else "models"
        device = torch.device("cpu") if kind == "loader" else chosen_device(cfg.device)
        facts = {"what": cfg.what, "device": device_name(device), "torch": torch.__version__}
        peaks = dict.fromkeys(f"{r['peak_tflops']:.2f} in {r['precision']}" for r in rows if "peak_tflops" in r)
        title = f"{cfg.what}, {facts['device']}, torch {facts['torch']}"
        show(rows, kind, title + (f"; matrix peak, TFLOP/s: {', '.join(peaks)}" if peaks else ""))
        for row in rows if kind == "loader" else ():
            print(cores(row, cfg.device_clips_per_second))
        write(rows, facts, cfg.json, cfg.csv)
        if cfg.plot and kind == "models":
            from stts_lightning.analysis import charts

            with charts.style():
                charts.speeds(rows, title).savefig(cfg.plot, dpi=130)


if __name__ == "__main__":
    sys.argv[1:] = for_hydra(sys.argv[1:])
    main()
