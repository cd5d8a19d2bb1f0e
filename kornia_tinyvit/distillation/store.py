"""A teacher's answers for every sample of every epoch, in files that training reads back at speed.

A store is a folder::

    manifest.json                           what the records were made from and how they lie (Manifest)
    epoch-00000/shard-00000.safetensors     records 0 ... 8191 of epoch 0
    epoch-00000/shard-00001.lock            held while a process gathers that shard

Records lie **in the order in which the epoch visits the samples**: the place of a sample is its position in
:class:`~kornia_tinyvit.data.order.EpochOrder`. Saving and training go through the shards from front to back, and the
two partners of a mixup lie in one. A shard is a safetensors file with a tensor per field. N records of a
:class:`LabelStore` are ``classes`` :math:`(N, K)` of the smallest unsigned integers that hold them, ``probabilities``
:math:`(N, K)` float16 and ``checksums`` :math:`(N,)` uint32.

A shard is written whole, under a temporary name, and then renamed: where its file is, all of its records are, and they
never change. A process that is killed loses the shard it was gathering. A shard depends on nothing but the manifest and
the teacher, so two processes that write the same one write the same bytes; its lock only shares the work.
"""

from __future__ import annotations

import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load_file
from torch import Tensor

from kornia_tinyvit.data.order import EpochOrder
from kornia_tinyvit.distillation.manifest import MANIFEST_NAME, Manifest, StoreError
from kornia_tinyvit.files import locked, replacing, write_text

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

#: Whole numbers, one per sample.
Integers = NDArray[Any] | Tensor | Sequence[int]
Columns = dict[str, NDArray[Any]]

_MAX_MAPS = 4096  # the system allows a process 65,530
_MAX_HALF = 65504.0
_MAX_SUM = 1.01  # what rounding to half precision may make of a sum of 1
# Halves from 0 up are in the order of their bits, where negative ones, infinity and NaN are larger than all.
_MAX_BITS = np.float16(_MAX_SUM).view(np.uint16)
_MEND = "Delete it and run `kornia-tinyvit distill save` again, which writes what is missing."


class StoreMismatchError(StoreError):
    """A store was made from something else than what it is now asked to belong to."""


class MissingRecordsError(StoreError):
    """The requested records are missing."""


class Records(NamedTuple):
    """Records of a :class:`LabelStore`, in the types they are stored in, as less then goes to a device.

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
    """Records of a :class:`FeatureStore`.

    Args:
        features: :math:`(B, ...)`, float16.
        checksums: of the augmentation each was made with, :math:`(B,)`, int64 in [0, 2**32).
    """

    features: Tensor
    checksums: Tensor


_Store = TypeVar("_Store", bound="RecordStore")


class RecordStore(ABC):
    """A store of one record per sample and epoch: what the stores of labels and of features share.

    Any number of processes, and of threads, may have a store open. It can be pickled, and is opened anew by the process
    it comes to. As a context it lets go of its files at the end.

    Args:
        path: the store's folder.

    Raises:
        StoreError: if there is no store, its manifest is damaged, or it holds records of another kind.

    Attributes:
        path: the store's folder.
        manifest: what its records were made from.
        order: the order in which epochs visit the samples.
    """

    _kind: ClassVar[str]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        if self.manifest.kind != self._kind:
            raise StoreError(
                f"{self.path} holds {self.manifest.kind}, which {type(self).__name__} does not read; it reads "
                f"{self._kind}."
            )
        self.order = EpochOrder(self.manifest.num_samples, self.manifest.seed)
        self._maps: dict[tuple[int, int], tuple[NDArray[Any], ...]] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls: type[_Store], path: str | Path, manifest: Manifest) -> _Store:
        """Make a store, or open the one that is there, which any number of processes may do at once.

        Args:
            path: the store's folder, which is made.
            manifest: what the records will be made from.

        Raises:
            StoreMismatchError: if a store is there that was made from something else; the message states what differs.
            OSError: if it cannot be made.
        """
        target = Path(path) / MANIFEST_NAME
        if not target.exists():
            temporary = target.with_name(f".{MANIFEST_NAME}.{secrets.token_hex(4)}")
            write_text(temporary, manifest.to_json())
            with suppress(FileExistsError):  # another process was first; whether it wants the same is compared next
                target.hardlink_to(temporary)
            temporary.unlink()
        store = cls(path)
        store.require(asdict(manifest))
        return store

    def __enter__(self: _Store) -> _Store:
        return self

    def __exit__(self, *error: object) -> None:
        self._maps.clear()

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path]]:
        return type(self), (self.path,)

    def require(self, expected: Mapping[str, Any]) -> None:
        """Reject a store that was made from something else than what a pipeline has.

        Args:
            expected: what the pipeline has, under names of :class:`Manifest`; what it leaves out may be anything.

        Raises:
            StoreMismatchError: with each difference.
        """
        differences = self.manifest.differences(expected)
        if differences:
            mend = "Use the settings of the store" if self.epochs else "It holds no records yet: delete the folder"
            raise StoreMismatchError(
                f"{self.path} was made from something else:\n  " + ";\n  ".join(differences) + f".\n{mend}, or use "
                "another folder."
            )

    @property
    def epochs(self) -> list[int]:
        """The epochs of which there is a shard, in order; not all of their records need be written."""
        found = {path.parent.name.removeprefix("epoch-") for path in self.path.glob("epoch-*/shard-*.safetensors")}
        return sorted(int(number) for number in found if number.isdecimal())

    def missing_shards(self, epoch: int) -> list[int]:
        """Return the shards of an epoch that are still to be written, in order.

        Raises:
            StoreError: if one that is there is damaged.
        """
        missing, last = [], self.manifest.num_shards - 1
        sizes = self.manifest.shard_bytes(0), self.manifest.shard_bytes(last)
        for shard in range(last + 1):
            path = self._shard_path(epoch, shard)
            if not path.exists():
                missing.append(shard)
            elif path.stat().st_size != sizes[shard == last]:
                self._open(epoch, shard)  # raises what is wrong
        return missing

    def missing(self, epoch: int) -> NDArray[np.int64]:
        """Return the samples of an epoch that are still to be written, in the epoch's order, :math:`(M,)`."""
        shards = [self._samples(epoch, shard) for shard in self.missing_shards(epoch)]
        return np.concatenate([np.empty(0, np.int64), *shards])

    def valid_count(self, epoch: int) -> int:
        """Return how many records of an epoch are written."""
        return self.manifest.num_samples - sum(map(self.manifest.records_in, self.missing_shards(epoch)))

    def is_complete(self, epoch: int) -> bool:
        """Return whether an epoch has all its records."""
        return not self.missing_shards(epoch)

    @abstractmethod
    def read(self, epoch: int, indices: Integers) -> Records | FeatureRecords:
        """Return what was stored about samples.

        Args:
            epoch: in [0, 2**32).
            indices: the samples, :math:`(B,)`, in any order.

        Raises:
            MissingRecordsError: if any of them has not been written.
            IndexError: if there is no such sample.
            StoreError: if a shard is damaged.
        """

    @contextmanager
    def writer(self, epoch: int, shard: int) -> Iterator[ShardWriter]:
        """Take a shard for writing, to the exclusion of all others, until the block or the process ends.

        Args:
            epoch: in [0, 2**32).
            shard: in [0, ``manifest.num_shards``).

        Yields:
            What gathers the shard and writes its file with the last record; what is gathered before is lost if the
            block ends.

        Raises:
            BlockingIOError: if it is being written.
            StoreError: if there is no such shard, or it is damaged.
        """
        samples, path = self._samples(epoch, shard), self._shard_path(epoch, shard)
        lock = path.with_suffix(".lock")
        with locked(lock, f"Shard {shard} of epoch {epoch} ({path}) is being written; take another one, or wait"):
            for unfinished in path.parent.glob(f".{path.name}.*"):  # of a killed process
                unfinished.unlink(missing_ok=True)
            writer = ShardWriter(self, path, samples if self._open(epoch, shard) is None else samples[:0])
            yield writer
        with suppress(OSError):  # whoever holds it by now goes on
            lock.unlink()

    def write(self, epoch: int, indices: Integers, values: Tensor, checksums: Integers) -> int:
        """Write whole shards, of which those that are there stay as they are; :meth:`writer` gathers one from batches.

        Args:
            epoch: in [0, 2**32).
            indices: all samples of one or more shards, :math:`(B,)`, in any order.
            values: what the teacher returned. For labels: probabilities of all classes, not negative and with a sum of
                at most 1.01, :math:`(B, num_classes)`, of which the ``top_k`` largest are kept. For features: finite
                and of at most 65504, the largest float16, :math:`(B, *shape)`. Of any floating type, on any device.
            checksums: of the augmentations, in [0, 2**32), :math:`(B,)`.

        Returns:
            How many of them were not there before.

        Raises:
            BlockingIOError: if a shard is being written by another process.
            StoreError: if something has a wrong shape or value, or samples of a shard are left out.
            IndexError: if there is no such sample.
            OSError: if the disk has no room.
        """
        samples = _integers(indices, "indices")
        columns = self._encode(samples, values, checksums)
        shards, rows = self._locate(epoch, samples)
        written = 0
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            if len(chosen) != (count := self.manifest.records_in(shard)):
                raise StoreError(
                    f"Got {len(chosen)} of the {count} records of shard {shard} of epoch {epoch}; a shard is written "
                    "whole. Take its samples from order.permutation(epoch), or gather it from batches with writer()."
                )
            chosen = chosen[np.argsort(rows[chosen])]
            with self.writer(epoch, shard) as writer:
                if len(writer.missing()):
                    written += writer._put(samples[chosen], {name: each[chosen] for name, each in columns.items()})
        return written

    @abstractmethod
    def _stored(self, samples: NDArray[np.int64], values: Tensor) -> Columns:
        """Check what a teacher returned and convert it to what is stored of it."""

    def _encode(self, samples: NDArray[np.int64], values: Tensor, checksums: Integers) -> Columns:
        sums = _integers(checksums, "checksums")
        if len(sums) != len(samples):
            raise StoreError(f"Got {len(sums)} checksums for {len(samples)} samples; each needs one.")
        if len(sums) and not 0 <= sums.min() <= sums.max() < 2**32:
            raise StoreError(f"checksums must be in [0, 2**32); got {sums.min()} to {sums.max()}.")
        return {**self._stored(samples, values), "checksums": sums.astype(np.uint32)}

    def _read(self, epoch: int, indices: Integers) -> list[Tensor]:
        """Return the fields of samples in the manifest's order, the checksums as int64."""
        samples = _integers(indices, "indices")
        shards, rows = self._locate(epoch, samples)
        # Sorted by their shards, so that each is read once; numpy sorts numbers of 16 bits by counting.
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
                f"{len(lost)} of {len(samples)} records asked for are not in epoch {epoch} of {self.path} (samples "
                f"{', '.join(map(str, lost[:5]))}{', ...' * (len(lost) > 5)}), which has {self.valid_count(epoch)} of "
                f"{self.manifest.num_samples}. Run `kornia-tinyvit distill save` on this store again: it resumes and "
                "writes what is missing."
            )
        if len(numbers) > 1:
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            found = [column.take(back, 0) for column in found]
        return [torch.from_numpy(column) for column in (*found[:-1], found[-1].astype(np.int64))]

    def _locate(self, epoch: int, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return in which shard each sample's record lies, and as which one there."""
        with self._lock:  # as another epoch's order may be drawn
            positions = self.order.positions(epoch, samples)
        shards, rows = np.divmod(positions, self.manifest.shard_records)
        return shards, rows

    def _samples(self, epoch: int, shard: int) -> NDArray[np.int64]:
        """Return the samples of a shard in the epoch's order."""
        start, count = shard * self.manifest.shard_records, self.manifest.records_in(shard)
        with self._lock:
            return self.order.permutation(epoch)[start : start + count].copy()

    def _open(self, epoch: int, shard: int) -> tuple[NDArray[Any], ...] | None:
        """Return the fields of a shard, mapped from its file; None if it has not been written."""
        path, count = self._shard_path(epoch, shard), self.manifest.records_in(shard)
        try:
            columns = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        except FileNotFoundError:
            return None
        except (SafetensorError, TypeError) as error:
            raise StoreError(f"{path} is damaged: {error}. {_MEND}") from error
        wanted = {name: (dtype, (count, *shape)) for name, (dtype, shape) in self.manifest.fields.items()}
        if {name: (column.dtype, column.shape) for name, column in columns.items()} != wanted:
            raise StoreError(f"{path} is damaged: it has other tensors than {wanted}. {_MEND}")
        if len(self._maps) >= _MAX_MAPS:
            self._maps.clear()
        return self._maps.setdefault((epoch, shard), tuple(columns[name] for name in wanted))

    def _shard_path(self, epoch: int, shard: int) -> Path:
        return self.path / f"epoch-{epoch:05d}" / f"shard-{shard:05d}.safetensors"


class ShardWriter:
    """Gathers the records of a shard and writes its file with the last of them; :meth:`RecordStore.writer` makes it."""

    def __init__(self, store: RecordStore, path: Path, samples: NDArray[np.int64]) -> None:
        self._store, self._path, self._samples = store, path, samples
        self._gathered: list[Columns] = []
        self._count = 0

    def missing(self) -> NDArray[np.int64]:
        """Return the samples that are still to be written, in the epoch's order, :math:`(M,)`; none if it is there."""
        return self._samples[self._count :]

    def write(self, indices: Integers, values: Tensor, checksums: Integers) -> int:
        """Gather the next records of the shard; see :meth:`RecordStore.write`.

        Args:
            indices: the samples, the first ones of :meth:`missing`, :math:`(B,)`.
            values: probabilities :math:`(B, num_classes)` or features :math:`(B, ...)`.
            checksums: of the augmentations, in [0, 2**32), :math:`(B,)`.

        Returns:
            How many there were.

        Raises:
            StoreError: if there are other samples, or something has a wrong shape or value.
            OSError: if the disk has no room.
        """
        samples = _integers(indices, "indices")
        return self._put(samples, self._store._encode(samples, values, checksums))

    def _put(self, samples: NDArray[np.int64], columns: Columns) -> int:
        if not np.array_equal(samples, self.missing()[: len(samples)]):
            raise StoreError(f"{self._path} takes each of its samples once, in the epoch's order; see missing().")
        self._gathered.append(columns)
        self._count += len(samples)
        if self._count == len(self._samples):
            whole = {name: np.concatenate([each[name] for each in self._gathered]) for name in columns}
            with replacing(self._path) as temporary:
                temporary.write_bytes(save(whole))
        return len(samples)


class LabelStore(RecordStore):
    """A store of a teacher's most probable classes.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> manifest = Manifest(num_samples=3, num_classes=4, top_k=2, seed=7, shard_records=2)
        >>> probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.125]])
        >>> store = LabelStore.create(folder.name, manifest)
        >>> store.order.permutation(0)
        array([2, 1, 0])
        >>> store.write(epoch=0, indices=[2, 1], values=probabilities, checksums=[11, 12])
        2
        >>> store.read(epoch=0, indices=[1]).classes
        tensor([[0, 1]], dtype=torch.uint8)
        >>> store.missing(epoch=0)
        array([0])
    """

    _kind = "logits"

    def read(self, epoch: int, indices: Integers) -> Records:
        """Return what was stored about samples; see :meth:`RecordStore.read`."""
        found = Records(*self._read(epoch, indices))
        classes, bits = found.classes.numpy(), found.probabilities.numpy().view(np.uint16)
        if classes.max(initial=0) >= self.manifest.num_classes or bits.max(initial=0) > _MAX_BITS:
            wrong = (classes >= self.manifest.num_classes) | (bits > _MAX_BITS)
            sample = _integers(indices, "indices")[wrong.any(1)][:1]
            path = self._shard_path(epoch, int(self._locate(epoch, sample)[0][0]))
            raise StoreError(f"{path} is damaged: the record of sample {sample[0]} is that of no teacher. {_MEND}")
        return found

    def _stored(self, samples: NDArray[np.int64], values: Tensor) -> Columns:
        values = _floating(values, "probabilities", (len(samples), self.manifest.num_classes))
        lowest, total = values.amin(1).float(), values.sum(1, dtype=torch.float32)
        good = (lowest >= 0) & (total <= _MAX_SUM)  # no comparison with NaN holds
        if not good.all():
            row = int(good.logical_not().nonzero()[0])
            raise StoreError(
                f"The probabilities of sample {samples[row]} have the minimum {lowest[row]:.4g} and the sum "
                f"{total[row]:.4g}; expected none below 0, no NaN, and a sum of at most {_MAX_SUM}. Pass "
                "softmax(logits), not logits."
            )
        top, classes = values.abs().topk(self.manifest.top_k, dim=1)  # abs takes the sign from -0
        index, _ = self.manifest.fields["classes"]
        return {"classes": classes.cpu().numpy().astype(index), "probabilities": top.half().cpu().numpy()}


class FeatureStore(RecordStore):
    """A store of a teacher's features: one float16 array of the manifest's shape for each sample."""

    _kind = "features"

    def read(self, epoch: int, indices: Integers) -> FeatureRecords:
        """Return what was stored about samples; see :meth:`RecordStore.read`."""
        return FeatureRecords(*self._read(epoch, indices))

    def _stored(self, samples: NDArray[np.int64], values: Tensor) -> Columns:
        values = _floating(values, "features", (len(samples), *self.manifest.shape))
        largest = values.abs().flatten(1).amax(1).float()
        good = largest <= _MAX_HALF  # no comparison with NaN holds
        if not good.all():
            row = int(good.logical_not().nonzero()[0])
            raise StoreError(
                f"The features of sample {samples[row]} reach {largest[row]:.6g}; float16 holds finite values up to "
                f"{_MAX_HALF:.0f}. Scale or normalize them first."
            )
        return {"features": values.half().cpu().numpy()}


def _integers(values: Integers, name: str) -> NDArray[np.int64]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):  # an empty list has no type of its own
        raise StoreError(f"{name} must be whole numbers of shape (B,); got {array.dtype} of shape {array.shape}.")
    return array.astype(np.int64, copy=False)


def _floating(values: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != shape:
        got = f"{values.dtype} of {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise StoreError(f"{name} must be a floating tensor of shape {shape}; got {got}.")
    return values.detach()
