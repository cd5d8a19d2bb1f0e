"""COCO's average precision of detectors, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit.data.detection import DetectionDataset
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.training.metrics.counts import Counts
from kornia_tinyvit.training.metrics.precision_recall import PrecisionRecall, measure_curve

__all__ = ["DetectionMetrics", "DetectionScores"]

_MAX_DETECTIONS = 100  # per image, sorted by descending score; COCO's number
_ROW = 6  # class, score, left, top, width, height


@dataclass(frozen=True)
class DetectionScores:
    """COCO's scores of a detector (cocodataset.org, "Detection evaluation"), in per cent; NaN without objects.

    Args:
        images: number of images.
        objects: number of objects that are no crowds.
        map: mAP, average precision averaged over classes and the IoU thresholds 0.5, 0.55, ..., 0.95.
        map50: mAP at IoU 0.5 (AP50).
        map75: mAP at IoU 0.75 (AP75).
        map_small: mAP of objects below 32 x 32 pixels.
        map_medium: mAP of objects from 32 x 32 to 96 x 96 pixels.
        map_large: mAP of objects above 96 x 96 pixels.
        recall: average recall with 100 detections per image (AR@100).
        per_class: average precision of each class, :math:`(K,)`; NaN for classes without objects.
        curve: precision-recall curve at IoU 0.5 of the detections of all classes, which are pooled.
        class_curves: that of each class.
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
    curve: PrecisionRecall
    class_curves: tuple[PrecisionRecall, ...]

    @property
    def best_f1(self) -> float:
        """Highest F1 score of :attr:`curve`, in per cent."""
        return self.curve.best_f1

    @property
    def threshold(self) -> float:
        """Score threshold of the highest F1 score, in [0, 1]."""
        return self.curve.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return the scores over all classes, rounded, as JSON types; ``None`` instead of NaN."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, (int, float))}
        numbers |= {"best_f1": self.best_f1, "threshold": self.threshold}
        return {name: None if math.isnan(value) else round(value, 4) for name, value in numbers.items()}


class DetectionMetrics(Counts):
    """Collect the detections of images for :class:`DetectionScores`.

    The counts hold the size and the 100 detections of the highest scores of each image; those of images on other ranks
    are zero.

    Args:
        images: the data set.
    """

    def __init__(self, images: DetectionDataset) -> None:
        super().__init__((len(images), 2), (len(images), _MAX_DETECTIONS, _ROW), dtype=torch.float32)
        self.images = images
        self._sizes, self._detections = self.parts

    def update(self, index: int, detections: Tensor, height: int, width: int) -> None:
        """Add an image.

        Args:
            index: index of the image.
            detections: output of kornia's ``DETRPostProcessor``, :math:`(D, 6)`: class index, score, left, top, width
                and height in pixels.
            height: height of the image.
            width: width of the image.
        """
        best = detections[detections[:, 1].argsort(descending=True)[:_MAX_DETECTIONS]]
        self._sizes[index] = torch.tensor([height, width])
        self._detections[index] = 0
        self._detections[index, : len(best)] = best.detach().to("cpu", torch.float32)

    def compute(self) -> DetectionScores:
        """Return the scores of all images.

        Raises:
            ValueError: if there are no images.
            MissingExtraError: if pycocotools is missing.
        """
        seen = [index for index in range(len(self.images)) if self._sizes[index].all()]
        if not seen:
            raise ValueError("No images were evaluated.")
        annotations: list[dict[str, Any]] = []
        results: list[list[float]] = []
        for index in seen:
            height, width = self._sizes[index].int().tolist()
            rows = zip(*(field.tolist() for field in self.images.objects(index, height, width)), strict=True)
            for (left, top, right, bottom), label, area, crowd in rows:
                annotations.append({
                    "id": len(annotations) + 1, "image_id": index, "category_id": label, "area": area,
                    "iscrowd": int(crowd), "bbox": [left, top, right - left, bottom - top],
                })  # fmt: skip
            detections = self._detections[index]
            results += [[index, *box, score, label] for label, score, *box in detections.tolist() if score > 0]
        categories = [{"id": index, "name": name} for index, name in enumerate(self.images.class_names)]
        dataset = {"images": [{"id": index} for index in seen], "annotations": annotations, "categories": categories}
        scores, per_class, curves = _evaluate(dataset, results)
        objects = sum(not each["iscrowd"] for each in annotations)
        mean, at50, at75, small, medium, large, recall = scores.tolist()
        return DetectionScores(len(seen), objects, mean, at50, at75, small, medium, large, recall, per_class, *curves)


def _evaluate(
    dataset: dict[str, Any], results: list[list[float]]
) -> tuple[Tensor, Tensor, tuple[PrecisionRecall, tuple[PrecisionRecall, ...]]]:
    """Return the scores of :class:`DetectionScores` from ``map`` to ``recall``, those of each class, and the curves.

    Args:
        dataset: ground truth in COCO's format.
        results: image, left, top, width, height, score and class of the detections.
    """
    with optional_imports("Evaluating detectors needs pycocotools", "'kornia-tinyvit[train,hf]'"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each step
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(np.array(results)) if results else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = torch.from_numpy(evaluation.stats[[0, 1, 2, 3, 4, 5, 8]])  # without the recalls of other counts and sizes
    precision = torch.from_numpy(evaluation.eval["precision"])  # (IoU thresholds, recalls, classes, sizes, counts)
    per_class = precision[:, :, :, 0, -1].mean((0, 1))
    # COCO returns -1 without objects.
    scores, per_class = (torch.where(each > -1, 100 * each, torch.nan) for each in (scores, per_class))
    return scores, per_class.float(), _measure_curves(evaluation)


def _measure_curves(evaluation: Any) -> tuple[PrecisionRecall, tuple[PrecisionRecall, ...]]:
    """Return the curves of all classes and of each class, from the matches at IoU 0.5 of pycocotools' evaluation.

    pycocotools accumulates each class separately, so it has no curve of all.
    """
    params = evaluation.params
    images, sizes = len(params.imgIds), len(params.areaRng)
    classes: list[tuple[NDArray[np.float64], NDArray[np.bool_], int]] = []
    for first in range(0, len(params.catIds) * sizes * images, sizes * images):  # objects of all sizes come first
        cells = [cell for cell in evaluation.evalImgs[first : first + images] if cell is not None]
        counted = np.concatenate([np.zeros(0, bool), *(cell["dtIgnore"][0] == 0 for cell in cells)])
        scores = np.concatenate([np.zeros(0), *(cell["dtScores"] for cell in cells)])[counted]
        correct = np.concatenate([np.zeros(0, bool), *(cell["dtMatches"][0] > 0 for cell in cells)])[counted]
        classes.append((scores, correct, sum(int((cell["gtIgnore"] == 0).sum()) for cell in cells)))
    scores, correct, objects = zip(*classes, strict=True)
    pooled = measure_curve(np.concatenate(scores), np.concatenate(correct), sum(objects))
    return pooled, tuple(measure_curve(*each) for each in classes)
