"""Progress on stderr: a bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["ProgressBar", "track_progress"]

_LINE_FRACTION, _LINE_SECONDS, _MIN_SECONDS = 0.1, 30.0, 3.0  # between two lines
_RATE_SECONDS = 600.0  # over which a bar averages the rate


class ProgressBar(Progress):
    """Show how much of a task is done, its rate and the time left, on stderr.

    On a terminal it is a bar, which disappears at the end. Elsewhere, e.g. in a log file, it is a line such as
    ``training 120/600, 12 images/s, 3:20 left`` after 3 seconds, every 10 % but not more often than every 3 seconds,
    and every 30 seconds. It is a context manager.

    Args:
        name: name of the task.
        total: number of steps.
        shown: whether to show anything.
        completed: number of steps that are done already.
    """

    def __init__(self, name: str, total: int, shown: bool = True, completed: int = 0) -> None:
        console = Console(stderr=True)
        self._prints_lines = shown and not console.is_terminal
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False), TimeRemainingColumn(),
        )  # fmt: skip
        settings: dict[str, Any] = {"transient": True, "disable": not shown or self._prints_lines}
        super().__init__(*columns, console=console, speed_estimate_period=_RATE_SECONDS, **settings)
        self.add_task(name, total=total, completed=completed, text="")
        self._started = self._printed = time.monotonic(), completed
        self._is_first = True

    def step(self, count: int = 1, text: str | None = None) -> None:
        """Add completed steps.

        Args:
            count: number of steps.
            text: a new text behind the number of steps, such as a rate; ``None`` keeps the last one.
        """
        task = self.tasks[0]
        self.update(task.id, advance=count, text=task.fields["text"] if text is None else text)
        now, (then, completed) = time.monotonic(), self._printed
        due = self._is_first or task.completed - completed >= _LINE_FRACTION * (task.total or 0)
        if self._prints_lines and now - then >= (_MIN_SECONDS if due else _LINE_SECONDS):
            self._printed, self._is_first = (now, int(task.completed)), False
            start, before = self._started  # rich's estimate needs several steps within its period
            minutes, seconds = divmod(round((now - start) / (task.completed - before) * (task.remaining or 0)), 60)
            parts = (
                f"{task.description} {task.completed:g}/{task.total:g}",
                task.fields["text"],
                f"{minutes}:{seconds:02} left",
            )
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def track_progress(items: Any, name: str, shown: bool = True) -> Iterator[Any]:
    """Yield the items of a collection and show how many are done.

    Args:
        items: the collection.
        name: name of the task.
        shown: whether to show anything.
    """
    with ProgressBar(name, len(items), shown) as bar:
        for item in items:
            yield item
            bar.step()
