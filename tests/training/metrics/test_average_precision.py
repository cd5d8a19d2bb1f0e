"""COCO's average precision in cases with known results, and over ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from pycocotools.cocoeval import COCOeval

from kornia_tinyvit.data import DetectionDataset
from kornia_tinyvit.training import DetectionMetrics
from kornia_tinyvit.training.metrics.precision_recall import RECALLS, measure_curve, save_precision_recall
from tests.scenes import make_coco, write_coco, write_yolo


@pytest.fixture
def images(tmp_path) -> DetectionDataset:
    """Images of 40 x 20 pixels: two cats, an owl, and nothing."""
    labels = {"a": "0 0.25 0.5 0.25 0.5\n0 0.75 0.5 0.25 0.5", "b": "2 0.5 0.5 0.5 0.5", "c": ""}
    return DetectionDataset.open(write_yolo(tmp_path, labels))


#: Perfect detections: class, score, left, top, width and height.
PERFECT = {0: [[0, 0.9, 5, 5, 10, 10], [0, 0.8, 25, 5, 10, 10]], 1: [[2, 0.7, 10, 5, 20, 10]], 2: []}


def evaluate(images, found, metrics=None):
    metrics = metrics or DetectionMetrics(images)
    for index, rows in found.items():
        metrics.update(index, torch.tensor(rows).reshape(-1, 6), 20, 40)
    return metrics


class TestScores:
    def test_perfect_detections(self, images):
        scores = evaluate(images, PERFECT).compute()
        assert (scores.map, scores.map50, scores.map75, scores.recall) == pytest.approx((100, 100, 100, 100))
        assert (scores.images, scores.objects) == (3, 3)
        assert scores.per_class[[0, 2]].tolist() == pytest.approx([100, 100])
        assert scores.per_class[1].isnan()
        assert scores.map_small == pytest.approx(100)
        assert math.isnan(scores.map_large)
        assert scores.to_dict()["map_large"] is None

    def test_no_detections(self, images):
        scores = evaluate(images, {0: [], 1: [], 2: []}).compute()
        assert (scores.map, scores.recall) == (0, 0)

    def test_one_of_two_cats(self, images):
        scores = evaluate(images, PERFECT | {0: PERFECT[0][:1]}).compute()
        # Precision is 1 up to a recall of 1/2: 51 of COCO's 101 points.
        assert scores.per_class[0] == pytest.approx(100 * 51 / 101)
        assert scores.recall == pytest.approx((50 + 100) / 2)

    def test_iou(self, images):
        shifted = PERFECT | {1: [[2, 0.7, 13, 5, 20, 10]]}  # an IoU of 17 / 23 = 0.74
        scores = evaluate(images, shifted).compute()
        assert (scores.map50, scores.map75) == pytest.approx((100, 50))
        assert scores.per_class[2] == pytest.approx(50)  # at IoU 0.5, 0.55, 0.6, 0.65 and 0.7

    def test_wrong_class_and_false_positives(self, images):
        wrong = PERFECT | {1: [[1, 0.7, 10, 5, 20, 10]], 2: [[0, 0.85, 0, 0, 5, 5]]}
        scores = evaluate(images, wrong).compute()
        assert scores.per_class[2] == 0
        # Sorted by score: true, false, true positive: precision 1 up to a recall of 1/2, then 2/3.
        assert scores.per_class[0] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)

    def test_other_images_do_not_count(self, images):
        scores = evaluate(images, {1: PERFECT[1]}).compute()
        assert (scores.images, scores.objects, scores.map) == (1, 1, pytest.approx(100))
        with pytest.raises(ValueError, match="No images"):
            DetectionMetrics(images).compute()

    def test_crowds_do_not_count(self, tmp_path):
        data = DetectionDataset.open(write_coco(tmp_path, make_coco()))
        found = {0: [[1, 0.9, 4, 2, 20, 10], [0, 0.9, 10, 5, 5, 5]], 1: []}  # the cat, and an owl in the crowd
        scores = evaluate(data, found).compute()
        assert (scores.objects, scores.map) == (1, pytest.approx(100))

    def test_at_most_100_detections_per_image(self, images):
        noise = [[0, 0.95, 0, 0, 1, 1]] * 100
        scores = evaluate(images, PERFECT | {0: PERFECT[0] + noise}).compute()
        assert scores.per_class[0] == 0


def pycocotools_curves(monkeypatch, images, found):
    """Return pycocotools' own precision and scores at IoU 0.5, (101, K), beside our scores."""
    kept = []
    accumulate = COCOeval.accumulate
    monkeypatch.setattr(COCOeval, "accumulate", lambda self: (accumulate(self), kept.append(self.eval)))
    scores = evaluate(images, found).compute()
    return scores, kept[0]["precision"][0, :, :, 0, -1], kept[0]["scores"][0, :, :, 0, -1]


class TestCurves:
    def test_equal_pycocotools(self, tmp_path, monkeypatch):
        """The precision of each class over recall, and a best threshold that keeps the detections of a curve point."""
        generator = torch.Generator().manual_seed(0)
        labels, found = {}, {}
        for index in range(6):
            boxes = torch.rand(5, 2, generator=generator) * 0.6 + 0.2
            labels[str(index)] = "\n".join(f"{row % 2} {x} {y} 0.2 0.4" for row, (x, y) in enumerate(boxes.tolist()))
            noise = 0.05 * torch.randn(8, 2, generator=generator)
            corners = (torch.cat([boxes, boxes[:3]]) + noise - torch.tensor([0.1, 0.2])) * torch.tensor([40, 20])
            scores = torch.rand(8, 1, generator=generator)
            classes = torch.tensor([0.0, 1, 0, 1, 0, 0, 0, 1])[:, None]
            found[index] = torch.cat([classes, scores, corners, torch.full((8, 2), 8.0)], 1).tolist()
        images = DetectionDataset.open(write_yolo(tmp_path, labels))
        scores, precision, thresholds = pycocotools_curves(monkeypatch, images, found)
        for index in (0, 1):
            curve = scores.class_curves[index]
            assert curve.precision.numpy() == pytest.approx(100 * precision[:, index], abs=1e-4)
            assert 0 < curve.precision[0] <= 100
            f1 = 200 * precision[:, index] * RECALLS / (precision[:, index] + RECALLS).clip(1e-9)
            assert curve.best_f1 == pytest.approx(f1.max(), abs=1)  # recall is rounded to one per cent there
            assert thresholds[f1.argmax(), index] - 0.1 < curve.threshold < thresholds[f1.argmax(), index]
        assert scores.class_curves[2].precision.isnan().all()

    def test_perfect_detections(self, images):
        scores = evaluate(images, PERFECT).compute()
        assert (scores.best_f1, scores.threshold) == (100, pytest.approx(0.35))
        assert (scores.curve.precision == 100).all()
        assert [each.best_f1 for each in scores.class_curves] == [100, pytest.approx(math.nan, nan_ok=True), 100]
        assert scores.to_dict()["threshold"] == pytest.approx(0.35)

    def test_threshold_of_the_best_f1(self, images):
        """Without the false positive below 0.7, one of four is wrong, and no object is missing."""
        found = {0: [*PERFECT[0], [0, 0.3, 0, 0, 4, 4]], 1: PERFECT[1], 2: [[0, 0.75, 0, 0, 5, 5]]}
        scores = evaluate(images, found).compute()
        assert scores.threshold == pytest.approx((0.7 + 0.3) / 2)
        assert scores.best_f1 == pytest.approx(200 * 3 / (4 + 3))
        assert scores.class_curves[0].threshold == pytest.approx((0.8 + 0.75) / 2)
        assert scores.curve.precision[[0, 66, 67, 100]].tolist() == pytest.approx([100, 100, 75, 75])

    def test_equal_scores_are_kept_together(self):
        curve = measure_curve(np.full(2, 0.5), np.array([True, False]), 1)
        assert (curve.best_f1, curve.threshold) == (pytest.approx(200 / 3), 0.25)

    def test_nothing_found(self, images):
        scores = evaluate(images, {0: [], 1: [], 2: [[0, 0.9, 0, 0, 5, 5]]}).compute()
        assert scores.best_f1 == 0
        assert math.isnan(scores.threshold)
        assert scores.to_dict()["threshold"] is None
        assert not scores.curve.precision.any()

    def test_plot(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.append((y.tolist(), style.get("label"))))
        empty = measure_curve(np.zeros(0), np.zeros(0, bool), 0)
        save_precision_recall(tmp_path / "empty.png", {"all": empty})
        half = measure_curve(np.array([0.9, 0.5]), np.array([True, False]), 2)
        save_precision_recall(tmp_path / "new" / "a.png", {"all": half, "cat": half, "dog": empty})
        assert Image.open(tmp_path / "new" / "a.png").format == "PNG"
        assert [label for _, label in drawn] == ["all: F1 66.7 % at 0.70", "cat: F1 66.7 % at 0.70"]
        assert drawn[0][0] == [100.0] * 51 + [0.0] * 50
        save_precision_recall(tmp_path / "b.png", dict.fromkeys(map(str, range(30)), half))
        assert [label for _, label in drawn[2:]] == ["0: F1 66.7 % at 0.70", *[None] * 29]


class TestCounts:
    def test_counts_add_up(self, images):
        parts = [evaluate(images, {row: PERFECT[row]}) for row in range(3)]
        whole = DetectionMetrics(images)
        whole.load_state(torch.stack([part.state().double() for part in parts]).sum(0))
        assert whole.compute().to_dict() == evaluate(images, PERFECT).compute().to_dict()

    def test_another_number_of_images(self, images):
        with pytest.raises(ValueError, match="Expected 1806 counts; got 5"):
            DetectionMetrics(images).load_state(torch.zeros(5))

    def test_update_replaces_detections(self, images):
        metrics = evaluate(images, {0: PERFECT[1] * 2, 1: PERFECT[0], 2: PERFECT[0]})
        assert evaluate(images, PERFECT, metrics).compute().map == pytest.approx(100)
