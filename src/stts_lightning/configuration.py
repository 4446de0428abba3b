"""Where the configuration lies, and `selection=`, which takes the paper's notation. Light: nothing here imports torch.

`selection` is a Hydra group with one file, `none`. All its other options are made from their names: `t0_0.6_s4_0.9` is `none`
with a slot `t0` of ratio 0.6 and a slot `s4` of ratio 0.9. So any notation can be typed, swept, and named in an experiment.
"""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from stts_lightning.selection.spec import PAPER_SELECTIONS, SelectionError, SelectionSpec, is_notation

GROUP = "selection"


def conf_dir() -> str:
    """Absolute path of `conf/`: beside the package when installed, at the top of a checkout otherwise.

    Raises:
        FileNotFoundError: if the installation lacks it.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parents[1] / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/ with train.yaml beside {here}; reinstall stts-lightning")


class NotationSource(ConfigSource):
    """Options of `selection=` made from their names. `--help` lists those of the paper's tables."""

    @staticmethod
    def scheme() -> str:
        """Of the search path's entry."""
        return "notation"

    def available(self) -> bool:
        """Always: it reads no file."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether there are options below a path."""
        return config_path.strip("/") in ("", GROUP)

    def is_config(self, config_path: str) -> bool:
        """Whether a path is an option: `selection/` and slots in the paper's notation."""
        group, _, name = config_path.rpartition("/")
        return group == GROUP and is_notation(name.removesuffix(".yaml"))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The group, or the options that `--help` names."""
        if config_path.strip("/") == GROUP:
            return [] if results_filter == ObjectType.GROUP else list(PAPER_SELECTIONS)
        return [] if results_filter == ObjectType.CONFIG else [GROUP]

    def load_config(self, config_path: str) -> ConfigResult:
        """Slots on top of `none`. Raises ConfigCompositionException, which Hydra prints as one line, for an impossible ratio."""
        name = config_path.rpartition("/")[2].removesuffix(".yaml")
        try:
            slots = SelectionSpec.of(name).to_dict()["slots"]
        except SelectionError as error:
            raise ConfigCompositionException(f"error: {error}") from error
        config = OmegaConf.create({"defaults": ["none"], "slots": slots})
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header={"package": None})


class _NotationOnSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("stts-lightning", f"{NotationSource.scheme()}://")


Plugins.instance().register(NotationSource)
Plugins.instance().register(_NotationOnSearchPath)
