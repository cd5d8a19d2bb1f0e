"""Measure networks: accuracy, confusions, calibration, and what their features are worth without a head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.metrics import confusion_matrix
from torch import Tensor, nn
from torch.utils.data import Dataset

from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.model import TinyViT

__all__ = [
    "Evaluation",
    "Metrics",
    "ReadablePictures",
    "collate_readable",
    "extract_features",
    "k_nearest_neighbours",
    "linear_probe",
    "select_classes",
]

CALIBRATION_BINS = 15
CONFUSION_CLASSES = 2048  # the table of ImageNet-22k would take 4 GB
_SIMILARITIES = 2**25  # that are held at a time, 128 MB


@dataclass(frozen=True)
class Evaluation:
    """What a network does on labelled pictures. Shares are in per cent.

    Args:
        pictures: how many were seen.
        top1: share whose class has the highest logit.
        top5: share whose class is among the ``top_k`` highest logits.
        top_k: 5, or the number of classes where that is smaller.
        class_pictures: pictures of each class, :math:`(C,)`, int64.
        per_class: top-1 of each class, :math:`(C,)`, float64; NaN where there are no pictures.
        confusion: pictures :math:`(C, C)`, int64, by their class (row) and the class they were taken for (column);
            ``None`` for more than 2048 classes.
        calibration_error: expected calibration error over 15 bins of equal width (arXiv:1706.04599): how far the
            probability of the best class is from the share of right answers, on average over the pictures.
        calibration_bins: :math:`(15, 3)`, float64: pictures, mean probability of the best class and top-1 of each bin,
            the last two in per cent and NaN where there are no pictures.
    """

    pictures: int
    top1: float
    top5: float
    top_k: int
    class_pictures: Tensor
    per_class: Tensor
    confusion: Tensor | None
    calibration_error: float
    calibration_bins: Tensor

    def confusions(self, count: int = 10) -> list[tuple[int, int, int]]:
        """Return the most frequent mistakes: class, the class it was taken for, and how often; most frequent first.

        Raises:
            ValueError: if there are too many classes for a table of confusions.
        """
        if self.confusion is None:
            raise ValueError(f"Confusions are counted for up to {CONFUSION_CLASSES} classes.")
        mistakes = self.confusion.clone().fill_diagonal_(0)
        times, cells = mistakes.flatten().sort(descending=True, stable=True)
        found = zip(cells[:count].tolist(), times[:count].tolist(), strict=True)
        return [(*divmod(cell, len(mistakes)), number) for cell, number in found if number]


class Metrics:
    """Collect what :class:`Evaluation` needs, batch by batch, in counts that add up over processes.

    Args:
        num_classes: classes of the logits.

    Raises:
        ValueError: if there are no classes.

    Example:
        >>> metrics = Metrics(3)
        >>> metrics.update(torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1]))
        >>> metrics.compute().top1
        50.0
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}.")
        self.num_classes = num_classes
        self.top_k = min(5, num_classes)
        self.counts_confusions = num_classes <= CONFUSION_CLASSES
        cells = num_classes if self.counts_confusions else 0
        self._sizes = [1, num_classes, num_classes, 3 * CALIBRATION_BINS, cells * cells]
        self._state = torch.zeros(sum(self._sizes), dtype=torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            logits: scores :math:`(B, C)`, on any device.
            labels: class indices :math:`(B,)`.

        Raises:
            ValueError: if the shapes do not fit or a label is no class of the logits.
        """
        if logits.shape != (len(labels), self.num_classes) or labels.ndim != 1:
            raise ValueError(
                f"Expected logits (B, {self.num_classes}) and labels (B,); got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if not len(labels):
            return
        if int(labels.max()) >= self.num_classes or int(labels.min()) < 0:
            worst = int(labels.max()) if int(labels.min()) >= 0 else int(labels.min())
            raise ValueError(f"The data has a class {worst}, but the network knows {self.num_classes}.")
        # kornia.metrics.accuracy gives rounded percentages; counts add up exactly, and one ranking settles all ties.
        best = logits.topk(self.top_k).indices.cpu()
        confidence = logits.float().softmax(1).amax(1).cpu().double()
        labels = labels.cpu().long()
        right = best[:, 0] == labels
        hits, seen, correct, bins, cells = self._parts()
        hits += (best == labels.unsqueeze(1)).any(1).sum()
        seen += labels.bincount(minlength=self.num_classes)
        correct += labels[right].bincount(minlength=self.num_classes)
        _fill_bins(bins.view(CALIBRATION_BINS, 3), confidence, right)
        if self.counts_confusions:
            # It keeps its first axis apart, so the batch is one sample; and it wants at least two classes.
            table = confusion_matrix(best[None, :, 0], labels[None], max(2, self.num_classes))[0]
            cells += table[: self.num_classes, : self.num_classes].flatten()

    def state(self) -> Tensor:
        """Return all counts as one float64 vector :math:`(n,)`; that of all pictures is the sum over the processes."""
        return self._state.clone()

    def load_state(self, state: Tensor) -> None:
        """Take over counts of :meth:`state`.

        Raises:
            ValueError: if they are of another number of classes.
        """
        if state.shape != self._state.shape:
            raise ValueError(
                f"Expected the state of {self.num_classes} classes, {tuple(self._state.shape)}; got "
                f"{tuple(state.shape)}."
            )
        self._state = state.detach().to("cpu", torch.float64, copy=True)

    def merge(self, other: Metrics) -> None:
        """Add what another one has seen.

        Raises:
            ValueError: if it counts another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"Counts of {other.num_classes} classes do not add to those of {self.num_classes}.")
        self._state += other._state

    def compute(self) -> Evaluation:
        """Return the measures over all batches so far.

        Raises:
            ValueError: if there were none.
        """
        hits, seen, correct, bins, cells = self._parts()
        pictures = int(seen.sum())
        if not pictures:
            raise ValueError("No pictures were evaluated.")
        number, confidence, right = bins.view(CALIBRATION_BINS, 3).unbind(1)
        return Evaluation(
            pictures=pictures,
            top1=100 * float(correct.sum()) / pictures,
            top5=100 * float(hits) / pictures,
            top_k=self.top_k,
            class_pictures=seen.long(),
            per_class=100 * correct / seen,
            confusion=cells.view(self.num_classes, -1).long() if self.counts_confusions else None,
            calibration_error=100 * float((confidence - right).abs().sum()) / pictures,
            calibration_bins=torch.stack([number, 100 * confidence / number, 100 * right / number], 1),
        )

    def _parts(self) -> Sequence[Tensor]:
        return self._state.split(self._sizes)


def _fill_bins(bins: Tensor, confidence: Tensor, right: Tensor) -> None:
    """Add pictures to the bins :math:`(15, 3)` of their number, sum of confidences and right answers."""
    index = (
        (confidence * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
    )  # (i / 15, (i + 1) / 15]
    bins.index_add_(0, index, torch.stack([torch.ones_like(confidence), confidence, right.double()], 1))


class ReadablePictures(Dataset[tuple[Tensor | None, int, str]]):
    """Some pictures of a data set, for :func:`collate_readable`; those that cannot be decoded do not stop the loader.

    Args:
        images: the data set.
        rows: which of its pictures, in this order.
        skip_broken: replace a picture that cannot be decoded by ``None`` instead of raising its error.
    """

    def __init__(self, images: ClassificationDataset, rows: Sequence[int], skip_broken: bool = False) -> None:
        self.images = images
        self.rows = rows
        self.skip_broken = skip_broken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        row = self.rows[index]
        try:
            picture, label = self.images[row]
        except BrokenImageError:
            if not self.skip_broken:
                raise
            return None, self.images.labels[row], self.images.name(row)
        return picture, label, self.images.name(row)


def collate_readable(items: list[tuple[Tensor | None, int, str]]) -> tuple[list[Tensor], Tensor, list[str]]:
    """Return the pictures of a batch that could be read, their classes, and the names of those that could not.

    Args:
        items: for each picture its tensor :math:`(C, H, W)`, or ``None`` if it could not be read, its class, and its
            name.

    Returns:
        Tensors :math:`(C, H, W)` of any sizes, classes :math:`(B,)`, and names.
    """
    readable = [(picture, label) for picture, label, _ in items if picture is not None]
    broken = [name for picture, _, name in items if picture is None]
    return [picture for picture, _ in readable], torch.tensor([label for _, label in readable]).long(), broken


def select_classes(logits: Tensor, indices: Tensor) -> Tensor:
    """Keep some classes of a head, such as those of ImageNet-1k of an ImageNet-22k head.

    Args:
        logits: :math:`(*, C)`.
        indices: positions in [0, C) of the classes to keep, :math:`(K,)`; -1 for a class that the head does not have.

    Returns:
        Logits :math:`(*, K)`; minus infinity for classes that the head does not have.

    Raises:
        ValueError: if a position is no class.
    """
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= logits.shape[-1]):
        raise ValueError(
            f"Positions must be -1 or in [0, {logits.shape[-1]}); got {int(indices.min())} to {int(indices.max())}."
        )
    indices = indices.to(logits.device)
    return logits[..., indices.clamp(min=0)].masked_fill(indices < 0, float("-inf"))


def extract_features(model: TinyViT, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return what a network's head sees of pictures: its normalised pooled features.

    Args:
        model: the network; its mode and its weights stay as they are.
        batches: normalised pictures :math:`(B, C, H, W)` and their classes :math:`(B,)`.

    Returns:
        Features :math:`(N, D)`, float32, and classes :math:`(N,)`, both in main memory.

    Raises:
        ValueError: if there are no batches.
    """
    first = next(model.parameters())
    features, labels = [], []
    with evaluating(model), torch.no_grad():
        for images, classes in batches:
            found = model.forward_head(model.forward_features(images.to(first.device, first.dtype)), pre_logits=True)
            features.append(found.float().cpu())
            labels.append(classes.cpu().long())
    if not features:
        raise ValueError("There are no pictures to take features of.")
    return torch.cat(features), torch.cat(labels)


def k_nearest_neighbours(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Classify by the most similar training pictures, as InstDisc (arXiv:1805.01978) and DINO (arXiv:2104.14294) do.

    Each of the ``k`` neighbours votes for its class with the weight :math:`e^{s / T}` of its cosine similarity
    :math:`s`.

    Args:
        train_features: :math:`(N, D)`.
        train_labels: class indices :math:`(N,)`.
        features: those to classify, :math:`(M, D)`.
        k: neighbours; at most all training pictures.
        temperature: the :math:`T`.
        num_classes: one more than the largest label if left out.

    Returns:
        The votes :math:`(M, C)`, at least 0, divided by :math:`e^{1 / T}`.

    Raises:
        ValueError: if there are no training pictures, or ``k`` or ``temperature`` is not positive.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k and temperature must be positive; got {k} and {temperature}.")
    if not len(train_features) or len(train_features) != len(train_labels):
        raise ValueError(f"Got {len(train_features)} training features and {len(train_labels)} labels for them.")
    num_classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    known = F.normalize(train_features, dim=1).T
    votes = features.new_zeros(len(features), num_classes)
    rows = max(1, _SIMILARITIES // len(train_features))
    for some, total in zip(features.split(rows), votes.split(rows), strict=True):
        similarity, nearest = (F.normalize(some, dim=1) @ known).topk(min(k, len(train_features)))
        # Less the largest possible similarity, so that a low temperature overflows nothing.
        total.scatter_add_(1, train_labels[nearest], ((similarity - 1) / temperature).exp())
    return votes


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    num_classes: int,
    penalty: float = 1e-4,
    max_iterations: int = 300,
) -> nn.Linear:
    """Train a linear classifier on frozen features: logistic regression by L-BFGS, as CLIP's probes (arXiv:2103.00020).

    It starts at zero and takes all pictures at each step, so the result does not depend on chance. The features are
    standardised for the training, and that is folded into the layer.

    Args:
        train_features: :math:`(N, D)`.
        train_labels: class indices :math:`(N,)`.
        num_classes: the :math:`C`.
        penalty: half of it times the sum of the squared weights is added to the mean cross entropy.
        max_iterations: steps of L-BFGS, which ends earlier where nothing changes.

    Returns:
        A layer that takes features :math:`(*, D)` as they are.

    Raises:
        ValueError: if there are no training pictures, or a label is no class.
    """
    if not len(train_features) or len(train_features) != len(train_labels):
        raise ValueError(f"Got {len(train_features)} training features and {len(train_labels)} labels for them.")
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

        def objective() -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(inputs @ weight.T + bias, train_labels) + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        solver.step(objective)
        layer = nn.Linear(inputs.shape[1], num_classes).to(inputs).requires_grad_(False)
        layer.weight.copy_(weight.detach() / scale)
        layer.bias.copy_(bias.detach() - layer.weight @ mean)
    return layer
