"""Write docs/configuration.md: every key of the configuration with its default and meaning, from conf/ and docstrings.

python scripts/configuration_page.py            # writes the page; a test compares it with what this would write
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stts_lightning.containers import leaves

ROOT = Path(__file__).resolve().parents[1]
CONF, PAGE = ROOT / "conf", ROOT / "docs" / "configuration.md"
OURS = "stts_lightning"
BACKBONES = {"mvit": "mvit.MViT", "mvit_v2": "mvit_v2.MViTv2", "video_swin": "video_swin.VideoSwin", "vit": "vit.ViT"}

# Where the keys of a section are explained, if no comment in its file does; a later one is asked where the first says nothing.
EXPLAINED: dict[str, tuple[str, ...]] = {
    "augment": ("training.augment.BatchAugment",),
    "clip": ("data.datamodule.VideoDataModule", "data.dataset.Reading"),
    "clip.train_transform": ("data.transforms.TrainTransform",),
    "dataset": ("data.sources.ListSource", "data.sources.FolderSource", "data.sources.Source", "data.demo.DemoSpec",
                "data.sources.SplitSource"),
    "distill": ("training.distillation.Teacher",),
    "loader": ("data.workers.LoaderOptions",),
    "optim": ("training.optim.OptimSpec",),
    "optim.parts.*": ("training.optim.PartSpec",),
    "selection": ("selection.spec.SelectionSpec",),
    "selection.slots.*": ("selection.spec.SlotSpec",),
    "backbone": ("classifier.VideoClassifier", *(f"backbones.{name}" for name in BACKBONES.values())),
    "embed": ("data.embed.Embedding",),
}  # fmt: skip


class Key(NamedTuple):
    """A row of a table."""

    name: str
    default: str
    meaning: str


def comments(file: Path) -> dict[str, str]:
    """Comments above the keys of a YAML file, by full key."""
    found: dict[str, str] = {}
    place: list[tuple[int, str]] = []
    said: list[str] = []
    for line in file.read_text().splitlines():
        text = line.strip()
        if text.startswith("#"):
            if not text.startswith("# @package"):
                said.append(text[1:].strip())
            continue
        key = re.match(r"( *)([\w.]+):", line)
        if not key:
            said = []
            continue
        depth = len(key[1])
        place = [(d, name) for d, name in place if d < depth] + [(depth, key[2])]
        if said:
            found[".".join(name for _, name in place)] = " ".join(said)
        said = []
    return found


@cache
def explained(path: str) -> dict[str, str]:
    """What the docstring of a class says of each of its arguments and attributes; "a, b: text" is of both."""
    module, _, name = path.rpartition(".")
    found: dict[str, str] = {}
    for kind in import_module(f"{OURS}.{module}").__dict__[name].__mro__:
        lines = (kind.__doc__ or "").splitlines()
        names: list[str] = []
        inside = False
        for line in lines:
            if re.fullmatch(r"\s+(Args|Attributes):", line):
                inside = True
            elif entry := re.match(r"\s{8}([\w, ]+): (.*)", line):
                names = [one.strip() for one in entry[1].split(",")] if inside else []
                for one in names:
                    found.setdefault(one, entry[2])
            elif names and re.match(r"\s{12}\S", line):
                for one in names:
                    found[one] += " " + line.strip()
            else:
                names = []
    return found


def meaning(section: str, name: str) -> str:
    """Of a key, from the docstrings."""
    for path in EXPLAINED.get(section, ()):
        text = explained(path).get(name, "")
        if text and not text.startswith("see `"):
            return text
    return ""


def keys(file: Path, content: Mapping[str, Any], prefix: str, skip: tuple[str, ...] = ()) -> Iterator[Key]:
    """Keys of a file.

    Args:
        file: with the comments.
        content: the part of it that is told.
        prefix: of the keys in a composed configuration, which the file itself may leave out.
        skip: keys that are not told.
    """
    said = comments(file)
    for own, value in leaves(content, lists=False):
        name = f"{prefix}.{own}" if prefix else own
        if name in skip or own.endswith("_target_"):
            continue
        section, _, last = name.rpartition(".")
        pattern = re.sub(r"^(optim\.parts|selection\.slots)\.[^.]+", r"\1.*", section)
        target = _target(content, own)
        # A file may leave out the beginning of its keys, or begin with the package they go to.
        text = said.get(own) or next((t for key, t in said.items() if f".{name}".endswith(f".{key}")), "")
        text = text or (meaning_of_target(target, last) if target else "") or meaning(pattern, last)
        yield Key(name, _shown(value), text)


def _target(content: Any, own: str) -> str:
    """The class that a key is an argument of."""
    place = content
    for part in own.split(".")[:-1]:
        place = place[part]
    return str(place.get("_target_", "")) if isinstance(place, Mapping) else ""


def meaning_of_target(target: str, name: str) -> str:
    """What the class that a section builds says of an argument."""
    if not target.startswith(OURS):
        return ""
    module, _, last = target.removeprefix(f"{OURS}.").rpartition(".")
    found = import_module(f"{OURS}.{module}").__dict__[last]
    if isinstance(found, type):
        return explained(f"{module}.{last}").get(name, "")
    entry = re.search(rf"\n\s+{name}: (.*?)(?=\n\s+\w+: |\n\n|$)", found.__doc__ or "", re.S)
    return " ".join(entry[1].split()) if entry else ""


def _shown(value: Any) -> str:
    if value == "???":
        return "must be given"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
    return f"`{text}`"


def table(rows: list[Key]) -> str:
    """In Markdown."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, default, text in rows:
        # What is None in Python is null on a command line.
        text = re.sub(r"\bNone\b", "null", text).replace("|", "\\|").rstrip(".")
        lines.append(f"| `{key}` | {default} | {text} |")
    return "\n".join(lines)


def read(name: str) -> tuple[Path, dict[str, Any]]:
    """A file of conf/, and what it holds."""
    file = CONF / f"{name}.yaml"
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    for key in ("defaults", "hydra"):
        content.pop(key, None)
    return file, content


def options(group: str) -> str:
    """Choices of a group, with what the first comment of each file says."""
    lines: list[str] = []
    for file in sorted((CONF / group).glob("*.yaml")):
        first = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line]
        text = " ".join(first).split(". ")[0].rstrip(".")
        lines.append(f"- `{group}={file.stem}`{': ' + text if text else ''}")
    return "\n".join(lines)


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Title, introduction and keys of each section."""
    yield "Training", "Keys of `train` itself.", list(keys(*read("train"), ""))
    yield (
        "Backbone",
        options("backbone"),
        [
            key
            for name in ("mvit_b16", "mvit_v2_s", "video_swin_b")
            for key in keys(CONF / f"backbone/{name}.yaml", read(f"backbone/{name}")[1]["backbone"], "backbone")
        ],
    )
    slots = {name: None for name in ("ratio", "keep", "side", "drop", "threshold", "place", "selector")}
    selection = list(keys(*read("selection/none"), "selection", ("selection.slots",)))
    selection += [Key(f"selection.slots.t0.{name}", "`null`", meaning("selection.slots.*", name)) for name in slots]
    yield (
        "Selection",
        "`selection=t0_0.6_s4_0.9` sets the slots; see [how to choose](study.md) and [reducers](reducers.md).",
        selection,
    )
    for name in ("folder", "list", "demo"):
        content = read(f"dataset/{name}")[1]
        yield f"Data set `{name}`", "", list(keys(CONF / f"dataset/{name}.yaml", content.get("dataset", content), "dataset"))
    yield "Clips", "Set by many backbones and data sets.", list(keys(*read("clip/default"), "clip"))
    yield "Loader", "", list(keys(*read("loader/default"), "loader"))
    file, paper = read("recipe/paper")
    yield (
        "Optimiser",
        options("recipe") + "\n\nDefaults here are those of `recipe=paper`.",
        list(keys(file, paper["optim"], "optim")),
    )
    parts = [Key(f"optim.parts.PART.{name}", "", text) for name, text in explained("training.optim.PartSpec").items()]
    yield (
        "Parts of the model",
        "PART is `selectors`, `backbone` or `head`: `optim.parts.backbone.frozen=true` trains the rest alone.",
        parts,
    )
    yield (
        "Trainer",
        options("trainer") + "\n\nAny other argument of Lightning's Trainer with `+`.",
        list(keys(*read("trainer/default"), "trainer")),
    )
    yield "Callbacks", "Turn one off with `callbacks.NAME=null`.", list(keys(*read("callbacks/default"), "callbacks"))
    loggers = [
        key
        for name in ("csv", "wandb")
        for key in keys(CONF / f"logger/{name}.yaml", read(f"logger/{name}")[1][name], f"logger.{name}")
    ]
    yield "Logger", options("logger"), loggers
    yield "Paths", "", list(keys(*read("paths/default"), "paths"))
    trained = tuple(read("train")[1])
    for command in ("evaluate", "predict", "report", "flops", "benchmark", "export", "prepare_data"):
        own = [key for key in keys(*read(command), "") if key.name.split(".")[0] not in ("callbacks", "logger")]
        own = [key for key in own if key.name not in trained or key.meaning]
        yield f"Command `{command}`", "", own


def page() -> str:
    """The whole page."""
    parts = [
        "# Every key of the configuration",
        "",
        "Written by `scripts/configuration_page.py` from `conf/` and docstrings. Set any key with `key=value`, choose an",
        "option with `group=option`, sweep either with `-m key=a,b`. `--cfg job` prints what a command composes.",
    ]
    for title, text, rows in sections():
        parts += ["", f"## {title}", *(["", text] if text else []), "", table(rows)]
    return "\n".join(parts) + "\n"


def unexplained() -> list[str]:
    """Keys without a meaning."""
    return [key.name for _, _, rows in sections() for key in rows if not key.meaning]


if __name__ == "__main__":
    if missing := unexplained():
        raise SystemExit(f"no meaning: {', '.join(missing)}")
    PAGE.write_text(page())
    print(PAGE)
