"""What a user meets first: installation, --help, configuration."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_help_is_quick() -> None:
    times = []
    for _ in range(2):
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "stts_lightning.train", "--help"], capture_output=True, text=True, timeout=60
        )
        times.append(time.monotonic() - start)
        assert done.returncode == 0
    assert min(times) < 5
    for group in ("backbone", "selection", "dataset", "recipe", "trainer"):
        assert f"\n{group}: " in done.stdout


def test_wheel_carries_the_configuration(tmp_path: Path) -> None:
    run = {"check": True, "capture_output": True, "text": True, "timeout": 300}
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], **run)
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], **run)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], **run)
    code = "import stts_lightning, sys; print(stts_lightning.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, **run).stdout
    assert where.startswith(str(tmp_path / "site"))
    compose = [sys.executable, "-m", "stts_lightning.train", "--cfg", "job", "experiment=demo", "selection.sigma=0.2"]
    composed = subprocess.run(compose, cwd=tmp_path, env=env, **run).stdout
    assert "name: mvit_tiny" in composed
    assert "sigma: 0.2" in composed


def test_broken_torchvision_pair_is_met_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    command = [sys.executable, "-m", "stts_lightning.train", "experiment=demo"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "does not work with torch" in line
    assert "pip install" in line


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (ROOT / "conf" / "recipe").glob("*.yaml")))
@pytest.mark.parametrize("selection", sorted(p.stem for p in (ROOT / "conf" / "selection").glob("*.yaml")))
def test_every_selection_and_recipe_composes_and_fits_the_model(selection: str, recipe: str) -> None:
    from hydra import compose, initialize_config_dir

    from stts_lightning import assembly
    from stts_lightning.selection.spec import SelectionSpec

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [f"selection={selection}", f"recipe={recipe}"])
    assert assembly.build_model_shape(cfg) == (16, 224, 224)
    spec = SelectionSpec.of(assembly.plain(cfg.selection))
    # A file's name is its content; the paper lists temporal before spatial at each place.
    assert {s.name: s.ratio for s in SelectionSpec.of("none" if selection == "operator" else selection).slots} == {
        s.name: s.ratio for s in spec.slots
    }
    assembly.build_optim(cfg)
    assert (spec.scorer, spec.estimator) == (("official", "official") if "official" in recipe else ("paper", "monte_carlo"))
