"""What a teacher said about every sample of every epoch, kept in files that training reads back at speed.

A store is a folder::

    manifest.json                    what the records were made from and how they lie (Manifest)
    epoch-00000/shard-00000.bin      records 0 ... 65535 of epoch 0, then one bit a record: valid or not
    epoch-00000/.lock                held for a moment while a shard is made

Records have a fixed size and lie **in the order in which the epoch visits the samples**: the place of a sample is its
position in :class:`~kornia_tinyvit.data.order.EpochOrder`. Whoever writes while walking through an epoch, and
whoever reads it back in training, goes through the files from front to back, and the two partners of a mixup are
neighbours. A record of a :class:`LabelStore` is ``top_k`` class indices (the smallest unsigned integers that hold
them), ``top_k`` float16 probabilities and a uint32 checksum, little-endian and without padding.

A record counts once its bit is set, and its bit is set once it is on the disk. So a process can be killed, or the power
fail, at any time: at most the batch being written is lost, no half-written record is ever read, and the next process
writes only what is missing. Any number of processes may read while others write; each shard is written by one process
at a time. Over a network file system, let an epoch be written before another machine reads it: such systems may show
one page of a file later than another.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import mmap
import os
import re
import secrets
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.files import describe_differences, locks

__all__ = [
    "FeatureRecords",
    "FeatureStore",
    "LabelStore",
    "Manifest",
    "MissingRecordsError",
    "RecordStore",
    "Records",
    "ShardWriter",
    "StoreError",
    "StoreLockedError",
    "StoreMismatchError",
    "estimated_size",
    "readable_size",
]

#: Whole numbers, one a sample.
Integers = NDArray[Any] | Tensor | Sequence[int]

_VERSION = 1
_MANIFEST = "manifest.json"
_SHARD_RECORDS = 65536
_MAX_MAPS = 256  # each keeps a file descriptor, of which a process may have 1,024 or fewer
_MAX_HALF = 65504.0
_NO_KIND = "A RecordStore only counts records; open {} as a LabelStore or FeatureStore."
_MAX_SUM = 1.01  # what rounding to half precision may make of a sum of 1
_ONE = 0x3C00  # the bits of 1 in half precision
_MAX_RECORD = 2**31 - 1  # bytes, which is what numpy can describe


class StoreError(ValueError):
    """A store cannot be read or written, or was given what it does not take."""


class StoreMismatchError(StoreError):
    """A store was made from something else than what it is now asked to belong to."""


class MissingRecordsError(StoreError):
    """Records were asked for that have not been written."""


class StoreLockedError(StoreError):
    """A shard is being written by another process."""


class Records(NamedTuple):
    """What a :class:`LabelStore` holds about a batch, in the types it is stored in, as less then goes to a device.

    Indexing takes ``classes.long()``, which belongs where the tensors are used.

    Args:
        classes: the most probable classes, most probable first, :math:`(B, K)`, uint8, uint16 or uint32.
        probabilities: theirs, :math:`(B, K)`, float16.
        checksums: of the augmentation each was made with, :math:`(B,)`, int64 in [0, 2**32).
    """

    classes: Tensor
    probabilities: Tensor
    checksums: Tensor


class FeatureRecords(NamedTuple):
    """What a :class:`FeatureStore` holds about a batch.

    Args:
        features: :math:`(B, ...)`, float16.
        checksums: of the augmentation each was made with, :math:`(B,)`, int64 in [0, 2**32).
    """

    features: Tensor
    checksums: Tensor


@dataclass(frozen=True)
class Manifest:
    """What a store's records were made from and how they lie. Two stores with equal manifests hold equal records.

    Args:
        num_samples: samples of the data set, in [1, 2**32).
        num_classes: classes of the teacher (logits only).
        top_k: how many of them a record keeps, at most ``num_classes`` (logits only).
        seed: of the order and the augmentation, in [0, 2**64).
        augmentation: its settings; anything that JSON can say, as for the next two.
        data: fingerprint of the data set.
        teacher: name and checksum of the teacher.
        kind: ``"logits"`` or ``"features"``.
        shape: of a sample's features (features only).
        shard_records: records of a shard; even, so that the partners of a mixup lie in one.
        version: of this layout.

    Raises:
        StoreError: if a number is out of its range, the kind is unknown, or something is not JSON.
    """

    num_samples: int
    num_classes: int = 0
    top_k: int = 0
    seed: int = 0
    augmentation: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    kind: str = "logits"
    shape: tuple[int, ...] = ()
    shard_records: int = _SHARD_RECORDS
    version: int = _VERSION

    def __post_init__(self) -> None:
        for name in ("augmentation", "data", "teacher"):
            # As it would come back from the file: a tuple and the list that it becomes are no difference.
            object.__setattr__(self, name, _as_json(getattr(self, name), name))
        object.__setattr__(self, "shape", tuple(self.shape))
        self._refuse_bad_values()

    @property
    def record(self) -> np.dtype[np.void]:
        """How the bytes of a record lie."""
        if self.kind == "features":
            return np.dtype([("features", "<f2", self.shape), ("checksum", "<u4")])
        index = np.min_scalar_type(self.num_classes - 1).newbyteorder("<")
        return np.dtype(
            [("classes", index, (self.top_k,)), ("probabilities", "<f2", (self.top_k,)), ("checksum", "<u4")]
        )

    @property
    def num_shards(self) -> int:
        """How many shards an epoch has."""
        return -(-self.num_samples // self.shard_records)

    def records_in(self, shard: int) -> int:
        """Return how many records a shard holds: ``shard_records``, but for the last.

        Raises:
            StoreError: if there is no such shard.
        """
        if not 0 <= shard < self.num_shards:
            raise StoreError(f"An epoch has the shards 0 to {self.num_shards - 1}; got {shard}.")
        return min(self.shard_records, self.num_samples - shard * self.shard_records)

    def shard_bytes(self, shard: int) -> int:
        """Return the size of a shard's file in bytes: its records and one bit for each."""
        count = self.records_in(shard)
        return count * self.record.itemsize + _bitmap_bytes(count)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Tell where a pipeline differs from what the store was made from.

        Args:
            other: what the pipeline has, under names of this class; what it leaves out is not compared.

        Returns:
            A line for each difference, such as
            ``augmentation.crop_scale: the store has [0.08, 1.0], this pipeline [0.5, 1.0]``.
        """
        return describe_differences({name: value for name, value in asdict(self).items() if name in other}, other)

    def to_json(self) -> str:
        """Return what :meth:`from_json` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "The manifest") -> Manifest:
        """Read what :meth:`to_json` returned.

        Args:
            text: JSON.
            source: where it came from, for the errors.

        Raises:
            StoreError: if it is damaged or of another version.
        """
        try:
            content = json.loads(text)
            version = content["version"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise StoreError(f"{source} is damaged or no manifest of a store: {error!r}.") from error
        if version != _VERSION:
            raise StoreError(
                f"{source} is of version {version} and this release reads {_VERSION}; use another release."
            )
        known = {each.name for each in fields(cls)}
        if content.keys() != known:
            raise StoreError(f"{source} is damaged: it should have {sorted(known)} and has {sorted(content)}.")
        try:
            return cls(**content)
        except (TypeError, RecursionError) as error:
            raise StoreError(f"{source} is damaged: {error}.") from error

    def _refuse_bad_values(self) -> None:
        for name in ("num_samples", "num_classes", "top_k", "seed", "shard_records"):
            if not isinstance(getattr(self, name), int):
                raise StoreError(f"{name} must be a whole number; got {getattr(self, name)!r}.")
        if not all(isinstance(side, int) and not isinstance(side, bool) for side in self.shape):
            raise StoreError(f"shape must hold whole numbers; got {self.shape}.")
        if not 0 < self.num_samples < 2**32 or not 0 <= self.seed < 2**64:
            raise StoreError(
                f"num_samples must be in [1, 2**32) and seed in [0, 2**64); got {self.num_samples} and {self.seed}."
            )
        if not 2 <= self.shard_records <= 2**32 or self.shard_records % 2:
            raise StoreError(
                "shard_records must be even, positive and at most 2**32, so that the partners of a mixup lie in one "
                f"shard; got {self.shard_records}."
            )
        if self.kind == "logits":
            if not 0 < self.top_k <= self.num_classes <= 2**32 or self.shape:
                raise StoreError(
                    f"A store of logits needs top_k in [1, num_classes], num_classes up to 2**32 and no shape; got "
                    f"top_k={self.top_k}, num_classes={self.num_classes} and shape={self.shape}."
                )
        elif self.kind == "features":
            if not self.shape or min(self.shape) < 1 or self.top_k or self.num_classes:
                raise StoreError(
                    "A store of features needs the shape of a sample's features, and no top_k or num_classes; got "
                    f"shape={self.shape}, top_k={self.top_k} and num_classes={self.num_classes}."
                )
        else:
            raise StoreError(f"kind must be 'logits' or 'features'; got {self.kind!r}.")
        size = 2 * math.prod(self.shape) if self.shape else 6 * self.top_k
        if size >= _MAX_RECORD:
            raise StoreError(f"A record would take {readable_size(size)}; there is room for {_MAX_RECORD} bytes.")


def estimated_size(
    num_samples: int, epochs: int, num_classes: int, top_k: int, shard_records: int = _SHARD_RECORDS
) -> int:
    """Return what the shards of a :class:`LabelStore` take on the disk in bytes, exactly.

    Args:
        num_samples: samples of the data set.
        epochs: how many epochs are stored.
        num_classes: classes of the teacher.
        top_k: how many of them a record keeps.
        shard_records: records of a shard.

    Raises:
        StoreError: if a number is out of its range.

    Example:
        >>> round(estimated_size(1_281_167, 300, 1000, 10) / 2**30, 1)  # ImageNet-1k, GiB
        15.8
    """
    manifest = Manifest(num_samples, num_classes, top_k, shard_records=shard_records)
    last = manifest.num_shards - 1
    return epochs * (last * manifest.shard_bytes(0) + manifest.shard_bytes(last))


class _Shard:
    """A shard in memory: its records as opaque bytes, which copies fastest, and the bits that say which are valid."""

    def __init__(self, path: Path, size: int, count: int, record_bytes: int, writable: bool = False) -> None:
        with open(path, "r+b" if writable else "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise StoreError(
                    f"{path} is damaged: it has {found} bytes and {count} records of {record_bytes} bytes take {size}. "
                    "Delete it and run `kornia-tinyvit distill save` again, which writes what is missing."
                )
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self.records = np.frombuffer(self._map, np.dtype((np.void, record_bytes)), count)
        self.bits = np.frombuffer(self._map, np.uint8, offset=count * record_bytes)

    def valid(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (self.bits[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).astype(bool)

    def all_valid(self) -> NDArray[np.bool_]:
        return np.unpackbits(self.bits, count=len(self.records), bitorder="little").astype(bool)

    def put(self, rows: NDArray[np.int64], records: NDArray[np.void]) -> None:
        self.records[rows] = records
        self._map.flush()  # the records must be on the disk before anything says so
        np.bitwise_or.at(self.bits, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
        self._map.flush()


_Store = TypeVar("_Store", bound="RecordStore")


class RecordStore:
    """A store of one record a sample and epoch, opened for reading; what the stores of logits and of features share.

    It counts records of either kind; :class:`LabelStore` and :class:`FeatureStore` read and write theirs. Any number of
    processes, and of threads, may have a store open. It can be pickled, and is opened anew by the process it comes to.

    Args:
        path: the store's folder.

    Raises:
        StoreError: if there is no store, its manifest is damaged, or it holds records of another kind.

    Attributes:
        path: the store's folder.
        manifest: what its records were made from.
        order: the order in which epochs visit the samples.
    """

    _kind: ClassVar[str | None] = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        if self._kind is not None and self.manifest.kind != self._kind:
            raise StoreError(
                f"{self.path} holds {self.manifest.kind}, which {type(self).__name__} does not read; it reads "
                f"{self._kind}."
            )
        self.order = EpochOrder(self.manifest.num_samples, self.manifest.seed)
        self._maps: OrderedDict[tuple[int, int], _Shard] = OrderedDict()
        self._held: dict[tuple[int, int], ShardWriter] = {}
        self._lock = threading.RLock()

    @classmethod
    def create(cls: type[_Store], path: str | Path, manifest: Manifest) -> _Store:
        """Make a store, or open the one that is there, which any number of processes may do at once.

        Args:
            path: the store's folder, which is made.
            manifest: what the records will be made from.

        Raises:
            StoreMismatchError: if a store is there that was made from something else; the message tells what differs.
            StoreError: if it cannot be made.
        """
        path = Path(path)
        if not (path / _MANIFEST).exists():
            _publish(path, manifest)
        store = cls(path)
        store.require(asdict(manifest))
        return store

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path]]:
        return type(self), (self.path,)

    def require(self, expected: Mapping[str, Any]) -> None:
        """Refuse a store that was made from something else than what a pipeline has.

        Args:
            expected: what the pipeline has, under names of :class:`Manifest`; what it leaves out may be anything.

        Raises:
            StoreMismatchError: telling each difference.
        """
        differences = self.manifest.differences(expected)
        if differences:
            empty = not any(self.valid_count(epoch) for epoch in self.epochs)
            mend = "It holds no records yet: delete the folder" if empty else "Use the settings of the store"
            raise StoreMismatchError(
                f"{self.path} was made from something else:\n  " + ";\n  ".join(differences) + f".\n{mend}, or use "
                "another folder."
            )

    @property
    def num_shards(self) -> int:
        """How many shards an epoch has."""
        return self.manifest.num_shards

    @property
    def epochs(self) -> list[int]:
        """The epochs of which there is a shard, in order; not all of their records need be written."""
        found = {path.parent.name for path in self.path.glob("epoch-*/shard-*.bin")}
        return sorted(int(match[1]) for name in found if (match := re.fullmatch(r"epoch-(\d{5,})", name)))

    def missing(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch that are still to be written, in the epoch's order, :math:`(M,)`."""
        with self._lock:
            return self.order.permutation(epoch)[~self._valid(epoch)]

    def valid_count(self, epoch: int) -> int:
        """Return how many records of an epoch are written."""
        return int(self._valid(epoch).sum())

    def is_complete(self, epoch: int) -> bool:
        """Tell whether an epoch has all its records."""
        return self.valid_count(epoch) == self.manifest.num_samples

    def read(self, epoch: int, indices: Integers) -> Records | FeatureRecords:
        """Return what was stored about samples; see :meth:`LabelStore.read` and :meth:`FeatureStore.read`."""
        raise StoreError(_NO_KIND.format(self.path))

    def writer(self, epoch: int, shard: int) -> ShardWriter:
        """Take a shard for writing, to the exclusion of all others; use it as a context.

        The shard is free again when the writer is closed or its process has ended, however it did.

        Args:
            epoch: in [0, 2**32).
            shard: in [0, ``num_shards``).

        Raises:
            StoreLockedError: if it is being written.
            StoreError: if there is no such shard, the disk has no room for it, or it is damaged.
        """
        return ShardWriter(self, epoch, shard)

    def close(self) -> None:
        """Let go of all shards that :meth:`write` holds, and of all files."""
        with self._lock:
            for writer in self._held.values():
                writer.close()
            self._held.clear()
            self._maps.clear()

    def _encode(self, samples: NDArray[np.int64], values: Tensor, records: NDArray[np.void]) -> None:
        """Check what a subclass stores and put it into records, all but the checksum."""
        raise StoreError(_NO_KIND.format(self.path))

    def _records(self, samples: NDArray[np.int64], values: Tensor, checksums: Integers) -> NDArray[np.void]:
        sums = _integers(checksums, "checksums")
        if len(sums) != len(samples):
            raise StoreError(f"Got {len(sums)} checksums for {len(samples)} samples; each needs one.")
        if len(sums) and not 0 <= sums.min() <= sums.max() < 2**32:
            raise StoreError(f"checksums must be in [0, 2**32); got {sums.min()} to {sums.max()}.")
        records = np.empty(len(samples), self.manifest.record)
        self._encode(samples, values, records)
        records["checksum"] = sums
        return records.view(np.dtype((np.void, records.itemsize)))

    def _write(self, epoch: int, indices: Integers, values: Tensor, checksums: Integers) -> int:
        samples = _integers(indices, "indices")
        records = self._records(samples, values, checksums)
        shards, rows = self._locate(epoch, samples)
        written = 0
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            with self._lock:
                writer = self._held.get((epoch, shard))
                if writer is None or writer.closed:
                    writer = self._held[epoch, shard] = self.writer(epoch, shard)
            written += writer.put(rows[chosen], records[chosen])
            if writer.is_complete:  # or one who writes epoch after epoch would hold them all
                writer.close()
                self._held.pop((epoch, shard), None)
        return written

    def _read(self, epoch: int, indices: Integers) -> NDArray[np.void]:
        """Return the records of samples as the structured array :math:`(B,)` that the manifest describes."""
        samples = _integers(indices, "indices")
        shards, rows = self._locate(epoch, samples)
        # Sorted by their shards, so that each shard is asked once and little is done for each.
        order = np.argsort(shards, kind="stable")
        shards, rows = shards[order], rows[order]
        bounds = [*np.flatnonzero(np.diff(shards, prepend=-1)).tolist(), len(samples)]
        record = self.manifest.record
        found = np.empty(len(samples), np.dtype((np.void, record.itemsize)))
        bits = np.zeros(len(samples), np.uint8)
        for start, end in itertools.pairwise(bounds):
            shard = self._map(epoch, int(shards[start]))
            if shard is not None:
                # The bits before the records: what is valid now stays as it is.
                bits[start:end] = shard.bits[rows[start:end] >> 3]
                found[start:end] = shard.records.take(rows[start:end])
        valid = np.empty(len(samples), bool)
        valid[order] = bits >> (rows & 7).astype(np.uint8) & 1
        if not valid.all():
            self._refuse_missing(epoch, samples, valid)
        records = np.empty_like(found)
        records[order] = found
        return records.view(record)

    def _refuse_missing(self, epoch: int, samples: NDArray[np.int64], valid: NDArray[np.bool_]) -> None:
        missing = samples[~valid]
        shown = ", ".join(map(str, missing[:5].tolist())) + (", ..." if len(missing) > 5 else "")
        raise MissingRecordsError(
            f"{len(missing)} of {len(samples)} records asked for are not in epoch {epoch} of {self.path} (samples "
            f"{shown}), which has {self.valid_count(epoch)} of {self.manifest.num_samples}. Run "
            "`kornia-tinyvit distill save` on this store again: it resumes and writes what is missing."
        )

    def _locate(self, epoch: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return in which shard each sample's record lies, and as which one there."""
        with self._lock:  # as another epoch's order may be drawn
            positions = self.order.positions(epoch, samples)
        shards, rows = np.divmod(positions, self.manifest.shard_records)
        return shards, rows

    def _valid(self, epoch: int) -> NDArray[np.bool_]:
        """Return whether each record of an epoch is written, in its order, :math:`(N,)`."""
        valid = []
        for number in range(self.num_shards):
            shard = self._map(epoch, number)
            valid.append(np.zeros(self.manifest.records_in(number), bool) if shard is None else shard.all_valid())
        return np.concatenate(valid)

    def _map(self, epoch: int, number: int) -> _Shard | None:
        """Return a shard for reading; None if it has not been made."""
        with self._lock:
            shard = self._maps.get((epoch, number))
            if shard is None:
                try:
                    shard = self._open(epoch, number)
                except FileNotFoundError:
                    return None
                self._maps[epoch, number] = shard
                if len(self._maps) > _MAX_MAPS:
                    self._maps.popitem(last=False)
            self._maps.move_to_end((epoch, number))
            return shard

    def _open(self, epoch: int, number: int, writable: bool = False) -> _Shard:
        count, size = self.manifest.records_in(number), self.manifest.shard_bytes(number)
        return _Shard(self._shard_path(epoch, number), size, count, self.manifest.record.itemsize, writable)

    def _shard_path(self, epoch: int, number: int) -> Path:
        return self.path / f"epoch-{epoch:05d}" / f"shard-{number:05d}.bin"


class ShardWriter:
    """One shard of one epoch, held for writing; :meth:`RecordStore.writer` makes it.

    A child process that is forked meanwhile does not inherit it.

    Attributes:
        epoch: the epoch.
        shard: number of the shard.
        records: how many records the shard has room for.
        closed: whether the shard has been let go.
    """

    def __init__(self, store: RecordStore, epoch: int, shard: int) -> None:
        fcntl = locks()
        self.epoch, self.shard, self.closed = epoch, shard, True
        self._store = store
        self._thread_lock = threading.Lock()
        self._path = store._shard_path(epoch, shard)
        self._samples = self._samples_of_shard()
        self.records = len(self._samples)
        _make_shard(self._path, store.manifest.shard_bytes(shard))
        # A file of its own: the map keeps one open for as long as anything looks at it, and would keep the lock too.
        self._file = os.open(self._path, os.O_RDWR)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._data = store._open(epoch, shard, writable=True)
        except BlockingIOError as error:
            os.close(self._file)
            raise StoreLockedError(
                f"Shard {shard} of epoch {epoch} ({self._path}) is being written by another process or another writer "
                "of this one. Take another shard, or wait until that one ends."
            ) from error
        except BaseException:
            os.close(self._file)
            raise
        self.closed = False
        _WRITERS.add(self)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    @property
    def is_complete(self) -> bool:
        """Whether the shard has all its records."""
        return bool(self._data.all_valid().all())

    def missing(self) -> NDArray[np.int64]:
        """Return the shard's samples that are still to be written, in the epoch's order, :math:`(M,)`."""
        return self._samples[~self._data.all_valid()]

    def write(self, indices: Integers, values: Tensor, checksums: Integers) -> int:
        """Write records of samples of this shard; as the store's own ``write``, which tells more.

        Args:
            indices: the samples, :math:`(B,)`.
            values: probabilities :math:`(B, num_classes)` or features :math:`(B, ...)`.
            checksums: of the augmentations, in [0, 2**32), :math:`(B,)`.

        Returns:
            How many of them were not there before.

        Raises:
            StoreError: if a sample is of another shard, something has a wrong shape or value, or the writer is closed.
        """
        samples = _integers(indices, "indices")
        records = self._store._records(samples, values, checksums)
        shards, rows = self._store._locate(self.epoch, samples)
        strays = shards != self.shard
        if strays.any():
            raise StoreError(
                f"Sample {samples[strays][0]} lies in shard {shards[strays][0]} of epoch {self.epoch} and this writer "
                f"is of shard {self.shard}; take the samples from missing()."
            )
        return self.put(rows, records)

    def put(self, rows: NDArray[np.int64], records: NDArray[np.void]) -> int:
        """Write encoded records at places of the shard; return how many were not there before."""
        if self.closed:
            raise StoreError(
                f"The writer of {self._path} was closed, or belongs to the process that this one was forked from; take "
                "a new one from store.writer()."
            )
        with self._thread_lock:
            rows, first = np.unique(rows, return_index=True)  # in the order of the file, too
            # A valid record may be being read, so it is never touched again.
            new = ~self._data.valid(rows)
            if new.any():
                self._data.put(rows[new], records[first[new]])
            return int(new.sum())

    def close(self) -> None:
        """Let the shard go; what was written is on the disk already."""
        if not self.closed:
            self.closed = True
            fcntl = locks()
            fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)

    def _samples_of_shard(self) -> NDArray[np.int64]:
        start = self.shard * self._store.manifest.shard_records
        with self._store._lock:
            order = self._store.order.permutation(self.epoch)
            return order[start : start + self._store.manifest.records_in(self.shard)].copy()

    def _leave_to_parent(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._file)  # unlocking it would unlock the parent's


_WRITERS: weakref.WeakSet[ShardWriter] = weakref.WeakSet()


def _leave_writers_to_parent() -> None:
    # A lock lasts until the last process that inherited it ends: a killed writer's data workers would keep it.
    for writer in list(_WRITERS):
        writer._leave_to_parent()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_writers_to_parent)


class LabelStore(RecordStore):
    """A store of a teacher's most probable classes.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> manifest = Manifest(num_samples=3, num_classes=4, top_k=2, seed=7)
        >>> probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.125]])
        >>> with LabelStore.create(folder.name, manifest) as store:
        ...     store.write(epoch=0, indices=[2, 0], probabilities=probabilities, checksums=[11, 12])
        2
        >>> store = LabelStore(folder.name)
        >>> store.read(epoch=0, indices=[0]).classes
        tensor([[0, 1]], dtype=torch.uint8)
        >>> store.missing(epoch=0)
        array([1])
    """

    _kind = "logits"

    def read(self, epoch: int, indices: Integers) -> Records:
        """Return what was stored about samples.

        Args:
            epoch: in [0, 2**32).
            indices: the samples, :math:`(B,)`, in any order.

        Raises:
            MissingRecordsError: if any of them has not been written.
            IndexError: if there is no such sample.
            StoreError: if a shard is damaged.
        """
        records = self._read(epoch, indices)
        found = Records(
            _native(records["classes"]), _native(records["probabilities"]), _native(records["checksum"], np.int64)
        )
        self._refuse_damaged(epoch, indices, found)
        return found

    def write(self, epoch: int, indices: Integers, probabilities: Tensor, checksums: Integers) -> int:
        """Write what a teacher said about samples, of which the ``top_k`` most probable classes are kept.

        The shards they lie in are taken as :meth:`writer` does, and held until they are whole or the store is closed.
        Records that are there already stay as they are. What is returned from is on the disk.

        Args:
            epoch: in [0, 2**32).
            indices: the samples, :math:`(B,)`, in any order; neighbours in the epoch's order are fastest.
            probabilities: of all classes, not negative and with a sum of at most 1.01, :math:`(B, num_classes)`, of any
                floating type and on any device.
            checksums: of the augmentations, in [0, 2**32), :math:`(B,)`.

        Returns:
            How many of them were not there before.

        Raises:
            StoreLockedError: if a shard is being written by another process.
            StoreError: if something has a wrong shape or value, or the disk has no room.
            IndexError: if there is no such sample.
        """
        return self._write(epoch, indices, probabilities, checksums)

    def _refuse_damaged(self, epoch: int, indices: Integers, found: Records) -> None:
        """Refuse records that no teacher's answer makes, such as those of a disk that lost some bits."""
        classes, shares = found.classes.numpy(), found.probabilities.numpy()
        # Halves from 0 up are in the order of their bits, where negative ones, infinity and NaN are larger than all.
        if not classes.size or (classes.max() < self.manifest.num_classes and shares.view(np.uint16).max() <= _ONE):
            return
        good = (classes < self.manifest.num_classes).all(1) & ((shares >= 0) & (shares <= _MAX_SUM)).all(1)
        if not good.all():
            sample = _integers(indices, "indices")[~good][0]
            raise StoreError(
                f"The record of sample {sample} in epoch {epoch} of {self.path} is damaged: it has classes or "
                "probabilities that no teacher says. Delete that epoch's folder and run `kornia-tinyvit distill save` "
                "again, which writes what is missing."
            )

    def _encode(self, samples: NDArray[np.int64], values: Tensor, records: NDArray[np.void]) -> None:
        _refuse_shape(values, "probabilities", (len(samples), self.manifest.num_classes))
        values = values.detach()
        lowest, total = values.amin(1).float(), values.sum(1, dtype=torch.float32)
        good = ((lowest >= 0) & (total <= _MAX_SUM)).cpu()  # no comparison with NaN holds
        if not good.all():
            row = int(good.logical_not().nonzero()[0])
            raise StoreError(
                f"The probabilities of sample {samples[row]} have the minimum {lowest[row]:.4g} and the sum "
                f"{total[row]:.4g}; expected none below 0, no NaN, and a sum of at most {_MAX_SUM}. Pass "
                "softmax(logits), not logits."
            )
        top = values.topk(self.manifest.top_k, dim=1)
        records["classes"] = top.indices.cpu().numpy()
        records["probabilities"] = top.values.half().cpu().numpy()


class FeatureStore(RecordStore):
    """A store of a teacher's features: one float16 array of the manifest's shape for each sample."""

    _kind = "features"

    def read(self, epoch: int, indices: Integers) -> FeatureRecords:
        """Return what was stored about samples; see :meth:`LabelStore.read` for the arguments and errors."""
        records = self._read(epoch, indices)
        return FeatureRecords(_native(records["features"]), _native(records["checksum"], np.int64))

    def write(self, epoch: int, indices: Integers, features: Tensor, checksums: Integers) -> int:
        """Write a teacher's features of samples; see :meth:`LabelStore.write` for what else it says.

        Args:
            epoch: in [0, 2**32).
            indices: the samples, :math:`(B,)`.
            features: finite and of at most 65504, the largest float16, :math:`(B, *shape)`, of any floating type and on
                any device.
            checksums: of the augmentations, in [0, 2**32), :math:`(B,)`.

        Returns:
            How many of them were not there before.

        Raises:
            StoreLockedError: if a shard is being written by another process.
            StoreError: if something has a wrong shape or value, or the disk has no room.
            IndexError: if there is no such sample.
        """
        return self._write(epoch, indices, features, checksums)

    def _encode(self, samples: NDArray[np.int64], values: Tensor, records: NDArray[np.void]) -> None:
        _refuse_shape(values, "features", (len(samples), *self.manifest.shape))
        largest = values.detach().abs().flatten(1).amax(1).float().cpu()
        good = largest <= _MAX_HALF  # no comparison with NaN holds
        if not good.all():
            row = int(good.logical_not().nonzero()[0])
            raise StoreError(
                f"The features of sample {samples[row]} reach {largest[row]:.6g}; float16 holds finite values up to "
                f"{_MAX_HALF:.0f}. Scale or normalise them first."
            )
        records["features"] = values.detach().half().cpu().numpy()


def _bitmap_bytes(count: int) -> int:
    return -(-count // 8)


def _as_json(value: Any, name: str) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{name} must be what JSON can say: text, finite numbers, lists and dicts; {error}."
        ) from error


def _integers(values: Integers, name: str) -> NDArray[np.int64]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list has no type of its own
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise StoreError(f"{name} must be whole numbers of shape (B,); got {array.dtype} of shape {array.shape}.")
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise StoreError(f"{name} must be below 2**63; got {array.max()}.")
    return array.astype(np.int64, copy=False)


def _native(array: NDArray[Any], dtype: type | None = None) -> Tensor:
    # Fields of packed records are neither aligned nor contiguous, nor is the byte order of the file everyone's.
    return torch.from_numpy(array.astype(dtype or array.dtype.newbyteorder("="), order="C"))


def _refuse_shape(values: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != shape:
        got = f"{values.dtype} of {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise StoreError(f"{name} must be a floating tensor of shape {shape}; got {got}.")


def _read_manifest(path: Path) -> Manifest:
    try:
        text = (path / _MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{path} is no store: it has no {_MANIFEST}. Make one with `kornia-tinyvit distill save`."
        ) from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path / _MANIFEST} is damaged: {error}.") from error
    except (OSError, ValueError) as error:  # a name that no system knows, or a file that may not be read
        raise StoreError(f"{str(path)[:200]!r} cannot be read as a store: {error}.") from error
    return Manifest.from_json(text, str(path / _MANIFEST))


def _publish(path: Path, manifest: Manifest) -> None:
    """Put a manifest into place whole, unless one is there."""
    content = manifest.to_json().encode()
    temporary = path / f".{_MANIFEST}.{secrets.token_hex(8)}.tmp"
    with _explained(path / _MANIFEST, len(content)):
        path.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # another process was first; whether it wants the same is compared next
                os.link(temporary, path / _MANIFEST)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path)


def _make_shard(path: Path, size: int) -> None:
    """Make a shard of zeros, none of them valid, unless it is there."""
    if path.exists():
        return
    temporary, fcntl = path.with_suffix(".tmp"), locks()
    with _explained(path, size):
        path.parent.mkdir(exist_ok=True)
        # One process at a time, which may thus take over what a killed one left unfinished.
        with open(path.parent / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not path.exists():
                    _allocate(temporary, size)
                    os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
        _sync_folder(path.parent)
        _sync_folder(path.parent.parent)


def _allocate(path: Path, size: int) -> None:
    """Make a file of zeros whose space is taken: without it, a full disk would kill whoever writes through the map."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            for start in range(0, size, 1 << 20):
                file.write(bytes(min(1 << 20, size - start)))
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise StoreError(
            f"{path} could not be made, which takes {readable_size(size)}: {error.strerror or error}. What was written "
            f"earlier is intact; {'make room' if full else 'mend that'} and start again, which resumes."
        ) from error


def readable_size(size: int) -> str:
    """Return a number of bytes as people read it, in powers of 1000 and, for comparison with tools, of 1024.

    Example:
        >>> readable_size(16_964_000_000)
        '16.96 GB (15.80 GiB)'
    """
    power = min(4, int(math.log2(max(size, 1))) // 10)
    if not power:
        return f"{size} bytes"
    unit = ("", "K", "M", "G", "T")[power]
    return f"{size / 1000**power:.2f} {unit.replace('K', 'k')}B ({size / 1024**power:.2f} {unit}iB)"
