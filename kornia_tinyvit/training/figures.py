"""Figure of predictions on held-out images beside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from kornia_tinyvit.data.loader import read_unless_broken
from kornia_tinyvit.images import to_pil
from kornia_tinyvit.training.tasks.base import Task
from kornia_tinyvit.visualization import distinct_colors, save_image

__all__ = ["save_predictions"]

_TILE, _GAP, _LINE, _FONT = 320, 8, 18, 13  # in pixels
_PER_ROW = 4  # images of a task that draws one tile for each


@torch.no_grad()
def save_predictions(path: str | Path, task: Task, network: Any, images: Any, count: int = 8, seed: int = 0) -> None:
    """Write a figure of images, their ground truth and the predictions of a network.

    The images are a random sample that depends on the seed only, so that figures of several trainings compare. Corrupt
    images are left out.

    Args:
        path: the PNG file to write; its folder is created.
        task: the task; nothing is written if it draws nothing, see
            :meth:`~kornia_tinyvit.training.tasks.base.Task.draw`.
        network: a network that the task saves.
        images: the validation data, with the classes of the network.
        count: most images to draw.
        seed: random seed.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    rows = []
    for index in order.tolist():
        sample = read_unless_broken(images.read, index, skip_broken=True)
        if sample is not None and (tiles := task.draw(network, to_pil(sample[0]), sample[1])):
            rows.append(
                [(images.name(index), tiles[0][1], tiles[0][0]), *(("", text, each) for each, text in tiles[1:])]
            )
    if rows:
        save_image(path, _compose(rows, task.legend(network)))


def _compose(rows: Sequence[Sequence[tuple[str, str, Image.Image]]], legend: Sequence[str]) -> Image.Image:
    """Return a sheet of rows of named tiles with captions, and a legend of classes below."""
    if max(map(len, rows)) == 1:
        tiles = [tile for row in rows for tile in row]
        rows = [tiles[first : first + _PER_ROW] for first in range(0, len(tiles), _PER_ROW)]
    font = ImageFont.load_default(_FONT)
    width = _GAP + max(map(len, rows)) * (_TILE + _GAP)
    places, below = _place_legend(legend, font, width)
    resized = [[_fit(tile[2]) for tile in row] for row in rows]
    heights = [max(image.height for image in row) + 2 * _LINE + _GAP for row in resized]
    sheet = Image.new("RGB", (width, _GAP + sum(heights) + below), "white")
    draw, top = ImageDraw.Draw(sheet), _GAP
    for row, scaled, height in zip(rows, resized, heights, strict=True):
        for column, ((name, text, _), image) in enumerate(zip(row, scaled, strict=True)):
            left = _GAP + column * (_TILE + _GAP)
            sheet.paste(image, (left, top))
            draw.text((left, top + image.height + 2), _shorten(text, font), fill="black", font=font)
            draw.text((left, top + image.height + 2 + _LINE), _shorten(name, font), fill="#777777", font=font)
        top += height
    colors = (255 * distinct_colors(len(legend))).int().tolist()
    for name, color, (left, line) in zip(legend, colors, places, strict=True):
        y = top + line * _LINE
        draw.rectangle((left, y + 2, left + _FONT, y + 2 + _FONT), fill=tuple(color))
        draw.text((left + _FONT + 4, y), name, fill="black", font=font)
    return sheet


def _place_legend(legend: Sequence[str], font: Any, width: int) -> tuple[list[tuple[int, int]], int]:
    """Return the left edge and the line of each class of a legend, and its height."""
    left, line, places = _GAP, 0, []
    for name in legend:
        needed = _FONT + 4 + round(font.getlength(name)) + 2 * _GAP
        if left + needed > width and left > _GAP:
            left, line = _GAP, line + 1
        places.append((left, line))
        left += needed
    return places, (line + 1) * _LINE + _GAP if legend else 0


def _fit(image: Image.Image) -> Image.Image:
    """Return an image resized to the width of a tile, or to its height if it is a tall one."""
    scale = min(_TILE / image.width, 1.5 * _TILE / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _shorten(text: str, font: Any) -> str:
    """Return the end of a text that is too long for a tile."""
    if font.getlength(text) <= _TILE:
        return text
    while font.getlength(f"...{text}") > _TILE:
        text = text[1:]
    return f"...{text}"
