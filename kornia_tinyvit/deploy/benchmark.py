"""How fast engines run a network on this machine, and how far its answers stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.deploy.accuracy import compare
from kornia_tinyvit.deploy.graph import synthetic_images
from kornia_tinyvit.deploy.measurement import as_step, count_flops, interleaved, matrix_peak
from kornia_tinyvit.deploy.optimization import DTYPES as KNOWN_DTYPES
from kornia_tinyvit.deploy.optimization import Candidates, Optimized
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import progress_bar

__all__ = ["DTYPES", "Benchmark", "LabeledImages", "Row", "read_images"]

#: The types that engines compute in, by name.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KNOWN_DTYPES}


@dataclass(frozen=True)
class LabeledImages:
    """Images as a network takes them, some to calibrate int8 on and others to judge it by.

    Args:
        calibration: images :math:`(K, C, S, S)`.
        images: other images :math:`(N, C, S, S)`.
        labels: their classes :math:`(N,)`.
    """

    calibration: Tensor
    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches :math:`(B, C, S, S)` with their classes :math:`(B,)`.

        All are full, as an engine may have to get ready for any other shape; a small set makes one smaller batch.
        """
        for start in range(0, max(len(self.images) - size, 0) + 1, size):
            yield self.images[start : start + size], self.labels[start : start + size]


def read_images(classifier: ImageClassifier, data: str | Path, limit: int, calibration: int = 256) -> LabeledImages:
    """Read labeled images and prepare them for a classifier's network, drawn with a fixed seed.

    Args:
        classifier: whose preprocessing is applied, and whose classes the labels become.
        data: what :class:`~kornia_tinyvit.data.classification.ClassificationDataset` takes.
        limit: how many images to judge by, at most.
        calibration: how many others to calibrate on, at most; of a small data set half of it.

    Raises:
        ValueError: if there are fewer than two images, or they have classes that the network does not know.
    """
    dataset = ClassificationDataset.open(data).with_classes(classifier.class_names)
    if len(dataset) < 2:
        raise ValueError(f"{data} has one image; calibrating and judging take at least one each.")
    if dataset.num_classes > len(classifier.class_names):
        raise ValueError(f"The data has {dataset.num_classes} classes, the network {len(classifier.class_names)}.")
    kept = min(calibration, len(dataset) // 2)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: kept + limit].tolist()
    prepare = classifier.preprocessing
    device = next(classifier.parameters()).device
    photos = torch.cat([prepare(dataset[row][0][None].to(device)) for row in rows])
    labels = torch.tensor([dataset.labels[row] for row in rows[kept:]])
    return LabeledImages(photos[:kept], photos[kept:], labels)


@dataclass
class Row:
    """An engine that runs a network in a type at a batch size: what it takes, or the reason why it does not run.

    Shares are in per cent; the error is the mean relative one.
    """

    engine: str
    dtype: str
    batch: int
    skipped: str | None = None
    ms: float | None = None
    images_per_second: float | None = None
    peak_fraction: float | None = None
    warmup_s: float | None = None
    agreement: float | None = None
    error: float | None = None
    top1: float | None = None


class Benchmark:
    """Measures a network in engines.

    Args:
        network: the network.
        method: which of its methods.
        images: what to calibrate int8 on and to judge by.
        judged: whether to judge.

    Attributes:
        flops: floating point operations for an image.
        peaks: what :func:`~kornia_tinyvit.deploy.measurement.matrix_peak` returned for the types that were measured.
        top1: right answers of the network itself in per cent; ``None`` if nothing was judged by classes.
    """

    def __init__(
        self, network: TinyViT, method: str = "forward", photos: LabeledImages | None = None, judged: bool = True
    ) -> None:
        self.network = network
        self.method = method
        self.photos = photos
        self.judged = judged and photos is not None
        self.device = next(network.parameters()).device
        self.flops = count_flops(getattr(network, method), synthetic_images(network.config).to(self.device))
        self.peaks: dict[str, float | None] = {}
        self.top1: float | None = None

    def measure(self, rows: Sequence[Row], repetitions: int = 15, progress: bool = False) -> None:
        """Fill in rows, sorted by their batch size: those of one run in turn. Rows that are refused stay as they are.

        Args:
            rows: the rows.
            repetitions: timed runs of each.
            progress: show which row is made ready.
        """
        calibration = () if self.photos is None else self.photos.calibration.split(16)
        candidates = Candidates(self.network, self.method, calibration=calibration)
        with progress_bar(progress) as bar:
            task = bar.add_task("", total=len(rows))
            for batch, group in itertools.groupby(rows, key=lambda row: row.batch):
                images = synthetic_images(self.network.config, batch).to(self.device)
                same, steps = list(group), {}
                for number, row in enumerate(same):
                    bar.update(task, description=f"{row.engine} {row.dtype}, batch {batch}")
                    fast = self._make(row, candidates, images)
                    if fast is not None:
                        steps[number] = as_step(fast, images)
                    bar.advance(task)
                bar.update(task, description=f"timing, batch {batch}")
                for number, seconds in interleaved(steps, repetitions).items():
                    self._fill_in(same[number], seconds)

    def _make(self, row: Row, candidates: Candidates, images: Tensor) -> Optimized | None:
        """Make what a row measures, and judge it; a reason why it cannot be made is written into the row."""
        if row.skipped is not None:
            return None
        try:
            fast = candidates.make(row.engine, DTYPES[row.dtype], images)
        except (ImportError, ValueError, RuntimeError) as error:  # an engine that fails must not lose the others' rows
            row.skipped = (str(error).strip() or type(error).__name__).splitlines()[0]
            return None
        row.warmup_s = fast.warmup_s
        if self.judged and self.photos is not None:
            found = compare(getattr(self.network, self.method), fast, self.photos.batches(row.batch))
            row.agreement, row.error, row.top1 = found.agreement, found.mean_error, found.top1_candidate
            self.top1 = found.top1_reference
        return fast

    def _fill_in(self, row: Row, seconds: float) -> None:
        if row.dtype not in self.peaks:
            self.peaks[row.dtype] = matrix_peak(DTYPES[row.dtype], self.device)
        peak = self.peaks[row.dtype]
        row.ms = 1000 * seconds
        row.images_per_second = row.batch / seconds
        row.peak_fraction = None if peak is None else 100 * row.batch * self.flops / seconds / 1e9 / peak
