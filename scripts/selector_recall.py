"""How well the selectors of demo runs find the action: `python scripts/selector_recall.py runs/A runs/B ...`."""

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from stts_lightning import create_model
from stts_lightning.analysis.recall import temporal_recall
from stts_lightning.data.annotations import read_list

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for run in map(Path, sys.argv[1:]):
        checkpoint = run / "checkpoints" / "last.ckpt"
        recipe = torch.load(checkpoint, weights_only=True)["model"]
        cfg = OmegaConf.load(run / "config.yaml")
        model = create_model(**recipe, pretrained=checkpoint)
        videos = read_list(Path(cfg.dataset.root) / "val.csv")
        recall = temporal_recall(model, videos, "t0", cfg.clip.stride, cfg.clip.short_side)
        print(f"{run} seed {cfg.seed}: recall {recall.selector:.3f}, random {recall.random:.3f}, top-1 {recall.top1:.3f}")
