"""The display of progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

__all__ = ["progress_bar", "track_progress"]

Item = TypeVar("Item")


def progress_bar(shown: bool = True, counts: bool = True, fields: tuple[str, ...] = ()) -> Progress:
    """Return a progress display: a context whose tasks show a description, a bar, and the time that remains.

    Args:
        shown: whether to show anything.
        counts: show how many of how many are done, otherwise percent.
        fields: further texts, which ``add_task`` and ``update`` take by these names.
    """
    amount = MofNCompleteColumn() if counts else TextColumn("{task.percentage:.0f} %")
    texts = [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    columns = (TextColumn("{task.description}"), BarColumn(), amount, *texts, TimeRemainingColumn())
    return Progress(*columns, disable=not shown)


def track_progress(items: Iterable[Item], description: str, shown: bool = True) -> Iterator[Item]:
    """Yield items while a bar shows how many are done; it disappears at the end.

    Args:
        items: the items.
        description: text beside the bar.
        shown: show the bar.
    """
    yield from track(items, description, disable=not shown, transient=True)
