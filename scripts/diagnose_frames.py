"""Tell whether the choice or the network falls short of the oracle, and which frames and windows are chosen wrongly.

    python scripts/diagnose_frames.py runs/study NAME --data NAME=FOLDER --seed 1
    python scripts/diagnose_frames.py runs/study demo_both --row "recipe, frames=each"

Of a run of the study and of the oracle's with the same seed, all tables are of test videos:

1. Each network with each selection of frames and of windows, exchanged after training: top-1, the share of the action that is
   kept, and the share of clips in which the kept frames follow one another.
2. For each place of a frame in the clip: how often it is kept where it shows the action and where it does not, and the mean norm
   of the tokens that reach the selector, by which it can be told apart.
3. Where frames are kept in a segment: how often it is the one with most of the action, or its neighbour, what share of the action
   it holds, and the mean raw scores of frames of which all, a part or nothing is action.
4. How often each window is kept, by either: a choice that hardly depends on the clip has learned a place.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from pages import header, line
from study_plan import COMMON, METHODS, DataSet, Row, data_sets

from stts_lightning import assembly, load_model
from stts_lightning.classifier import VideoClassifier
from stts_lightning.configuration import conf_dir
from stts_lightning.data.dataset import Batch
from stts_lightning.selection.truth import found, of_grid

RECIPE, ORACLE = "recipe=learn_selection", "oracle"


def test_batches(of: DataSet) -> list[Batch]:
    """All test clips of a data set."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", [*COMMON, *of.data, "selection=none", "loader.num_workers=0", "run_dir=."])
    data = assembly.build_data(cfg, assembly.build_body(cfg).backbone.clip_size)
    data.prepare_data()
    data.setup("fit")
    return list(data.val_dataloader())


@torch.inference_mode()
def outcome(model: VideoClassifier, batches: Sequence[Batch]) -> list[str]:
    """Cells of the first table: top-1, what each slot found, and clips whose frames follow one another, in percent."""
    right: list[torch.Tensor] = []
    together: list[torch.Tensor] = []
    shares: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        assert batch.truth is not None
        model.slots.tell_truth(batch.truth[:, 0])
        logits, kept = model(batch.clip[:, 0], return_selection=True)
        right.append(logits.argmax(-1) == batch.label)
        for name, share in found(batch.truth[:, 0], list(kept.values()), model.slots.sizes).items():
            shares.setdefault(name, []).append(share)
        for name, selection in kept.items():
            if name.startswith("t"):
                together.append((selection.indices.diff(dim=1) == 1).all(1))
    cells = [f"{100 * torch.cat(right).float().mean():.1f}", *(f"{100 * torch.cat(of).nanmean():.0f}" for of in shares.values())]
    return [*cells, f"{100 * torch.cat(together).float().mean():.0f}" if together else ""]


def exchanged(network: VideoClassifier, given: dict[str, VideoClassifier]) -> VideoClassifier:
    """A network with the selectors of others: by slot, whose."""
    model = copy.deepcopy(network)
    for name, other in given.items():
        model.slots.selectors[name] = copy.deepcopy(other.slots.selectors[name])
    return model.eval()


def exchange_table(models: dict[str, VideoClassifier], batches: Sequence[Batch]) -> list[str]:
    """Each network with each choice, in Markdown."""
    slots = list(next(iter(models.values())).slots.selectors)
    head = ["network", *(f"{slot} by" for slot in slots), "top-1", *(f"{slot} found, %" for slot in slots), "frames in a row, %"]
    lines = header(*head)
    choices: list[tuple[str, ...]] = [()]
    for _ in slots:
        choices = [(*before, name) for before in choices for name in models]
    for network in models:
        for choice in choices:
            model = exchanged(models[network], {slot: models[name] for slot, name in zip(slots, choice, strict=True)})
            lines.append(line(network, *choice, *outcome(model, batches)))
    return lines


@torch.inference_mode()
def place_table(model: VideoClassifier, batches: Sequence[Batch]) -> list[str]:
    """How often frames are kept, by their place in the clip, in Markdown; empty without a choice of frames."""
    slot = next((name for name in model.slots.selectors if name.startswith("t")), None)
    if slot is None:
        return []
    grids: list[torch.Tensor] = []
    hook = model.slots.selectors[slot].register_forward_pre_hook(lambda _, inputs: grids.append(inputs[0]))
    kept: list[torch.Tensor] = []
    action: list[torch.Tensor] = []
    for batch in batches:
        assert batch.truth is not None
        selection = model(batch.clip[:, 0], return_selection=True)[1][slot]
        frames = model.slots.sizes[slot][0]
        kept.append(torch.nn.functional.one_hot(selection.indices, frames).sum(1).float())
        action.append(~of_grid(batch.truth[:, 0], frames)[..., 0].isnan())
    hook.remove()
    norms = torch.cat([grid.norm(dim=-1).mean((2, 3)) for grid in grids])
    chosen, shown = torch.cat(kept), torch.cat(action)
    rows = {
        "kept where it shows the action, %": [100 * float(chosen[shown[:, at], at].mean()) for at in range(chosen.shape[1])],
        "kept where it does not, %": [100 * float(chosen[~shown[:, at], at].mean()) for at in range(chosen.shape[1])],
    }
    cells = {name: [f"{value:.0f}" for value in values] for name, values in rows.items()}
    cells["norm of its tokens"] = [f"{value:.1f}" for value in norms.mean(0).tolist()]
    lines = header("frame", *(str(at) for at in range(chosen.shape[1])))
    return [*lines, *(line(name, *values) for name, values in cells.items())]


@torch.inference_mode()
def segment_table(model: VideoClassifier, batches: Sequence[Batch]) -> list[str]:
    """Where the kept segments lie, in Markdown; empty if nothing is learned or frames are kept one by one."""
    slot = next((name for name in model.slots.selectors if name.startswith("t")), "")
    scorer = getattr(model.slots.selectors[slot], "scorer", None) if slot else None
    if scorer is None or model.recipe["selection"]["frames"] != "segment":
        return []
    frames, scores = model.slots.sizes[slot][0], list[torch.Tensor]()
    hook = scorer.register_forward_hook(lambda _, inputs, output: scores.append(output))  # pyright: ignore[reportUnknownLambdaType]
    starts: list[torch.Tensor] = []
    shares: list[torch.Tensor] = []
    kept = 0
    for batch in batches:
        assert batch.truth is not None
        indices = model(batch.clip[:, 0], return_selection=True)[1][slot].indices
        starts.append(indices[:, 0])
        kept = indices.shape[1]
        shown = ~batch.truth[:, 0, :, 0].isnan()
        shares.append(shown.float().unflatten(1, (frames, -1)).mean(-1))
    hook.remove()
    score, share, start = torch.cat(scores)[:, 1:], torch.cat(shares), torch.cat(starts)
    held = share.unfold(1, kept, 1).sum(-1) / share.sum(1, keepdim=True)
    best = held == held.amax(1, keepdim=True)
    there = torch.nn.functional.one_hot(start, held.shape[1]).bool()
    beside = torch.zeros_like(there)
    beside[:, 1:] |= there[:, :-1]
    beside[:, :-1] |= there[:, 1:]
    right = (best & there).any(1)
    near = (best & beside).any(1) & ~right
    found = {"best segment": right, "its neighbour": near, "another": ~right & ~near, "action held": held[there]}
    found |= {"at best": held.amax(1)}
    cells = {f"{name}, %": f"{100 * float(of.double().mean()):.1f}" for name, of in found.items()}
    parts = {"all": share == 1, "a part": (share > 0) & (share < 1), "nothing": share == 0}
    # Without the first frame, which may be scored as the second.
    cells |= {f"score where {name} is action": f"{float(score[of[:, 1:]].mean()):.1f}" for name, of in parts.items()}
    return [*header(*cells), line(*cells.values())]


@torch.inference_mode()
def window_table(models: dict[str, VideoClassifier], batches: Sequence[Batch]) -> list[str]:
    """How often each window is kept by each model, in Markdown; empty without a choice of windows."""
    slot = next((name for name in next(iter(models.values())).slots.selectors if name.startswith("s")), None)
    if slot is None:
        return []
    kept: dict[str, Counter[tuple[int, int]]] = {name: Counter() for name in models}
    for name, model in models.items():
        for batch in batches:
            assert batch.truth is not None
            model.slots.tell_truth(batch.truth[:, 0])
            windows = model(batch.clip[:, 0], return_selection=True)[1][slot].windows
            assert windows is not None
            kept[name].update((top, left) for top, left, *_ in windows.flatten(0, 1).tolist())
    places = sorted({place for counts in kept.values() for place in counts})
    head = ["first row, column of the window", *(f"{top}, {left}" for top, left in places)]
    lines = header(*head)
    for name, counts in kept.items():
        shares = (f"{100 * counts[place] / counts.total():.0f}" for place in places)
        lines.append(line(f"{name}, %", *shares))
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the study's runs")
    parser.add_argument("name", help="of the data set")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="as in study.py")
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    parser.add_argument(
        "--row",
        default=RECIPE,
        choices=[method.label for method in METHODS if method.label != ORACLE],
        metavar="LABEL",
        help="of the study",
    )
    options = parser.parse_args()
    of = data_sets(options.data)[options.name]
    models: dict[str, VideoClassifier] = {}
    for label in (options.row, ORACLE):
        method = next(method for method in METHODS if method.label == label)
        folder = Row(options.name, of.budgets[-1], method).folder(options.root.resolve(), options.seed)
        models[label] = load_model(folder / "checkpoints" / "last.ckpt").eval()
    batches = test_batches(of)
    print("\n".join([*exchange_table(models, batches), "", *place_table(models[options.row], batches)]))
    print("\n".join(["", *segment_table(models[options.row], batches), "", *window_table(models, batches)]))


if __name__ == "__main__":
    main()
