"""A search as a picture: accuracy against each cost that the budget limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from kornia_tinyvit.files import replacing

if TYPE_CHECKING:
    from kornia_tinyvit.contraction.search import Candidate, SearchResult

__all__ = ["save_search"]

_PANEL = (560, 400)
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 44, 20, 52  # around the axes of a panel
_GREY, _BLUE, _RED = "#b4b4b4", "#30638e", "#d1495b"
_UNITS = {
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "latency_ms": "milliseconds for one picture",
    "throughput": "pictures a second",
    "memory": "bytes of memory",
}


def save_search(path: str | Path, result: SearchResult) -> None:
    """Draw what a search evaluated, a panel for each cost that the budget limits.

    Grey: evaluated networks. Blue: those that were kept, from the seed to the winner. Red: the Pareto front. Dashed:
    the limit. Costs are on a logarithmic scale.

    Args:
        path: the PNG file to write.
        result: the search.
    """
    limits = result.budget.limits
    canvas = Image.new("RGB", (_PANEL[0] * len(limits), _PANEL[1]), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (cost, limit) in enumerate(limits.items()):
        _draw_panel(draw, number * _PANEL[0], result, cost, limit)
    with replacing(path, suffix=".png") as temporary:
        canvas.save(temporary)


def _draw_panel(draw: ImageDraw.ImageDraw, left: int, result: SearchResult, cost: str, limit: float) -> None:
    shown = result.evaluated
    costs = [*(each.costs[cost] for each in shown), limit]
    across = _Axis([math.log10(each) for each in costs], left + _LEFT, left + _PANEL[0] - _RIGHT)
    up = _Axis([each.accuracy or 0.0 for each in shown], _PANEL[1] - _BOTTOM, _TOP)

    def place(each: Candidate) -> tuple[float, float]:
        return across.place(math.log10(each.costs[cost])), up.place(each.accuracy or 0.0)

    _draw_axes(draw, across, up, _UNITS[cost])
    x = across.place(math.log10(limit))
    for y in range(_TOP, _PANEL[1] - _BOTTOM, 8):
        draw.line((x, y, x, y + 4), fill="black")
    for each in shown:
        _dot(draw, place(each), _GREY, 3)
    front = result.pareto_front(cost)
    _draw_steps(draw, [place(each) for each in front])
    draw.line([place(each) for each in result.path], fill=_BLUE, width=2)
    for each in result.path:
        _dot(draw, place(each), _BLUE, 5)
    for each in front:
        _dot(draw, place(each), _RED, 2)


class _Axis:
    """Places values between two pixels, with a little room at both ends."""

    def __init__(self, values: Sequence[float], start: int, stop: int) -> None:
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.5
        self.low, self.high, self.start, self.stop = low - room, high + room, start, stop

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        step = (self.high - self.low) / (count + 1)
        return [self.low + step * (number + 1) for number in range(count)]


def _draw_axes(draw: ImageDraw.ImageDraw, across: _Axis, up: _Axis, unit: str) -> None:
    font = ImageFont.load_default(13)
    draw.line((across.start, up.stop, across.start, up.start, across.stop, up.start), fill="black")
    for value in across.ticks():
        x = across.place(value)
        draw.line((x, up.start, x, up.start + 4), fill="black")
        draw.text((x, up.start + 7), _short(10**value), fill="black", font=font, anchor="ma")
    for value in up.ticks():
        y = up.place(value)
        draw.line((across.start - 4, y, across.start, y), fill="black")
        draw.text((across.start - 7, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
    middle = (across.start + across.stop) / 2
    draw.text((middle, up.start + 28), unit, fill="black", font=font, anchor="ma")
    draw.text((across.start, up.stop - 24), "accuracy", fill="black", font=font, anchor="la")
    for number, (text, color) in enumerate((("evaluated", _GREY), ("kept", _BLUE), ("Pareto front", _RED))):
        draw.text((across.start + 130 + 100 * number, up.stop - 24), text, fill=color, font=font, anchor="la")


def _draw_steps(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]]) -> None:
    """Join the points of a front: at a cost between two, the accuracy of the cheaper one is to be had."""
    for (x, y), (next_x, next_y) in pairwise(points):
        draw.line((x, y, next_x, y, next_x, next_y), fill=_RED)


def _dot(draw: ImageDraw.ImageDraw, place: tuple[float, float], color: str, radius: int) -> None:
    x, y = place
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _short(value: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"
