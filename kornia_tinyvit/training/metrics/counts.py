"""Counts that add up over batches and processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Counts", "count_pairs"]


class Counts:
    """Numbers of a metric in one vector, whose sum over the processes is that of all images.

    Args:
        *shapes: shapes of the parts of the vector.
        dtype: data type of the numbers.

    Attributes:
        parts: the parts, which share the memory of the vector.
    """

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        self._state = torch.zeros(sum(sizes), dtype=dtype)
        self.parts = [part.view(shape) for part, shape in zip(self._state.split(sizes), shapes, strict=True)]

    def state(self) -> Tensor:
        """Return a copy of the vector :math:`(n,)`."""
        return self._state.clone()

    def load_state(self, state: Tensor) -> None:
        """Replace the numbers by those of a vector from :meth:`state`.

        Raises:
            ValueError: if it has another length, such as that of another number of classes.
        """
        if state.shape != self._state.shape:
            raise ValueError(f"Expected {len(self._state)} counts; got {state.numel()}.")
        self._state.copy_(state)


def count_pairs(truth: Tensor, answers: Tensor, num_classes: int) -> Tensor:
    """Return how often each class (row) was taken for each class (column), :math:`(K, K)`, int64.

    Args:
        truth: class indices in [0, K), :math:`(N,)`.
        answers: the predicted ones, :math:`(N,)`.
        num_classes: the :math:`K`.
    """
    return (truth * num_classes + answers).bincount(minlength=num_classes**2).view(num_classes, num_classes)
