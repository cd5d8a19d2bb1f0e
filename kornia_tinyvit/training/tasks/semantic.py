"""Training segmenters: images and masks changed together, the loss, and what a segmenter is measured by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.data.paired import PairedAugmentation, PairedBatch, PairedSamples
from kornia_tinyvit.data.segmentation import IGNORED, SegmentationDataset
from kornia_tinyvit.semantic import SegmenterConfig, SemanticSegmenter, class_maps
from kornia_tinyvit.training.metrics.semantic import SegmentationMetrics
from kornia_tinyvit.training.tasks.base import Evaluator, Task

__all__ = [
    "SEMANTIC",
    "MaskAugmentation",
    "SegmentationEvaluator",
    "SegmentationLoss",
    "SegmentationSamples",
    "SegmentationTask",
    "balanced_weights",
]


class MaskAugmentation(PairedAugmentation):
    """Crop, flip and recolor an image and its mask by kornia; the mask is moved alike and never blended.

    See :class:`~kornia_tinyvit.data.paired.PairedAugmentation` for the arguments; the usual preset is
    ``"semantic"``.
    """

    kind = "masks"
    usual_preset = "semantic"
    data_key = "mask"

    def __call__(self, image: Tensor, mask: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Change a sample.

        Args:
            image: 8-bit image :math:`(3, H, W)` on the CPU.
            mask: its class indices :math:`(H, W)`, or several masks :math:`(N, H, W)`.
            epoch: number of the epoch.
            index: number of the sample.

        Returns:
            8-bit image :math:`(3, S, S)` and mask :math:`(S, S)`, or masks :math:`(N, S, S)`.
        """
        pixels, labels = self._reduce(image), mask.reshape(1, -1, *mask.shape[-2:]).float()
        if labels.shape[-2:] != pixels.shape[-2:]:
            labels = F.interpolate(labels, pixels.shape[-2:], mode="nearest-exact")
        crop, labels = self._apply(pixels, labels, epoch, index)
        return crop, labels.reshape(*mask.shape[:-2], *labels.shape[-2:]).to(mask.dtype)


class SegmentationSamples(PairedSamples):
    """Images and masks decoded and augmented as an epoch demands, a whole batch at a time.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: a
    :class:`~kornia_tinyvit.data.SegmentationDataset` and a :class:`MaskAugmentation`.
    """

    def _blank(self) -> Tensor:
        side = self.augmentation.img_size
        return torch.full((side, side), IGNORED)

    def _collate(self, targets: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(targets)


class SegmentationLoss:
    """Cross-entropy of the classes of pixels, the weighted mean over those of an image that have a label.

    Args:
        label_smoothing: share of the target that is spread over all classes.
        class_weights: weight of each class, :math:`(K,)`, such as :func:`balanced_weights`; all alike if left out.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def describe(self) -> dict[str, Any]:
        """Return its kind, the smoothing and the weights."""
        weights = None if self.class_weights is None else [round(each, 4) for each in self.class_weights.tolist()]
        return {"kind": "pixel labels", "label_smoothing": self.label_smoothing, "class_weights": weights}

    def __call__(self, outputs: Tensor, images: Tensor, batch: PairedBatch) -> Tensor:
        """Return the losses :math:`(B,)` of logits :math:`(B, K, S, S)`; 0 for an image without labels."""
        masks = batch.targets.to(outputs.device, non_blocking=True)
        # Classes last, as the network's memory has them: three times as fast on a CPU.
        scores = outputs.float().movedim(1, -1).flatten(0, -2)
        weights = scores.new_ones(scores.shape[1]) if self.class_weights is None else self.class_weights.to(scores)
        losses = F.cross_entropy(
            scores, masks.flatten(), weights, ignore_index=IGNORED, reduction="none",
            label_smoothing=self.label_smoothing,
        ).view_as(masks)  # fmt: skip
        total = torch.where(masks == IGNORED, 0, weights[masks.clamp(min=0)]).sum((1, 2))
        return losses.sum((1, 2)) / total.clamp(min=1e-6)


def balanced_weights(images: SegmentationDataset, power: float = 0.5) -> Tensor:
    """Return weights that make up for rare classes: median frequency balancing (arXiv:1411.4734), to a power.

    The frequency of a class is its share of the labeled pixels of the images that show it. All masks are read.

    Args:
        images: the images to train on.
        power: 1 as in the paper, which makes the smallest things loud; 0 for none.

    Returns:
        Weights :math:`(K,)`, 1 for the class of median frequency and for classes that do not occur.
    """
    own, shown = torch.zeros(2, images.num_classes, dtype=torch.float64)
    for _, mask in images:
        counts = mask[mask != IGNORED].bincount(minlength=images.num_classes)
        own += counts
        shown += (counts > 0) * counts.sum()
    frequency = own / shown
    weights = (frequency.nanmedian() / frequency) ** power
    return weights.nan_to_num(1.0).float()


class SegmentationEvaluator(Evaluator):
    """A single measurement of a segmenter on images with masks, one at a time since each has its own size.

    Args:
        images: the data set.
        config: the segmenter's configuration.
        **options: as for :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(self, images: SegmentationDataset, config: SegmenterConfig, **options: Any) -> None:
        super().__init__(images, SegmentationMetrics(config.num_classes), **options | {"batch_size": 1})
        self.config = config.backbone

    def measure(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, Tensor]]]) -> None:
        """Count pixels; a sample is an index with an image :math:`(3, H, W)` in [0, 1] and a mask :math:`(H, W)`."""
        size = self.config.img_size
        image, mask = samples[0][1] if samples else (torch.zeros(3, size, size), None)
        classes = class_maps(network, image[None].to(self.device), self.config)
        if mask is not None:
            self.counts.update(classes[0], mask)

    def measures(self) -> dict[str, float]:
        """Return mean IoU and pixel accuracy in per cent."""
        found = self.counts.compute()
        return {"mean_iou": round(found.mean_iou, 4), "pixel_accuracy": round(found.pixel_accuracy, 4)}


class SegmentationTask(Task):
    """A class a pixel: mean intersection over union and pixel accuracy in per cent of :class:`SegmentationDataset`."""

    metric = "mean_iou"
    evaluator_class = SegmentationEvaluator
    network_class = SemanticSegmenter


#: The task of semantic segmenters, for :func:`~kornia_tinyvit.training.train`.
SEMANTIC = SegmentationTask()
