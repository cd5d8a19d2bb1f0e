"""Agreement of an optimized network with the original: relative errors, class agreement, top-1 and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from kornia_tinyvit.images import Images, list_images
from kornia_tinyvit.ops import mask_boxes, mask_ious
from kornia_tinyvit.sam.embedding import ImageEmbedding, MaskPrediction
from kornia_tinyvit.sam.model import MobileSAM

__all__ = ["Agreement", "MaskComparison", "as_list", "compare"]

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Agreement:
    r"""Results of :func:`compare`.

    The relative error of an image is ``norm(c - r) / norm(r)`` of its whole output in the Euclidean norm; of several
    feature maps, each has its own.

    Args:
        images: number of images.
        top1_reference: top-1 accuracy of the reference in percent; ``None`` without labels or logits.
        top1_candidate: top-1 accuracy of the candidate.
        agreement: percentage of images with the same top-1 class; ``None`` without logits.
        max_error: the largest relative error.
        mean_error: the mean relative error.
        mask_iou: mean IoU in percent of the masks of a MobileSAM, see :class:`MaskComparison`; ``None`` otherwise.
        min_mask_iou: the lowest of these IoUs.
    """

    images: int
    top1_reference: float | None
    top1_candidate: float | None
    agreement: float | None
    max_error: float
    mean_error: float
    mask_iou: float | None = None
    min_mask_iou: float | None = None


class MaskComparison:
    """The masks of a MobileSAM on some images, with which those of other encoders are compared.

    The prompts need no ground truth: a grid of points, and the boxes of the masks that the reference finds at them. A
    point has three masks, of which the one with the reference's highest score is compared; a box has one. Prompts
    without a mask are left out.

    Args:
        reference: the network.
        images: images as for :meth:`MobileSAM.embed`.
        points_per_side: points of the grid along each side.

    Raises:
        ValueError: if there are no images, or the reference finds no mask.
    """

    @torch.inference_mode()
    def __init__(self, reference: MobileSAM, images: Images, points_per_side: int = 4) -> None:
        self._images = list_images(images)
        if not self._images:
            raise ValueError("There are no images to compare on.")
        self._expected = [_Prompted.find(reference, reference.embed(image), points_per_side) for image in self._images]
        self._reference = reference
        if not any(len(each.points) for each in self._expected):
            raise ValueError("The reference finds no mask in the images; pass trained weights or other images.")

    @torch.inference_mode()
    def __call__(self, candidate: MobileSAM) -> Agreement:
        """Return the agreement of the masks and the embeddings of a network with those of the reference.

        Args:
            candidate: the network, with the input size of the reference.
        """
        ious: list[Tensor] = []
        errors: list[Tensor] = []
        for image, prompted in zip(self._images, self._expected, strict=True):
            embedding = candidate.embed(image)
            expected, found = _on_cpu(prompted.embedding.features), _on_cpu(embedding.features)
            errors += map(_relative_errors, expected, found)
            if len(prompted.points):
                masks = prompted.predict(self._reference, prompted.embedding)
                visible = masks.flatten(1).any(1)
                ious.append(mask_ious(masks, prompted.predict(candidate, embedding))[visible].cpu())
        all_ious, all_errors = 100 * torch.cat(ious).double(), torch.cat(errors)
        return Agreement(
            len(self._images), None, None, None, float(all_errors.max()), float(all_errors.mean()),
            float(all_ious.mean()), float(all_ious.min()),
        )  # fmt: skip


@dataclass(frozen=True)
class _Prompted:
    """The embedding of an image and its prompts: points and the numbers of their masks, and boxes."""

    embedding: ImageEmbedding
    points: Tensor
    chosen: Tensor
    boxes: Tensor

    @classmethod
    def find(cls, sam: MobileSAM, embedding: ImageEmbedding, points_per_side: int) -> _Prompted:
        """Find the masks at a grid of points, and their boxes."""
        height, width = embedding.geometries[0].original_size
        centers = (torch.arange(points_per_side) + 0.5) / points_per_side
        points = torch.cartesian_prod(centers * width, centers * height)[:, None]
        (three,) = sam.predict_masks(embedding, points)
        boxes = mask_boxes(three.best().masks()[:, 0]).cpu()
        kept = boxes.any(1)
        return cls(embedding, points[kept], three.scores.argmax(1).cpu()[kept], boxes[kept])

    def predict(self, sam: MobileSAM, embedding: ImageEmbedding) -> Tensor:
        """Return the masks of all prompts, :math:`(P, H, W)`, bool."""
        (three,) = sam.predict_masks(embedding, self.points)
        (boxed,) = sam.predict_masks(embedding, boxes=self.boxes, multimask_output=False)
        pointed = three.low_res_logits[torch.arange(len(self.chosen)), self.chosen][:, None]
        logits = torch.cat([pointed, boxed.low_res_logits])
        return MaskPrediction(logits, logits.flatten(1)[:, :1], boxed.geometry, boxed.threshold).masks()[:, 0]


@overload
def compare(reference: MobileSAM, candidate: MobileSAM, batches: Images) -> Agreement: ...
@overload
def compare(
    reference: Callable[[Tensor], Outputs],
    candidate: Callable[[Tensor], Outputs],
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
) -> Agreement: ...
@torch.inference_mode()
def compare(reference: Callable[..., Outputs], candidate: Callable[..., Outputs], batches: Any) -> Agreement:
    """Run two versions of a network on the same images and measure how well they agree.

    Args:
        reference: maps images :math:`(B, C, H, W)` to logits :math:`(B, classes)`, a feature map
            :math:`(B, C', H', W')` or a sequence of feature maps; or a MobileSAM, whose masks are compared (see
            :class:`MaskComparison`).
        candidate: maps the same images to outputs of the same shapes, in any floating-point precision.
        batches: images, or pairs of images and class indices :math:`(B,)`; for a MobileSAM, images as for
            :meth:`MobileSAM.embed`.

    Returns:
        The agreement over all images.

    Raises:
        ValueError: if there are no images, only some have labels, the outputs differ in number or shape, or a
            MobileSAM finds no mask.

    Example:
        >>> half = compare(lambda x: x.mean((2, 3)), lambda x: x.half().mean((2, 3)), [torch.rand(8, 3, 4, 4)])
        >>> half.agreement, half.max_error < 1e-3
        (100.0, True)
    """
    if isinstance(reference, MobileSAM) and isinstance(candidate, MobileSAM):
        return MaskComparison(reference, batches)(candidate)
    errors: list[Tensor] = []
    top1, labels, count = [], [], 0
    for batch in batches:
        images, classes = (batch, None) if isinstance(batch, Tensor) else batch
        expected, found = _on_cpu(reference(images)), _on_cpu(candidate(images))
        if [output.shape for output in expected] != [output.shape for output in found]:
            raise ValueError(f"The outputs differ in shape: expected {_shapes(expected)}; got {_shapes(found)}.")
        count += len(images)
        errors += map(_relative_errors, expected, found)
        if len(expected) == 1 and expected[0].ndim == 2:
            top1.append(torch.stack([expected[0].argmax(1), found[0].argmax(1)]))
        if classes is not None:
            labels += classes.tolist()
    if not count:
        raise ValueError("There are no images to compare on.")
    if len(labels) not in {0, count}:
        raise ValueError(f"Only {len(labels)} of {count} images have labels; label all images or none.")
    agreement = top1_reference = top1_candidate = None
    if top1:
        first, second = torch.cat(top1, 1)
        agreement = _percentage(first == second)
        if labels:
            target = torch.tensor(labels)
            top1_reference, top1_candidate = _percentage(first == target), _percentage(second == target)
    max_error, mean_error = float(torch.cat(errors).max()), float(torch.cat(errors).mean())
    return Agreement(count, top1_reference, top1_candidate, agreement, max_error, mean_error)


def as_list(outputs: Outputs) -> list[Tensor]:
    """Return the outputs of a network, one tensor :math:`(B, *)` or several, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _on_cpu(outputs: Outputs) -> list[Tensor]:
    return [output.detach().cpu().double() for output in as_list(outputs)]


def _shapes(outputs: list[Tensor]) -> str:
    return ", ".join(str(tuple(output.shape)) for output in outputs)


def _relative_errors(expected: Tensor, found: Tensor) -> Tensor:
    """Return the relative error of each image; infinity where only the reference is zero."""
    difference, size = (found - expected).flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / size)


def _percentage(hits: Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)
