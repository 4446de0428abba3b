"""Run a command and keep what it prints as a picture of a terminal: how pictures of the documents are made.

python scripts/terminal_picture.py docs/pictures/export.svg python -m stts_lightning.export run=runs/RUN
"""

import argparse
import os
import subprocess
import sys

from rich.console import Console
from rich.text import Text


def main() -> int:
    """Run, show, write; returns the command's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="SVG to write")
    parser.add_argument("--width", type=int, default=110, help="columns")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    environment = {**os.environ, "COLUMNS": str(options.width), "FORCE_COLOR": "1"}
    done = subprocess.run(options.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    # Of a progress bar only its last state is left: each writes over the one before.
    lines = [line.rpartition("\r")[2] for line in done.stdout.decode().replace("\r\n", "\n").split("\n")]
    console = Console(record=True, width=options.width, file=sys.stdout)
    console.print(Text(f"$ {' '.join(options.command)}", style="bold"))
    console.print(Text.from_ansi("\n".join(line for line in lines if line.strip())))
    console.save_svg(options.picture, title="stts-lightning")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
