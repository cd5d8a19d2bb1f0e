"""Counts of metrics, which add up over batches and ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["Counts", "confusion_matrix"]


class Counts:
    """Counts of a metric in one vector, which is summed over ranks.

    Args:
        *shapes: shapes of the counts.
        dtype: data type of the counts.

    Attributes:
        parts: the counts, views of the vector.
    """

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        self._state = torch.zeros(sum(sizes), dtype=dtype)
        self.parts = [part.view(shape) for part, shape in zip(self._state.split(sizes), shapes, strict=True)]

    def state(self) -> Tensor:
        """Return a copy of the vector :math:`(n,)`."""
        return self._state.clone()

    def load_state(self, state: Tensor) -> None:
        """Replace the counts by a vector, such as a sum of :meth:`state`.

        Args:
            state: the vector :math:`(n,)`.

        Raises:
            ValueError: if the length differs, for example for another number of classes.
        """
        if state.shape != self._state.shape:
            raise ValueError(f"Expected {len(self._state)} counts; got {state.numel()}.")
        self._state.copy_(state)


def confusion_matrix(targets: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Return the counts of each class (row) by predicted class (column), :math:`(K, K)`, int64.

    Args:
        targets: class indices in [0, K), :math:`(N,)`.
        predictions: predicted class indices in [0, K), :math:`(N,)`.
        num_classes: the number of classes :math:`K`.
    """
    return (targets * num_classes + predictions).bincount(minlength=num_classes**2).view(num_classes, num_classes)
