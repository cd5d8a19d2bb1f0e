"""Manifest of a store: the origin and the layout of its records."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Manifest", "StoreError", "estimated_size", "readable_size"]

MANIFEST_NAME = "manifest.json"
_VERSION = 2
# Defaults: a killed process loses few records of a small data set, and a large data set has few files.
_SHARD_RECORDS, _SHARDS, _SHARD_BYTES = 8192, 48, 2**24
_LARGEST_SHARD = 2**31


class StoreError(ValueError):
    """A store is invalid or damaged, or an argument does not match it."""


@dataclass(frozen=True)
class Manifest:
    """Origin and layout of the records of a store. Stores with equal manifests hold equal records.

    Args:
        num_samples: number of samples of the data set, in [1, 2**32).
        num_classes: number of classes of the teacher (logits only), in [1, 2**32].
        top_k: number of probabilities per record, at most ``num_classes`` (logits only).
        seed: seed of the order and the augmentation, in [0, 2**64).
        augmentation: settings of the augmentation, JSON serializable.
        data: fingerprint of the data set, JSON serializable.
        teacher: name and checksum of the teacher, JSON serializable.
        kind: ``"logits"`` or ``"features"``.
        shape: shape of the features of one sample (features only).
        shard_records: number of records per shard; even, as a shard holds both images of a mixup pair. A shard is
            held in memory while it is written and is limited to 2 GiB. 0 selects the larger of 8,192 and
            ``num_samples / 48``, limited to 16 MiB.
        version: version of the layout.

    Raises:
        StoreError: if a number is out of range, the kind is unknown, or a value is not JSON serializable.
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
            try:  # tuples become lists, as in a manifest read from its file
                value = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise StoreError(f"{name} must be JSON serializable, with finite numbers: {error}.") from error
            object.__setattr__(self, name, value)
        object.__setattr__(self, "shape", tuple(self.shape))
        self._check_values()
        if not self.shard_records:
            count = min(max(_SHARD_RECORDS, self.num_samples // _SHARDS), _SHARD_BYTES // self.record_bytes)
            object.__setattr__(self, "shard_records", max(2, count // 2 * 2))
        size = self.shard_records * self.record_bytes
        if size > _LARGEST_SHARD:
            raise StoreError(
                f"A shard of {self.shard_records} records takes {readable_size(size)} of memory; the limit is "
                f"{readable_size(_LARGEST_SHARD)}. Reduce shard_records or the size of a record."
            )

    def _check_values(self) -> None:
        if self.version != _VERSION:
            raise StoreError(f"Expected version {_VERSION} of the layout; got {self.version!r}.")
        if self.kind not in ("logits", "features"):
            raise StoreError(f"kind must be 'logits' or 'features'; got {self.kind!r}.")
        for name in ("num_samples", "num_classes", "top_k", "seed", "shard_records", "shape"):
            value = getattr(self, name)
            if not all(type(each) is int for each in (value if name == "shape" else (value,))):
                raise StoreError(f"{name} takes integers only; got {value!r}.")
        if not 0 < self.num_samples < 2**32 or not 0 <= self.seed < 2**64:
            raise StoreError(
                f"num_samples must be in [1, 2**32) and seed in [0, 2**64); got {self.num_samples} and {self.seed}."
            )
        if self.shard_records < 0 or self.shard_records % 2:
            raise StoreError(f"shard_records must be even and at least 0; got {self.shard_records}.")
        if self.kind == "logits":
            expected = "logits requires top_k in [1, num_classes], num_classes up to 2**32 and no shape"
            valid = 0 < self.top_k <= self.num_classes <= 2**32 and not self.shape
        else:
            expected = "features requires the shape of one sample's features, and no top_k or num_classes"
            valid = min(self.shape, default=0) > 0 and self.top_k == self.num_classes == 0
        if not valid:
            got = f"top_k={self.top_k}, num_classes={self.num_classes} and shape={self.shape}"
            raise StoreError(f"A store of {expected}; got {got}.")

    @property
    def fields(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Data type and shape of each tensor of a record, by name."""
        half = np.dtype(np.float16)
        if self.kind == "features":
            values = {"features": (half, self.shape)}
        else:
            index = np.min_scalar_type(self.num_classes - 1)
            values = {"classes": (index, (self.top_k,)), "probabilities": (half, (self.top_k,))}
        return {**values, "checksums": (np.dtype(np.uint32), ())}

    @property
    def record_bytes(self) -> int:
        """Size of a record in bytes."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.fields.values())

    @property
    def num_shards(self) -> int:
        """Number of shards per epoch."""
        return -(-self.num_samples // self.shard_records)

    def records_in(self, shard: int) -> int:
        """Return the number of records of a shard: ``shard_records``, or the remainder for the last one.

        Args:
            shard: in [0, ``num_shards``).

        Raises:
            StoreError: if ``shard`` is out of range.
        """
        if not 0 <= shard < self.num_shards:
            raise StoreError(f"shard must be in 0 to {self.num_shards - 1}; got {shard}.")
        return min(self.shard_records, self.num_samples - shard * self.shard_records)

    def shard_bytes(self, shard: int) -> int:
        """Return the size of a shard's file in bytes, including the header that safetensors 0.8 writes.

        Args:
            shard: in [0, ``num_shards``).

        Raises:
            StoreError: if ``shard`` is out of range.
        """
        count, header, end = self.records_in(shard), {}, 0
        for name, (dtype, shape) in sorted(self.fields.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            start, end = end, end + count * dtype.itemsize * math.prod(shape)
            kind = f"{dtype.kind.upper()}{8 * dtype.itemsize}"
            header[name] = {"dtype": kind, "shape": [count, *shape], "data_offsets": [start, end]}
        return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end

    def to_json(self) -> str:
        """Return the content of the manifest's file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read the manifest of a store.

        Args:
            path: folder of the store.

        Raises:
            StoreError: if the manifest is missing, damaged or of another version.
        """
        try:
            content = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
            names = {each.name for each in fields(cls)}
            if not isinstance(content, dict) or content.keys() != names:
                raise StoreError(f"expected the fields {', '.join(sorted(names))}")
            return cls(**content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{path} is not a store: it has no {MANIFEST_NAME}. Create one with `kornia-tinyvit distill save`."
            ) from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            shown = str(path / MANIFEST_NAME)[-200:]
            raise StoreError(f"{shown!r} is damaged or cannot be read as a store's manifest: {error}") from error


def estimated_size(num_samples: int, epochs: int, num_classes: int, top_k: int) -> int:
    """Return the size of the shards of a :class:`LabelStore` in bytes.

    Args:
        num_samples: number of samples of the data set.
        epochs: number of stored epochs.
        num_classes: number of classes of the teacher.
        top_k: number of probabilities per record.

    Raises:
        StoreError: if a number is out of range.

    Example:
        >>> round(estimated_size(1_281_167, 300, 1000, 10) / 2**30, 1)  # ImageNet-1k, GiB
        15.8
    """
    manifest = Manifest(num_samples, num_classes, top_k)
    last = manifest.num_shards - 1
    return epochs * (last * manifest.shard_bytes(0) + manifest.shard_bytes(last))


def readable_size(size: int) -> str:
    """Format a number of bytes in powers of 1000 and of 1024.

    Args:
        size: number of bytes, at least 0.

    Returns:
        Both numbers with their units.

    Example:
        >>> readable_size(16_964_000_000)
        '16.96 GB (15.80 GiB)'
    """
    power = min(4, int(math.log2(max(size, 1))) // 10)
    if not power:
        return f"{size} bytes"
    unit = ("", "K", "M", "G", "T")[power]
    return f"{size / 1000**power:.2f} {unit.replace('K', 'k')}B ({size / 1024**power:.2f} {unit}iB)"
