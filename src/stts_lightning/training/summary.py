"""The one table that a run prints before it starts."""

from collections.abc import Mapping

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table


class StartTable(pl.Callback):
    """Prints facts of a run, a line each, once the number of its steps is known.

    Args:
        rows: name and value of each line.
    """

    def __init__(self, rows: Mapping[str, object]) -> None:
        self.rows = dict(rows)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print on one process."""
        if not trainer.is_global_zero:
            return
        table = Table(show_header=False, title="stts-lightning", title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        done = f" (resumed after {trainer.global_step})" if trainer.global_step else ""
        for name, value in {**self.rows, "steps": f"{int(trainer.estimated_stepping_batches)}{done}"}.items():
            table.add_row(name, str(value))
        Console().print(table)
