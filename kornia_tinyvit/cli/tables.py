"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["print_names", "print_table"]


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1, notes: int = 0) -> None:
    """Print a table; names and numbers stand as they are, without markup or color.

    Args:
        columns: headings.
        rows: cells of each row.
        left: how many of the first columns are texts, aligned to the left; the others are numbers, to the right.
        notes: how many of the last columns are texts, too. Texts are folded where the terminal is narrow.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        text = number < left or number >= len(columns) - notes
        table.add_column(name, justify="left" if text else "right", no_wrap=not text)
    for row in rows:
        table.add_row(*map(str, row))
    Console(highlight=False, markup=False, emoji=False).print(table)


def print_names(text: str, names: Sequence[str], most: int = 5) -> None:
    """Print how many names there are and some of them after a text; nothing if there are none."""
    if names:
        print(f"{text}: {len(names)}, such as {'; '.join(names[:most])}")
