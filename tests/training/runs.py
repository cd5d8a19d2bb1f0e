"""Interrupted trainings, and their metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import json_lines


class Interrupted(Exception):
    pass


class Stopping:
    """A loss that raises :class:`Interrupted` at a batch, counted from 1; 0 for none."""

    def __init__(self, loss, call: int) -> None:
        self.loss, self.call = loss, call

    def describe(self) -> dict[str, Any]:
        return self.loss.describe()

    def __call__(self, outputs, images, batch):
        self.call -= 1
        if not self.call:
            raise Interrupted
        return self.loss(outputs, images, batch)


def metrics(out: Path) -> list[dict[str, Any]]:
    return json_lines(out / "metrics.jsonl")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]
