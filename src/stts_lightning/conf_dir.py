"""Where the configuration lies: beside the package when installed, at the top of a checkout otherwise."""

from pathlib import Path


def conf_dir() -> str:
    """Absolute path of `conf/`. Raises FileNotFoundError if the installation lacks it."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parents[1] / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/ with train.yaml beside {here}; reinstall stts-lightning")
