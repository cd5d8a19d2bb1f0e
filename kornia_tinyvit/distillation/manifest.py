"""What the records of a store were made from, and how they lie."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from kornia_tinyvit.files import describe_differences

__all__ = ["Manifest", "StoreError", "estimated_size", "readable_size"]

MANIFEST_NAME = "manifest.json"
_VERSION = 2
# Defaults: a kill loses little of a small data set, and a large one has few files, which random batches go through.
_SHARD_RECORDS, _SHARDS, _SHARD_BYTES = 8192, 48, 2**24
_LARGEST_SHARD = 2**31


class StoreError(ValueError):
    """A store cannot be read or written, or was given what it does not take."""


@dataclass(frozen=True)
class Manifest:
    """What a store's records were made from and how they lie. Two stores with equal manifests hold equal records.

    Args:
        num_samples: samples of the data set, in [1, 2**32).
        num_classes: classes of the teacher (logits only).
        top_k: how many of them a record keeps, at most ``num_classes`` (logits only).
        seed: of the order and the augmentation, in [0, 2**64).
        augmentation: its settings; anything that JSON can express, as for the next two.
        data: fingerprint of the data set.
        teacher: name and checksum of the teacher.
        kind: ``"logits"`` or ``"features"``.
        shape: of a sample's features (features only).
        shard_records: records per shard; even, so that the partners of a mixup lie in one. A shard is gathered in
            memory and has at most 2 GiB. 0 takes 8,192 or a 48th of an epoch, whichever is more, up to 16 MiB.
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
    shard_records: int = 0
    version: int = _VERSION

    def __post_init__(self) -> None:
        for name in ("augmentation", "data", "teacher"):
            # As it would come back from the file: a tuple and the list that it becomes are no difference.
            try:
                value = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise StoreError(
                    f"{name} must be what JSON can say: text, finite numbers, lists and dicts; {error}."
                ) from error
            object.__setattr__(self, name, value)
        object.__setattr__(self, "shape", tuple(self.shape))
        self._check_values()
        if not self.shard_records:
            count = min(max(_SHARD_RECORDS, self.num_samples // _SHARDS), _SHARD_BYTES // self.record_bytes)
            object.__setattr__(self, "shard_records", max(2, count // 2 * 2))
        size = self.shard_records * self.record_bytes
        if size > _LARGEST_SHARD:
            raise StoreError(
                f"A shard of {self.shard_records} records would take {readable_size(size)} of memory; the limit is "
                f"{readable_size(_LARGEST_SHARD)}. Lower shard_records, or the size of a record."
            )

    def _check_values(self) -> None:
        if self.version != _VERSION:
            raise StoreError(f"This release reads and writes version {_VERSION} of the layout; got {self.version!r}.")
        if self.kind not in ("logits", "features"):
            raise StoreError(f"kind must be 'logits' or 'features'; got {self.kind!r}.")
        for name in ("num_samples", "num_classes", "top_k", "seed", "shard_records", "shape"):
            value = getattr(self, name)
            if not all(type(each) is int for each in (value if name == "shape" else (value,))):
                raise StoreError(f"{name} takes whole numbers only; got {value!r}.")
        if not 0 < self.num_samples < 2**32 or not 0 <= self.seed < 2**64:
            raise StoreError(
                f"num_samples must be in [1, 2**32) and seed in [0, 2**64); got {self.num_samples} and {self.seed}."
            )
        if self.shard_records < 0 or self.shard_records % 2:
            raise StoreError(f"shard_records must be even and not negative; got {self.shard_records}.")
        if self.kind == "logits":
            wanted = "logits needs top_k in [1, num_classes], num_classes up to 2**32 and no shape"
            good = 0 < self.top_k <= self.num_classes <= 2**32 and not self.shape
        else:
            wanted = "features needs the shape of a sample's features, and no top_k or num_classes"
            good = min(self.shape, default=0) > 0 and self.top_k == self.num_classes == 0
        if not good:
            got = f"top_k={self.top_k}, num_classes={self.num_classes} and shape={self.shape}"
            raise StoreError(f"A store of {wanted}; got {got}.")

    @property
    def fields(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of each tensor of a record, by name."""
        half = np.dtype(np.float16)
        if self.kind == "features":
            values = {"features": (half, self.shape)}
        else:
            index = np.min_scalar_type(self.num_classes - 1)
            values = {"classes": (index, (self.top_k,)), "probabilities": (half, (self.top_k,))}
        return {**values, "checksums": (np.dtype(np.uint32), ())}

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.fields.values())

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
        """Return the size of a shard's file in bytes, with the header as safetensors 0.8 writes it."""
        count, header, end = self.records_in(shard), {}, 0
        for name, (dtype, shape) in sorted(self.fields.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            start, end = end, end + count * dtype.itemsize * math.prod(shape)
            kind = f"{dtype.kind.upper()}{8 * dtype.itemsize}"
            header[name] = {"dtype": kind, "shape": [count, *shape], "data_offsets": [start, end]}
        return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return where a pipeline differs from what the store was made from.

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
    def from_json(cls, text: str) -> Manifest:
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: if it is damaged or of another version.
            TypeError: if something has another type.
        """
        content, names = json.loads(text), {each.name for each in fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise StoreError(f"A manifest has {', '.join(sorted(names))}")
        return cls(**content)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest of a store.

        Args:
            path: the store's folder.

        Raises:
            StoreError: if there is none, or it is damaged or of another version.
        """
        try:
            return cls.from_json((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{path} is no store: it has no {MANIFEST_NAME}. Make one with `kornia-tinyvit distill save`."
            ) from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            shown = str(path / MANIFEST_NAME)[-200:]
            raise StoreError(f"{shown!r} is damaged or cannot be read as a store's: {error}") from error


def estimated_size(num_samples: int, epochs: int, num_classes: int, top_k: int) -> int:
    """Return what the shards of a :class:`LabelStore` take on the disk in bytes.

    Args:
        num_samples: samples of the data set.
        epochs: how many epochs are stored.
        num_classes: classes of the teacher.
        top_k: how many of them a record keeps.

    Raises:
        StoreError: if a number is out of its range.

    Example:
        >>> round(estimated_size(1_281_167, 300, 1000, 10) / 2**30, 1)  # ImageNet-1k, GiB
        15.8
    """
    manifest = Manifest(num_samples, num_classes, top_k)
    last = manifest.num_shards - 1
    return epochs * (last * manifest.shard_bytes(0) + manifest.shard_bytes(last))


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
