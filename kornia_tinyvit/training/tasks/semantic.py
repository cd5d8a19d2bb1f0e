"""Training segmenters: augmentation of images with masks, loss, evaluator and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kornia_tinyvit.data.paired import PairedAugmentation, PairedBatch, PairedSamples
from kornia_tinyvit.data.segmentation import IGNORED, SegmentationDataset
from kornia_tinyvit.semantic import SegmenterConfig, SemanticSegmenter, class_maps
from kornia_tinyvit.training.metrics.semantic import SegmentationMetrics
from kornia_tinyvit.training.tasks.base import Evaluator, Task
from kornia_tinyvit.visualization import draw_class_map

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
    """Crop and flip an image with its mask, and jitter the image's color, by kornia.

    Masks are resampled by nearest neighbor. See :class:`~kornia_tinyvit.data.paired.PairedAugmentation` for the
    arguments; the default preset is ``"semantic"``.
    """

    kind = "masks"
    default_preset = "semantic"
    data_key = "mask"

    def __call__(self, image: Tensor, mask: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Augment a sample.

        Args:
            image: uint8 image :math:`(3, H, W)` on the CPU.
            mask: its class indices :math:`(H, W)`, or several masks :math:`(N, H, W)`.
            epoch: number of the epoch.
            index: index of the sample.

        Returns:
            uint8 image :math:`(3, S, S)` and mask :math:`(S, S)`, or masks :math:`(N, S, S)`.
        """
        pixels, labels = self._reduce(image), mask.reshape(1, -1, *mask.shape[-2:]).float()
        if labels.shape[-2:] != pixels.shape[-2:]:
            labels = F.interpolate(labels, pixels.shape[-2:], mode="nearest-exact")
        crop, labels = self._apply(pixels, labels, epoch, index)
        return crop, labels.reshape(*mask.shape[:-2], *labels.shape[-2:]).to(mask.dtype)


class SegmentationSamples(PairedSamples):
    """Images and masks, decoded and augmented; targets are class indices :math:`(B, S, S)`.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: a
    :class:`~kornia_tinyvit.data.SegmentationDataset` and a :class:`MaskAugmentation`. Pixels without a label are
    :data:`~kornia_tinyvit.data.segmentation.IGNORED`.
    """

    def _blank(self) -> Tensor:
        side = self.augmentation.img_size
        return torch.full((side, side), IGNORED)

    def _collate(self, targets: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(targets)


class SegmentationLoss:
    """Cross-entropy per pixel, averaged over the labeled pixels of each image with the weights of their classes.

    Args:
        label_smoothing: probability in [0, 1] that is spread over all classes.
        class_weights: weight of each class, :math:`(K,)`, such as :func:`balanced_weights`; ``None`` for 1.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def describe(self) -> dict[str, Any]:
        """Return its kind, the label smoothing and the class weights."""
        weights = None if self.class_weights is None else [round(each, 4) for each in self.class_weights.tolist()]
        return {"kind": "pixel labels", "label_smoothing": self.label_smoothing, "class_weights": weights}

    def __call__(self, outputs: Tensor, images: Tensor, batch: PairedBatch) -> Tensor:
        """Return the losses :math:`(B,)` of logits :math:`(B, K, S, S)`; 0 for an image without labels."""
        masks = batch.targets.to(outputs.device, non_blocking=True)
        # The channels-last logits as a matrix: three times as fast on a CPU as (B, K, S, S).
        logits = outputs.float().movedim(1, -1).flatten(0, -2)
        weights = logits.new_ones(logits.shape[1]) if self.class_weights is None else self.class_weights.to(logits)
        losses = F.cross_entropy(
            logits, masks.flatten(), weights, ignore_index=IGNORED, reduction="none",
            label_smoothing=self.label_smoothing,
        ).view_as(masks)  # fmt: skip
        total = torch.where(masks == IGNORED, 0, weights[masks.clamp(min=0)]).sum((1, 2))
        return losses.sum((1, 2)) / total.clamp(min=1e-6)


def balanced_weights(images: SegmentationDataset, power: float = 0.5) -> Tensor:
    """Return class weights by median frequency balancing (arXiv:1411.4734), raised to a power.

    The frequency of a class is its fraction of the labeled pixels in the images that contain it. All masks are read.

    Args:
        images: the training images.
        power: 1 as in the paper, which weighs rare classes most; 0 for equal weights.

    Returns:
        Weights :math:`(K,)`; 1 for the class of median frequency and for absent classes.
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
    """Evaluate a segmenter on images with masks, one image at a time at its own size.

    Args:
        images: the data set.
        config: configuration of the segmenter.
        **options: see :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(self, images: SegmentationDataset, config: SegmenterConfig, **options: Any) -> None:
        super().__init__(images, SegmentationMetrics(config.num_classes), **options | {"batch_size": 1})
        self.config = config.backbone

    def update(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, Tensor]]]) -> None:
        """Update the metrics; a sample is an image :math:`(3, H, W)` in [0, 1] and its mask :math:`(H, W)`."""
        size = self.config.img_size
        image, mask = samples[0][1] if samples else (torch.zeros(3, size, size), torch.full((size, size), IGNORED))
        classes = class_maps(network, image[None].to(self.device), self.config)
        self.counts.update(classes[0], mask)


class SegmentationTask(Task):
    """Semantic segmentation: mIoU and pixel accuracy on a :class:`~kornia_tinyvit.data.SegmentationDataset`."""

    metrics = ("mean_iou", "pixel_accuracy")
    evaluator_class = SegmentationEvaluator
    network_class = SemanticSegmenter

    def draw(self, network: SemanticSegmenter, image: Image.Image, target: Tensor) -> list[tuple[Image.Image, str]]:
        """Return the image and the class maps, of which the target is :math:`(H, W)`; ignored pixels are black."""
        (predicted,) = network.predict(image)
        labeled = target != IGNORED
        right = 100 * float((predicted.cpu() == target)[labeled].float().mean()) if labeled.any() else 0.0
        return [
            (image, "image"),
            (draw_class_map(target), "truth"),
            (draw_class_map(predicted), f"prediction, {right:.0f} % of the pixels right"),
        ]

    def legend(self, network: SemanticSegmenter) -> Sequence[str]:
        """Return the names of the classes."""
        return network.class_names


#: The task of :class:`~kornia_tinyvit.SemanticSegmenter`, for :func:`~kornia_tinyvit.training.train`.
SEMANTIC = SegmentationTask()
