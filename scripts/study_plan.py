"""What the study compares: data sets, budgets and ways of choosing, and the run of each."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from stts_lightning.analysis.results import read_configuration
from stts_lightning.configuration import conf_dir

PAGE = Path(__file__).resolve().parents[1] / "docs" / "study.md"
DETAILS = PAGE.with_name("study_details.md")
"""The page with all tables."""


QUICK = ("clip.decoder=pyav", "clip.decode_timeout=null")
"""Twice as fast for small files that are known to decode."""
COMMON = ["backbone=mvit_tiny", "callbacks.progress=null", "callbacks.best=null", "callbacks.loading=null"]
FIXED = {"t": "uniform", "s": "centre"}


@dataclass(frozen=True)
class Method:
    """A way of choosing.

    Attributes:
        label: what tables call it.
        overrides: of the run; {plain} is the unpruned model's checkpoint.
        recipe: of the run.
        slots: selectors of the slots of an axis, where they differ: {"t": "gumbel"}.
        axes: budgets that it can choose for: "t", "s", "ts"; "r" for reducers.
        main: whether the small study has it.
    """

    label: str
    overrides: tuple[str, ...] = ()
    recipe: str = "finetune"
    slots: dict[str, str] = field(default_factory=dict)
    axes: tuple[str, ...] = ("t", "s", "ts")
    main: bool = False

    @property
    def folder(self) -> str:
        """Its part of a folder's name."""
        return re.sub(r"[^\w.-]+", "_", self.label.replace("=", "-")).strip("_")


def chosen(selector: str) -> tuple[str, ...]:
    """Overrides of a method that is a selector's name."""
    return (f"selection.selector={selector}",)


PAPER = ("selection.sigma=0.1",)
WIDE = ("selection.sigma=0.5",)
SLOW = ("optim.parts.backbone.lr_scale=0.01", "optim.parts.head.lr_scale=0.01")
"""The network's rate as a share of the selectors' (paper Sec. 4.1); of other methods it is 0.2, as 300 steps are few."""
DISTILLED = ("distill.teacher=start",)
TRAINED = (*DISTILLED, "optim.parts.backbone.lr_scale=0.4", "optim.parts.head.lr_scale=0.4")
"""What the recipe gives the network, for a choice that has nothing to learn: the unpruned model teaches it, at twice the rate."""
SMALL = ("selection.start=small",)
"""As the recipe was before windows started at random; all that stand below were run so."""
UNTAUGHT = ("distill.teacher=null",)
SLOWER = ("optim.parts.backbone.lr_scale=0.2", "optim.parts.head.lr_scale=0.2")
BEFORE = (*SMALL, *UNTAUGHT, *SLOWER)
"""As the recipe was before the unpruned model taught it, and all that stand below."""
CLIP = (*BEFORE, "selection.windows=clip")
"""As the recipe was before it scored windows by motion."""
EACH = (*CLIP, "selection.frames=each", "selection.first_frame=own")
"""As the recipe was before it had segments."""
DEVIATION = (*CLIP, "selection.scorer=deviation")
HALF = (
    *EACH,
    "optim.parts.selectors.lr_scale=1.0",
)
"""Half of the rate for the selectors."""
LEARNING = (*EACH, "optim.parts.backbone.warmup_share=0", "optim.parts.head.warmup_share=0")
"""The network learns at its full rate from the first step on."""
FROZEN_QUARTER = (*LEARNING, "+optim.parts.backbone.frozen_share=0.25", "+optim.parts.head.frozen_share=0.25")
"""The network does not learn in the first quarter of the run."""
FASTER = (*LEARNING, "optim.parts.selectors.lr_scale=3.0")
"""One and a half times the rate for the selectors."""
EVEN = (*LEARNING, "selection.start=even", "selection.sigma=0.3", "optim.parts.selectors.lr_scale=1.0")
"""As the recipe was at first: no preference, more noise, a lower rate."""
EVEN_MEAN = (*EVEN, "selection.scorer=paper")
"""The same, and frames are described by their mean alone."""
FROZEN = ("+optim.parts.backbone.frozen_share=0.5", "+optim.parts.head.frozen_share=0.5")
"""Backbone and head learn in the second half alone."""
RISING = ("+optim.parts.backbone.warmup_share=0.5", "+optim.parts.head.warmup_share=0.5")
"""Their rate rises over the first half."""
TOGETHER = ("selection.frames=segment", "selection.windows=clip")
"""Frames that follow one another, and one window for the clip."""
METHODS = (
    Method("oracle", chosen("oracle"), main=True),
    Method("oracle, one window a clip", (*chosen("oracle"), "selection.windows=clip"), axes=("s", "ts")),
    Method("random", chosen("random"), main=True),
    Method("random segment, one window", (*chosen("random"), *TOGETHER), main=True),
    Method("fixed (uniform, centre)", slots=FIXED, main=True),
    Method("fixed (middle, centre)", chosen("centre"), axes=("t", "ts"), main=True),
    Method("oracle, distilled", (*chosen("oracle"), *DISTILLED)),
    Method("random segment, one window, distilled", (*chosen("random"), *TOGETHER, *DISTILLED)),
    Method("fixed (middle, centre), distilled", (*chosen("centre"), *DISTILLED)),
    Method("oracle, trained as the recipe", (*chosen("oracle"), *TRAINED)),
    Method("oracle, twice the network's rate", (*chosen("oracle"), *TRAINED[1:])),
    Method("random segment, one window, trained as the recipe", (*chosen("random"), *TOGETHER, *TRAINED)),
    Method("fixed (middle, centre), trained as the recipe", (*chosen("centre"), *TRAINED), main=True),
    Method("difference to the frame before", chosen("difference")),
    Method("difference, segment, one window", (*chosen("difference"), *TOGETHER, "selection.first_frame=next")),
    Method("Gumbel-Softmax", slots={"t": "gumbel"}, axes=("t",)),
    Method("STTS, sigma 0.1", PAPER, main=True),
    Method("STTS, sigma 0.5", WIDE),
    Method("STTS, sigma 0.1, the paper's rates", (*PAPER, *SLOW), main=True),
    Method("STTS as released", ("selection.scorer=official", "selection.estimator=official", *PAPER)),
    Method("recipe, frames=each, rate x1.5, network learns at once", FASTER, recipe="learn_selection"),
    Method("recipe, frames=each, network learns at once", LEARNING, recipe="learn_selection"),
    Method("recipe, frames=each, network frozen for a quarter", FROZEN_QUARTER, recipe="learn_selection"),
    Method("recipe, frames=each, even start, network learns at once", EVEN, recipe="learn_selection"),
    Method("recipe, frames=each, even start, paper's scorer, network learns at once", EVEN_MEAN, recipe="learn_selection"),
    Method("recipe, frames=each, rate x0.5", HALF, recipe="learn_selection"),
    Method("recipe, scorer=deviation", DEVIATION, recipe="learn_selection", axes=("t", "ts")),
    Method(
        "recipe, scorer=deviation, sigma 0.2", (*DEVIATION, "selection.sigma=0.2"), recipe="learn_selection", axes=("t", "ts")
    ),
    Method("recipe, frames=each", EACH, recipe="learn_selection", axes=("t", "ts")),
    Method("recipe, windows=clip", CLIP, recipe="learn_selection", axes=("s", "ts")),
    Method("recipe, not distilled", BEFORE, recipe="learn_selection"),
    Method("recipe, the teacher alone", (*SMALL, *SLOWER), recipe="learn_selection"),
    Method("recipe, twice the network's rate alone", (*SMALL, *UNTAUGHT), recipe="learn_selection"),
    Method("recipe, not distilled, sigma until 0.7", (*BEFORE, "callbacks.sigma.until=0.7"), recipe="learn_selection"),
    Method("recipe, samples=2", (*SMALL, "selection.samples=2"), recipe="learn_selection"),
    Method("recipe, samples=4", (*SMALL, "selection.samples=4"), recipe="learn_selection"),
    Method("recipe, start=random, 48 starts", ("selection.start=random", "callbacks.starts.draws=48"), recipe="learn_selection"),
    Method("recipe, start=small", SMALL, recipe="learn_selection", axes=("s", "ts")),
    Method("recipe=learn_selection", recipe="learn_selection", main=True),
)
"""Rows of the main tables."""

REDUCERS = (
    Method("random tokens", ("selection.reducer=random", "+selection.slots.r0.place=before"), axes=("r",), main=True),
    Method("tokens that changed most (RLT)", ("selection.reducer=rlt",), axes=("r",), main=True),
    Method(
        "recipe, not distilled, tokens", (*BEFORE, "selection.reducer=topk"), recipe="learn_selection", axes=("r",), main=True
    ),
)
"""Rows of reducers, on a ViT."""
REDUCED = "r0_0.28125"
"""Their budget: as many tokens as the smallest budget of folders keeps, four frames of eight and nine tokens of sixteen."""

OPTIONS = (
    Method("start=even", (*WIDE, "selection.start=even")),
    Method("start=small", (*WIDE, "selection.start=small")),
    Method("start=small_frames", (*WIDE, "selection.start=small_frames")),
    Method("48 random starts", (*WIDE, "callbacks.starts.draws=48")),
    Method("network frozen for the first half", (*WIDE, *FROZEN)),
    Method("the network's rate rises over the first half", (*WIDE, *RISING)),
    Method("normalize=windows", (*WIDE, "selection.normalize=windows")),
    Method("scope=clip", (*WIDE, "selection.scope=clip")),
    Method("first_frame=next", (*WIDE, "selection.first_frame=next")),
    Method("frames=segment", (*WIDE, "selection.frames=segment")),
    Method("windows=clip", (*WIDE, "selection.windows=clip")),
    Method("windows=smooth", (*WIDE, "selection.windows=smooth")),
    Method("windows=motion", (*WIDE, "selection.windows=motion")),
    Method("forward=hard", (*WIDE, "selection.forward=hard")),
    Method("sigma of spread", ("selection.sigma=1.0", "selection.sigma_of=spread")),
    Method("sigma until 0.6", (*WIDE, "callbacks.sigma.until=0.6")),
    Method("scorer=context", (*WIDE, "selection.scorer=context")),
    Method("scorer=deviation", (*WIDE, "selection.scorer=deviation")),
    Method("distilled", (*WIDE, "distill.teacher={plain}")),
)
"""Each option alone, on top of "STTS, sigma 0.5", where both time and place matter."""

ON_REAL_VIDEOS = ("all tokens, tuned as the others", "difference, segment, one window", "STTS as released")
"""What a small study compares there too: motion is seen in the differences, not in the mean of a frame."""

ATTENTION = Method("attention of the class token", chosen("attention"))
"""Chooses what the block before attended to; needs a block before it."""

ORACLES = ("oracle", "oracle, one window a clip", "oracle, trained as the recipe")
RANDOM_CHOICES = ("random", "random segment, one window", "random segment, one window, trained as the recipe")
FIXED_CHOICES = ("fixed (uniform, centre)", "fixed (middle, centre)", "fixed (middle, centre), trained as the recipe")
"""What needs no learning. A difference is one to the best of those that have the same seeds."""
BASES = (*RANDOM_CHOICES, *FIXED_CHOICES, "STTS, sigma 0.5", "recipe=learn_selection")
"""Rows that each option alone is compared with."""
BESIDE_ATTENTION = ("oracle", *RANDOM_CHOICES, *FIXED_CHOICES, "STTS, sigma 0.1", "recipe=learn_selection")
"""Rows that attention is compared with."""


@dataclass(frozen=True)
class DataSet:
    """How a data set is used.

    Attributes:
        data: overrides of every run.
        plain: overrides of the unpruned models.
        budgets: what is kept, from half of the tokens down.
        attended: the budget at which attention is compared; empty for none.
        options: the budget at which each option is tried alone; empty for none.
        epochs: of tuning.
        reduced: the budget of reducers; empty for none.
        also: rows that its small study has beside the main ones.
        tested: list of the test videos, where several were made of one source; None where each is its own.
    """

    data: tuple[str, ...]
    plain: tuple[str, ...]
    budgets: tuple[str, ...]
    attended: str = ""
    options: str = ""
    epochs: int = 2
    reduced: str = ""
    also: tuple[str, ...] = ()
    tested: Path | None = None


DEMOS = {
    "when": (("t0_0.5", "t0_0.25"), "t1_0.25"),
    "where": (("s0_0.5", "s0_0.25"), "s1_0.25"),
    "both": (("t0_0.7_s0_0.7", "t0_0.5_s0_0.25"), "t1_0.5_s1_0.25"),
}
"""Budgets of each setting, and that of attention."""


OWN_BUDGETS = ("t0_0.5", "s0_0.5", "t0_0.5_s0_0.5")
OWN_ATTENDED = "t1_0.5_s1_0.5"
"""Of other folders than the demo's, and where attention is compared."""


def data_sets(
    own: Sequence[str], start: Path | None = None, backbone: str | None = None, budgets: Sequence[str] = OWN_BUDGETS
) -> dict[str, DataSet]:
    """The demo's settings, and folders given as NAME=FOLDER.

    Args:
        own: these folders.
        start: what their unpruned models begin with; None for nothing.
        backbone: on these folders; None is that of `COMMON`.
        budgets: of these folders.
    """
    plain = ("recipe=scratch", "trainer.max_epochs=4")
    found = {
        f"demo_{setting}": DataSet(
            ("dataset=demo", f"dataset.setting={setting}", *QUICK),
            plain,
            kept,
            attended,
            kept[-1] if setting == "both" else "",
        )
        for setting, (kept, attended) in DEMOS.items()
    }
    for given in own:
        name, _, place = given.partition("=")
        root = Path(place).resolve()
        model = (f"backbone={backbone}",) if backbone else ()
        # Few and long videos: a clip has a frame of each sixteenth of a video, and all of the picture.
        data = (
            *model, "dataset=list", f"dataset.train={root}/train.csv", f"dataset.val={root}/val.csv", f"dataset.name={name}",
            f"dataset.manifest={root}/manifest.csv", "dataset.truth=true", "clip.sampling=segments", "clip.test_views=1",
            "trainer.check_val_every_n_epoch=8", *QUICK,
            "clip.short_side=crop", "clip.train_transform.scale=[0.6,1.0]", "clip.train_transform.ratio=[0.8,1.25]",
        )  # fmt: skip
        unpruned = ("recipe=scratch", "trainer.max_epochs=12")
        if start:
            unpruned = (
                f"pretrained={start.resolve()}",
                "recipe=scratch",
                "trainer.max_epochs=24",
                "optim.lr=3e-4",
                "backbone.drop_path=0.2",
            )
        reduced = REDUCED if (backbone or "").startswith("vit") else ""
        listed = root / "val.csv"
        found[name] = DataSet(
            data, unpruned, tuple(budgets), OWN_ATTENDED, epochs=16, reduced=reduced, also=ON_REAL_VIDEOS, tested=listed
        )
    return found


def axes(kept: str) -> str:
    """Axes of a budget: "t", "s", "ts" or "r"."""
    return "".join(sorted({part[0] for part in kept.split("_")[::2]}, key="tsr".index))


class Job(NamedTuple):
    """One run: its folder and its overrides."""

    folder: Path
    overrides: list[str]


@dataclass(frozen=True)
class Row:
    """A line of a table: a method at a budget on a data set, and where its runs lie."""

    data: str
    kept: str
    method: Method

    def folder(self, root: Path, seed: int) -> Path:
        """Of one run."""
        return root / self.data / f"{self.kept}_{self.method.folder}_seed{seed}"


ALL = Method("all tokens, tuned as the others")


LABELS = {method.label for method in (ALL, *METHODS, *REDUCERS, *OPTIONS, ATTENTION)}
"""Of all rows."""


def plain_folder(root: Path, data: str, seed: int) -> Path:
    """Of the unpruned model that the methods start from."""
    return root / data / f"plain_seed{seed}"


def rows(name: str, data: DataSet, small: bool) -> Iterator[Row]:
    """What is compared on a data set, what matters most first."""
    *larger, smallest = data.budgets

    def wanted(method: Method) -> bool:
        return not small or method.main or method.label in data.also

    if wanted(ALL):
        yield Row(name, "none", ALL)
    yield from (Row(name, smallest, method) for method in METHODS if axes(smallest) in method.axes and wanted(method))
    if data.reduced:
        yield from (Row(name, data.reduced, method) for method in REDUCERS)
    if small:
        return
    if data.options:
        yield from (Row(name, data.options, method) for method in OPTIONS)
    if data.attended:
        beside = [method for method in METHODS if method.label in BESIDE_ATTENTION and axes(data.attended) in method.axes]
        yield from (Row(name, data.attended, method) for method in (*beside, ATTENTION))
    for kept in larger:
        yield from (Row(name, kept, method) for method in METHODS if axes(kept) in method.axes)


def plain(root: Path, name: str, data: DataSet, seed: int) -> Job:
    """The run of the unpruned model that the methods start from."""
    return Job(plain_folder(root, name, seed), [*data.data, "selection=none", *data.plain, f"seed={seed}"])


def job(root: Path, row: Row, data: DataSet, seed: int) -> Job:
    """A row's run with one seed."""
    parts = [] if row.kept == "none" else list(zip(*[iter(row.kept.split("_"))] * 2, strict=True))
    slots = [f"+selection.slots.{slot}.ratio={ratio}" for slot, ratio in parts]
    slots += [f"+selection.slots.{slot}.selector={row.method.slots[slot[0]]}" for slot, _ in parts if slot[0] in row.method.slots]
    start = f"{plain_folder(root, row.data, seed)}/checkpoints/last.ckpt"
    own = [override.replace("{plain}", start) for override in row.method.overrides]
    return Job(
        row.folder(root, seed),
        [
            *data.data,
            "selection=none",
            *slots,
            f"recipe={row.method.recipe}",
            f"trainer.max_epochs={data.epochs}",
            *own,
            f"pretrained={start}",
            f"seed={seed}",
        ],
    )


LEARNING_KEYS = re.compile(
    r"(backbone|clip|distill|head|label_smoothing|loader\.batch_size|optim|selection|callbacks\.sigma)(\..*)?"
    r"|callbacks\.starts\.(draws|clips)|trainer\.(max_epochs|gradient_clip_val)"
)
"""Keys that change what a run learns, whose values are the same on every machine."""


def composed(one: Job) -> DictConfig:
    """The configuration that a run would have now."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("train", [*COMMON, *one.overrides, "run_dir=.", "experiment_name=null"])


def changed(one: Job) -> str:
    """How a finished run was configured otherwise than it would be now, as "key: then, now NOW"; empty if it was not."""
    with tempfile.TemporaryDirectory() as folder:
        OmegaConf.save(composed(one), Path(folder) / "config.yaml", resolve=True)
        now, then = read_configuration(folder), read_configuration(one.folder)
    assert now is not None
    if then is None:
        return "it has no config.yaml"
    differ = (
        f"{key}: {then[key]}, now {value}"
        for key, value in now.items()
        if LEARNING_KEYS.fullmatch(key) and key in then and then[key] != value and "/" not in value + then[key]
    )
    return "; ".join(differ)
