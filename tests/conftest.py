import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    # Two processes of two threads each on two cores wait for each other more than they work.
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
    torch.set_num_threads(threads)
    # Without it Lightning's DDP gives each process all cores, and keeps that for all tests after it.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not torch.cuda.is_available():  # Before Triton is imported: kernels then run in its interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Each test begins with the same environment.

    Lightning's DDP notes in it that this process has a rank. A command that a later test starts would inherit that, take its
    processes for launched, and wait for them without end.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models begin with whatever lies in memory: for tests of large ones whose weights all come from a file."""
    for place in ("stts_lightning.backbones.mvit", "stts_lightning.backbones.video_swin"):
        monkeypatch.setattr(f"{place}.trunc_normal_", lambda tensor, **_: tensor)
    for name in ("trunc_normal_", "kaiming_uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference numbers and real videos, kept beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared with reference data beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def load_rule(shared: Path) -> Callable[[str], ModuleType]:
    """Import golden/<family>/rule.py, the written rule that gives every weight and input."""

    def load(family: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"rule_{family}", shared / "golden" / family / "rule.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
