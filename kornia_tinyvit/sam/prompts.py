"""What a user points at: points, boxes and masks, checked against their photo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kornia.models.structures import Prompts
from torch import Tensor

from kornia_tinyvit.sam.embedding import Geometry

__all__ = ["PromptInput", "prepare_prompts", "split_prompts"]

#: The prompts of one kind: a tensor for a single photo, or an entry for each photo.
PromptInput = Tensor | Sequence[Tensor | None] | None

LABELS = (-1, 0, 1)
_FARTHEST = 2**24  # from where on float32 has not every whole number


def split_prompts(kind: str, prompts: PromptInput, photos: int) -> list[Tensor | None]:
    """Return the prompts of one kind for each photo.

    Args:
        kind: their name, for errors.
        prompts: a tensor :math:`(P, ...)` for a single photo, or a list with such a tensor or ``None`` a photo.
        photos: how many photos there are.

    Raises:
        TypeError: if they are no tensors.
        ValueError: if there are not as many entries as photos.
    """
    if prompts is None:
        return [None] * photos
    if isinstance(prompts, Tensor):
        if photos != 1:
            raise ValueError(f"A tensor holds the {kind} of one photo; for {photos} photos pass a list of tensors.")
        return [prompts]
    entries = list(prompts)
    for entry in entries:
        if entry is not None and not isinstance(entry, Tensor):
            raise TypeError(f"{kind} must be a tensor, or a list with a tensor or None a photo; got {type(entry)}.")
    if len(entries) != photos:
        raise ValueError(f"Got {kind} for {len(entries)} photos; the embedding has {photos}.")
    return entries


def prepare_prompts(
    geometry: Geometry,
    points: Tensor | None,
    labels: Tensor | None,
    boxes: Tensor | None,
    masks: Tensor | None,
) -> Prompts:
    """Check the prompts of a photo and map them to the input of the encoder.

    Args:
        geometry: how the photo lies in the input.
        points: :math:`(P, N, 2)`, x and y in pixels of the photo.
        labels: :math:`(P, N)`: 1 on the object, 0 off it, -1 for no point at all; all 1 if left out.
        boxes: :math:`(P, 4)`, left, top, right and bottom in pixels of the photo.
        masks: logits :math:`(P, 1, h/4, w/4)` of an earlier prediction.

    Returns:
        kornia's record of them, coordinates in float32 or wider.

    Raises:
        ValueError: if there is no prompt, a shape or a value is not as above, or a prompt lies outside of the photo.
    """
    if labels is not None and points is None:
        raise ValueError("Labels belong to points, and there are none.")
    kinds = {"points": points, "boxes": boxes, "masks": masks}
    counts = {kind: len(each) for kind, each in kinds.items() if each is not None}
    if not counts:
        raise ValueError("There is nothing to look for: give points, boxes or masks, or use generate_masks.")
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} of {kind}" for kind, count in counts.items())
        raise ValueError(f"Each prompt has its points, box and mask, so there must be equally many; got {told}.")
    pairs = None if points is None else _points(geometry, points, labels)
    edges = None if boxes is None else geometry.map_points(_boxes(geometry, boxes).unflatten(1, (2, 2))).flatten(1)
    return Prompts(pairs, edges, None if masks is None else _masks(geometry, masks))


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
        raise ValueError(f"Labels must be {tuple(points.shape[:2])}, one a point; got {tuple(labels.shape)}.")
    if labels.is_complex():
        raise ValueError(f"Labels are 1 on the object, 0 off it and -1 for no point; got {labels.dtype}.")
    labels = labels.to(points.device, torch.int64 if labels.dtype == torch.bool else None)
    if not torch.isin(labels, torch.tensor(LABELS, device=labels.device, dtype=labels.dtype)).all():
        raise ValueError(f"Labels are 1 on the object, 0 off it and -1 for no point; got {labels.unique().tolist()}.")
    height, width = geometry.original_size
    outside = ((points < 0) | (points > points.new_tensor([width, height]))).any(-1) & (labels != -1)
    if outside.any():
        x, y = points[outside][0].tolist()
        raise ValueError(
            f"The point ({x:g}, {y:g}) lies outside of the photo, which is {width} wide and {height} high."
        )
    return geometry.map_points(points), labels


def _boxes(geometry: Geometry, boxes: Tensor) -> Tensor:
    """Return boxes whose corners are in order and that show some of the photo; detectors' boxes may jut out."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"Boxes must be (P, 4): left, top, right and bottom; got {tuple(boxes.shape)}.")
    boxes = _coordinates("boxes", boxes)
    height, width = geometry.original_size
    left, top, right, bottom = boxes.unbind(1)
    for wrong, reason in (
        ((right <= left) | (bottom <= top), "is empty: its right and bottom must be larger than its left and top"),
        (
            (right <= 0) | (bottom <= 0) | (left >= width) | (top >= height),
            f"lies outside of the photo, which is {width} wide and {height} high",
        ),
    ):
        if wrong.any():
            raise ValueError(f"The box ({', '.join(f'{side:g}' for side in boxes[wrong][0].tolist())}) {reason}.")
    return boxes


def _masks(geometry: Geometry, masks: Tensor) -> Tensor:
    expected = tuple(side // 4 for side in geometry.img_size)
    if masks.ndim != 4 or masks.shape[1] != 1 or tuple(masks.shape[2:]) != expected:
        raise ValueError(
            f"Masks must be logits (P, 1, {expected[0]}, {expected[1]}), as low_res_logits of a prediction; got "
            f"{tuple(masks.shape)}."
        )
    if not masks.is_floating_point() or not masks.float().isfinite().all():
        raise ValueError(f"Masks must be finite floating point logits; got {masks.dtype}, or NaN or infinity.")
    return masks


def _coordinates(kind: str, values: Tensor) -> Tensor:
    if values.is_complex():
        raise ValueError(f"The {kind} must be real numbers; got {values.dtype}.")
    # Half precision has too few digits for pixels.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if not values.isfinite().all():
        raise ValueError(f"The {kind} hold NaN or infinity.")
    if values.numel() and values.abs().max() > _FARTHEST:
        raise ValueError(f"The {kind} lie up to {float(values.abs().max()):g} pixels away; {_FARTHEST} is the limit.")
    return values
