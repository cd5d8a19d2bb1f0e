"""Boxes around objects, as the readers collect them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: left, top, right and bottom in pixels, :math:`(N, 4)`, inside of the image.
        labels: class indices :math:`(N,)`.
        areas: what COCO states as an object's size in pixels, :math:`(N,)`: that of its outline; else the box's.
        crowds: whether a box is neither learnt nor counted, :math:`(N,)`: COCO's crowds, and what Pascal VOC calls
            difficult.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowds: Tensor


class Box(NamedTuple):
    """A box as a file states it.

    Attributes:
        label: class index.
        corners: left, top, right and bottom, in pixels if the file states the image's size, else as fractions of it.
        note: what is reported if the box has no area in the image.
        area: the object's size in pixels, NaN where the file states none.
        crowd: whether it is neither learnt nor counted.
    """

    label: int
    corners: tuple[float, float, float, float]
    note: str
    area: float = math.nan
    crowd: bool = False


@dataclass(frozen=True)
class Boxes:
    """The boxes of an image, as fractions of its sides, and the height and width it must have if a file states them."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]  # in pixels, NaN where the file states none
    crowds: NDArray[np.bool_]
    size: tuple[int, int] | None

    def scale(self, height: int, width: int) -> Objects:
        """Return the objects of an image of that size."""
        boxes = self.boxes * (width, height, width, height)
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = np.where(np.isnan(self.areas), sides.prod(1), self.areas)
        return Objects(
            torch.from_numpy(boxes).float(),
            torch.from_numpy(self.labels),
            torch.from_numpy(areas).float(),
            torch.from_numpy(self.crowds),
        )


def collect_boxes(found: Iterable[Box], left_out: list[str], size: tuple[int, int] | None = None) -> Boxes:
    """Cut boxes at the border of their image, and leave out those of which nothing is in it.

    Args:
        found: the boxes.
        left_out: takes the notes of those that are left out.
        size: height and width of the image, if the file states them.
    """
    height, width = size or (1, 1)
    kept: list[Box] = []
    corners: list[tuple[float, ...]] = []
    for box in found:
        left, top, right, bottom = (
            min(max(edge / side, 0.0), 1.0) for edge, side in zip(box.corners, (width, height) * 2, strict=True)
        )
        if left < right and top < bottom:
            kept.append(box)
            corners.append((left, top, right, bottom))
        else:
            left_out.append(box.note)
    return Boxes(
        np.array(corners, dtype=np.float64).reshape(-1, 4),
        np.array([box.label for box in kept], dtype=np.int64),
        np.array([box.area for box in kept], dtype=np.float64),
        np.array([box.crowd for box in kept], dtype=np.bool_),
        size,
    )
