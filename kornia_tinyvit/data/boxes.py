"""Bounding boxes of objects, as the readers collect them."""

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
        boxes: left, top, right and bottom in pixels, :math:`(N, 4)`, clipped to the image.
        labels: class indices :math:`(N,)`.
        areas: areas in pixels, :math:`(N,)`: those of the outlines where a COCO file states them, else of the boxes.
        crowds: objects ignored in training and evaluation, :math:`(N,)`: COCO's crowds and Pascal VOC's difficult
            objects.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowds: Tensor


class Box(NamedTuple):
    """A box as stored in a file.

    Attributes:
        label: class index.
        corners: left, top, right and bottom, in pixels if the file states the image's size, else as fractions of it.
        note: the message if the box has no area inside the image.
        area: the object's area in pixels, NaN where the file states none.
        crowd: whether it is ignored in training and evaluation.
    """

    label: int
    corners: tuple[float, float, float, float]
    note: str
    area: float = math.nan
    crowd: bool = False


@dataclass(frozen=True)
class Boxes:
    """The boxes of an image, as fractions of its sides.

    Attributes:
        boxes: left, top, right and bottom in [0, 1], :math:`(N, 4)`.
        labels: class indices :math:`(N,)`.
        areas: areas in pixels, NaN where the file states none, :math:`(N,)`.
        crowds: whether an object is ignored in training and evaluation, :math:`(N,)`.
        size: height and width of the image, if the file states them.
        left_out: a message for each box that is dropped.
    """

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowds: NDArray[np.bool_]
    size: tuple[int, int] | None
    left_out: tuple[str, ...]

    def scale(self, height: int, width: int) -> Objects:
        """Return the boxes in pixels of an image of that size."""
        boxes = self.boxes * (width, height, width, height)
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = np.where(np.isnan(self.areas), sides.prod(1), self.areas)
        arrays = boxes.astype(np.float32), self.labels, areas.astype(np.float32), self.crowds
        return Objects(*(torch.from_numpy(array) for array in arrays))


def collect_boxes(found: Iterable[Box], size: tuple[int, int] | None = None) -> Boxes:
    """Clip boxes to their image and drop those without an area.

    Args:
        found: the boxes.
        size: height and width of the image, if the file states them.
    """
    boxes = list(found)
    height, width = size or (1, 1)
    corners = np.array([box.corners for box in boxes], dtype=np.float64).reshape(-1, 4)
    corners = (corners / (width, height, width, height)).clip(0, 1)
    kept = np.all(corners[:, :2] < corners[:, 2:], axis=1)
    return Boxes(
        corners[kept],
        np.array([box.label for box in boxes], dtype=np.int64)[kept],
        np.array([box.area for box in boxes], dtype=np.float64)[kept],
        np.array([box.crowd for box in boxes], dtype=np.bool_)[kept],
        size,
        tuple(box.note for box, keep in zip(boxes, kept, strict=True) if not keep),
    )
