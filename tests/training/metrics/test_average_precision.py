"""COCO's average precision in cases with known results, and over ranks."""

from __future__ import annotations

import math

import pytest
import torch

from kornia_tinyvit.data import DetectionDataset
from kornia_tinyvit.training import DetectionMetrics
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
