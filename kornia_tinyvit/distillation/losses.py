"""Distillation losses against stored soft labels, stored features or an online teacher."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.loader import Batch
from kornia_tinyvit.data.params import ReplayParams
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
    r"""Cross-entropy against soft labels of which only the K largest probabilities are stored.

    The remaining probability is distributed uniformly over the other classes, as in the official code. With
    :math:`p_k` the stored probabilities, :math:`z` the logits and :math:`r = (1 - \sum_k p_k) / (C - K)`, the loss is

    .. math::
        \left(\sum_k p_k + r (C - K)\right) \log\sum_c e^{z_c} - \sum_k p_k z_k
        - r \left(\sum_c z_c - \sum_k z_k\right),

    computed without the dense distribution.

    Args:
        logits: logits of the student, :math:`(B, C)`.
        classes: indices of the stored classes, unique within each row, any integer type, :math:`(B, K)`.
        probabilities: their probabilities, any floating point type, :math:`(B, K)`.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Returns:
        The loss, a scalar or :math:`(B,)`, float32.

    Raises:
        ValueError: if the shapes do not match, a class index is out of range (checked for indices on the CPU) or the
            reduction is unknown.

    Example:
        >>> soft_target_cross_entropy(torch.zeros(1, 4), torch.tensor([[2, 0]]), torch.tensor([[0.7, 0.1]]))
        tensor(1.3863)
    """
    if classes.shape != probabilities.shape or classes.ndim != 2 or len(classes) != len(logits):
        raise ValueError(
            f"Expected classes and probabilities of shape ({len(logits)}, K); got {tuple(classes.shape)} and "
            f"{tuple(probabilities.shape)}."
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none'; got {reduction!r}.")
    # Moved to the device in the stored types, uint16 and float16: a third of the bytes of int64 and float32.
    logits, stored = logits.float(), probabilities.to(logits.device, non_blocking=True).float()
    others = logits.shape[1] - classes.shape[1]
    if others < 0:
        raise ValueError(f"{classes.shape[1]} classes are stored, but the logits have {logits.shape[1]}.")
    if classes.numel() and classes.device.type == "cpu":  # on a GPU this would synchronize at every step
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
    """Interpolate between :func:`soft_target_cross_entropy` and the cross-entropy of the ground truth.

    Args:
        logits: logits of the student, :math:`(B, C)`.
        classes: indices of the stored classes, :math:`(B, K)`.
        probabilities: their probabilities, :math:`(B, K)`.
        labels: class indices :math:`(B,)` or probabilities :math:`(B, C)`; required if ``hard_weight`` is not 0.
        hard_weight: weight of the ground truth in [0, 1]; the paper uses 0.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Returns:
        The loss, a scalar or :math:`(B,)`, float32.

    Raises:
        ValueError: if ``hard_weight`` is out of range, or as :func:`soft_target_cross_entropy` does.
    """
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight must be in [0, 1]; got {hard_weight!r}.")
    soft = soft_target_cross_entropy(logits, classes, probabilities, reduction)
    if not hard_weight:
        return soft
    if labels is None:
        raise ValueError(f"hard_weight={hard_weight} requires labels; got None.")
    return torch.lerp(soft, F.cross_entropy(logits.float(), labels, reduction=reduction), hard_weight)


class OnlineDistillationLoss:
    """Cross-entropy against the soft labels that a teacher computes at every step.

    Args:
        teacher: module that maps the augmented images to logits. It is set to evaluation mode and moved to the device
            of the images.
        autocast: data type of the teacher's forward pass; ``None`` disables autocast.
    """

    def __init__(self, teacher: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.teacher = teacher.eval()
        self.autocast = autocast

    def describe(self) -> dict[str, Any]:
        """Return the kind of the loss, the teacher and its precision."""
        teacher = self.teacher.describe() if isinstance(self.teacher, Teacher) else type(self.teacher).__name__
        return {"kind": "online teacher", "teacher": teacher, "autocast": str(self.autocast)}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`."""
        dtype = self.autocast or torch.bfloat16
        with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=self.autocast is not None):
            targets = self.teacher.to(images.device)(images).float().softmax(1)
        return F.cross_entropy(outputs.float(), targets, reduction="none")


class StoredLabelLoss:
    """Cross-entropy against stored soft labels.

    Args:
        store: store of the soft labels.
        augmentation: augmentation of the batches; it mixes the ground truth labels.
        hard_weight: weight of the ground truth in [0, 1]; the paper uses 0.
        patience: seconds to wait for records that another process is still writing.
    """

    def __init__(
        self, store: LabelStore, augmentation: ReplayableAugmentation, hard_weight: float = 0.0, patience: float = 0.0
    ) -> None:
        self.store = store
        self.augmentation = augmentation
        self.hard_weight = hard_weight
        self.patience = patience

    def describe(self) -> dict[str, Any]:
        """Return the kind of the loss, the teacher and the weight of the ground truth."""
        return {"kind": "stored labels", "teacher": self.store.manifest.teacher, "hard_weight": self.hard_weight}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`.

        Raises:
            MissingRecordsError: if a sample has no stored labels after ``patience`` seconds.
            StoreMismatchError: if the random augmentation parameters differ from those of the stored labels.
        """
        classes, probabilities, checksums = self._read(batch.params)
        _check_replay(self.store, batch.params, checksums)
        hard = None
        if self.hard_weight:
            hard = self.augmentation.soft_labels(batch.labels, batch.params, outputs.shape[1]).to(outputs.device)
        return distillation_loss(outputs, classes, probabilities, hard, self.hard_weight, reduction="none")

    def _read(self, params: ReplayParams) -> Records:
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return self.store.read(params.epoch, params.indices)
            except MissingRecordsError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.2)


class StoredFeatureLoss:
    """Mean squared error against stored features, as in MobileSAM's decoupled distillation (arXiv:2306.14289).

    If the features of student and teacher both end in a layer norm, as in MobileSAM, the loss starts near 2 and needs
    some hundred steps to fall below 1, the loss of a constant output.

    Args:
        store: store of the features.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def describe(self) -> dict[str, Any]:
        """Return the kind of the loss and the teacher."""
        return {"kind": "stored features", "teacher": self.store.manifest.teacher}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`.

        Raises:
            MissingRecordsError: if a sample has no stored features.
            StoreMismatchError: if the random augmentation parameters differ from those of the stored features.
            StoreError: if the student's features have a different shape.
        """
        features, checksums = self.store.read(batch.params.epoch, batch.params.indices)
        _check_replay(self.store, batch.params, checksums)
        if outputs.shape != features.shape:
            raise StoreError(
                f"The student returns features of shape {tuple(outputs.shape[1:])} per image, but {self.store.path} "
                f"holds {tuple(features.shape[1:])}."
            )
        return (outputs.float() - features.to(outputs.device, torch.float32)).square().flatten(1).mean(1)


def _check_replay(store: RecordStore, params: ReplayParams, checksums: Tensor) -> None:
    changed = params.checksums() != checksums.numpy()
    if changed.any():
        raise StoreMismatchError(
            f"The augmentation parameters of {int(changed.sum())} of {len(params)} samples of epoch {params.epoch}, "
            f"such as sample {int(params.indices[changed][0])}, differ from those stored in {store.path}. This version "
            "cannot replay the store; create a new one with `kornia-tinyvit distill save`."
        )
