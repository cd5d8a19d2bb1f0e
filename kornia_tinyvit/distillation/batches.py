"""Batches of replayed samples: which come when, and what the workers of a data loader make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kornia_tinyvit.distillation.augmentation import Draws, ReplayableAugmentation
from kornia_tinyvit.distillation.keyed import EpochOrder
from kornia_tinyvit.training.data import BrokenPictureError, LabelledImages

__all__ = ["Batch", "EpochBatches", "ReplayedSamples", "replay_loader"]

Key = tuple[int, int]  # epoch and sample
ON_BROKEN = ("stop", "skip")


class Batch(NamedTuple):
    """Samples as the workers hand them over.

    Attributes:
        crops: 8-bit pictures :math:`(B, 3, S, S)`, for :class:`ReplayableAugmentation`.
        labels: class indices :math:`(B,)`.
        valid: 1 for samples whose picture could be read, 0 for broken ones, :math:`(B,)`.
        draws: what was drawn for them.
        broken: names of the pictures that could not be read.
    """

    crops: Tensor
    labels: Tensor
    valid: Tensor
    draws: Draws
    broken: tuple[str, ...]


class ReplayedSamples(Dataset[Batch]):
    """Pictures decoded and cropped as an epoch demands, a whole batch at a time.

    Args:
        images: the labelled pictures.
        augmentation: what draws and crops.
        on_broken: ``"stop"`` raises at a picture that cannot be read; ``"skip"`` puts a grey one in its place, which
            is marked as not valid and named.

    Attributes:
        order: order of the samples in each epoch.

    Raises:
        ValueError: if ``on_broken`` is neither, or the augmentation mixes for another number of samples.
    """

    def __init__(self, images: LabelledImages, augmentation: ReplayableAugmentation, on_broken: str = "stop") -> None:
        if on_broken not in ON_BROKEN:
            raise ValueError(f"on_broken must be 'stop' or 'skip'; got {on_broken!r}.")
        if augmentation.mixes and augmentation.order.num_samples != len(images):
            raise ValueError(
                f"The augmentation mixes {augmentation.order.num_samples} samples, but the data has {len(images)}."
            )
        self.images = images
        self.augmentation = augmentation
        self.order = EpochOrder(len(images), augmentation.seed)
        self.on_broken = on_broken

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> dict[str, Any]:
        """Return what a store's :class:`~kornia_tinyvit.distillation.Manifest` says about the pictures shown."""
        return {
            "num_samples": len(self),
            "seed": self.augmentation.seed,
            "augmentation": self.augmentation.describe(),
            "data": {"fingerprint": self.images.fingerprint()},
        }

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the augmented pictures :math:`(B, 3, S, S)` of a batch on a device."""
        return self.augmentation.to(device)(batch.crops.to(device, non_blocking=True), batch.draws)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return the samples of keys (epoch, sample), all of one epoch."""
        indices = [index for _, index in keys]
        draws = self.augmentation.draw(keys[0][0], indices)
        size = self.augmentation.img_size
        crops = torch.full((len(keys), 3, size, size), 128, dtype=torch.uint8)
        valid = torch.ones(len(keys))
        broken = []
        for row, index in enumerate(indices):
            try:
                crops[row] = self.augmentation.crop(self.images.pixels(index), draws, row)
            except BrokenPictureError:
                if self.on_broken == "stop":
                    raise
                valid[row] = 0
                broken.append(self.images.name(index))
        labels = torch.tensor([self.images.labels[index] for index in indices])
        return Batch(crops, labels, valid, draws, tuple(broken))


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


def replay_loader(samples: Any, batches: Sequence[list[Key]] | Sampler[list[Key]], workers: int = 0) -> DataLoader[Any]:
    """Return a loader of batches for lists of keys; each batch is made in one worker.

    Args:
        samples: the data: :class:`ReplayedSamples`, or another that makes a batch of a list of keys.
        batches: lists of keys (epoch, sample).
        workers: processes that read pictures; 0 reads them in this one.
    """
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # for the workers' seeds, which else are drawn from everyone's random numbers
        pin_memory=torch.cuda.is_available(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)  # the workers share the processor with the training
