"""Metrics of promptable segmentation: mean IoU per kind of prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kornia_tinyvit.ops import mask_ious
from kornia_tinyvit.training.metrics.counts import Counts

__all__ = ["PromptMetrics", "PromptScores"]


@dataclass(frozen=True)
class PromptScores:
    """Scores of prompted masks; IoUs are in per cent and NaN without prompts of their kind.

    Args:
        instances: number of instances.
        box_iou: mean IoU of the masks of box prompts.
        point_iou: mean IoU of the masks of point prompts.
    """

    instances: int
    box_iou: float
    point_iou: float


class PromptMetrics(Counts):
    """Sum the IoUs of prompted masks for :class:`PromptScores`.

    Example:
        >>> metrics = PromptMetrics()
        >>> mask = torch.tensor([[[True, True, False]]])
        >>> metrics.update("box", torch.tensor([[[True, False, False]]]), mask)
        >>> metrics.compute()
        PromptScores(instances=1, box_iou=50.0, point_iou=nan)
    """

    kinds = ("box", "point")

    def __init__(self) -> None:
        super().__init__((len(self.kinds), 2))  # sum and number of the IoUs

    def update(self, kind: str, predictions: Tensor, targets: Tensor) -> None:
        """Add masks.

        Args:
            kind: ``"box"`` or ``"point"``.
            predictions: predicted masks, bool :math:`(N, H, W)`.
            targets: ground truth masks, bool :math:`(N, H, W)`.

        Raises:
            ValueError: if the shapes differ.
        """
        if predictions.shape != targets.shape:
            raise ValueError(f"Expected masks of the shape {tuple(targets.shape)}; got {tuple(predictions.shape)}.")
        ious = mask_ious(predictions, targets.to(predictions.device)).double()
        self.parts[0][self.kinds.index(kind)] += torch.tensor([float(ious.sum()), len(ious)], dtype=torch.float64)

    def compute(self) -> PromptScores:
        """Return the scores of all masks."""
        sums, counts = self.parts[0].unbind(1)
        return PromptScores(int(counts.max()), *(100 * sums / counts).tolist())
