"""`python -m stts_lightning.prepare_data`: find out which videos decode, write them again, or embed them in larger ones."""

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig

from stts_lightning import command_line
from stts_lightning.analysis.results import printable
from stts_lightning.configuration import conf_dir
from stts_lightning.data.annotations import AnnotationError, Video, VideoList
from stts_lightning.data.checking import Task, work
from stts_lightning.data.embed import SCENES, Embedding
from stts_lightning.data.encode import Encoding
from stts_lightning.data.manifest import Entry, manifest_hash, read_manifest, write_manifest
from stts_lightning.doctor import check_installation
from stts_lightning.files import replacing, write_text
from stts_lightning.overrides import for_hydra
from stts_lightning.progress import counting

TASKS = ("check", "encode", "embed")


def targets(videos: VideoList, folder: Path) -> list[Path]:
    """Where each video is written: under the path that it has in the folder that all of the list have in common.

    Raises:
        AnnotationError: for two sources that would share a target.
    """
    paths = [video.path.absolute() for video in videos.videos]
    base = Path(os.path.commonpath([path.parent for path in paths]))
    files = [folder / path.parent.relative_to(base) / _target_name(path) for path in paths]
    sources: dict[Path, Path] = {}
    for path, file in zip(paths, files, strict=True):
        if sources.setdefault(file, path) != path:
            raise AnnotationError(f"{sources[file]} and {path} would both be written to {file}; rename one of them")
    return files


def _target_name(path: Path) -> str:
    """`v.mp4` stays, `v.avi` becomes `v.avi.mp4`, the frame folder `v` becomes `v.frames.mp4`."""
    if path.is_dir():
        return f"{path.name}.frames.mp4"
    return path.name if path.suffix == ".mp4" else f"{path.name}.mp4"


def embeddings(videos: VideoList, folder: Path, how: Embedding, scene: str, copies: int) -> tuple[VideoList, list[Task]]:
    """The videos of `task=embed`, several copies of each of a list, and how each is made.

    Args:
        videos: whose actions are embedded.
        folder: of the files.
        how: what all have in common.
        scene: one of `SCENES`.
        copies: of each video.

    Raises:
        AnnotationError: where all videos are of one class, and another class is to be seen around them.
    """
    rng, labels = np.random.default_rng(how.seed), videos.labels
    made: list[Video] = []
    tasks: list[Task] = []
    for video, target in zip(videos.videos, targets(videos, folder), strict=True):
        for copy in range(copies):
            around = None
            if scene != "idle":
                others = np.flatnonzero(labels != video.label)
                if not len(others):
                    raise AnnotationError(f"embed.scene={scene}: all videos are of one class; embed.scene=idle needs no other")
                around = videos.videos[int(rng.choice(others))].path
            file = target.with_name(f"{target.stem}_{copy}.mp4")
            made.append(replace(video, path=file))
            tasks.append(Task(video.path, file, replace(how, scene=around, still=scene == "still", copy=copy)))
    return replace(videos, videos=tuple(made)), tasks


def run(tasks: Sequence[Task], jobs: int, timeout: float) -> list[Entry]:
    """Work through tasks, and show how far it is."""
    with counting("files", len(tasks)) as one_more:
        return work(tasks, jobs, timeout, lambda _: one_more())


def write_list(file: Path, videos: VideoList, entries: Sequence[Entry]) -> None:
    """A list of what was written, labels as numbers, and the names of the classes beside it."""
    with replacing(file) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "label"])
        base = file.parent.absolute()
        pairs = zip(videos.videos, entries, strict=True)
        writer.writerows([Path(entry.path).relative_to(base), video.label] for video, entry in pairs if entry.status == "ok")
    write_text(file.parent / "classes.txt", "".join(f"{name}\n" for name in videos.classes))


def with_earlier_warnings(entries: Sequence[Entry], manifest: Path) -> list[Entry]:
    """Entries with what an earlier encoding said of files that were not written anew: their sources are not decoded again."""
    try:
        earlier, written = read_manifest(manifest), manifest.stat().st_mtime_ns
    except AnnotationError:  # There is none, or it is of another version.
        return list(entries)
    kept: list[Entry] = []
    for entry in entries:
        path = Path(entry.path)
        before = earlier.get(path.absolute())
        same = before is not None and path.is_file() and path.stat().st_mtime_ns <= written
        kept.append(replace(entry, warning=before.warning) if before and same and not entry.warning else entry)
    return kept


def show(results: dict[str, list[Entry]], manifest: Path) -> None:
    """Print how many files were listed, found and decodable, and what is odd about single ones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Names of files are no markup, and may be no UTF-8.
    console = Console(soft_wrap=True)
    table = Table(title=Text(printable(str(manifest))), title_justify="left")
    for name in ("split", "listed", "found", "decodable", "by PyAV", "with warnings"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, entries in results.items():
        good = [entry for entry in entries if entry.status == "ok"]
        numbers = (
            len(entries),
            sum(entry.status != "missing" for entry in entries),
            len(good),
            sum(entry.decoder == "pyav" for entry in good),
            sum(bool(entry.warning) for entry in good),
        )
        table.add_row(Text(split), *map(str, numbers))
    console.print(table)
    everything = [entry for entries in results.values() for entry in entries]
    for odd in (
        [entry for entry in everything if entry.status != "ok"],
        [entry for entry in everything if entry.status == "ok" and entry.warning],
    ):
        for entry in odd[:20]:
            path = os.path.relpath(entry.path)
            shown = entry.path if path.startswith("..") else path
            status = f"decoded by {entry.decoder}" if entry.status == "ok" else entry.status
            console.print(printable(f"{status}: {shown} {entry.warning}"), markup=False, highlight=False)
        if len(odd) > 20:
            console.print(f"and {len(odd) - 20} more; the manifest lists all of them")
    found = manifest_hash(entry for entries in results.values() for entry in entries)
    print(printable(f"manifest {found}: {manifest}"))


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    """Check or encode the videos of a data set."""
    check_installation()
    from hydra.utils import instantiate

    from stts_lightning import console, run_config

    with console.one_line_errors(), console.as_user_errors():
        run_config.check_numbers(cfg)
        values: dict[str, Any] = run_config.to_container(cfg)
        if values["task"] not in TASKS:
            raise run_config.ConfigError(f"task={values['task']}: allowed are {', '.join(TASKS)}")
        splits = values["splits"]
        if splits is not None and (not isinstance(splits, list) or not splits):
            raise run_config.ConfigError(f"splits={splits}: must be a list, as [train,val] or [val]; null is all there are")
        asked = values["embed"]
        scene, copies = asked.pop("scene"), asked.pop("copies")
        if scene not in SCENES:
            raise run_config.ConfigError(f"embed.scene={scene}: allowed are {', '.join(SCENES)}")
        embedding = Embedding(None, 0, short_side=values["short_side"], crf=values["crf"], **asked)
        encoding = Encoding(values["short_side"], values["keyframe_every"], values["crf"])
        source = instantiate(cfg.dataset)
        source.check, source.manifest = False, None  # What is missing is what is to be found out.
        source.prepare()
        lists: dict[str, VideoList] = {}
        splits = splits or source.splits()
        for split in splits:
            try:
                lists[split] = source.videos(split)
            except AnnotationError as error:
                others = [other for other in splits if other != split]
                hint = f"; splits=[{','.join(others)}] leaves {split} out" if others else ""
                raise run_config.ConfigError(f"{error}{hint}") from error
        writes, embeds = values["task"] != "check", values["task"] == "embed"
        out = Path(values["out"])
        manifest = out / "manifest.csv" if writes or out.suffix != ".csv" else out
        timeout = values["timeout"] or (1800 if writes else 60)
        jobs = values["jobs"] or os.cpu_count() or 1
        results: dict[str, list[Entry]] = {}
        for split, videos in lists.items():
            if embeds:
                videos, tasks = embeddings(videos, out / split, embedding, scene, copies)
            elif writes:
                goals = targets(videos, out / split)
                tasks = [Task(video.path, goal, encoding) for video, goal in zip(videos.videos, goals, strict=True)]
            else:
                tasks = [Task(video.path) for video in videos.videos]
            results[split] = run(tasks, jobs, timeout)
            if writes:
                results[split] = with_earlier_warnings(results[split], manifest)
                write_list(out / f"{split}.csv", videos, results[split])
                written = {Path(entry.path) for entry in results[split]}
                if others := sum(file.absolute() not in written for file in (out / split).rglob("*.mp4")):
                    print(f"{out / split}: {others} files are of no video of this list; its csv leaves them out")
        # An encoding's lists name only what decodes, and so does its manifest.
        kept = (entry for entries in results.values() for entry in entries if entry.status == "ok" or not writes)
        write_manifest(manifest, kept)
    show(results, manifest)
    if writes:
        lists_given = " ".join(f"dataset.{split}={out / split}.csv" for split in results)
        print(f"train with dataset=list {lists_given} dataset.manifest={manifest}{' dataset.truth=true' if embeds else ''}")


if __name__ == "__main__":
    sys.argv[1:] = for_hydra(sys.argv[1:])
    command_line.check("prepare_data", sys.argv[1:])
    main()
