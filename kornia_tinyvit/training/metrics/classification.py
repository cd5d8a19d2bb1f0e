"""Metrics of classifiers: accuracy, confusion matrix and calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kornia_tinyvit.training.metrics.counts import Counts, confusion_matrix

__all__ = ["ClassificationMetrics", "ClassificationScores", "select_classes"]

CALIBRATION_BINS = 15
CONFUSION_CLASSES = 2048  # the matrix of ImageNet-22k would take 4 GB


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of a classifier on labeled images, in per cent.

    Args:
        images: number of images.
        top1: top-1 accuracy.
        top5: top-``top_k`` accuracy.
        top_k: 5, or the number of classes if that is smaller.
        class_images: number of images of each class, :math:`(C,)`, int64.
        per_class: top-1 accuracy of each class, :math:`(C,)`, float64; NaN for classes without images.
        confusion: confusion matrix :math:`(C, C)`, int64, with classes as rows and predictions as columns; ``None`` for
            more than 2048 classes.
        calibration_error: expected calibration error over 15 bins of equal width (arXiv:1706.04599).
        calibration_bins: :math:`(15, 3)`, float64: images, mean confidence and top-1 accuracy of each bin, the last two
            in per cent and NaN for empty bins.
    """

    images: int
    top1: float
    top5: float
    top_k: int
    class_images: Tensor
    per_class: Tensor
    confusion: Tensor | None
    calibration_error: float
    calibration_bins: Tensor

    def confusions(self, count: int = 10) -> list[tuple[int, int, int]]:
        """Return the most frequent errors as (class, predicted class, count), sorted by descending count.

        Args:
            count: maximum number of errors.

        Raises:
            ValueError: if there are too many classes for a confusion matrix.
        """
        if self.confusion is None:
            raise ValueError(f"The confusion matrix is limited to {CONFUSION_CLASSES} classes.")
        mistakes = self.confusion.clone().fill_diagonal_(0)
        counts, cells = mistakes.flatten().sort(descending=True, stable=True)
        pairs = zip(cells[:count].tolist(), counts[:count].tolist(), strict=True)
        return [(*divmod(cell, len(mistakes)), number) for cell, number in pairs if number]


class ClassificationMetrics(Counts):
    """Count the predictions of a classifier for :class:`ClassificationScores`.

    Args:
        num_classes: number of classes.

    Raises:
        ValueError: if there are no classes.

    Example:
        >>> metrics = ClassificationMetrics(3)
        >>> metrics.update(torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1]))
        >>> metrics.compute().top1
        50.0
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}.")
        cells = num_classes if num_classes <= CONFUSION_CLASSES else 0
        super().__init__((), (num_classes,), (num_classes,), (CALIBRATION_BINS, 3), (cells, cells))
        self.num_classes = num_classes
        self.top_k = min(5, num_classes)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: scores :math:`(B, C)`, on any device.
            labels: class indices :math:`(B,)`.

        Raises:
            ValueError: if the shapes do not match or a label is no class index.
        """
        if logits.shape != (len(labels), self.num_classes) or labels.ndim != 1:
            raise ValueError(
                f"Expected logits (B, {self.num_classes}) and labels (B,); got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}."
            )
        labels = labels.cpu().long()
        unknown = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(unknown):
            raise ValueError(f"The data has a class {unknown[0]}, but the network has {self.num_classes} classes.")
        # kornia.metrics.accuracy returns percentages of a batch, which do not add up.
        best = logits.topk(self.top_k).indices.cpu()
        confidence = logits.float().softmax(1).amax(1).cpu().double()
        correct = best[:, 0] == labels
        hits, images, class_hits, bins, confusion = self.parts
        hits += (best == labels.unsqueeze(1)).any(1).sum()
        images += labels.bincount(minlength=self.num_classes)
        class_hits += labels[correct].bincount(minlength=self.num_classes)
        # Bin i contains confidences in (i / 15, (i + 1) / 15].
        index = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        bins.index_add_(0, index, torch.stack([torch.ones_like(confidence), confidence, correct.double()], 1))
        if confusion.numel():
            confusion += confusion_matrix(labels, best[:, 0], self.num_classes)

    def compute(self) -> ClassificationScores:
        """Return the scores of all batches.

        Raises:
            ValueError: if there are no images.
        """
        hits, class_images, class_hits, bins, confusion = self.parts
        images = int(class_images.sum())
        if not images:
            raise ValueError("No images were evaluated.")
        number, confidence, correct = bins.unbind(1)
        return ClassificationScores(
            images=images,
            top1=100 * float(class_hits.sum()) / images,
            top5=100 * float(hits) / images,
            top_k=self.top_k,
            class_images=class_images.long(),
            per_class=100 * class_hits / class_images,
            confusion=confusion.long() if confusion.numel() else None,
            calibration_error=100 * float((confidence - correct).abs().sum()) / images,
            calibration_bins=torch.stack([number, 100 * confidence / number, 100 * correct / number], 1),
        )


def select_classes(logits: Tensor, indices: Tensor) -> Tensor:
    """Select the logits of some classes, such as those of ImageNet-1k from an ImageNet-22k head.

    Args:
        logits: :math:`(*, C)`.
        indices: class indices in [0, C), :math:`(K,)`; -1 for a class that the head lacks.

    Returns:
        Logits :math:`(*, K)`; minus infinity for classes that the head lacks.

    Raises:
        ValueError: if an index is out of range.
    """
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= logits.shape[-1]):
        raise ValueError(
            f"Class indices must be -1 or in [0, {logits.shape[-1]}); got {int(indices.min())} to {int(indices.max())}."
        )
    indices = indices.to(logits.device)
    return logits[..., indices.clamp(min=0)].masked_fill(indices < 0, float("-inf"))
