"""Training segmenters: pictures and masks changed together, the loss, and what a segmenter is measured by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from kornia.metrics import confusion_matrix
from torch import Tensor, nn

from kornia_tinyvit.data.loader import Key
from kornia_tinyvit.data.paired import PairedAugmentation, PairedSamples
from kornia_tinyvit.data.segmentation import IGNORED, SegmentationDataset
from kornia_tinyvit.semantic import SegmenterConfig, SemanticSegmenter, class_maps
from kornia_tinyvit.training.tasks.classification import ReadableItems, as_it_is, check_names

__all__ = [
    "SEMANTIC",
    "MaskAugmentation",
    "MaskedBatch",
    "MaskedSamples",
    "PixelLabels",
    "PixelMetrics",
    "Segmentation",
    "Semantic",
    "balanced_weights",
    "evaluate_segmenter",
]

_EXACT = 2**24  # counts up to which float32, which kornia's confusion matrix returns, is exact


class MaskedBatch(NamedTuple):
    """Pictures and masks as the workers hand them over, augmented.

    Attributes:
        crops: 8-bit pictures :math:`(B, 3, S, S)`.
        masks: class indices :math:`(B, S, S)`, or :data:`~kornia_tinyvit.data.segmentation.IGNORED`.
        valid: 1 for samples whose files could be read, 0 for broken ones, :math:`(B,)`.
        broken: names of the pictures that could not be read.
    """

    crops: Tensor
    masks: Tensor
    valid: Tensor
    broken: tuple[str, ...]


class MaskAugmentation(PairedAugmentation):
    """Crop, flip and recolour a picture and its mask by kornia; the mask is moved alike and never blended.

    See :class:`~kornia_tinyvit.data.paired.PairedAugmentation` for the arguments; the usual preset is
    ``"semantic"``.
    """

    kind = "masks"
    usual_preset = "semantic"
    data_key = "mask"

    def __call__(self, picture: Tensor, mask: Tensor, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Change a sample.

        Args:
            picture: 8-bit picture :math:`(3, H, W)` on the CPU.
            mask: its class indices :math:`(H, W)`, or several masks :math:`(N, H, W)`.
            epoch: number of the epoch.
            index: number of the sample.

        Returns:
            8-bit picture :math:`(3, S, S)` and mask :math:`(S, S)`, or masks :math:`(N, S, S)`.
        """
        pixels, labels = picture[None], mask.reshape(1, -1, *mask.shape[-2:]).float()
        size = self._reduced_size(pixels)
        if size != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
            labels = F.interpolate(labels, size, mode="nearest-exact")
        crop, labels = self._apply(pixels, labels, epoch, index)
        return crop, labels.reshape(*mask.shape[:-2], *labels.shape[-2:]).to(mask.dtype)


class MaskedSamples(PairedSamples[MaskedBatch]):
    """Pictures and masks decoded and augmented as an epoch demands, a whole batch at a time.

    See :class:`~kornia_tinyvit.data.KeyedSamples` for the arguments: a
    :class:`~kornia_tinyvit.data.SegmentationDataset` and a :class:`MaskAugmentation`.
    """

    def __getitems__(self, keys: Sequence[Key]) -> MaskedBatch:
        """Return the samples of keys (epoch, sample)."""
        crops = self._grey(len(keys))
        masks = torch.full((len(keys), *crops.shape[-2:]), IGNORED)
        valid = torch.ones(len(keys))
        broken = []
        for row, (epoch, index) in enumerate(keys):
            sample = self._read(index)
            if sample is None:
                valid[row] = 0
                broken.append(self.images.name(index))
            else:
                crops[row], masks[row] = self.augmentation(*sample, epoch, index)
        return MaskedBatch(crops, masks, valid, tuple(broken))


class PixelLabels:
    """Cross-entropy of the classes of pixels, the weighted mean over those of a picture that have a label.

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

    def __call__(self, outputs: Tensor, images: Tensor, batch: MaskedBatch) -> Tensor:
        """Return the losses :math:`(B,)` of logits :math:`(B, K, S, S)`; 0 for a picture without labels."""
        masks = batch.masks.to(outputs.device, non_blocking=True)
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

    The frequency of a class is its share of the labelled pixels of the pictures that show it. All masks are read.

    Args:
        images: the pictures to train on.
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


@dataclass(frozen=True)
class Segmentation:
    """What a segmenter does on pictures with masks. Shares are in per cent, pixels without a label left out.

    Args:
        pixels: how many pixels were compared.
        pixel_accuracy: share of pixels of the right class.
        mean_iou: mean over the classes that the masks hold, of intersection over union over all pictures together.
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


class PixelMetrics:
    """Collect what :class:`Segmentation` needs, in counts that add up over pictures and processes.

    The counts are those of :func:`kornia.metrics.confusion_matrix`; :func:`kornia.metrics.mean_iou` takes each picture
    for itself and counts absent classes as right.

    Args:
        num_classes: classes of the network.

    Raises:
        ValueError: if there are no classes.

    Example:
        >>> metrics = PixelMetrics(3)
        >>> metrics.update(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 0, -100]]))
        >>> found = metrics.compute()
        >>> round(found.mean_iou, 2), round(found.pixel_accuracy, 2)
        (50.0, 66.67)
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}.")
        self.num_classes = num_classes
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.float64)

    def update(self, classes: Tensor, masks: Tensor) -> None:
        """Add pictures.

        Args:
            classes: predicted class indices of any shape, such as :math:`(B, H, W)`.
            masks: the true ones of the same shape, or :data:`~kornia_tinyvit.data.segmentation.IGNORED`.

        Raises:
            ValueError: if the shapes differ or an index is no class.
        """
        if classes.shape != masks.shape:
            raise ValueError(f"Expected masks of the shape {tuple(classes.shape)}; got {tuple(masks.shape)}.")
        masks = masks.to(classes.device)
        labelled = masks != IGNORED
        side = max(2, self.num_classes)  # kornia's matrix has at least two
        pairs = zip(classes[labelled].split(_EXACT), masks[labelled].split(_EXACT), strict=True)
        for some, truth in pairs:
            if truth.numel() and not 0 <= int(truth.min()) <= int(truth.max()) < self.num_classes:
                raise ValueError(f"Masks hold {int(truth.max())}; expected classes in [0, {self.num_classes}).")
            table = confusion_matrix(some[None], truth[None], side)[0, : self.num_classes, : self.num_classes]
            self._confusion += table.cpu().double()

    def state(self) -> Tensor:
        """Return all counts as one float64 vector :math:`(n,)`; that of all pictures is the sum over the processes."""
        return self._confusion.flatten().clone()

    def load_state(self, state: Tensor) -> None:
        """Take over counts of :meth:`state`.

        Raises:
            ValueError: if they are of another number of classes.
        """
        if state.numel() != self._confusion.numel():
            raise ValueError(f"Expected {self._confusion.numel()} counts; got {state.numel()}.")
        self._confusion = state.detach().to("cpu", torch.float64, copy=True).view_as(self._confusion)

    def compute(self) -> Segmentation:
        """Return the measures over all pictures so far.

        Raises:
            ValueError: if no pixel had a label.
        """
        right, truth = self._confusion.diagonal(), self._confusion.sum(1)
        pixels = int(truth.sum())
        if not pixels:
            raise ValueError("No labelled pixels were evaluated.")
        union = truth + self._confusion.sum(0) - right
        per_class = torch.where(truth > 0, 100 * right / union, torch.nan)
        return Segmentation(
            pixels=pixels,
            pixel_accuracy=100 * float(right.sum()) / pixels,
            mean_iou=float(per_class.nanmean()),
            per_class=per_class,
            class_pixels=truth.long(),
            confusion=self._confusion.long(),
        )


def evaluate_segmenter(
    segmenter: SemanticSegmenter, images: SegmentationDataset | Iterable[tuple[Tensor, Tensor]]
) -> Segmentation:
    """Measure a segmenter on whole pictures, at the size of their masks.

    Args:
        segmenter: the segmenter, seen as :meth:`SemanticSegmenter.predict` sees pictures.
        images: pictures :math:`(3, H, W)` in [0, 1] and masks :math:`(H, W)`.

    Raises:
        ValueError: if the masks have other classes than the segmenter, or no labels.
    """
    if isinstance(images, SegmentationDataset):
        check_names(images.class_names, segmenter.class_names)
    metrics = PixelMetrics(segmenter.config.num_classes)
    for picture, mask in images:
        metrics.update(segmenter.predict(picture)[0], mask)
    return metrics.compute()


class Semantic:
    """A class a pixel: mean intersection over union and pixel accuracy in per cent of :class:`SegmentationDataset`."""

    measure = "mean_iou"

    def check(self, images: SegmentationDataset, config: SegmenterConfig, class_names: Sequence[str] | None) -> None:
        """Refuse masks of other classes than the network's."""
        check_names(images.class_names, class_names)
        if images.num_classes != config.num_classes:
            raise ValueError(
                f"The validation masks have {images.num_classes} classes, but the network {config.num_classes}."
            )

    def judge(
        self,
        images: SegmentationDataset,
        config: SegmenterConfig,
        samples: MaskedSamples,
        batch_size: int,
        device: torch.device,
    ) -> PixelJudge:
        """Begin to count pixels, one picture at a time since each has its own size."""
        return PixelJudge(images, config, samples.on_broken == "skip", device)

    def save(
        self,
        config: SegmenterConfig,
        state: dict[str, Tensor],
        paths: Sequence[Path],
        class_names: Sequence[str] | None,
    ) -> None:
        """Write files for :meth:`SemanticSegmenter.from_config`."""
        plain = SemanticSegmenter.from_config(config, class_names=class_names)
        plain.load_state_dict(state)
        for path in paths:
            plain.save(path)


#: The task of semantic segmenters, for :func:`~kornia_tinyvit.training.train`.
SEMANTIC = Semantic()


class PixelJudge:
    """A single measurement of a segmenter on validation pictures; see :class:`~.tasks.Judge`."""

    collate = staticmethod(as_it_is)
    batch_size = 1

    def __init__(
        self, images: SegmentationDataset, config: SegmenterConfig, skip_broken: bool, device: torch.device
    ) -> None:
        self.pictures = ReadableItems(images, images.__getitem__, skip_broken)
        self.config, self.device = config.backbone, device
        self.counts = PixelMetrics(config.num_classes)

    def add(self, network: nn.Module, batch: list[tuple[tuple[Tensor, Tensor] | None, str]]) -> list[str]:
        """Count the pixels of a picture."""
        sample = batch[0][0] if batch else None
        # Without a picture of its own a process still takes part in what the network's processes do together.
        picture = torch.zeros(3, self.config.img_size, self.config.img_size) if sample is None else sample[0]
        classes = class_maps(network, picture[None].to(self.device), self.config)
        if sample is not None:
            self.counts.update(classes[0], sample[1])
        return [name for found, name in batch if found is None]

    def measures(self) -> dict[str, float]:
        """Return mean IoU and pixel accuracy in per cent."""
        found = self.counts.compute()
        return {"mean_iou": round(found.mean_iou, 4), "pixel_accuracy": round(found.pixel_accuracy, 4)}
