"""`python -m stts_lightning.export`: a trained model for use without this package; the numeric difference is printed."""

import json
import logging
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from stts_lightning import command_line
from stts_lightning.configuration import conf_dir
from stts_lightning.doctor import check_installation
from stts_lightning.overrides import for_run

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=conf_dir(), config_name="export")
def main(cfg: DictConfig) -> None:
    """Export one model."""
    check_installation()
    from stts_lightning import assembly, console, run_config
    from stts_lightning.analysis.exporting import export

    with console.one_line_errors():
        console.quiet()
        with console.as_user_errors():
            cfg, checkpoint = run_config.trained_config(cfg, list(HydraConfig.get().overrides.task), "export")
            run_config.check_numbers(cfg)
            model = assembly.build_model(cfg)
            assembly.check_truth(model, known=False)
            names = run_config.class_names(None, checkpoint, model.classes)
        out = Path(cfg.out) if cfg.out else Path(cfg.run_dir) / "model"
        with console.as_user_errors():
            files = export(model, list(cfg.formats), out)
    facts = {
        "input": ["batch", 3, *model.backbone.clip_size],
        "input_type": "uint8 RGB; mean and deviation are applied inside",
        "output": "logits",
        "classes": names,
        "slots": model.slots.describe(),
        "checkpoint": str(checkpoint),
        "files": files,
    }
    out.with_name(f"{out.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    for one in files:
        size = one["bytes"] / 2**20
        log.info("%s (%.1f MiB): logits differ by %.1e at most, batch %d", one["file"], size, one["difference"], one["batch"])


if __name__ == "__main__":
    sys.argv[1:] = for_run(sys.argv[1:], "export")
    command_line.check("export", sys.argv[1:])
    main()
