"""Turn a checkpoint of any known layout into safetensors with a model card beside it.

python scripts/convert_checkpoint.py mvit.pyth mvit.safetensors --backbone mvit_b16 --selection t0_0.6_s4_0.9
"""

import argparse
import json
from pathlib import Path

from stts_lightning import create_model
from stts_lightning.analysis.model_card import model_card
from stts_lightning.backbones import CheckpointError
from stts_lightning.backbones.checkpoints import read_checkpoint, save_weights

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("converted", type=Path, help="ends in .safetensors; the card goes beside it, in .md")
    parser.add_argument("--backbone", help="a registered name; a file of this project says it itself")
    parser.add_argument("--selection", default=None, help="in the paper's notation, where the file holds selectors, or JSON")
    parser.add_argument("--arguments", type=json.loads, default={}, help="further ones of the backbone, in JSON")
    parser.add_argument("--licence", help="of the weights")
    parser.add_argument("--trust", action="store_true", help="also read a file that holds Python objects")
    given = parser.parse_args()
    try:
        checkpoint = read_checkpoint(given.source, given.trust)
        classes = checkpoint.num_classes
        if classes is None:
            raise CheckpointError(f"checkpoint {given.source}: holds no classifier head; tune it first, with head=reset")
        recipe = {**(checkpoint.model or {}), "num_classes": classes, "trust": given.trust, **given.arguments}
        if given.backbone:
            recipe["backbone"] = given.backbone
        if "backbone" not in recipe:
            raise CheckpointError(f"checkpoint {given.source}: does not say which model it holds; name it with --backbone")
        if given.selection is not None:
            recipe["selection"] = json.loads(given.selection) if given.selection.startswith("{") else given.selection
        model = create_model(**{**recipe, "pretrained": given.source})
    except ValueError as error:  # Each refusal of the package is one, JSON's too.
        raise SystemExit(f"error: {error}") from error
    notes = {"source": given.source.name, "layout": checkpoint.layout.name}
    save_weights(model, {**model.recipe, "classes": list(model.classes)}, given.converted, notes)
    card = given.converted.with_suffix(".md")
    card.write_text(model_card(model, checkpoint, given.converted, given.licence))
    print(f"{given.converted}: {model.weights}\n{card}")
