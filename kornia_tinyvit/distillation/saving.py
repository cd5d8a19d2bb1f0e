"""Fill a store with what a teacher says, and check what a store holds against the teacher."""

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

__all__ = ["CheckReport", "SaveReport", "check_records", "save_records"]


@dataclass(frozen=True)
class SaveReport:
    """What a run of :func:`save_records` did.

    Attributes:
        written: records written.
        present: records that were there already.
        locked: shards that other processes are writing, and which were left to them.
        broken: names of images that could not be read and got an even distribution.
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
) -> SaveReport:
    """Let a teacher look at epochs of replayed samples and write down what is missing in a store.

    Any number of processes and machines may do this at once on a shared disk: each takes the shards that no other one
    holds. A killed process loses the shard it was at. With a teacher on a CPU the process keeps the memory it frees
    from then on, see :func:`~kornia_tinyvit.allocator.keep_memory`.

    Args:
        store: a :class:`~kornia_tinyvit.distillation.LabelStore` or
            :class:`~kornia_tinyvit.distillation.FeatureStore`.
        teacher: maps normalized images to logits, or to features for a feature store.
        samples: the data and its augmentation.
        epochs: which epochs to fill.
        batch_size: images at a time; it changes nothing in what is stored but for rounding in the teacher.
        workers: processes that read images.
        autocast: data type to compute in; ``None`` for the teacher's own.
        progress: called with the number of records that are done.
    """
    if device_of(teacher).type == "cpu":
        keep_memory()
    waiting = [(epoch, shard) for epoch in epochs for shard in store.missing_shards(epoch)]
    total = store.manifest.num_samples * len(epochs)
    present = total - sum(store.manifest.records_in(shard) for _, shard in waiting)
    progress(present)
    written = 0
    broken: set[str] = set()
    taken: deque[tuple[ShardWriter, ExitStack]] = deque()

    def take_shards() -> Iterator[list[Key]]:
        """Take the free ones of the waiting shards as the loader asks for batches, which it does some ahead."""
        nonlocal present
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
            else:
                held.close()
                present += store.manifest.records_in(shard)
                progress(store.manifest.records_in(shard))

    # Shards that others hold are tried again in the end: whoever held them may have been stopped.
    while waiting:
        locked: list[Key] = []
        try:
            for batch in replay_loader(samples, take_shards(), workers):
                writer, held = taken[0]
                targets = _ask(store, teacher, samples, batch, autocast)
                written += writer.write(batch.draws.indices, targets, batch.draws.checksums())
                broken.update(batch.broken)
                progress(len(batch.labels))
                if not len(writer.missing()):
                    held.close()
                    taken.popleft()
        finally:
            for _, held in taken:
                held.close()
        if len(locked) == len(waiting):
            break
        waiting = locked
    return SaveReport(written, present, len(waiting), tuple(sorted(broken)))


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
        batch_size: images at a time.
        seed: seed of the choice.
        autocast: data type to compute in, that of the saving; ``None`` for the teacher's own.

    Raises:
        StoreError: if the store holds no records.
    """
    augmentation = samples.augmentation
    random = np.random.default_rng(seed)
    epochs = store.epochs
    largest, total, count, checked, drifted = 0.0, 0.0, 0, 0, []
    for number, epoch in enumerate(epochs):
        share = records // len(epochs) + (number < records % len(epochs))
        valid = np.setdiff1d(np.arange(store.manifest.num_samples), store.missing(epoch), assume_unique=True)
        chosen = random.choice(valid, min(share, len(valid)), replace=False)
        for keys in _batches(augmentation, epoch, chosen, batch_size):
            batch = samples.__getitems__(keys)
            targets = _ask(store, teacher, samples, batch, autocast).cpu()
            stored = store.read(epoch, batch.draws.indices)
            if isinstance(stored, Records):
                difference = (targets.gather(1, stored.classes.long()) - stored.probabilities.float()).abs()
            else:
                difference = (targets - stored.features.float()).abs()
            drifted += batch.draws.indices[batch.draws.checksums() != stored.checksums.numpy()].tolist()
            largest = max(largest, float(difference.max()))
            total += float(difference.sum())
            count += difference.numel()
            checked += len(batch.labels)
    if not checked:
        raise StoreError(f"{store.path} holds no records to check; kornia-tinyvit distill save writes them.")
    return CheckReport(checked, largest, total / count, tuple(drifted))


def _batches(
    augmentation: ReplayableAugmentation, epoch: int, samples: NDArray[np.int64], batch_size: int
) -> list[list[Key]]:
    """Cut samples into batches; where images are mixed, each brings its partner along, beside it."""
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
    store: RecordStore, teacher: nn.Module, samples: ReplayedSamples, batch: Batch, autocast: torch.dtype | None
) -> Tensor:
    """Return probabilities or features of a batch, uniform or zero where an image could not be read."""
    device = device_of(teacher)
    with torch.inference_mode(), torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        output = teacher(samples.inputs(batch, device))
    output, neutral = output.float(), 0.0
    if isinstance(store, LabelStore):
        output, neutral = output.softmax(1), 1 / output.shape[1]
    missing = (batch.valid == 0).view(-1, *[1] * (output.ndim - 1))
    return output.masked_fill(missing.to(device), neutral)
