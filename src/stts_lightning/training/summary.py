"""The one table that a run prints before it starts."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table


def print_summary(rows: Mapping[str, object]) -> None:
    """Print facts of a run, a line each."""
    table = Table(show_header=False, title="stts-lightning", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
