"""ClassificationMetrics of semantic segmentation: intersection over union and pixel accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kornia_tinyvit.data.segmentation import IGNORED
from kornia_tinyvit.training.metrics.counts import Counts, count_pairs

__all__ = ["SegmentationMetrics", "SegmentationScores"]


@dataclass(frozen=True)
class SegmentationScores:
    """What a segmenter does on images with masks. Shares are in per cent, pixels without a label left out.

    Args:
        pixels: how many pixels were compared.
        pixel_accuracy: share of pixels of the right class.
        mean_iou: mean over the classes that the masks hold, of intersection over union over all images together.
        per_class: that intersection over union of each class, :math:`(K,)`, float64; NaN where no mask holds it.
        class_pixels: pixels of each class in the masks, :math:`(K,)`, int64.
        confusion: pixels :math:`(K, K)`, int64, by their class (row) and the class they were taken for (column).
    """

    pixels: int
    pixel_accuracy: float
    mean_iou: float
    per_class: Tensor
    class_pixels: Tensor
    confusion: Tensor

    @property
    def present(self) -> int:
        """How many classes the masks hold."""
        return int((self.class_pixels > 0).sum())


class SegmentationMetrics(Counts):
    """Collect what :class:`SegmentationScores` needs, in counts that add up over images and processes.

    :func:`kornia.metrics.mean_iou` takes each image for itself and counts absent classes as right.

    Args:
        num_classes: classes of the network.

    Raises:
        ValueError: if there are no classes.

    Example:
        >>> metrics = SegmentationMetrics(3)
        >>> metrics.update(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 0, -100]]))
        >>> found = metrics.compute()
        >>> round(found.mean_iou, 2), round(found.pixel_accuracy, 2)
        (50.0, 66.67)
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}.")
        super().__init__((num_classes, num_classes))
        self.num_classes = num_classes

    def update(self, classes: Tensor, masks: Tensor) -> None:
        """Add images.

        Args:
            classes: predicted class indices of any shape, such as :math:`(B, H, W)`.
            masks: the true ones of the same shape, or :data:`~kornia_tinyvit.data.segmentation.IGNORED`.

        Raises:
            ValueError: if the shapes differ or an index is no class.
        """
        if classes.shape != masks.shape:
            raise ValueError(f"Expected masks of the shape {tuple(classes.shape)}; got {tuple(masks.shape)}.")
        masks = masks.to(classes.device)
        labeled = masks != IGNORED
        truth, answers = masks[labeled], classes[labeled]
        for name, found in (("Masks", truth), ("Predictions", answers)):
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < self.num_classes:
                raise ValueError(f"{name} hold {int(found.max())}; expected classes in [0, {self.num_classes}).")
        self.parts[0] += count_pairs(truth, answers, self.num_classes).cpu()

    def compute(self) -> SegmentationScores:
        """Return the measures over all images so far.

        Raises:
            ValueError: if no pixel had a label.
        """
        (confusion,) = self.parts
        right, truth = confusion.diagonal(), confusion.sum(1)
        pixels = int(truth.sum())
        if not pixels:
            raise ValueError("No labeled pixels were evaluated.")
        union = truth + confusion.sum(0) - right
        per_class = torch.where(truth > 0, 100 * right / union, torch.nan)
        return SegmentationScores(
            pixels=pixels,
            pixel_accuracy=100 * float(right.sum()) / pixels,
            mean_iou=float(per_class.nanmean()),
            per_class=per_class,
            class_pixels=truth.long(),
            confusion=confusion.long(),
        )
