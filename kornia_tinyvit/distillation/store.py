"""Stores of soft labels or features: one record per sample and epoch, in immutable shards.

A store is a folder::

    manifest.json                           origin and layout of the records (Manifest)
    epoch-00000/shard-00000.safetensors     records 0 ... 8191 of epoch 0
    epoch-00000/shard-00001.lock            held while a process writes that shard

Records are stored **in the order in which the epoch visits the samples**, see
:class:`~kornia_tinyvit.data.order.EpochOrder`: saving and training read the shards sequentially, and both images of a
mixup pair are in one shard. A shard is a safetensors file with one tensor per field. The fields of N records of a
:class:`LabelStore` are ``classes`` :math:`(N, K)` in the smallest sufficient unsigned integer type, ``probabilities``
:math:`(N, K)` float16 and ``checksums`` :math:`(N,)` uint32.

A shard is written to a temporary name and renamed: if its file exists, it is complete and does not change. A killed
process loses only the shard that it was writing. The content of a shard depends only on the manifest and the teacher,
so that two writers of one shard write identical bytes; the lock only distributes the work.
"""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load_file
from torch import Tensor

from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.distillation.manifest import MANIFEST_NAME, Manifest, StoreError
from kornia_tinyvit.files import describe_differences, locked, replacing, write_text

__all__ = [
    "FeatureRecords",
    "FeatureStore",
    "LabelStore",
    "MissingRecordsError",
    "RecordStore",
    "Records",
    "ShardWriter",
    "StoreMismatchError",
]

#: Integers of shape (B,), one per sample.
Integers = NDArray[Any] | Tensor | Sequence[int]
Columns = dict[str, NDArray[Any]]

_MAX_MAPS = 4096  # Linux limits a process to 65,530 mappings
_MAX_HALF = 65504.0
_MAX_SUM = 1.01  # of probabilities rounded to half precision
# As uint16, non-negative halves keep their order; negative values, infinity and NaN are larger than all of them.
_MAX_BITS = np.float16(_MAX_SUM).view(np.uint16)
_REPAIR = "Delete it and run `kornia-tinyvit distill save` again to write the missing records."


class StoreMismatchError(StoreError):
    """A store does not match the settings of a pipeline."""


class MissingRecordsError(StoreError):
    """The requested records are missing."""


class Records(NamedTuple):
    """Records of a :class:`LabelStore`, in the stored types to keep transfers to a device small.

    Args:
        classes: classes sorted by descending probability, :math:`(B, K)`, uint8, uint16 or uint32. Use
            ``classes.long()`` for indexing.
        probabilities: their probabilities, :math:`(B, K)`, float16.
        checksums: checksums of the augmentation parameters, :math:`(B,)`, int64 in [0, 2**32).
    """

    classes: Tensor
    probabilities: Tensor
    checksums: Tensor


class FeatureRecords(NamedTuple):
    """Records of a :class:`FeatureStore`.

    Args:
        features: features :math:`(B, *shape)`, float16.
        checksums: checksums of the augmentation parameters, :math:`(B,)`, int64 in [0, 2**32).
    """

    features: Tensor
    checksums: Tensor


class RecordStore(ABC):
    """Base class of the stores of one record per sample and epoch.

    Any number of processes and threads may open a store. A pickled store opens the same folder. As a context manager
    it unmaps its files on exit.

    Args:
        path: folder of the store.

    Raises:
        StoreError: if there is no store, its manifest is damaged, or it holds records of another kind.

    Attributes:
        path: folder of the store.
        manifest: origin and layout of the records.
        order: order in which epochs visit the samples.
    """

    _kind: ClassVar[str]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        if self.manifest.kind != self._kind:
            raise StoreError(f"{self.path} holds {self.manifest.kind}, but {type(self).__name__} reads {self._kind}.")
        self.order = EpochOrder(self.manifest.num_samples, self.manifest.seed)
        self._maps: dict[tuple[int, int], tuple[NDArray[Any], ...]] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> Self:
        """Create a store, or open an existing one. Any number of processes may do this at the same time.

        Args:
            path: folder of the store; created if missing.
            manifest: origin and layout of the records.

        Raises:
            StoreMismatchError: if the existing store has another manifest; the message lists the differences.
            OSError: if the store cannot be created.
        """
        target = Path(path) / MANIFEST_NAME
        if not target.exists():
            temporary = target.with_name(f".{MANIFEST_NAME}.{secrets.token_hex(4)}")
            write_text(temporary, manifest.to_json())
            with suppress(FileExistsError):  # another process was first; its manifest is compared below
                target.hardlink_to(temporary)
            temporary.unlink()
        store = cls(path)
        store.require(asdict(manifest))
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._maps.clear()

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path]]:
        return type(self), (self.path,)

    def require(self, expected: Mapping[str, Any]) -> None:
        """Check that the store matches the settings of a pipeline.

        Args:
            expected: settings under the field names of :class:`Manifest`; missing fields are not compared.

        Raises:
            StoreMismatchError: if they differ. The message has one line per difference, such as
                ``augmentation.crop_scale: the store has [0.08, 1.0], this pipeline [0.5, 1.0]``.
        """
        stored = {name: value for name, value in asdict(self.manifest).items() if name in expected}
        if differences := describe_differences(stored, expected):
            action = "Use the settings of the store" if self.epochs else "It holds no records yet: delete the folder"
            raise StoreMismatchError(
                f"{self.path} does not match this pipeline:\n  " + ";\n  ".join(differences) + f".\n{action}, or use "
                "another folder."
            )

    @property
    def epochs(self) -> list[int]:
        """Epochs with at least one shard, in ascending order."""
        found = {path.parent.name.removeprefix("epoch-") for path in self.path.glob("epoch-*/shard-*.safetensors")}
        return sorted(int(number) for number in found if number.isdecimal())

    def missing_shards(self, epoch: int) -> list[int]:
        """Return the missing shards of an epoch in ascending order.

        Args:
            epoch: in [0, 2**32).

        Raises:
            StoreError: if an existing shard is damaged.
        """
        missing, last = [], self.manifest.num_shards - 1
        sizes = self.manifest.shard_bytes(0), self.manifest.shard_bytes(last)
        for shard in range(last + 1):
            path = self._shard_path(epoch, shard)
            if not path.exists():
                missing.append(shard)
            elif path.stat().st_size != sizes[shard == last]:
                self._open(epoch, shard)  # raises the reason
        return missing

    def missing(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples without records in an epoch, in the epoch's order, :math:`(M,)` int64.

        Args:
            epoch: in [0, 2**32).

        Raises:
            StoreError: if an existing shard is damaged.
        """
        shards = [self._samples(epoch, shard) for shard in self.missing_shards(epoch)]
        return np.concatenate([np.empty(0, np.int64), *shards])

    def valid_count(self, epoch: int) -> int:
        """Return the number of records of an epoch; see :meth:`missing`."""
        return self.manifest.num_samples - sum(map(self.manifest.records_in, self.missing_shards(epoch)))

    @abstractmethod
    def read(self, epoch: int, indices: Integers) -> Records | FeatureRecords:
        """Return the records of samples.

        Args:
            epoch: in [0, 2**32).
            indices: sample indices :math:`(B,)`, in any order.

        Raises:
            MissingRecordsError: if a record is missing.
            IndexError: if a sample index is out of range.
            StoreError: if a shard is damaged.
        """

    @contextmanager
    def writer(self, epoch: int, shard: int) -> Iterator[ShardWriter]:
        """Lock a shard for writing until the block or the process ends.

        Args:
            epoch: in [0, 2**32).
            shard: in [0, ``manifest.num_shards``).

        Yields:
            The writer of the shard. Its records are lost if the block ends before the shard is complete.

        Raises:
            BlockingIOError: if another writer holds the lock.
            StoreError: if ``shard`` is out of range or its file is damaged.
        """
        samples, path = self._samples(epoch, shard), self._shard_path(epoch, shard)
        lock = path.with_suffix(".lock")
        with locked(lock, f"Shard {shard} of epoch {epoch} ({path}) is being written; choose another one or wait"):
            for unfinished in path.parent.glob(f".{path.name}.*"):  # of a killed process
                unfinished.unlink(missing_ok=True)
            yield ShardWriter(self, path, samples if self._open(epoch, shard) is None else samples[:0])
        with suppress(OSError):  # another process may hold it by now
            lock.unlink()

    @abstractmethod
    def _encode(self, samples: NDArray[np.int64], values: Tensor) -> Columns:
        """Validate the outputs of a teacher and convert them to the stored fields."""

    def _read(self, epoch: int, indices: Integers) -> list[Tensor]:
        """Return the fields of samples in the order of the manifest, with checksums as int64."""
        samples = _integers(indices, "indices")
        shards, rows = self._locate(epoch, samples)
        # Sorted to read each shard once; numpy sorts 16-bit integers by counting.
        order = np.argsort(shards.astype(np.min_scalar_type(self.manifest.num_shards)), kind="stable")
        rows, counts = rows[order], np.bincount(shards)
        numbers = np.flatnonzero(counts)
        found = [np.empty((len(samples), *shape), dtype) for dtype, shape in self.manifest.fields.values()]
        missing, end = [], 0
        for number, count in zip(numbers.tolist(), counts[numbers].tolist(), strict=True):
            start, end = end, end + count
            shard = self._maps.get((epoch, number)) or self._open(epoch, number)
            if shard is None:
                missing.append(order[start:end])
                continue
            chosen = rows[start:end]
            for stored, column in zip(shard, found):  # noqa: B905 - the innermost loop
                stored.take(chosen, 0, column[start:end], "clip")
        if missing:
            lost = samples[np.sort(np.concatenate(missing))].tolist()
            raise MissingRecordsError(
                f"{len(lost)} of {len(samples)} requested records are missing in epoch {epoch} of {self.path} (samples "
                f"{', '.join(map(str, lost[:5]))}{', ...' * (len(lost) > 5)}), which has {self.valid_count(epoch)} of "
                f"{self.manifest.num_samples}. Resume `kornia-tinyvit distill save` to write them."
            )
        if len(numbers) > 1:
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            found = [column.take(back, 0) for column in found]
        return [torch.from_numpy(column) for column in (*found[:-1], found[-1].astype(np.int64))]

    def _locate(self, epoch: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the shard of each sample and its row in that shard."""
        with self._lock:  # the order caches one epoch
            positions = self.order.positions(epoch, samples)
        shards, rows = np.divmod(positions, self.manifest.shard_records)
        return shards, rows

    def _samples(self, epoch: int, shard: int) -> NDArray[np.int64]:
        """Return the samples of a shard in the order of the epoch."""
        start, count = shard * self.manifest.shard_records, self.manifest.records_in(shard)
        with self._lock:
            return self.order.permutation(epoch)[start : start + count].copy()

    def _open(self, epoch: int, shard: int) -> tuple[NDArray[Any], ...] | None:
        """Return the memory-mapped fields of a shard, or None if it is missing."""
        path, count = self._shard_path(epoch, shard), self.manifest.records_in(shard)
        try:
            columns = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        except FileNotFoundError:
            return None
        except (SafetensorError, TypeError) as error:
            raise StoreError(f"{path} is damaged: {error}. {_REPAIR}") from error
        wanted = {name: (dtype, (count, *shape)) for name, (dtype, shape) in self.manifest.fields.items()}
        if {name: (column.dtype, column.shape) for name, column in columns.items()} != wanted:
            raise StoreError(f"{path} is damaged: expected the tensors {wanted}. {_REPAIR}")
        if len(self._maps) >= _MAX_MAPS:
            self._maps.clear()
        return self._maps.setdefault((epoch, shard), tuple(columns[name] for name in wanted))

    def _shard_path(self, epoch: int, shard: int) -> Path:
        return self.path / f"epoch-{epoch:05d}" / f"shard-{shard:05d}.safetensors"


class ShardWriter:
    """Writer of one shard, created by :meth:`RecordStore.writer`. The file is written with the last record.

    Args:
        store: the store.
        path: path of the shard.
        samples: indices of the samples of the shard.
    """

    def __init__(self, store: RecordStore, path: Path, samples: NDArray[np.int64]) -> None:
        self._store, self._path, self._missing = store, path, samples
        self._batches: list[Columns] = []

    def missing(self) -> NDArray[np.int64]:
        """Return the samples still to be written in the order of the epoch, :math:`(M,)` int64; empty if complete."""
        return self._missing

    def write(self, indices: Integers, values: Tensor, checksums: Integers) -> int:
        """Append the next records of the shard.

        Args:
            indices: sample indices :math:`(B,)`, equal to ``missing()[:B]``.
            values: outputs of the teacher of any floating point type, on any device. For labels: probabilities of all
                classes :math:`(B, num_classes)`, at least 0 and with a sum of at most 1.01, of which the ``top_k``
                largest are stored. For features: finite values up to 65504, the largest float16, :math:`(B, *shape)`.
            checksums: checksums of the augmentation parameters, in [0, 2**32), :math:`(B,)`.

        Returns:
            The number of records :math:`B`.

        Raises:
            StoreError: if the samples are not the next ones, or an argument has a wrong shape, type or value.
            OSError: if the disk is full.
        """
        samples, sums = _integers(indices, "indices"), _integers(checksums, "checksums")
        if len(sums) != len(samples):
            raise StoreError(f"Expected one checksum per sample; got {len(sums)} checksums for {len(samples)} samples.")
        if len(sums) and not 0 <= sums.min() <= sums.max() < 2**32:
            raise StoreError(f"checksums must be in [0, 2**32); got {sums.min()} to {sums.max()}.")
        columns = {**self._store._encode(samples, values), "checksums": sums.astype(np.uint32)}
        if not np.array_equal(samples, self._missing[: len(samples)]):
            raise StoreError(f"{self._path} takes each of its samples once, in the order of the epoch; see missing().")
        self._batches.append(columns)
        self._missing = self._missing[len(samples) :]
        if len(samples) and not len(self._missing):
            whole = {name: np.concatenate([batch[name] for batch in self._batches]) for name in columns}
            with replacing(self._path) as temporary:
                temporary.write_bytes(save(whole))
        return len(samples)


class LabelStore(RecordStore):
    """Store of the largest probabilities of a teacher and their classes.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> manifest = Manifest(num_samples=3, num_classes=4, top_k=2, seed=7, shard_records=2)
        >>> probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.125]])
        >>> store = LabelStore.create(folder.name, manifest)
        >>> store.order.permutation(0)
        array([2, 1, 0])
        >>> with store.writer(epoch=0, shard=0) as writer:
        ...     writer.write(indices=[2, 1], values=probabilities, checksums=[11, 12])
        2
        >>> store.read(epoch=0, indices=[1]).classes
        tensor([[0, 1]], dtype=torch.uint8)
        >>> store.missing(epoch=0)
        array([0])
    """

    _kind = "logits"

    def read(self, epoch: int, indices: Integers) -> Records:
        """Return the records of samples; see :meth:`RecordStore.read`."""
        found = Records(*self._read(epoch, indices))
        classes, bits = found.classes.numpy(), found.probabilities.numpy().view(np.uint16)
        if classes.max(initial=0) >= self.manifest.num_classes or bits.max(initial=0) > _MAX_BITS:
            wrong = (classes >= self.manifest.num_classes) | (bits > _MAX_BITS)
            sample = _integers(indices, "indices")[wrong.any(1)][:1]
            path = self._shard_path(epoch, int(self._locate(epoch, sample)[0][0]))
            raise StoreError(f"{path} is damaged: the record of sample {sample[0]} has invalid values. {_REPAIR}")
        return found

    def _encode(self, samples: NDArray[np.int64], values: Tensor) -> Columns:
        values = _floating(values, "probabilities", (len(samples), self.manifest.num_classes))
        lowest, total = values.amin(1).float(), values.sum(1, dtype=torch.float32)
        valid = (lowest >= 0) & (total <= _MAX_SUM)  # False for NaN
        if not valid.all():
            row = int(valid.logical_not().nonzero()[0])
            raise StoreError(
                f"The probabilities of sample {samples[row]} have the minimum {lowest[row]:.4g} and the sum "
                f"{total[row]:.4g}; expected values of at least 0 and a sum of at most {_MAX_SUM}. Pass "
                "softmax(logits), not logits."
            )
        top, classes = values.abs().topk(self.manifest.top_k, dim=1)  # abs: -0 would be read as an invalid value
        index, _ = self.manifest.fields["classes"]
        return {"classes": classes.cpu().numpy().astype(index), "probabilities": top.half().cpu().numpy()}


class FeatureStore(RecordStore):
    """Store of the features of a teacher: one float16 tensor of the manifest's shape per sample."""

    _kind = "features"

    def read(self, epoch: int, indices: Integers) -> FeatureRecords:
        """Return the records of samples; see :meth:`RecordStore.read`."""
        return FeatureRecords(*self._read(epoch, indices))

    def _encode(self, samples: NDArray[np.int64], values: Tensor) -> Columns:
        values = _floating(values, "features", (len(samples), *self.manifest.shape))
        largest = values.abs().flatten(1).amax(1).float()
        valid = largest <= _MAX_HALF  # False for NaN
        if not valid.all():
            row = int(valid.logical_not().nonzero()[0])
            raise StoreError(
                f"The features of sample {samples[row]} reach {largest[row]:.6g}; expected finite values up to "
                f"{_MAX_HALF:.0f}, the largest float16. Scale or normalize them first."
            )
        return {"features": values.half().cpu().numpy()}


def _integers(values: Integers, name: str) -> NDArray[np.int64]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):  # an empty list becomes float64
        raise StoreError(f"{name} must be integers of shape (B,); got {array.dtype} of shape {array.shape}.")
    return array.astype(np.int64, copy=False)


def _floating(values: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != shape:
        got = f"{values.dtype} of {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise StoreError(f"{name} must be a floating point tensor of shape {shape}; got {got}.")
    return values.detach()
