"""How far a faster network is from the one it replaces, told by images rather than by hope."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Agreement", "as_list", "compare"]

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Agreement:
    r"""What :func:`compare` measures.

    Relative errors are those of an image's whole output, ``norm(c - r) / norm(r)`` in the Euclidean norm; where there
    are several maps, of each.

    Args:
        images: how many were compared.
        top1_reference: right answers of the reference in per cent; ``None`` without labels or logits.
        top1_candidate: those of the candidate.
        agreement: images in per cent for which both put the same class first; ``None`` without logits.
        max_error: the largest relative error.
        mean_error: the mean of the relative errors.
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
        reference: maps images :math:`(B, C, H, W)` to logits :math:`(B, classes)`, to a map :math:`(B, C', H', W')`
            or to several.
        candidate: maps the same images to the same shapes, in any floating point precision.
        batches: images, or pairs of images and class indices :math:`(B,)`.

    Raises:
        ValueError: if there are no images, only some have labels, or the outputs differ in number or shape.

    Example:
        >>> half = compare(lambda x: x.mean((2, 3)), lambda x: x.half().mean((2, 3)), [torch.rand(8, 3, 4, 4)])
        >>> half.agreement, half.max_error < 1e-3
        (100.0, True)
    """
    errors, answers, labels = [], [], []
    count = labeled = 0
    for batch in batches:
        images, classes = (batch, None) if isinstance(batch, Tensor) else batch
        expected, found = _maps(reference(images)), _maps(candidate(images))
        if [output.shape for output in expected] != [output.shape for output in found]:
            raise ValueError(f"The outputs differ in shape: expected {_shapes(expected)}; got {_shapes(found)}.")
        count += len(images)
        errors += [_relative_errors(*pair) for pair in zip(expected, found, strict=True)]
        if _are_logits(expected):
            answers.append(torch.stack([expected[0].argmax(1), found[0].argmax(1)]))
        if classes is not None:
            labeled += len(images)
            labels.append(classes.cpu())
    if not count:
        raise ValueError("There are no images to compare on.")
    if labeled not in {0, count}:
        raise ValueError(f"Only {labeled} of {count} images have labels; give all of them one, or none.")
    every = torch.cat(errors)
    agreement = top1_reference = top1_candidate = None
    if answers:
        first, second = torch.cat(answers, 1)
        agreement = _per_cent(first == second)
        if labels:
            truth = torch.cat(labels)
            top1_reference, top1_candidate = _per_cent(first == truth), _per_cent(second == truth)
    return Agreement(count, top1_reference, top1_candidate, agreement, float(every.max()), float(every.mean()))


def as_list(outputs: Outputs) -> list[Tensor]:
    """Return the outputs of a network, a tensor :math:`(B, *)` or several, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _maps(outputs: Outputs) -> list[Tensor]:
    return [output.detach().cpu().double() for output in as_list(outputs)]


def _shapes(outputs: list[Tensor]) -> str:
    return ", ".join(str(tuple(output.shape)) for output in outputs)


def _are_logits(outputs: list[Tensor]) -> bool:
    return len(outputs) == 1 and outputs[0].ndim == 2


def _relative_errors(expected: Tensor, found: Tensor) -> Tensor:
    """Return the relative error of each image; infinity where the reference is zero and the candidate is not."""
    difference, size = (found - expected).flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / size)


def _per_cent(hits: Tensor) -> float:
    return 100 * int(hits.sum()) / len(hits)
