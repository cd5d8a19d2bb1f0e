"""Trainings that stop in the middle, and what they write down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import json_lines


class Interrupted(Exception):
    pass


class Stopping:
    """An objective that stops at a batch, such as the third; 0 for none."""

    def __init__(self, objective, call: int) -> None:
        self.objective, self.call = objective, call

    def describe(self) -> dict[str, Any]:
        return self.objective.describe()

    def __call__(self, outputs, images, batch):
        self.call -= 1
        if not self.call:
            raise Interrupted
        return self.objective(outputs, images, batch)


def metrics(out: Path) -> list[dict[str, Any]]:
    return json_lines(out / "metrics.jsonl")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out) if "loss" in line]
