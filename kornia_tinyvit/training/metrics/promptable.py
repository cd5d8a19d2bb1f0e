"""Metrics of prompted masks: mean intersection over union per kind of prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from kornia_tinyvit.training.metrics.counts import Counts

__all__ = ["PromptMetrics", "mask_ious"]


class PromptMetrics(Counts):
    """Collect how well prompts find their masks, in sums that add up over images and processes.

    Example:
        >>> metrics = PromptMetrics()
        >>> mask = torch.tensor([[[True, True, False]]])
        >>> metrics.update("box", torch.tensor([[[True, False, False]]]), mask)
        >>> metrics.compute()
        {'instances': 1, 'box_iou': 50.0, 'point_iou': nan}
    """

    kinds = ("box", "point")

    def __init__(self) -> None:
        super().__init__((len(self.kinds), 2))  # sum of the IoUs, and how many

    def update(self, kind: str, found: Tensor, wanted: Tensor) -> None:
        """Add masks.

        Args:
            kind: ``"box"`` or ``"point"``.
            found: predicted masks, bool :math:`(N, H, W)`.
            wanted: the true ones, of the same shape.

        Raises:
            ValueError: if the shapes differ.
        """
        if found.shape != wanted.shape:
            raise ValueError(f"Expected masks of the shape {tuple(wanted.shape)}; got {tuple(found.shape)}.")
        ious = mask_ious(found, wanted.to(found.device)).double()
        self.parts[0][self.kinds.index(kind)] += torch.tensor([float(ious.sum()), len(ious)], dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """Return the instances and, in per cent, the mean IoU of each kind of prompt over them, NaN without any."""
        sums, counts = self.parts[0].unbind(1)
        named = zip(self.kinds, (100 * sums / counts).tolist(), strict=True)
        return {"instances": int(counts.max()), **{f"{kind}_iou": mean for kind, mean in named}}


def mask_ious(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the IoU of masks :math:`(*, H, W)`, bool; 0 for two empty ones."""
    both = (found & wanted).flatten(-2).sum(-1)
    either = (found | wanted).flatten(-2).sum(-1)
    return both / either.clamp(min=1)
