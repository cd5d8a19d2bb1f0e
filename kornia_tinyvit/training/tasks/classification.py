"""What the training loop leaves to the task: how networks are measured and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError, ImageLoader
from kornia_tinyvit.data.loader import Batch, ReplayedSamples
from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.layers import evaluating
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.progress import track_progress
from kornia_tinyvit.training.metrics.classification import Metrics, ReadablePictures, collate_readable

__all__ = ["CLASSIFICATION", "Classification", "Counts", "Judge", "Labels", "Samples", "Task"]


class Samples(Protocol):
    """Pictures and their augmentation, from which :func:`~kornia_tinyvit.data.replay_loader` makes batches."""

    order: EpochOrder
    on_broken: str
    images: Any
    augmentation: Any

    def inputs(self, batch: Any, device: torch.device) -> Any:
        """Return what the network takes of a batch, on a device."""


class Counts(Protocol):
    """What a measure adds up, in one tensor that may be summed over processes."""

    def state(self) -> Tensor:
        """Return all counts as one vector :math:`(n,)`."""

    def load_state(self, state: Tensor) -> None:
        """Take over counts of :meth:`state`."""


class Judge(Protocol):
    """A single measurement of a network on validation pictures.

    Attributes:
        pictures: the data set of the pictures.
        collate: what makes a batch of a list of them.
        batch_size: how many at a time.
        counts: what was added up: :class:`Counts`.
    """

    pictures: Any
    collate: Any
    batch_size: int
    counts: Any

    def add(self, network: nn.Module, batch: Any) -> Iterable[str]:
        """Measure a network, called exactly once, on a batch that may be empty; return the names of broken pictures."""

    def measures(self) -> dict[str, float]:
        """Return the numbers over all that was added."""


class Task(Protocol):
    """A task that networks are trained for.

    Attributes:
        measure: the name among :meth:`Judge.measures` of the number, the higher the better, that tells the best
            weights.
    """

    measure: str

    def check(self, images: Any, config: Any, class_names: Sequence[str] | None) -> None:
        """Refuse validation pictures whose labels do not mean what the network's classes mean.

        Raises:
            ValueError: telling what differs.
        """

    def judge(self, images: Any, config: Any, samples: Any, batch_size: int, device: torch.device) -> Judge:
        """Begin to measure networks of a configuration on validation pictures."""

    def save(
        self, config: Any, state: dict[str, Tensor], paths: Sequence[Path], class_names: Sequence[str] | None
    ) -> None:
        """Write weights to files that the network's ``from_config`` reads."""


class Labels:
    """Cross-entropy of the labels, mixed and smoothed as the augmentation's preset says.

    Args:
        augmentation: what the batches are augmented with.
    """

    def __init__(self, augmentation: ReplayableAugmentation) -> None:
        self.augmentation = augmentation

    def describe(self) -> dict[str, Any]:
        """Return its kind and the smoothing."""
        return {"kind": "labels", "label_smoothing": self.augmentation.preset.label_smoothing}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`."""
        targets = self.augmentation.soft_labels(batch.labels, batch.draws, outputs.shape[1])
        return F.cross_entropy(outputs.float(), targets.to(outputs.device), reduction="none")


class Classification:
    """One class a picture: top-1 and top-5 in per cent of :class:`ClassificationDataset`."""

    measure = "top1"

    def check(self, images: ClassificationDataset, config: TinyViTConfig, class_names: Sequence[str] | None) -> None:
        """Refuse pictures of other classes than the network's."""
        if images.num_classes > config.num_classes:
            raise ValueError(
                f"The validation pictures have {images.num_classes} classes, but the network {config.num_classes}."
            )
        check_names(images.class_names, class_names)

    def judge(
        self,
        images: ClassificationDataset,
        config: TinyViTConfig,
        samples: ReplayedSamples,
        batch_size: int,
        device: torch.device,
    ) -> _Accuracy:
        """Begin to count right answers."""
        return _Accuracy(images, config, samples, batch_size, device)

    def save(
        self, config: TinyViTConfig, state: dict[str, Tensor], paths: Sequence[Path], class_names: Sequence[str] | None
    ) -> None:
        """Write files for :meth:`TinyViT.from_config`."""
        plain = TinyViT.from_config(config)
        plain.load_state_dict(state)
        for path in paths:
            save_checkpoint(plain, path, class_names=class_names)


class _Accuracy:
    collate = staticmethod(collate_readable)

    def __init__(
        self,
        images: ClassificationDataset,
        config: TinyViTConfig,
        samples: ReplayedSamples,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.pictures = ReadablePictures(images, range(len(images)), samples.on_broken == "skip")
        self.batch_size, self.device = batch_size, device
        self.counts = Metrics(config.num_classes)
        augmentation = samples.augmentation
        mean, std = (tuple(values.tolist()) for values in (augmentation.mean, augmentation.std))
        self.size = augmentation.img_size
        self.prepare = EvaluationPipeline(self.size, mean=mean, std=std).to(device)

    def add(self, network: nn.Module, batch: tuple[list[Tensor], Tensor, list[str]]) -> list[str]:
        pictures, labels, broken = batch
        prepared = [self.prepare(picture[None].to(self.device)) for picture in pictures]
        # Without pictures of its own a process still takes part in what the network's processes do together.
        blank = torch.zeros(1, 3, self.size, self.size, device=self.device)
        logits = network(torch.cat(prepared) if prepared else blank)
        if prepared:
            self.counts.update(logits, labels)
        return broken

    def measures(self) -> dict[str, float]:
        found = self.counts.compute()
        return {"top1": round(found.top1, 4), "top5": round(found.top5, 4)}


#: The task of classifiers, which :func:`~kornia_tinyvit.training.train` takes if no other is named.
CLASSIFICATION = Classification()


class ReadableItems(Dataset[tuple[Any, str]]):
    """Samples of any kind and their names; those that cannot be read are ``None`` or raise.

    Args:
        images: the data set, which knows its names.
        read: what returns a sample of it by its index.
        skip_broken: whether to go on at one that cannot be read.
    """

    def __init__(self, images: Any, read: Callable[[int], Any], skip_broken: bool) -> None:
        self.images, self.read, self.skip_broken = images, read, skip_broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        name = self.images.name(index)
        try:
            return self.read(index), name
        except BrokenImageError:
            if not self.skip_broken:
                raise
            return None, name


def as_it_is(items: list[Any]) -> list[Any]:
    """Leave a batch a list, for samples of different sizes."""
    return items


@torch.no_grad()
def measure_network(network: nn.Module, judge: Judge, workers: int = 0, progress: bool = False) -> list[str]:
    """Let a judge see all its pictures, in one process.

    Args:
        network: what is measured, in evaluation mode meanwhile.
        judge: what measures it.
        workers: processes that read pictures.
        progress: show a bar.

    Returns:
        Names of the pictures that could not be read.
    """
    loader = ImageLoader(judge.pictures, batch_size=judge.batch_size, num_workers=workers, collate_fn=judge.collate)
    with evaluating(network):
        batches = track_progress(loader, "evaluating", progress)
        return [name for batch in batches for name in judge.add(network, batch)]


def check_names(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> None:
    """Refuse pictures whose classes have other names than the network's, or another order.

    Args:
        theirs: names of the pictures' classes, where they are known.
        ours: names of the network's.

    Raises:
        ValueError: naming some that differ.
    """
    if theirs is not None and ours is not None and tuple(theirs) != tuple(ours):
        others = sorted(set(theirs) ^ set(ours))[:5]
        raise ValueError(f"The validation pictures have other classes than the network: {', '.join(others)}.")
