"""Batches of replayed samples: which come when, and what the workers of a data loader make of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.data.drawing import Draws
from kornia_tinyvit.data.order import EpochOrder

__all__ = ["Batch", "EpochBatches", "KeyedSamples", "ReplayedSamples", "replay_loader"]

Key = tuple[int, int]  # epoch and sample
ON_BROKEN = ("stop", "skip")

Batch_co = TypeVar("Batch_co", covariant=True)
Sample = TypeVar("Sample")


class Batch(NamedTuple):
    """Samples as the workers hand them over.

    Attributes:
        crops: 8-bit images :math:`(B, 3, S, S)`, for :class:`ReplayableAugmentation`.
        labels: class indices :math:`(B,)`.
        valid: 1 for samples whose image could be read, 0 for broken ones, :math:`(B,)`.
        draws: what was drawn for them.
        broken: names of the images that could not be read.
    """

    crops: Tensor
    labels: Tensor
    valid: Tensor
    draws: Draws
    broken: tuple[str, ...]


class KeyedSamples(Dataset[Batch_co], ABC, Generic[Batch_co]):
    """Images decoded and augmented as an epoch demands, a whole batch at a time.

    Args:
        images: the images.
        augmentation: what changes them; its seed decides the order.
        on_broken: ``"stop"`` raises at a sample that cannot be read; ``"skip"`` puts a gray image in its place, which
            is marked as not valid and named.

    Attributes:
        order: order of the samples in each epoch.

    Raises:
        ValueError: if ``on_broken`` is neither.
    """

    def __init__(self, images: Any, augmentation: Any, on_broken: str = "stop") -> None:
        if on_broken not in ON_BROKEN:
            raise ValueError(f"on_broken must be 'stop' or 'skip'; got {on_broken!r}.")
        self.images = images
        self.augmentation = augmentation
        self.order = EpochOrder(len(images), augmentation.seed)
        self.on_broken = on_broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Batch_co:
        return self.__getitems__([key])

    @abstractmethod
    def __getitems__(self, keys: Sequence[Key]) -> Batch_co:
        """Return the samples of keys (epoch, sample)."""

    def _gray(self) -> Tensor:
        """Return what stands for an image that cannot be read."""
        side = self.augmentation.img_size
        return torch.full((3, side, side), 128, dtype=torch.uint8)

    def _gather(
        self, keys: Sequence[Key], read: Callable[[int], Any], augment: Callable[[Any, int], Sample], blank: Sample
    ) -> tuple[list[Sample], Tensor, tuple[str, ...]]:
        """Read and augment the samples of a batch one after the other.

        Args:
            keys: epoch and sample of each.
            read: returns a sample by its index.
            augment: changes what was read for a row of the batch.
            blank: what stands for a sample that cannot be read.

        Returns:
            The samples, 1 for each that was read and 0 for broken ones :math:`(B,)`, and the names of the broken ones.
        """
        samples, valid, broken = [], torch.ones(len(keys)), []
        for row, (_, index) in enumerate(keys):
            found = read_unless_broken(read, index, self.on_broken == "skip")
            if found is None:
                valid[row] = 0
                broken.append(self.images.name(index))
            samples.append(blank if found is None else augment(found, row))
        return samples, valid, tuple(broken)


def read_unless_broken(read: Callable[[int], Sample], index: int, skip_broken: bool) -> Sample | None:
    """Return a sample of a data set, or ``None`` if it cannot be read and may be skipped.

    Raises:
        BrokenImageError: if it cannot be read and may not be skipped.
    """
    try:
        return read(index)
    except BrokenImageError:
        if not skip_broken:
            raise
        return None


class ReplayedSamples(KeyedSamples[Batch]):
    """Labeled images, decoded and cropped; the rest of the augmentation is done on the device.

    See :class:`KeyedSamples` for the arguments: a :class:`~kornia_tinyvit.data.ClassificationDataset` and a
    :class:`ReplayableAugmentation`.

    Raises:
        ValueError: if ``on_broken`` is unknown, or the augmentation mixes for another number of samples.
    """

    def __init__(
        self, images: ClassificationDataset, augmentation: ReplayableAugmentation, on_broken: str = "stop"
    ) -> None:
        super().__init__(images, augmentation, on_broken)
        if augmentation.mixes and augmentation.order.num_samples != len(images):
            raise ValueError(
                f"The augmentation mixes {augmentation.order.num_samples} samples, but the data has {len(images)}."
            )

    def describe(self) -> dict[str, Any]:
        """Return what a store's :class:`~kornia_tinyvit.distillation.Manifest` says about the images shown."""
        return {
            "num_samples": len(self),
            "seed": self.augmentation.seed,
            "augmentation": self.augmentation.describe(),
            "data": {"fingerprint": self.images.fingerprint()},
        }

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the augmented images :math:`(B, 3, S, S)` of a batch on a device."""
        return self.augmentation.to(device)(batch.crops.to(device, non_blocking=True), batch.draws)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return the samples of keys (epoch, sample), all of one epoch."""
        indices = [index for _, index in keys]
        draws = self.augmentation.draw(keys[0][0], indices)
        crops, valid, broken = self._gather(
            keys, self.images.read, lambda found, row: self.augmentation.crop(found[0], draws, row), self._gray()
        )
        labels = torch.tensor([self.images.labels[index] for index in indices])
        return Batch(torch.stack(crops), labels, valid, draws, broken)


class EpochBatches(Sampler[list[Key]]):
    """Cut the orders of one epoch after another into global batches, and those into shares of the processes.

    The global batches are the same for any number of processes and accumulated steps. What is left of an epoch below
    a global batch is left out, another part in each epoch.

    Args:
        order: order of the samples in each epoch.
        batch_size: samples of a batch of one process; even, so that pairs that are mixed stay together.
        epochs: number of epochs.
        process: number of this process.
        processes: how many there are.
        accumulate: batches of a process that make one step of the optimizer.
        start: batches of a process that are done already, over all epochs.
        replays: which epochs are shown, one after another and again from the first; ``None`` for 0, 1, 2, ...

    Attributes:
        batches_per_epoch: batches of a process in an epoch, a multiple of ``accumulate``.

    Raises:
        ValueError: if the batch is odd or the data has fewer samples than a global batch.
    """

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int,
        epochs: int,
        process: int = 0,
        processes: int = 1,
        accumulate: int = 1,
        start: int = 0,
        replays: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 2 or batch_size % 2:
            raise ValueError(f"batch_size must be even, so that pairs of samples stay together; got {batch_size}.")
        step = batch_size * processes * accumulate
        if order.num_samples < step:
            raise ValueError(
                f"The data has {order.num_samples} samples, fewer than a global batch of {step}; take a smaller batch."
            )
        self.order = order
        self.batch_size = batch_size
        self.process = process
        self.processes = processes
        self.start = start
        self.replays = range(epochs) if replays is None else replays
        self.batches_per_epoch = order.num_samples // step * accumulate
        self.end = self.batches_per_epoch * epochs

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        for number in range(self.start, self.end):
            turn, batch = divmod(number, self.batches_per_epoch)
            epoch = self.replays[turn % len(self.replays)]
            first = (batch * self.processes + self.process) * self.batch_size
            samples = self.order.permutation(epoch)[first : first + self.batch_size]
            yield [(epoch, index) for index in samples.tolist()]


def replay_loader(samples: Any, batches: Any, workers: int = 0) -> DataLoader[Any]:
    """Return a loader of batches for lists of keys; each batch is made in one worker.

    Args:
        samples: the data: :class:`ReplayedSamples`, another that makes a batch of a list of keys, or a data set of
            which a batch is a list of samples.
        batches: lists of keys: of (epoch, sample), or of what the data takes.
        workers: processes that read images; 0 reads them in this one.

    Raises:
        BrokenImageError: while it is iterated over, if an image cannot be decoded and may not be skipped.
        OSError: then, if a file cannot be read.
    """
    return _Loader(
        _Telling(samples),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # for the workers' seeds, which else are drawn from everyone's random numbers
        pin_memory=torch.cuda.is_available(),
    )


class _Loader(DataLoader[Any]):
    """Raises the errors that :class:`_Telling` returns; torch puts the worker's whole traceback into the message."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


class _Telling(Dataset[Any]):
    """Returns the error of a batch in its place."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: list[Any]) -> Any:
        try:
            if hasattr(self.samples, "__getitems__"):
                return self.samples.__getitems__(keys)
            return [self.samples[key] for key in keys]
        except (BrokenImageError, OSError) as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)  # the workers share the processor with the training
