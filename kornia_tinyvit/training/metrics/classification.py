"""Metrics of classifiers: accuracy, confusions and calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kornia_tinyvit.training.metrics.counts import Counts, count_pairs

__all__ = ["ClassificationMetrics", "ClassificationScores", "select_classes"]

CALIBRATION_BINS = 15
CONFUSION_CLASSES = 2048  # the table of ImageNet-22k would take 4 GB


@dataclass(frozen=True)
class ClassificationScores:
    """What a network does on labeled images. Shares are in per cent.

    Args:
        images: how many were seen.
        top1: share whose class has the highest logit.
        top5: share whose class is among the ``top_k`` highest logits.
        top_k: 5, or the number of classes where that is smaller.
        class_images: images of each class, :math:`(C,)`, int64.
        per_class: top-1 of each class, :math:`(C,)`, float64; NaN where there are no images.
        confusion: images :math:`(C, C)`, int64, by their class (row) and the class they were taken for (column);
            ``None`` for more than 2048 classes.
        calibration_error: expected calibration error over 15 bins of equal width (arXiv:1706.04599): how far the
            probability of the best class is from the share of right answers, on average over the images.
        calibration_bins: :math:`(15, 3)`, float64: images, mean probability of the best class and top-1 of each bin,
            the last two in per cent and NaN where there are no images.
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
        """Return the most frequent mistakes: class, the class it was taken for, and how often; most frequent first.

        Raises:
            ValueError: if there are too many classes for a table of confusions.
        """
        if self.confusion is None:
            raise ValueError(f"Confusions are counted for up to {CONFUSION_CLASSES} classes.")
        mistakes = self.confusion.clone().fill_diagonal_(0)
        times, cells = mistakes.flatten().sort(descending=True, stable=True)
        found = zip(cells[:count].tolist(), times[:count].tolist(), strict=True)
        return [(*divmod(cell, len(mistakes)), number) for cell, number in found if number]


class ClassificationMetrics(Counts):
    """Collect what :class:`ClassificationScores` needs, batch by batch, in counts that add up over processes.

    Args:
        num_classes: classes of the logits.

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
            ValueError: if the shapes do not fit or a label is no class of the logits.
        """
        if logits.shape != (len(labels), self.num_classes) or labels.ndim != 1:
            raise ValueError(
                f"Expected logits (B, {self.num_classes}) and labels (B,); got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if not len(labels):
            return
        if int(labels.max()) >= self.num_classes or int(labels.min()) < 0:
            worst = int(labels.max()) if int(labels.min()) >= 0 else int(labels.min())
            raise ValueError(f"The data has a class {worst}, but the network knows {self.num_classes}.")
        # kornia.metrics.accuracy gives rounded percentages; counts add up exactly, and one ranking settles all ties.
        best = logits.topk(self.top_k).indices.cpu()
        confidence = logits.float().softmax(1).amax(1).cpu().double()
        labels = labels.cpu().long()
        right = best[:, 0] == labels
        hits, seen, correct, bins, cells = self.parts
        hits += (best == labels.unsqueeze(1)).any(1).sum()
        seen += labels.bincount(minlength=self.num_classes)
        correct += labels[right].bincount(minlength=self.num_classes)
        _fill_bins(bins, confidence, right)
        if cells.numel():
            cells += count_pairs(labels, best[:, 0], self.num_classes)

    def compute(self) -> ClassificationScores:
        """Return the measures over all batches so far.

        Raises:
            ValueError: if there were none.
        """
        hits, seen, correct, bins, cells = self.parts
        images = int(seen.sum())
        if not images:
            raise ValueError("No images were evaluated.")
        number, confidence, right = bins.unbind(1)
        return ClassificationScores(
            images=images,
            top1=100 * float(correct.sum()) / images,
            top5=100 * float(hits) / images,
            top_k=self.top_k,
            class_images=seen.long(),
            per_class=100 * correct / seen,
            confusion=cells.long() if cells.numel() else None,
            calibration_error=100 * float((confidence - right).abs().sum()) / images,
            calibration_bins=torch.stack([number, 100 * confidence / number, 100 * right / number], 1),
        )


def _fill_bins(bins: Tensor, confidence: Tensor, right: Tensor) -> None:
    """Add images to the bins :math:`(15, 3)` of their number, sum of confidences and right answers."""
    # Bin i holds what is in (i / 15, (i + 1) / 15].
    index = (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
    bins.index_add_(0, index, torch.stack([torch.ones_like(confidence), confidence, right.double()], 1))


def select_classes(logits: Tensor, indices: Tensor) -> Tensor:
    """Keep some classes of a head, such as those of ImageNet-1k of an ImageNet-22k head.

    Args:
        logits: :math:`(*, C)`.
        indices: positions in [0, C) of the classes to keep, :math:`(K,)`; -1 for a class that the head does not have.

    Returns:
        Logits :math:`(*, K)`; minus infinity for classes that the head does not have.

    Raises:
        ValueError: if a position is no class.
    """
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= logits.shape[-1]):
        raise ValueError(
            f"Positions must be -1 or in [0, {logits.shape[-1]}); got {int(indices.min())} to {int(indices.max())}."
        )
    indices = indices.to(logits.device)
    return logits[..., indices.clamp(min=0)].masked_fill(indices < 0, float("-inf"))
