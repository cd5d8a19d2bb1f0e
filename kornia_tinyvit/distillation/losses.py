"""Losses of a student against a teacher's soft labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distillation_loss", "soft_target_cross_entropy"]


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
    logits, stored = logits.float(), probabilities.to(logits.device, torch.float32)
    others = logits.shape[1] - classes.shape[1]
    if others < 0:
        raise ValueError(f"{classes.shape[1]} classes are stored, but the logits have {logits.shape[1]}.")
    if classes.numel() and classes.device.type == "cpu":  # on a GPU the look would wait for it at every step
        lowest, highest = (int(each) for each in classes.long().aminmax())
        if lowest < 0 or highest >= logits.shape[1]:
            raise ValueError(f"The stored classes are {lowest} to {highest}, but the logits have {logits.shape[1]}.")
    known = stored.sum(1)
    rest = (1 - known).clamp(min=0) / max(others, 1) if others else torch.zeros_like(known)
    chosen = logits.gather(1, classes.to(logits.device, torch.int64))
    mass = known + rest * others
    loss = mass * logits.logsumexp(1) - (stored * chosen).sum(1) - rest * (logits.sum(1) - chosen.sum(1))
    return loss.mean() if reduction == "mean" else loss


def distillation_loss(
    logits: Tensor,
    classes: Tensor,
    probabilities: Tensor,
    labels: Tensor | None = None,
    hard_share: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Mix :func:`soft_target_cross_entropy` with the cross-entropy of the true labels.

    Args:
        logits: the student's, :math:`(B, C)`.
        classes: indices of the stored classes, :math:`(B, K)`.
        probabilities: their probabilities, :math:`(B, K)`.
        labels: class indices :math:`(B,)` or targets :math:`(B, C)`; needed where ``hard_share`` is not 0.
        hard_share: weight of the labels in [0, 1]; the paper has 0.
        reduction: ``"mean"`` over the batch or ``"none"``.

    Raises:
        ValueError: if ``hard_share`` is out of its range, or labels are missing.
    """
    if not 0 <= hard_share <= 1:
        raise ValueError(f"hard_share must be in [0, 1]; got {hard_share!r}.")
    soft = soft_target_cross_entropy(logits, classes, probabilities, reduction)
    if not hard_share:
        return soft
    if labels is None:
        raise ValueError("hard_share needs the labels.")
    return torch.lerp(soft, F.cross_entropy(logits.float(), labels, reduction=reduction), hard_share)
