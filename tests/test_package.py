"""What a user meets first: installation, --help, configuration."""

import os
import pkgutil
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from warm import LONGEST, python_m

import stts_lightning
from stts_lightning.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


def test_help_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "stts_lightning.train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in imported and not imported & {"torch", "lightning"}
    for group in ("backbone", "selection", "dataset", "recipe", "trainer"):
        assert f"\n{group}: " in done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed in an environment that has the dependencies of this one and cannot see the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    run = {"check": True, "capture_output": True, "text": True, "timeout": 300}
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # As it would be committed: what git does not know of is no part of it.
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, **run).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            target = place / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(place), str(place / "source")], **run)
    (wheel,) = place.glob("*.whl")
    venv.create(place / "env", symlinks=True, with_pip=False)
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], **run)
    # Path by path, as a .pth file would make the editable checkout's known too.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in ours))
    return place / "env"


def test_the_wheel_works_where_the_checkout_cannot_be_seen(installed: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        command = [str(installed / "bin" / "python"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LONGEST)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = """if True:
        import pkgutil, stts_lightning as s
        print(s.__file__, s.__version__)
        print(*sorted(module.name for module in pkgutil.walk_packages(s.__path__, "stts_lightning.")))
        print(s.create_model("mvit_tiny", "t0_0.75").slots.describe())
    """
    about, modules, slots = run("-c", code).splitlines()
    file, version = about.split()
    assert file.startswith(str(installed)) and str(ROOT) not in file
    assert version == stts_lightning.__version__
    here = pkgutil.walk_packages(stts_lightning.__path__, "stts_lightning.")
    assert modules.split() == sorted(module.name for module in here)
    assert slots == "{'t0': '6 of 8 frames'}"
    # The console script, run by that environment's own Python.
    (script,) = map(str, installed.glob("lib/python*/site-packages/bin/stts"))
    assert run(script, "--version").strip() == f"stts-lightning {version}"
    assert "t0_0.6_s4_0.9" in run(script, "train", "--help")
    few = ["dataset.train=2", "dataset.val=1", "loader.batch_size=4", "loader.num_workers=0", "debug=fast"]
    done = run(script, "train", "experiment=demo", "pretrained=null", "trainer.accelerator=cpu", *few, "hydra.run.dir=runs/x")
    assert "top1" in done and (tmp_path / "runs" / "x" / "result.json").is_file()


def test_the_package_lists_its_commands(tmp_path: Path) -> None:
    doors = {path.stem for path in (ROOT / "src" / "stts_lightning").glob("*.py") if "@hydra.main" in path.read_text()}
    assert set(COMMANDS) == doors
    run = {"capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-m", "stts_lightning"], **run)
    assert done.returncode == 0 and all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert python_m("stts_lightning", ["--help"], tmp_path, dict(os.environ), 60).stdout == done.stdout
    wrong = python_m("stts_lightning", ["trian"], tmp_path, dict(os.environ), 60)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no command 'trian'; there are train, ")
    cost = python_m("stts_lightning", ["flops", "backbone=mvit_tiny", "selection=t0_0.75"], tmp_path, dict(os.environ), 60)
    assert cost.returncode == 0 and "T0: 6 of 8 frames" in cost.stdout


def test_broken_torchvision_pair_is_met_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    command = [sys.executable, "-m", "stts_lightning.train", "experiment=demo"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LONGEST)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "does not work with torch" in line
    assert "pip install" in line


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "conf" / "recipe").glob("*.yaml")))
def test_every_selection_and_recipe_composes_and_fits_the_model(recipe: str) -> None:
    import torch
    from hydra import compose, initialize_config_dir

    from stts_lightning import assembly, run_config
    from stts_lightning.selection.spec import PAPER_SELECTIONS, SelectionSpec

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["selection=none", f"recipe={recipe}"])
    for selection in PAPER_SELECTIONS:
        # As `selection=` has it; that each name is an option is tested beside the other options.
        cfg.selection.slots = SelectionSpec.of(selection).to_dict()["slots"]
        with torch.device("meta"):
            assert assembly.build_body(cfg).backbone.clip_size == (16, 224, 224)
        spec = SelectionSpec.of(run_config.to_container(cfg.selection))
        assert spec.slots == SelectionSpec.of(selection).slots
        assembly.build_optim(cfg)
        # The study's recipe takes the released scorer with the paper's estimator.
        released = "official" in recipe or recipe == "learn_selection"
        scorer, estimator = "official" if released else "paper", "official" if "official" in recipe else "monte_carlo"
        assert (spec.scorer, spec.estimator) == (scorer, estimator)
