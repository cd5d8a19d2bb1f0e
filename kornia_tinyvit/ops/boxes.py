"""Bounding boxes, IoUs and central points of masks, and non-maximum suppression."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from kornia.geometry import bbox
from torch import Tensor

__all__ = ["central_points", "mask_boxes", "mask_ious", "nms"]


def mask_boxes(masks: Tensor) -> Tensor:
    """Return bounding boxes :math:`(N, 4)` of masks: left, top, right, bottom in pixels, exclusive; zeros if empty.

    Args:
        masks: boolean masks :math:`(N, H, W)`.

    Example:
        >>> mask_boxes(torch.tensor([[[False, True], [False, True]]]))
        tensor([[1., 0., 2., 2.]])
    """
    lines = (masks.any(1).byte(), masks.any(2).byte())  # columns, rows
    first = [line.argmax(1) for line in lines]
    last = [line.shape[1] - line.flip(1).argmax(1) for line in lines]
    return torch.stack(first + last, 1).float() * lines[1].any(1, keepdim=True)


def mask_ious(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the IoUs of masks :math:`(*, H, W)`, bool; 0 for two empty masks.

    Args:
        predictions: predicted masks :math:`(*, H, W)`.
        targets: ground-truth masks :math:`(*, H, W)`.
    """
    intersection = (predictions & targets).flatten(-2).sum(-1)
    union = (predictions | targets).flatten(-2).sum(-1)
    return intersection / union.clamp(min=1)


def central_points(masks: Tensor) -> Tensor:
    """Return the point of each mask with the largest distance to its border, x and y, :math:`(N, 2)`.

    The distance is the Chebyshev distance; of equal ones the first in row-major order is returned.

    Args:
        masks: bool masks :math:`(N, H, W)`, not empty.

    Example:
        >>> central_points(torch.ones(1, 3, 5, dtype=torch.bool))
        tensor([[1.5000, 1.5000]])
    """
    points = [_central_point(mask, *corners) for mask, corners in zip(masks, mask_boxes(masks).tolist(), strict=True)]
    return torch.tensor(points).view(-1, 2)


def _central_point(mask: Tensor, left: float, top: float, right: float, bottom: float) -> tuple[float, float]:
    inside = mask[int(top) : int(bottom), int(left) : int(right)][None].float()
    rest = 1 - F.pad(inside, (1, 1, 1, 1))
    depth = torch.zeros_like(inside)
    while not rest.all():
        depth += 1 - rest[:, 1:-1, 1:-1]
        rest = F.max_pool2d(rest, 3, stride=1, padding=1)
    row, column = divmod(int(depth.argmax()), inside.shape[2])
    return left + column + 0.5, top + row + 0.5


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the indices of the boxes kept by non-maximum suppression, identical to ``torchvision.ops.nms``.

    Unlike kornia's ``nms``, which it calls, it is stable for equal scores, keeps boxes without area, and does not
    round the threshold to float32.

    Args:
        boxes: left, top, right and bottom :math:`(K, 4)`.
        scores: scores :math:`(K,)`.
        threshold: boxes with a larger IoU with a box of higher score are removed.

    Returns:
        Indices :math:`(N,)`, sorted by descending score.
    """
    order = scores.argsort(descending=True, stable=True)
    corners = boxes[order].float()
    (solid,) = ((corners[:, 2:] - corners[:, :2]).prod(1) > 0).nonzero(as_tuple=True)
    limit = np.float32(threshold)
    if float(limit) > threshold:
        limit = np.nextafter(limit, np.float32(-1))
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[solid] = False
    keep[solid[bbox.nms(corners[solid], torch.arange(len(solid), 0, -1).float(), float(limit))]] = True
    return order[keep]
