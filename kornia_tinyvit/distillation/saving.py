"""Save the outputs of a teacher in a store, and check stored records against the teacher."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.loader import Batch, Key, ReplayedSamples, replay_loader
from kornia_tinyvit.distillation.manifest import StoreError
from kornia_tinyvit.distillation.store import LabelStore, Records, RecordStore, ShardWriter
from kornia_tinyvit.distillation.teachers import device_of
from kornia_tinyvit.interruption import deferred_interrupt

__all__ = ["CheckReport", "SaveReport", "check_records", "save_records"]


@dataclass(frozen=True)
class SaveReport:
    """Result of :func:`save_records`.

    Attributes:
        written: number of records written.
        present: number of records that existed before or were written by other processes.
        locked: number of shards skipped because other processes are writing them.
        broken: names of corrupt images, which are stored with a uniform distribution.
    """

    written: int
    present: int
    locked: int
    broken: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """Result of :func:`check_records`.

    Attributes:
        records: number of recomputed records.
        largest: largest absolute difference between stored and recomputed values.
        mean: mean absolute difference.
        drifted: indices of samples whose augmentation parameters differ from those stored.
    """

    records: int
    largest: float
    mean: float
    drifted: tuple[int, ...]


def save_records(
    store: RecordStore,
    teacher: nn.Module,
    samples: ReplayedSamples,
    epochs: Sequence[int],
    batch_size: int = 128,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda records: None,
) -> SaveReport:
    """Save the outputs of a teacher for all missing records of some epochs.

    Any number of processes and machines may run this at the same time on a shared disk; each processes shards that no
    other one has locked. A killed process loses only the shard it was writing. A teacher on the CPU sets
    :func:`~kornia_tinyvit.allocator.keep_memory` for the process.

    Args:
        store: a :class:`~kornia_tinyvit.distillation.LabelStore` or
            :class:`~kornia_tinyvit.distillation.FeatureStore`.
        teacher: module that maps normalized images to logits, or to features for a feature store.
        samples: data set with its augmentation.
        epochs: epochs to save.
        batch_size: images per forward pass; it affects the records only by rounding in the teacher.
        workers: number of processes that read images.
        autocast: data type of the teacher's forward pass; ``None`` disables autocast.
        progress: called with the number of new records, first with those that exist already.

    Returns:
        The numbers of new and existing records and of skipped shards, and the names of corrupt images.

    Raises:
        BrokenImageError: if an image is corrupt and ``samples`` does not skip corrupt images.
        StoreError: if a shard is damaged, or the outputs do not match the store.
        OSError: if the disk is full.
        KeyboardInterrupt: after Ctrl-C (SIGINT), when the current batch is finished.
    """
    if device_of(teacher).type == "cpu":
        keep_memory()
    waiting = [(epoch, shard) for epoch in epochs for shard in store.missing_shards(epoch)]
    total = store.manifest.num_samples * len(epochs)
    progress(total - sum(store.manifest.records_in(shard) for _, shard in waiting))
    written = 0
    broken: set[str] = set()
    taken: deque[tuple[ShardWriter, ExitStack]] = deque()

    def take_shards() -> Iterator[list[Key]]:
        """Lock the available shards one by one as the loader prefetches, and yield their batches."""
        for epoch, shard in waiting:
            held = ExitStack()
            try:
                writer = held.enter_context(store.writer(epoch, shard))
            except BlockingIOError:
                locked.append((epoch, shard))
                continue
            if len(writer.missing()):
                taken.append((writer, held))
                yield from _batches(samples.augmentation, epoch, writer.missing(), batch_size)
            else:  # written by another process in the meantime
                held.close()
                progress(store.manifest.records_in(shard))

    # Locked shards are tried again at the end, because the process that held them may have been killed.
    while waiting:
        locked: list[Key] = []
        try:
            with deferred_interrupt() as interrupted:
                for batch in replay_loader(samples, take_shards(), workers):
                    writer, held = taken[0]
                    targets = _compute_targets(store, teacher, samples, batch, autocast)
                    written += writer.write(batch.params.indices, targets, batch.params.checksums())
                    broken.update(batch.broken)
                    progress(len(batch.labels))
                    if not len(writer.missing()):
                        held.close()
                        taken.popleft()
                    if interrupted.is_set():
                        raise KeyboardInterrupt
        finally:
            for _, held in taken:
                held.close()
        if len(locked) == len(waiting):
            break
        waiting = locked
    remaining = sum(store.manifest.records_in(shard) for _, shard in waiting)
    return SaveReport(written, total - written - remaining, len(waiting), tuple(sorted(broken)))


def check_records(
    store: RecordStore,
    teacher: nn.Module,
    samples: ReplayedSamples,
    records: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> CheckReport:
    """Compare randomly chosen records of a store with the outputs of its teacher.

    Args:
        store: store to check.
        teacher: teacher whose outputs were saved.
        samples: data set with its augmentation.
        records: number of records to recompute, distributed over the stored epochs. If images are mixed, the other
            image of each pair is recomputed as well.
        batch_size: images per forward pass.
        seed: seed of the random choice.
        autocast: data type of the teacher's forward pass, the same as for saving; ``None`` disables autocast.

    Returns:
        The differences between stored and recomputed values.

    Raises:
        StoreError: if the store is empty or damaged.
    """
    random = np.random.default_rng(seed)
    epochs = store.epochs
    maxima, means, drifted = [], [], []
    for number, epoch in enumerate(epochs):
        quota = records // len(epochs) + (number < records % len(epochs))
        valid = np.setdiff1d(np.arange(store.manifest.num_samples), store.missing(epoch), assume_unique=True)
        chosen = random.choice(valid, min(quota, len(valid)), replace=False)
        for keys in _batches(samples.augmentation, epoch, chosen, batch_size):
            batch = samples.__getitems__(keys)
            targets = _compute_targets(store, teacher, samples, batch, autocast).cpu()
            stored = store.read(epoch, batch.params.indices)
            if isinstance(stored, Records):
                difference = targets.gather(1, stored.classes.long()) - stored.probabilities
            else:
                difference = targets - stored.features
            drifted += batch.params.indices[batch.params.checksums() != stored.checksums.numpy()].tolist()
            maxima += difference.abs().flatten(1).amax(1).tolist()
            means += difference.abs().flatten(1).mean(1).tolist()
    if not means:
        raise StoreError(f"{store.path} has no records to check; run `kornia-tinyvit distill save` first.")
    return CheckReport(len(means), max(maxima), float(np.mean(means)), tuple(drifted))


def _batches(
    augmentation: ReplayableAugmentation, epoch: int, samples: NDArray[np.int64], batch_size: int
) -> list[list[Key]]:
    """Split samples into batches; if images are mixed, with both images of each pair side by side."""
    if augmentation.mixes:
        order = augmentation.order
        pairs = np.unique(order.positions(epoch, samples) // 2)
        positions = (pairs[:, None] * 2 + np.array([0, 1])).ravel()
        samples = order.permutation(epoch)[positions[positions < order.num_samples]]
        batch_size += batch_size % 2
    return [
        [(epoch, index) for index in samples[start : start + batch_size].tolist()]
        for start in range(0, len(samples), batch_size)
    ]


def _compute_targets(
    store: RecordStore, teacher: nn.Module, samples: ReplayedSamples, batch: Batch, autocast: torch.dtype | None
) -> Tensor:
    """Return probabilities or features of a batch: uniform or zero for corrupt images."""
    device = device_of(teacher)
    with torch.inference_mode(), torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        output = teacher(samples.inputs(batch, device))
    output, fill = output.float(), 0.0
    if isinstance(store, LabelStore):
        output, fill = output.softmax(1), 1 / output.shape[1]
    corrupt = (batch.valid == 0).view(-1, *[1] * (output.ndim - 1))
    return output.masked_fill(corrupt.to(device), fill)
