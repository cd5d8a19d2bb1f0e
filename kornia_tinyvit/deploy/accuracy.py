"""Agreement of an optimized network with the original: relative errors, class agreement and top-1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Agreement", "as_list", "compare"]

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
    """

    images: int
    top1_reference: float | None
    top1_candidate: float | None
    agreement: float | None
    max_error: float
    mean_error: float


@torch.inference_mode()
def compare(
    reference: Callable[[Tensor], Outputs],
    candidate: Callable[[Tensor], Outputs],
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
) -> Agreement:
    """Run two versions of a network on the same images and measure how well they agree.

    Args:
        reference: maps images :math:`(B, C, H, W)` to logits :math:`(B, classes)`, a feature map
            :math:`(B, C', H', W')` or a sequence of feature maps.
        candidate: maps the same images to outputs of the same shapes, in any floating-point precision.
        batches: images, or pairs of images and class indices :math:`(B,)`.

    Returns:
        The agreement over all images.

    Raises:
        ValueError: if there are no images, only some have labels, or the outputs differ in number or shape.

    Example:
        >>> half = compare(lambda x: x.mean((2, 3)), lambda x: x.half().mean((2, 3)), [torch.rand(8, 3, 4, 4)])
        >>> half.agreement, half.max_error < 1e-3
        (100.0, True)
    """
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
