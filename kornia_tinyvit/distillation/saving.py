"""Fill a store with what a teacher says, and check what a store holds against the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.loader import Batch, ReplayedSamples, replay_loader
from kornia_tinyvit.distillation.store import (
    FeatureRecords,
    LabelStore,
    Records,
    RecordStore,
    StoreError,
    StoreLockedError,
)
from kornia_tinyvit.distillation.teachers import device_of

__all__ = ["CheckReport", "SavedRecords", "check_records", "save_records"]


@dataclass(frozen=True)
class SavedRecords:
    """What a run of :func:`save_records` did.

    Attributes:
        written: records written.
        present: records that were there already.
        locked: shards that other processes are writing, and which were left to them.
        broken: names of pictures that could not be read and got an even distribution.
    """

    written: int
    present: int
    locked: int
    broken: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """How far stored records are from what the teacher says now.

    Attributes:
        records: how many were recomputed.
        largest: largest absolute difference of a stored value.
        mean: mean absolute difference.
        drifted: samples whose augmentation draws other parameters than when they were stored.
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
) -> SavedRecords:
    """Let a teacher look at epochs of replayed samples and write down what is missing in a store.

    Any number of processes and machines may do this at once on a shared disk: each takes the shards that no other one
    holds. A killed process loses the batch it was at. With a teacher on a CPU the process keeps the memory it frees
    from then on, see :func:`~kornia_tinyvit.allocator.keep_memory`.

    Args:
        store: a :class:`~kornia_tinyvit.distillation.LabelStore` or
            :class:`~kornia_tinyvit.distillation.FeatureStore`.
        teacher: maps normalised pictures to logits, or to features for a feature store.
        samples: the data and its augmentation.
        epochs: which epochs to fill.
        batch_size: pictures at a time; it changes nothing in what is stored but for rounding in the teacher.
        workers: processes that read pictures.
        autocast: data type to compute in; ``None`` for the teacher's own.
        progress: called with the number of records that are done.
    """
    device = device_of(teacher)
    if device.type == "cpu":
        keep_memory()
    samples.augmentation.to(device)
    written = present = 0
    broken: set[str] = set()
    waiting = [(epoch, shard) for epoch in epochs for shard in range(store.num_shards)]
    # Shards that others hold are tried again in the end: whoever held them may have been stopped.
    while waiting:
        locked = []
        for epoch, shard in waiting:
            try:
                writer = store.writer(epoch, shard)
            except StoreLockedError:
                locked.append((epoch, shard))
                continue
            with writer:
                missing = writer.missing()
                there = store.manifest.records_in(shard) - len(missing)
                present += there
                progress(there)
                batches = _batches(samples.augmentation, epoch, missing, batch_size)
                for batch in replay_loader(samples, batches, workers):
                    targets = _even_where_broken(store, _ask(store, teacher, samples, batch, autocast), batch.valid)
                    new = writer.write(batch.draws.indices, targets, batch.draws.checksums())
                    written += new
                    broken.update(batch.broken)
                    progress(new)
        if len(locked) == len(waiting):
            break
        waiting = locked
    return SavedRecords(written, present, len(waiting), tuple(sorted(broken)))


def check_records(
    store: RecordStore,
    teacher: nn.Module,
    samples: ReplayedSamples,
    records: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> CheckReport:
    """Recompute a random sample of a store's records with the teacher.

    Args:
        store: what to check.
        teacher: the network that is supposed to have made it.
        samples: the data and its augmentation.
        records: how many records to recompute, spread over the stored epochs; mixed samples bring their partners along.
        batch_size: pictures at a time.
        seed: seed of the choice.
        autocast: data type to compute in, that of the saving; ``None`` for the teacher's own.

    Raises:
        StoreError: if the store holds no records.
    """
    device = device_of(teacher)
    augmentation = samples.augmentation.to(device)
    random = np.random.default_rng(seed)
    epochs = store.epochs
    largest, total, count, checked, drifted = 0.0, 0.0, 0, 0, []
    for number, epoch in enumerate(epochs):
        share = records // len(epochs) + (number < records % len(epochs))
        valid = np.setdiff1d(np.arange(store.manifest.num_samples), store.missing(epoch), assume_unique=True)
        chosen = random.choice(valid, min(share, len(valid)), replace=False)
        for keys in _batches(augmentation, epoch, chosen, batch_size):
            batch = samples.__getitems__(keys)
            targets = _even_where_broken(store, _ask(store, teacher, samples, batch, autocast), batch.valid).cpu()
            difference, checksums = _compare(store.read(epoch, batch.draws.indices), targets)
            drifted += batch.draws.indices[batch.draws.checksums() != checksums].tolist()
            largest = max(largest, float(difference.max()))
            total, count, checked = (
                total + float(difference.sum()),
                count + difference.numel(),
                checked + len(batch.labels),
            )
    if not checked:
        raise StoreError(f"{store.path} holds no records to check; kornia-tinyvit distill save writes them.")
    return CheckReport(checked, largest, total / count, tuple(drifted))


def _compare(stored: Records | FeatureRecords, targets: Tensor) -> tuple[Tensor, NDArray[np.int64]]:
    """Return how far targets are from what is stored of them, and the stored checksums."""
    if isinstance(stored, Records):
        values, targets = stored.probabilities, targets.gather(1, stored.classes.long())
    else:
        values = stored.features
    return (targets - values.float()).abs(), stored.checksums.numpy()


def _batches(
    augmentation: ReplayableAugmentation, epoch: int, samples: NDArray[np.int64], batch_size: int
) -> list[list[tuple[int, int]]]:
    """Cut samples into batches; where pictures are mixed, each brings its partner along, beside it."""
    if augmentation.mixes:
        order = augmentation.order
        pairs = np.unique(order.positions(epoch, samples) // 2)
        places = (pairs[:, None] * 2 + np.array([0, 1])).ravel()
        samples = order.permutation(epoch)[places[places < order.num_samples]]
        batch_size += batch_size % 2
    return [
        [(epoch, index) for index in samples[start : start + batch_size].tolist()]
        for start in range(0, len(samples), batch_size)
    ]


def _ask(
    store: RecordStore,
    teacher: nn.Module,
    samples: ReplayedSamples,
    batch: Batch,
    autocast: torch.dtype | None,
) -> Tensor:
    augmentation = samples.augmentation
    device = augmentation.mean.device
    with torch.inference_mode(), torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        output = teacher(augmentation(batch.crops.to(device, non_blocking=True), batch.draws))
    output = output.float()
    return output.softmax(1) if isinstance(store, LabelStore) else output


def _even_where_broken(store: RecordStore, targets: Tensor, valid: Tensor) -> Tensor:
    neutral = 1 / targets.shape[1] if isinstance(store, LabelStore) else 0.0
    missing = (valid == 0).view(-1, *[1] * (targets.ndim - 1)).to(targets.device)
    return torch.where(missing, torch.full_like(targets, neutral), targets)
