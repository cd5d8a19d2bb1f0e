"""Progress on a terminal and in a log file."""

import io
import re

import pytest
from rich.console import Console

from kornia_tinyvit import progress
from kornia_tinyvit.progress import ProgressBar, track_progress


@pytest.fixture
def clock(monkeypatch):
    """Set the time that has passed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_percent(clock, capsys):
    with ProgressBar("training", 100) as bar:
        for step in range(30):
            clock[0] += 1
            bar.step(1, f"{step} images/s")
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.split(", ")[:2] for line in err.splitlines()]
    assert lines == [
        ["training 3/100", "2 images/s"],  # the first line comes early
        ["training 13/100", "12 images/s"],
        ["training 23/100", "22 images/s"],
    ]
    assert [line.split(", ")[2] for line in err.splitlines()] == ["1:37 left", "1:27 left", "1:17 left"]


def test_a_line_every_thirty_seconds(clock, capsys):
    with ProgressBar("training", 1000, completed=5) as bar:
        for _ in range(4):
            clock[0] += 15
            bar.step()
    assert capsys.readouterr().err.splitlines() == ["training 6/1000, 248:30 left", "training 8/1000, 248:00 left"]


def test_short_tasks_print_nothing(clock, capsys):
    assert list(track_progress(range(10), "evaluating")) == [*range(10)]
    assert capsys.readouterr() == ("", "")


def test_hidden(clock, capsys):
    for _ in track_progress(range(10), "evaluating", shown=False):
        clock[0] += 100
    assert capsys.readouterr() == ("", "")


def test_terminal(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=file, force_terminal=True, width=100))
    with ProgressBar("saving [a]", 4, completed=1) as bar:
        bar.step(3, "12 images/s")
    assert "saving [a]" in file.getvalue()
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", file.getvalue())
    assert "4/4 12 images/s" in shown
