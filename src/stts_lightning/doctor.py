"""Early checks of the installation."""

import warnings
from importlib.metadata import PackageNotFoundError, version


def check_installation() -> None:
    """Exit with one line if torch and torchvision do not belong together (their operators do not register).

    To be called before anything heavy is imported: it also hushes what libraries say of themselves on import.
    """
    warnings.filterwarnings("ignore", message=".*torch.jit.*")
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError) as error:
        raise SystemExit(
            f"torchvision {_version('torchvision')} does not work with torch {_version('torch')} "
            f"({str(error).splitlines()[0]}); install the pair together from one index, "
            "e.g. pip install --force-reinstall -c constraints.txt torch torchvision"
        ) from None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
