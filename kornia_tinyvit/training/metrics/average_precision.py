"""COCO's measure of detectors, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kornia_tinyvit.data.detection import DetectionDataset
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.training.metrics.counts import Counts

__all__ = ["DetectionMetrics", "DetectionScores"]

_COUNTED = 100  # detections of an image, the surest, as COCO counts them
_MEASURES = ("map", "map50", "map75", "map_small", "map_medium", "map_large", "recall")
_ROW = 6  # class, score, left, top, width, height


@dataclass(frozen=True)
class DetectionScores:
    """What a detector does on images with boxes, in per cent, as cocodataset.org, "Detection evaluation", has it.

    A mean is NaN where nothing was to be found.

    Args:
        images: how many were looked at.
        objects: how many there were to find.
        map: mean over classes and over overlaps (IoU) of 50, 55, ..., 95 % of the average precision.
        map50: the same at an overlap of 50 %.
        map75: the same at an overlap of 75 %.
        map_small: ``map`` for objects below 32 x 32 pixels.
        map_medium: ``map`` for those between.
        map_large: ``map`` for those from 96 x 96 pixels on.
        recall: mean share of objects that are found, with 100 detections an image.
        per_class: ``map`` of each class, :math:`(K,)`; NaN for classes that do not occur.
    """

    images: int
    objects: int
    map: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    recall: float
    per_class: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as values that JSON can hold, rounded; ``None`` where there is none."""
        numbers = {name: value for name, value in vars(self).items() if name != "per_class"}
        return {name: None if math.isnan(value) else round(value, 4) for name, value in numbers.items()}


class DetectionMetrics(Counts):
    """Collect what was found on images, so that it adds up over processes, and compare it with what is there.

    Each image has a place of its own for its size and its 100 surest detections. That of an image that another
    process looked at is zero.

    Args:
        images: the images and their boxes.
    """

    def __init__(self, images: DetectionDataset) -> None:
        super().__init__((len(images), 2), (len(images), _COUNTED, _ROW), dtype=torch.float32)
        self.images = images
        self._sizes, self._found = self.parts

    def update(self, index: int, found: Tensor, height: int, width: int) -> None:
        """Add an image.

        Args:
            index: number of the image.
            found: what kornia's post-processing tells of it, :math:`(D, 6)`: class, score, left, top, width and
                height in pixels.
            height: rows of the image.
            width: its columns.
        """
        best = found[found[:, 1].argsort(descending=True)[:_COUNTED]]
        self._sizes[index] = torch.tensor([height, width])
        self._found[index] = 0
        self._found[index, : len(best)] = best.detach().to("cpu", torch.float32)

    def compute(self) -> DetectionScores:
        """Return the measures over all images so far.

        Raises:
            ValueError: if none was looked at.
            MissingExtraError: if pycocotools is missing.
        """
        seen = [index for index in range(len(self.images)) if self._sizes[index].all()]
        if not seen:
            raise ValueError("No images were evaluated.")
        truth: list[dict[str, Any]] = []
        results: list[list[float]] = []
        for index in seen:
            height, width = self._sizes[index].int().tolist()
            rows = zip(*(field.tolist() for field in self.images.objects(index, height, width)), strict=True)
            for (left, top, right, bottom), label, area, crowd in rows:
                truth.append({
                    "id": len(truth) + 1, "image_id": index, "category_id": label, "area": area, "iscrowd": int(crowd),
                    "bbox": [left, top, right - left, bottom - top],
                })  # fmt: skip
            results += [[index, *box, score, label] for label, score, *box in self._found[index].tolist() if score > 0]
        categories = [{"id": index, "name": name} for index, name in enumerate(self.images.class_names)]
        images = [{"id": index} for index in seen]
        dataset = {"images": images, "annotations": truth, "categories": categories}
        scores, per_class = _evaluate(dataset, results)
        objects = sum(not each["iscrowd"] for each in truth)
        named = dict(zip(_MEASURES, scores.tolist(), strict=True))
        return DetectionScores(images=len(seen), objects=objects, **named, per_class=per_class)


def _evaluate(truth: dict[str, Any], results: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return the scores of :class:`DetectionScores` and those of each class, in per cent, NaN where nothing was there.

    Args:
        truth: a data set as COCO has it.
        results: image, left, top, width, height, score and class of what was found.
    """
    with optional_imports("Measuring detectors needs pycocotools", "'kornia-tinyvit[train,hf]'"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # which tells each step
        there = COCO()
        there.dataset = truth
        there.createIndex()
        evaluation = COCOeval(there, there.loadRes(np.array(results)) if results else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = torch.from_numpy(evaluation.stats[[0, 1, 2, 3, 4, 5, 8]])  # the others: recall of fewer, or of some sizes
    precision = torch.from_numpy(evaluation.eval["precision"])  # (overlaps, recalls, classes, sizes, counts)
    per_class = precision[:, :, :, 0, -1].mean((0, 1))
    # COCO writes -1 where nothing was to be found.
    scores, per_class = (torch.where(each > -1, 100 * each, torch.nan) for each in (scores, per_class))
    return scores, per_class.float()
