"""`stts`, `python -m stts_lightning`: list the commands, or run one: `stts train` is `python -m stts_lightning.train`."""

import runpy
import sys

import stts_lightning

COMMANDS = {
    "train": "train a model on a data set, test it, leave a run folder",
    "evaluate": "test a run or a checkpoint on all its views",
    "predict": "label any videos over time, and show what was kept",
    "report": "compare runs; print a table of the paper beside ours",
    "flops": "parameters and GFLOPs; what a budget allows",
    "benchmark": "speed and memory, beside torchvision's models",
    "export": "write a model for use without this package",
    "prepare_data": "find videos that do not decode; encode videos for fast loading",
}


def usage() -> str:
    """What `stts --help` prints."""
    lines = (f"  {name:<14}{text}" for name, text in COMMANDS.items())
    return "\n".join(
        (
            "Efficient video transformers with spatial-temporal token selection (STTS).",
            "",
            "usage: stts COMMAND [option=value ...]      or python -m stts_lightning.COMMAND [option=value ...]",
            "",
            *lines,
            "",
            "stts COMMAND --help lists a command's options; stts --version prints the version.",
        )
    )


def main() -> None:
    """Run the command that the first argument names."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name in ("-V", "--version"):
        print(f"stts-lightning {stts_lightning.__version__}")
    elif name.replace("-", "_") in COMMANDS:
        # As `python -m` runs it, so that Lightning starts the processes of other devices in the same way.
        sys.argv = [sys.argv[0], *rest]
        runpy.run_module(f"stts_lightning.{name.replace('-', '_')}", run_name="__main__", alter_sys=True)
    else:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
