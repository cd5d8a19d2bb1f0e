"""Point, box and mask prompts: validation and mapping to the model input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from kornia.models.structures import Prompts
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit.sam.embedding import Geometry

__all__ = ["PromptInput", "prepare_prompts", "split_prompts"]

#: Prompts of one kind: a tensor or an array for a single image, or one entry per image.
PromptInput = Tensor | NDArray[Any] | Sequence[Tensor | NDArray[Any] | None] | None

LABELS = (-1, 0, 1)
_MAX_COORDINATE = 2**24  # float32 represents every integer up to here


def split_prompts(kind: str, prompts: PromptInput, images: int) -> list[Tensor | None]:
    """Return the prompts of one kind as one entry per image.

    Args:
        kind: name of the argument in errors.
        prompts: a tensor or an array :math:`(P, ...)` for a single image, or a list with one or ``None`` per image.
        images: number of images.

    Returns:
        A tensor or ``None`` per image; arrays are copied to the CPU.

    Raises:
        TypeError: if an entry is neither a tensor, an array of numbers nor ``None``.
        ValueError: if the number of entries is not the number of images.
    """
    if prompts is None:
        return [None] * images
    single = isinstance(prompts, (Tensor, np.ndarray))
    if single and images != 1:
        raise ValueError(f"A tensor holds the {kind} of one image; for {images} images pass a list of tensors.")
    entries = [prompts] if single else list(prompts)
    if len(entries) != images:
        raise ValueError(f"Got {kind} for {len(entries)} images; the embedding has {images}.")
    return [None if entry is None else _to_tensor(kind, entry) for entry in entries]


def _to_tensor(kind: str, prompts: Any) -> Tensor:
    if isinstance(prompts, Tensor):
        return prompts
    if isinstance(prompts, np.ndarray) and prompts.dtype.kind in "biuf":
        return torch.from_numpy(prompts.astype(prompts.dtype.newbyteorder("="), order="C"))
    got = f"an array of {prompts.dtype}" if isinstance(prompts, np.ndarray) else str(type(prompts))
    raise TypeError(f"{kind} must be a tensor or an array, or a list with one or None per image; got {got}.")


def prepare_prompts(
    geometry: Geometry, points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None
) -> Prompts:
    """Validate the prompts of one image and map them to the model input.

    Args:
        geometry: placement of the image in the model input.
        points: point prompts :math:`(P, N, 2)`, x and y in pixels of the image.
        labels: point labels :math:`(P, N)`: 1 foreground, 0 background, -1 padding; default all 1.
        boxes: box prompts :math:`(P, 4)`, left, top, right and bottom in pixels of the image.
        masks: mask prompts, logits :math:`(P, 1, h/4, w/4)` of an earlier prediction.

    Returns:
        kornia's ``Prompts``, coordinates in float32 or float64.

    Raises:
        ValueError: if there is no prompt, a shape or value is invalid, or a prompt lies outside of the image.
    """
    if labels is not None and points is None:
        raise ValueError("Got labels without points; pass the points they belong to.")
    kinds = {"points": points, "boxes": boxes, "masks": masks}
    counts = {kind: len(each) for kind, each in kinds.items() if each is not None}
    if not counts:
        raise ValueError("There are no prompts: pass points, boxes or masks, or use generate_masks.")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ValueError(f"Points, boxes and masks must have the same number of prompts; got {listed}.")
    return Prompts(
        None if points is None else _points(geometry, points, labels),
        None if boxes is None else _boxes(geometry, boxes),
        None if masks is None else _masks(geometry, masks),
    )


def _points(geometry: Geometry, points: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    if points.ndim != 3 or points.shape[1] == 0 or points.shape[2] != 2:
        raise ValueError(
            "Points must be (P, N, 2): P prompts of N points, at least one, each x and y; got "
            f"{tuple(points.shape)}. A single point is points[None, None]."
        )
    points = _coordinates("points", points)
    if labels is None:
        labels = torch.ones(points.shape[:2], dtype=torch.int64, device=points.device)
    if labels.shape != points.shape[:2]:
        raise ValueError(f"Labels must be {tuple(points.shape[:2])}, one per point; got {tuple(labels.shape)}.")
    if labels.is_complex():
        raise ValueError(f"Labels are 1 (foreground), 0 (background) or -1 (padding); got {labels.dtype}.")
    labels = labels.to(points.device, torch.int64 if labels.dtype == torch.bool else None)
    if not torch.isin(labels, torch.tensor(LABELS, device=labels.device, dtype=labels.dtype)).all():
        values = labels.unique().tolist()
        raise ValueError(f"Labels are 1 (foreground), 0 (background) or -1 (padding); got {values}.")
    height, width = geometry.original_size
    outside = ((points < 0) | (points > points.new_tensor([width, height]))).any(-1) & (labels != -1)
    if outside.any():
        x, y = points[outside][0].tolist()
        raise ValueError(f"Point ({x:g}, {y:g}) lies outside of the image of width {width} and height {height}.")
    return geometry.map_points(points), labels


def _boxes(geometry: Geometry, boxes: Tensor) -> Tensor:
    """Map boxes to the model input; they may extend beyond the image, as boxes of detectors do."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"Boxes must be (P, 4): left, top, right and bottom; got {tuple(boxes.shape)}.")
    boxes = _coordinates("boxes", boxes)
    height, width = geometry.original_size
    left, top, right, bottom = boxes.unbind(1)
    empty = (right <= left) | (bottom <= top)
    outside = (right <= 0) | (bottom <= 0) | (left >= width) | (top >= height)
    invalid = empty | outside
    if invalid.any():
        sides = ", ".join(f"{side:g}" for side in boxes[invalid][0].tolist())
        if empty[invalid][0]:
            raise ValueError(f"Box ({sides}) is empty: right and bottom must be larger than left and top.")
        raise ValueError(f"Box ({sides}) lies outside of the image of width {width} and height {height}.")
    return geometry.map_points(boxes.unflatten(1, (2, 2))).flatten(1)


def _masks(geometry: Geometry, masks: Tensor) -> Tensor:
    height, width = (side // 4 for side in geometry.img_size)
    if masks.ndim != 4 or tuple(masks.shape[1:]) != (1, height, width):
        raise ValueError(f"Masks must be low-resolution logits (P, 1, {height}, {width}); got {tuple(masks.shape)}.")
    if not masks.is_floating_point() or not masks.float().isfinite().all():
        raise ValueError(f"Masks must be finite floating point logits; got {masks.dtype}, or NaN or infinity.")
    return masks


def _coordinates(kind: str, values: Tensor) -> Tensor:
    if values.is_complex():
        raise ValueError(f"The {kind} must be real numbers; got {values.dtype}.")
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # half precision cannot index large images
    if not values.isfinite().all():
        raise ValueError(f"The {kind} contain NaN or infinity.")
    if values.numel() and values.abs().max() > _MAX_COORDINATE:
        raise ValueError(f"Coordinates of {kind} reach {float(values.abs().max()):g}; the limit is {_MAX_COORDINATE}.")
    return values
