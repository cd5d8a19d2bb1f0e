"""Losses of a student against a teacher: beside it, or by what was stored of it."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.drawing import Draws
from kornia_tinyvit.data.loader import Batch
from kornia_tinyvit.distillation.manifest import StoreError
from kornia_tinyvit.distillation.store import (
    FeatureStore,
    LabelStore,
    MissingRecordsError,
    Records,
    RecordStore,
    StoreMismatchError,
)
from kornia_tinyvit.distillation.teachers import Teacher

__all__ = [
    "OnlineDistillationLoss",
    "StoredFeatureLoss",
    "StoredLabelLoss",
    "distillation_loss",
    "soft_target_cross_entropy",
]


def soft_target_cross_entropy(
    logits: Tensor, classes: Tensor, probabilities: Tensor, reduction: str = "mean"
) -> Tensor:
    r"""Cross-entropy against a distribution of which the K largest probabilities are known.

    What the K lack to 1 is spread evenly over the other classes, as in the original. With :math:`p_k` the stored
    probabilities, :math:`z` the logits and :math:`r = (1 - \sum_k p_k) / (C - K)`, the loss is

    .. math::
        \left(\sum_k p_k + r (C - K)\right) \log\sum_c e^{z_c} - \sum_k p_k z_k
        - r \left(\sum_c z_c - \sum_k z_k\right),

    which needs no dense distribution.

    Args:
        logits: the student's, :math:`(B, C)`.
        classes: indices of the stored classes, each at most once in a row, any integer type, :math:`(B, K)`.
        probabilities: their probabilities, any floating type, :math:`(B, K)`.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Returns:
        The loss, a scalar or :math:`(B,)`, float32.

    Raises:
        ValueError: if the shapes do not fit or the reduction is unknown.

    Example:
        >>> soft_target_cross_entropy(torch.zeros(1, 4), torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.1]]))
        tensor(1.3863)
    """
    if classes.shape != probabilities.shape or classes.ndim != 2 or len(classes) != len(logits):
        raise ValueError(
            f"Expected classes and probabilities of the shape ({len(logits)}, K); got {tuple(classes.shape)} and "
            f"{tuple(probabilities.shape)}."
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none'; got {reduction!r}.")
    # They go to the device as they are stored, uint16 and float16: a third of the bytes of int64 and float32.
    logits, stored = logits.float(), probabilities.to(logits.device, non_blocking=True).float()
    others = logits.shape[1] - classes.shape[1]
    if others < 0:
        raise ValueError(f"{classes.shape[1]} classes are stored, but the logits have {logits.shape[1]}.")
    if classes.numel() and classes.device.type == "cpu":  # on a GPU the look would wait for it at every step
        lowest, highest = (int(each) for each in classes.long().aminmax())
        if lowest < 0 or highest >= logits.shape[1]:
            raise ValueError(f"The stored classes are {lowest} to {highest}, but the logits have {logits.shape[1]}.")
    known = stored.sum(1)
    rest = (1 - known).clamp(min=0) / others if others else torch.zeros_like(known)
    chosen = logits.gather(1, classes.to(logits.device, non_blocking=True).long())
    mass = known + rest * others
    loss = mass * logits.logsumexp(1) - (stored * chosen).sum(1) - rest * (logits.sum(1) - chosen.sum(1))
    return loss.mean() if reduction == "mean" else loss


def distillation_loss(
    logits: Tensor,
    classes: Tensor,
    probabilities: Tensor,
    labels: Tensor | None = None,
    hard_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Mix :func:`soft_target_cross_entropy` with the cross-entropy of the true labels.

    Args:
        logits: the student's, :math:`(B, C)`.
        classes: indices of the stored classes, :math:`(B, K)`.
        probabilities: their probabilities, :math:`(B, K)`.
        labels: class indices :math:`(B,)` or targets :math:`(B, C)`; needed where ``hard_weight`` is not 0.
        hard_weight: weight of the labels in [0, 1]; the paper has 0.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Raises:
        ValueError: if ``hard_weight`` is out of its range, or labels are missing.
    """
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight must be in [0, 1]; got {hard_weight!r}.")
    soft = soft_target_cross_entropy(logits, classes, probabilities, reduction)
    if not hard_weight:
        return soft
    if labels is None:
        raise ValueError("hard_weight needs the labels.")
    return torch.lerp(soft, F.cross_entropy(logits.float(), labels, reduction=reduction), hard_weight)


class OnlineDistillationLoss:
    """Cross-entropy against all of what a teacher says at every step.

    Args:
        teacher: maps the augmented images to logits; it is put into evaluation mode and follows them to their device.
        autocast: data type it computes in; ``None`` for its own.
    """

    def __init__(self, teacher: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.teacher = teacher.eval()
        self.autocast = autocast

    def describe(self) -> dict[str, Any]:
        """Return its kind and the teacher."""
        told = self.teacher.describe() if isinstance(self.teacher, Teacher) else type(self.teacher).__name__
        return {"kind": "online teacher", "teacher": told, "autocast": str(self.autocast)}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`."""
        kind = self.autocast or torch.bfloat16
        with torch.no_grad(), torch.autocast(images.device.type, kind, enabled=self.autocast is not None):
            targets = self.teacher.to(images.device)(images).float().softmax(1)
        return F.cross_entropy(outputs.float(), targets, reduction="none")


class StoredLabelLoss:
    """Cross-entropy against the soft labels of a store.

    Args:
        store: the labels, of the epochs that are replayed.
        augmentation: what the batches are augmented with, for mixed labels.
        hard_weight: weight of the true labels beside them; the paper has 0.
        patience: seconds to wait for records that a teacher is still writing before they are reported missing.
    """

    def __init__(
        self, store: LabelStore, augmentation: ReplayableAugmentation, hard_weight: float = 0.0, patience: float = 0.0
    ) -> None:
        self.store = store
        self.augmentation = augmentation
        self.hard_weight = hard_weight
        self.patience = patience

    def describe(self) -> dict[str, Any]:
        """Return its kind, whose labels they are, and the share of the true ones."""
        return {"kind": "stored labels", "teacher": self.store.manifest.teacher, "hard_weight": self.hard_weight}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`.

        Raises:
            MissingRecordsError: if there are no labels for a sample.
            StoreMismatchError: if the augmentation draws other parameters than when the labels were stored.
        """
        classes, probabilities, checksums = self._read(batch.draws)
        _check_replay(self.store, batch.draws, checksums)
        hard = None
        if self.hard_weight:
            hard = self.augmentation.soft_labels(batch.labels, batch.draws, outputs.shape[1]).to(outputs.device)
        return distillation_loss(outputs, classes, probabilities, hard, self.hard_weight, reduction="none")

    def _read(self, draws: Draws) -> Records:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return self.store.read(draws.epoch, draws.indices)
            except MissingRecordsError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(1.0)


class StoredFeatureLoss:
    """Mean squared error against the features of a store, as MobileSAM's decoupled distillation has it.

    A student whose neck ends in a layer norm, as MobileSAM's does, begins with features of mean square 1, and so with
    an error near 2 for a teacher normalized alike; it needs some hundred steps to fall below that of a constant.

    Args:
        store: the features, of the epochs that are replayed.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def describe(self) -> dict[str, Any]:
        """Return its kind and whose features they are."""
        return {"kind": "stored features", "teacher": self.store.manifest.teacher}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`.

        Raises:
            StoreMismatchError: if the augmentation draws other parameters than when the features were stored.
            StoreError: if the student's features have another shape.
        """
        features, checksums = self.store.read(batch.draws.epoch, batch.draws.indices)
        _check_replay(self.store, batch.draws, checksums)
        if outputs.shape != features.shape:
            raise StoreError(
                f"The student returns {tuple(outputs.shape[1:])} for an image, but {self.store.path} holds "
                f"{tuple(features.shape[1:])}."
            )
        return (outputs.float() - features.to(outputs.device, torch.float32)).square().flatten(1).mean(1)


def _check_replay(store: RecordStore, draws: Draws, checksums: Tensor) -> None:
    drifted = draws.checksums() != checksums.numpy()
    if drifted.any():
        raise StoreMismatchError(
            f"{int(drifted.sum())} of {len(draws)} samples of epoch {draws.epoch} are augmented otherwise than when "
            f"{store.path} was written, such as sample {int(draws.indices[drifted][0])}. The store cannot be replayed "
            "by this version; write it anew with kornia-tinyvit distill save."
        )
