"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["print_table"]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1, notes: int = 0) -> None:
    """Print a table of plain text, without markup and color.

    Args:
        columns: headings.
        rows: cells of each row.
        left: number of first columns with text, aligned to the left; the others hold numbers, aligned to the right.
        notes: number of last columns with text. Text is folded where the terminal is narrow.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        text = number < left or number >= len(columns) - notes
        table.add_column(name, justify="left" if text else "right", no_wrap=not text)
    for row in rows:
        table.add_row(*map(str, row))
    Console(highlight=False, markup=False, emoji=False).print(table)
