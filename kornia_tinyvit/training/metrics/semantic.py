"""Metrics of semantic segmentation: IoU and pixel accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kornia_tinyvit.data.segmentation import IGNORED
from kornia_tinyvit.training.metrics.counts import Counts, confusion_matrix

__all__ = ["SegmentationMetrics", "SegmentationScores"]


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a segmenter on the labeled pixels of images, in per cent.

    Args:
        pixels: number of labeled pixels.
        pixel_accuracy: pixel accuracy.
        mean_iou: mean IoU of the classes in the masks, with intersections and unions summed over all images.
        per_class: IoU of each class, :math:`(K,)`, float64; NaN for classes that are in no mask.
        class_pixels: number of pixels of each class in the masks, :math:`(K,)`, int64.
        confusion: confusion matrix of pixels :math:`(K, K)`, int64, with classes as rows and predictions as columns.
    """

    pixels: int
    pixel_accuracy: float
    mean_iou: float
    per_class: Tensor
    class_pixels: Tensor
    confusion: Tensor

    @property
    def present(self) -> int:
        """Number of classes in the masks."""
        return int((self.class_pixels > 0).sum())


class SegmentationMetrics(Counts):
    """Count the predictions of a segmenter for :class:`SegmentationScores`.

    :func:`kornia.metrics.mean_iou` averages over images and gives absent classes an IoU of 1.

    Args:
        num_classes: number of classes.

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
            masks: class indices of the same shape, or :data:`~kornia_tinyvit.data.segmentation.IGNORED`.

        Raises:
            ValueError: if the shapes differ or a class index is out of range.
        """
        if classes.shape != masks.shape:
            raise ValueError(f"Expected masks of the shape {tuple(classes.shape)}; got {tuple(masks.shape)}.")
        masks = masks.to(classes.device)
        labeled = masks != IGNORED
        targets, predictions = masks[labeled], classes[labeled]
        for name, found in (("Masks", targets), ("Predictions", predictions)):
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < self.num_classes:
                raise ValueError(f"{name} contain {int(found.max())}; expected classes in [0, {self.num_classes}).")
        self.parts[0] += confusion_matrix(targets, predictions, self.num_classes).cpu()

    def compute(self) -> SegmentationScores:
        """Return the scores of all images.

        Raises:
            ValueError: if there are no labeled pixels.
        """
        (confusion,) = self.parts
        intersection, class_pixels = confusion.diagonal(), confusion.sum(1)
        pixels = int(class_pixels.sum())
        if not pixels:
            raise ValueError("No labeled pixels were evaluated.")
        union = class_pixels + confusion.sum(0) - intersection
        per_class = torch.where(class_pixels > 0, 100 * intersection / union, torch.nan)
        return SegmentationScores(
            pixels=pixels,
            pixel_accuracy=100 * float(intersection.sum()) / pixels,
            mean_iou=float(per_class.nanmean()),
            per_class=per_class,
            class_pixels=class_pixels.long(),
            confusion=confusion.long(),
        )
