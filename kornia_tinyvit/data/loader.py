"""Batches of replayed samples: their order, and how the workers of a data loader make them."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.data.params import ReplayParams

__all__ = ["Batch", "EpochBatches", "KeyedSamples", "ReplayedSamples", "replay_loader"]

Key = tuple[int, int]  # epoch and sample

Batch_co = TypeVar("Batch_co", covariant=True)
Sample = TypeVar("Sample")


class Batch(NamedTuple):
    """Crops and labels, as the workers of the loader return them.

    Attributes:
        crops: uint8 images :math:`(B, 3, S, S)`, for :class:`ReplayableAugmentation`.
        labels: class indices :math:`(B,)`.
        valid: 1 for samples whose image could be read, 0 for corrupt ones, :math:`(B,)`.
        params: random parameters of the augmentation.
        broken: names of the corrupt images.
    """

    crops: Tensor
    labels: Tensor
    valid: Tensor
    params: ReplayParams
    broken: tuple[str, ...]


class KeyedSamples(Dataset[Batch_co], ABC, Generic[Batch_co]):
    """Images decoded and augmented for (epoch, sample) keys, a whole batch at a time.

    Args:
        images: the dataset.
        augmentation: the augmentation; its seed determines the order.
        on_broken: ``"stop"`` raises at a corrupt image; ``"skip"`` replaces it by a gray image, whose sample is marked
            as not valid.

    Attributes:
        order: order of the samples in each epoch.

    Raises:
        ValueError: if ``on_broken`` is neither.
    """

    def __init__(self, images: Any, augmentation: Any, on_broken: str = "stop") -> None:
        if on_broken not in ("stop", "skip"):
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
        """Return the batch of some keys (epoch, sample)."""

    def _gray(self) -> Tensor:
        """Return the uint8 image that replaces a corrupt one, :math:`(3, S, S)`."""
        side = self.augmentation.img_size
        return torch.full((3, side, side), 128, dtype=torch.uint8)

    def _gather(
        self, keys: Sequence[Key], augment: Callable[[Any, int], Sample], blank: Sample
    ) -> tuple[list[Sample], Tensor, tuple[str, ...]]:
        """Read and augment the samples of a batch one after the other.

        Args:
            keys: epoch and sample of each.
            augment: augments a sample of the dataset, given its row in the batch.
            blank: replaces a corrupt sample.

        Returns:
            The samples, 1 for each that was read and 0 for corrupt ones :math:`(B,)`, and the names of the corrupt
            ones.
        """
        samples, valid, broken = [], torch.ones(len(keys)), []
        for row, (_, index) in enumerate(keys):
            found = read_unless_broken(self.images.read, index, self.on_broken == "skip")
            if found is None:
                valid[row] = 0
                broken.append(self.images.name(index))
            samples.append(blank if found is None else augment(found, row))
        return samples, valid, tuple(broken)


def read_unless_broken(read: Callable[[int], Sample], index: int, skip_broken: bool) -> Sample | None:
    """Return a sample of a dataset, or ``None`` if it is corrupt and ``skip_broken`` is set.

    Raises:
        BrokenImageError: if it is corrupt and ``skip_broken`` is not set.
    """
    try:
        return read(index)
    except BrokenImageError:
        if not skip_broken:
            raise
        return None


class ReplayedSamples(KeyedSamples[Batch]):
    """Labeled images, decoded and cropped in the workers; the device does the rest of the augmentation.

    Args:
        images: a :class:`~kornia_tinyvit.data.ClassificationDataset`.
        augmentation: a :class:`ReplayableAugmentation`.
        on_broken: see :class:`KeyedSamples`.

    Raises:
        ValueError: if ``on_broken`` is unknown, or the augmentation mixes for another number of samples.
    """

    def __init__(
        self, images: ClassificationDataset, augmentation: ReplayableAugmentation, on_broken: str = "stop"
    ) -> None:
        super().__init__(images, augmentation, on_broken)
        if augmentation.mixes and augmentation.order.num_samples != len(images):
            raise ValueError(
                f"The augmentation mixes {augmentation.order.num_samples} samples, but the dataset has {len(images)}."
            )

    def describe(self) -> dict[str, Any]:
        """Return the fields of :class:`~kornia_tinyvit.distillation.Manifest` that describe the images."""
        return {
            "num_samples": len(self),
            "seed": self.augmentation.seed,
            "augmentation": self.augmentation.describe(),
            "data": {"fingerprint": self.images.fingerprint()},
        }

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the augmented images :math:`(B, 3, S, S)` of a batch on a device.

        Args:
            batch: the batch.
            device: device of the result.
        """
        return self.augmentation.to(device)(batch.crops.to(device, non_blocking=True), batch.params)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return the batch of some keys (epoch, sample), all of one epoch."""
        indices = [index for _, index in keys]
        params = self.augmentation.sample_params(keys[0][0], indices)
        crops, valid, broken = self._gather(
            keys, lambda found, row: self.augmentation.crop(found[0], params, row), self._gray()
        )
        labels = torch.tensor([self.images.labels[index] for index in indices])
        return Batch(torch.stack(crops), labels, valid, params, broken)


class EpochBatches(Sampler[list[Key]]):
    """Split the orders of consecutive epochs into global batches, sharded across ranks.

    The global batches do not depend on the world size and the gradient accumulation. Samples that do not fill a global
    batch are dropped, different ones in each epoch.

    Args:
        order: order of the samples in each epoch.
        batch_size: samples per batch and rank; even, which keeps mixed pairs together.
        epochs: number of epochs.
        rank: rank of this process.
        world_size: number of ranks.
        accumulate: batches of a rank per optimizer step.
        start: batches of a rank that are done already, over all epochs.
        replays: the epochs to repeat in turn; ``None`` for 0, 1, 2, ...

    Attributes:
        batches_per_epoch: batches of a rank per epoch, a multiple of ``accumulate``.

    Raises:
        ValueError: if the batch size is odd, or the dataset is smaller than a global batch or has one image.
    """

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int,
        epochs: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start: int = 0,
        replays: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 2 or batch_size % 2:
            raise ValueError(f"batch_size must be even to keep pairs of samples together; got {batch_size}.")
        if order.num_samples < 2:
            raise ValueError("Training needs at least 2 images; the dataset has 1.")
        step = batch_size * world_size * accumulate
        if order.num_samples < step:
            raise ValueError(
                f"The dataset has {order.num_samples} samples, fewer than a global batch of {step}; reduce batch_size."
            )
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
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
            first = (batch * self.world_size + self.rank) * self.batch_size
            samples = self.order.permutation(epoch)[first : first + self.batch_size]
            yield [(epoch, index) for index in samples.tolist()]


def replay_loader(samples: Any, batches: Any, workers: int = 0) -> DataLoader[Any]:
    """Return a data loader whose batches are made by one worker each.

    Args:
        samples: :class:`KeyedSamples`, or a dataset, whose batches are lists of samples.
        batches: for each batch a list of keys (epoch, sample), or of indices of the dataset.
        workers: number of processes that read images; 0 reads them in this one.

    Raises:
        BrokenImageError: during iteration, if an image is corrupt and may not be skipped.
        OSError: during iteration, if a file cannot be read.
    """
    return _Loader(
        _ErrorReturning(samples),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_ignore_sigint,
        generator=torch.Generator(),  # for the workers' seeds; by default they change the global random state
        pin_memory=torch.cuda.is_available(),
    )


class _Loader(DataLoader[Any]):
    """Raises what :class:`_ErrorReturning` returns; torch would add the worker's traceback to the message."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


class _ErrorReturning(Dataset[Any]):
    """Returns the error of a batch instead of raising it."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __getitems__(self, keys: list[Any]) -> Any:
        try:
            if hasattr(self.samples, "__getitems__"):
                return self.samples.__getitems__(keys)
            return [self.samples[key] for key in keys]
        except (BrokenImageError, OSError) as error:
            return error


def _ignore_sigint(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the workers; this process decides for them


def _identity(batch: Any) -> Any:
    return batch
