"""Benchmark of a network: throughput, warm-up and agreement per engine, dtype and batch size."""

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
from kornia_tinyvit.deploy.graph import build_graph, synthetic_images
from kornia_tinyvit.deploy.measurement import as_step, count_flops, interleaved, matrix_peak
from kornia_tinyvit.deploy.optimization import DTYPES as KNOWN_DTYPES
from kornia_tinyvit.deploy.optimization import Candidates, Optimized
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import ProgressBar

__all__ = ["DTYPES", "Benchmark", "LabeledImages", "Row", "read_images"]

#: Dtypes of the engines, by name.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KNOWN_DTYPES}


@dataclass(frozen=True)
class LabeledImages:
    """Preprocessed images for the calibration of int8, and labeled ones for the evaluation.

    Args:
        calibration: images :math:`(K, C, S, S)`.
        images: other images :math:`(N, C, S, S)`.
        labels: class indices :math:`(N,)` of ``images``.
    """

    calibration: Tensor
    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images :math:`(B, C, S, S)` and class indices :math:`(B,)`.

        A partial last batch is left out, since an engine may need another warm-up for its shape; fewer images than
        ``size`` make one smaller batch.
        """
        for start in range(0, max(len(self.images) - size, 0) + 1, size):
            yield self.images[start : start + size], self.labels[start : start + size]


def read_images(classifier: ImageClassifier, data: str | Path, limit: int, calibration: int = 256) -> LabeledImages:
    """Read a random sample of labeled images, with a fixed seed, and preprocess it for a classifier.

    Args:
        classifier: the classifier whose preprocessing and class names are used.
        data: path for :meth:`~kornia_tinyvit.data.classification.ClassificationDataset.open`; of divided data the
            validation split.
        limit: maximum number of images for the evaluation.
        calibration: maximum number of images for the calibration; at most half of the dataset is used.

    Raises:
        ValueError: if there are fewer than two images, or classes that the classifier does not have.
    """
    dataset = ClassificationDataset.open(data, "val").with_classes(classifier.class_names)
    if len(dataset) < 2:
        raise ValueError(f"{data} has one image; calibration and evaluation need at least one each.")
    if dataset.num_classes > len(classifier.class_names):
        raise ValueError(f"The data has {dataset.num_classes} classes, the network {len(classifier.class_names)}.")
    kept = min(calibration, len(dataset) // 2)
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: kept + limit].tolist()
    device = next(classifier.parameters()).device
    images = torch.cat([classifier.preprocessing(dataset[row][0][None].to(device)) for row in rows])
    labels = torch.tensor([dataset.labels[row] for row in rows[kept:]])
    return LabeledImages(images[:kept], images[kept:], labels)


@dataclass
class Row:
    """Measurements of one engine, dtype and batch size, or the reason why there are none.

    Args:
        engine: name of the engine.
        dtype: a name of :data:`DTYPES`.
        batch: batch size.
        skipped: why the combination was not measured; ``None`` if it was.
        ms: median latency of a batch in milliseconds.
        images_per_second: throughput.
        peak_fraction: percentage of the :func:`~kornia_tinyvit.deploy.measurement.matrix_peak`.
        warmup_s: seconds until the first output, see :class:`~kornia_tinyvit.deploy.Optimized`.
        agreement: percentage of images with the network's own top-1 class.
        error: mean relative error.
        top1: top-1 accuracy in percent.
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
    """Measures a network in several engines.

    Args:
        network: the network.
        method: the method to run, see :func:`~kornia_tinyvit.deploy.optimize`.
        images: images for the calibration of int8 and for the comparison with the network.
        compared: whether to compare the outputs with the network's; it needs ``images``.

    Attributes:
        flops: floating-point operations per image.
        peaks: :func:`~kornia_tinyvit.deploy.measurement.matrix_peak` of each measured dtype.
        top1: top-1 accuracy of the network itself in percent; ``None`` if it was not measured.
    """

    def __init__(
        self, network: TinyViT, method: str = "forward", images: LabeledImages | None = None, compared: bool = True
    ) -> None:
        self.network = network
        self.method = method
        self.images = images
        self.compared = compared and images is not None
        self.device = next(network.parameters()).device
        self.flops = count_flops(getattr(network, method), synthetic_images(network.config).to(self.device))
        self.peaks: dict[str, float | None] = {}
        self.top1: float | None = None

    def measure(self, rows: Sequence[Row], repetitions: int = 15, progress: bool = False) -> None:
        """Fill in rows in place; rows of the same batch size are timed interleaved.

        Args:
            rows: the rows, sorted by batch size. Those with ``skipped`` set are left out.
            repetitions: timed runs of each.
            progress: show a progress bar.
        """
        calibration = () if self.images is None else self.images.calibration.split(16)
        candidates = Candidates(build_graph(self.network, self.method), calibration)
        pending = [row for row in rows if row.skipped is None]
        with ProgressBar("benchmark", len(pending), progress) as bar:
            for batch, group in itertools.groupby(pending, key=lambda row: row.batch):
                inputs = synthetic_images(self.network.config, batch).to(self.device)
                same, steps = list(group), {}
                for number, row in enumerate(same):
                    bar.step(0, f"{row.engine} {row.dtype}, batch {batch}")
                    optimized = self._prepare(row, candidates, inputs)
                    if optimized is not None:
                        steps[number] = as_step(optimized, inputs)
                    bar.step()
                bar.step(0, f"timing, batch {batch}")
                for number, seconds in interleaved(steps, repetitions).items():
                    self._fill_in(same[number], seconds)

    def _prepare(self, row: Row, candidates: Candidates, inputs: Tensor) -> Optimized | None:
        """Optimize the network for a row and compare it; if that fails, set ``skipped`` and return ``None``."""
        try:
            optimized = candidates.make(row.engine, DTYPES[row.dtype], inputs)
        except (ImportError, ValueError, RuntimeError) as error:  # the other engines are still measured
            row.skipped = (str(error).strip() or type(error).__name__).splitlines()[0]
            return None
        row.warmup_s = optimized.warmup_s
        if self.compared and self.images is not None:
            found = compare(getattr(self.network, self.method), optimized, self.images.batches(row.batch))
            row.agreement, row.error, row.top1 = found.agreement, found.mean_error, found.top1_candidate
            self.top1 = found.top1_reference
        return optimized

    def _fill_in(self, row: Row, seconds: float) -> None:
        if row.dtype not in self.peaks:
            self.peaks[row.dtype] = matrix_peak(DTYPES[row.dtype], self.device)
        peak = self.peaks[row.dtype]
        row.ms = 1000 * seconds
        row.images_per_second = row.batch / seconds
        row.peak_fraction = None if peak is None else 100 * row.batch * self.flops / seconds / 1e9 / peak
