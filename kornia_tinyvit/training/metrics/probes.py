"""Evaluation of frozen features: nearest neighbors and linear probes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import evaluation_copy

__all__ = ["extract_features", "k_nearest_neighbors", "linear_probe"]

_SIMILARITIES = 2**25  # in memory at a time, 128 MB


def extract_features(model: TinyViT, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the inputs of a network's head: its normalized pooled features.

    Args:
        model: the network, evaluated as in evaluation mode and not changed.
        batches: normalized images :math:`(B, C, H, W)` and their class indices :math:`(B,)`.

    Returns:
        Features :math:`(N, D)`, float32, and class indices :math:`(N,)`, both on the CPU.

    Raises:
        ValueError: if there are no batches.
    """
    first = next(model.parameters())
    features, labels = [], []
    model = evaluation_copy(model)
    with torch.no_grad():
        for images, classes in batches:
            found = model.forward_head(model.forward_features(images.to(first.device, first.dtype)), pre_logits=True)
            features.append(found.float().cpu())
            labels.append(classes.cpu().long())
    if not features:
        raise ValueError("There are no images to extract features of.")
    return torch.cat(features), torch.cat(labels)


def k_nearest_neighbors(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Classify by weighted k-nearest neighbors, as InstDisc (arXiv:1805.01978) and DINO (arXiv:2104.14294).

    Each of the ``k`` neighbors votes for its class with the weight :math:`e^{s / T}` of its cosine similarity
    :math:`s`.

    Args:
        train_features: features of the training images, :math:`(N, D)`.
        train_labels: their class indices, :math:`(N,)`.
        features: features to classify, :math:`(M, D)`.
        k: number of neighbors, at most :math:`N`.
        temperature: the temperature :math:`T`.
        num_classes: number of classes :math:`C`; the largest label plus 1 by default.

    Returns:
        Votes :math:`(M, C)`, at least 0, divided by :math:`e^{1 / T}`.

    Raises:
        ValueError: if there are no training images, or ``k`` or ``temperature`` is not positive.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k and temperature must be positive; got {k} and {temperature}.")
    _check_pairs(train_features, train_labels)
    num_classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    known = F.normalize(train_features, dim=1).T
    votes = features.new_zeros(len(features), num_classes)
    rows = max(1, _SIMILARITIES // len(train_features))
    for some, total in zip(features.split(rows), votes.split(rows), strict=True):
        similarity, nearest = (F.normalize(some, dim=1) @ known).topk(min(k, len(train_features)))
        # Minus the largest possible similarity, 1: a low temperature does not overflow.
        total.scatter_add_(1, train_labels[nearest], ((similarity - 1) / temperature).exp())
    return votes


def linear_probe(
    train_features: Tensor, train_labels: Tensor, num_classes: int, penalty: float = 1e-4, max_iterations: int = 300
) -> nn.Linear:
    """Train a linear classifier on frozen features: logistic regression by L-BFGS, as CLIP's probes (arXiv:2103.00020).

    The optimization is deterministic: it starts at zero and uses all images in each step. The features are standardized
    for the training; the standardization is folded into the layer.

    Args:
        train_features: features of the training images, :math:`(N, D)`.
        train_labels: their class indices, :math:`(N,)`.
        num_classes: number of classes :math:`C`.
        penalty: L2 penalty: half of it times the sum of the squared weights is added to the mean cross-entropy.
        max_iterations: maximum number of steps of L-BFGS.

    Returns:
        A layer from features :math:`(*, D)` to logits :math:`(*, C)`.

    Raises:
        ValueError: if there are no training images, or a label is out of range.
    """
    _check_pairs(train_features, train_labels)
    if int(train_labels.min()) < 0 or int(train_labels.max()) >= num_classes:
        raise ValueError(f"Labels must be in [0, {num_classes}); got one of {int(train_labels.max())}.")
    with torch.inference_mode(False), torch.enable_grad():
        mean = train_features.detach().mean(0)
        scale = train_features.detach().std(0, correction=0).clamp(min=1e-6)
        inputs = (train_features.detach() - mean) / scale
        weight = inputs.new_zeros(num_classes, inputs.shape[1]).requires_grad_()
        bias = inputs.new_zeros(num_classes).requires_grad_()
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=max_iterations, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(inputs @ weight.T + bias, train_labels) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        layer = nn.Linear(inputs.shape[1], num_classes).to(inputs).requires_grad_(False)
        layer.weight.copy_(weight.detach() / scale)
        layer.bias.copy_(bias.detach() - layer.weight @ mean)
    return layer


def _check_pairs(features: Tensor, labels: Tensor) -> None:
    if not len(features) or len(features) != len(labels):
        raise ValueError(f"Expected training features and as many labels; got {len(features)} and {len(labels)}.")
