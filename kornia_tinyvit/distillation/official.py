"""Read teacher logits that the original implementation saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit.distillation.store import StoreError

__all__ = ["OfficialLogits", "OfficialRecords"]


class OfficialRecords(NamedTuple):
    """What was saved about a batch, in the types it is stored in.

    Args:
        seeds: of the augmentations, :math:`(B,)`, int32.
        classes: the most probable classes, :math:`(B, K)`, uint16; indexing takes ``classes.long()``.
        probabilities: theirs, :math:`(B, K)`, float16.
    """

    seeds: Tensor
    classes: Tensor
    probabilities: Tensor


class OfficialLogits:
    """Logits in the layout of the original implementation: a folder of folders ``logits_top{K}_epoch{E}``.

    Line i of a ``rankN-keys.txt`` there names record i of ``rankN-values.bin``: an int32 seed, K int16 classes and K
    float16 probabilities, little-endian. Where ranks repeat a key, as the original's sampler does to give each rank as
    many samples, the first rank's record counts. The keys of one epoch are held in memory at a time.

    Args:
        path: the folder.

    Raises:
        StoreError: if there are no such folders, or they differ in K.

    Attributes:
        path: the folder.
        epochs: the epochs that were saved, in order.
        top_k: how many classes a record keeps.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        matches = [re.fullmatch(r"logits_top(\d+)_epoch(\d+)", folder.name) for folder in self.path.glob("logits_*/")]
        found = sorted((int(match[2]), int(match[1])) for match in matches if match)
        sizes = sorted({top_k for _, top_k in found})
        if len(sizes) != 1 or sizes[0] < 1:
            raise StoreError(
                f"{self.path} must hold folders logits_topK_epochE, of one K; it has "
                + (f"K = {', '.join(map(str, sizes))}." if sizes else "none.")
            )
        self.top_k = sizes[0]
        self.epochs = [epoch for epoch, _ in found]
        self._record = np.dtype(
            [("seed", "<i4"), ("classes", "<u2", (self.top_k,)), ("probabilities", "<f2", (self.top_k,))]
        )
        self._epoch: int | None = None
        self._ranks: list[NDArray[np.void]] = []
        self._starts = np.empty(0, np.int64)
        self._places: dict[str, int] = {}

    def keys(self, epoch: int) -> list[str]:
        """Return the keys of an epoch, rank after rank as they were saved, each once.

        Raises:
            StoreError: if the epoch was not saved, or a file is missing or damaged.
        """
        self._open(epoch)
        return list(self._places)

    def read(self, epoch: int, keys: Sequence[str]) -> OfficialRecords:
        """Return what was saved under keys.

        Args:
            epoch: one of ``epochs``.
            keys: in any order.

        Raises:
            StoreError: if a key or the epoch was not saved, or a file is missing or damaged.
        """
        self._open(epoch)
        try:
            places = np.array([self._places[key] for key in keys], dtype=np.int64)
        except KeyError as error:
            raise StoreError(
                f"{self._folder(epoch)} has no record of {error.args[0]!r}; the first of its "
                f"{len(self._places)} keys is {next(iter(self._places), None)!r}."
            ) from error
        ranks = np.searchsorted(self._starts, places, side="right") - 1
        records = np.empty(len(places), np.dtype((np.void, self._record.itemsize)))
        for rank in np.unique(ranks).tolist():
            chosen = np.flatnonzero(ranks == rank)
            records[chosen] = self._ranks[rank].take(places[chosen] - self._starts[rank])
        fields = records.view(self._record)
        return OfficialRecords(
            torch.from_numpy(fields["seed"].astype(np.int32)),
            torch.from_numpy(fields["classes"].astype(np.uint16)),
            torch.from_numpy(fields["probabilities"].astype(np.float16)),
        )

    def _folder(self, epoch: int) -> Path:
        return self.path / f"logits_top{self.top_k}_epoch{epoch}"

    def _open(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        if epoch not in self.epochs:
            raise StoreError(f"{self.path} has no epoch {epoch}; it has {', '.join(map(str, self.epochs))}.")
        names = {path.name for path in self._folder(epoch).iterdir()}
        count = sum(re.fullmatch(r"rank\d+-keys\.txt", name) is not None for name in names)
        if not count:
            raise StoreError(f"{self._folder(epoch)} holds no rank0-keys.txt.")
        places: dict[str, int] = {}
        ranks, starts, total = [], [], 0
        for rank in range(count):
            keys, records = self._open_rank(epoch, rank, names)
            for place, key in enumerate(keys, total):
                places.setdefault(key, place)
            ranks.append(records)
            starts.append(total)
            total += len(keys)
        self._ranks, self._starts, self._places = ranks, np.array(starts, dtype=np.int64), places
        self._epoch = epoch  # only now, so that a damaged epoch is refused each time

    def _open_rank(self, epoch: int, rank: int, names: set[str]) -> tuple[list[str], NDArray[np.void]]:
        folder = self._folder(epoch)
        for name in (f"rank{rank}-keys.txt", f"rank{rank}-values.bin"):
            if name not in names:
                raise StoreError(f"{folder} holds no {name}, though other ranks' files; copy it whole from its origin.")
        keys = (folder / f"rank{rank}-keys.txt").read_text(encoding="utf-8").removesuffix("\n")
        lines = keys.split("\n") if keys else []
        values, size = folder / f"rank{rank}-values.bin", self._record.itemsize
        found = values.stat().st_size
        if found != len(lines) * size:
            raise StoreError(
                f"{values} is damaged: it has {found} bytes, and the {len(lines)} keys beside it need "
                f"{len(lines) * size}. Copy it anew from its origin, or save that epoch again."
            )
        opaque = np.dtype((np.void, size))  # which copies faster than a record of fields
        return lines, np.memmap(values, opaque, "r") if lines else np.empty(0, opaque)
