"""COCO's measure: against cases whose answer is known, and in parts that add up."""

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


#: What would be found by someone who knows: class, score, left, top, width and height.
RIGHT = {0: [[0, 0.9, 5, 5, 10, 10], [0, 0.8, 25, 5, 10, 10]], 1: [[2, 0.7, 10, 5, 20, 10]], 2: []}


def measure(images, found, metrics=None):
    metrics = metrics or DetectionMetrics(images)
    for index, rows in found.items():
        metrics.update(index, torch.tensor(rows).reshape(-1, 6), 20, 40)
    return metrics


class TestScores:
    def test_everything_right(self, images):
        scores = measure(images, RIGHT).compute()
        assert (scores.map, scores.map50, scores.map75, scores.recall) == pytest.approx((100, 100, 100, 100))
        assert (scores.images, scores.objects) == (3, 3)
        assert scores.per_class[[0, 2]].tolist() == pytest.approx([100, 100])
        assert scores.per_class[1].isnan()
        assert scores.map_small == pytest.approx(100)
        assert math.isnan(scores.map_large)
        assert scores.to_dict()["map_large"] is None

    def test_nothing_found(self, images):
        scores = measure(images, {0: [], 1: [], 2: []}).compute()
        assert (scores.map, scores.recall) == (0, 0)

    def test_one_of_two_cats(self, images):
        scores = measure(images, RIGHT | {0: RIGHT[0][:1]}).compute()
        # Precision is 1 up to a recall of one half: 51 of COCO's 101 points.
        assert scores.per_class[0] == pytest.approx(100 * 51 / 101)
        assert scores.recall == pytest.approx((50 + 100) / 2)

    def test_overlap(self, images):
        shifted = RIGHT | {1: [[2, 0.7, 13, 5, 20, 10]]}  # an overlap of 17 / 23 = 0.74
        scores = measure(images, shifted).compute()
        assert (scores.map50, scores.map75) == pytest.approx((100, 50))
        assert scores.per_class[2] == pytest.approx(50)  # at 50, 55, 60, 65 and 70 %

    def test_wrong_class_and_false_alarms(self, images):
        wrong = RIGHT | {1: [[1, 0.7, 10, 5, 20, 10]], 2: [[0, 0.85, 0, 0, 5, 5]]}
        scores = measure(images, wrong).compute()
        assert scores.per_class[2] == 0
        # Ranked 0.9 right, 0.85 wrong, 0.8 right: precision 1 up to one half, then 2/3.
        assert scores.per_class[0] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)

    def test_only_what_was_looked_at_counts(self, images):
        scores = measure(images, {1: RIGHT[1]}).compute()
        assert (scores.images, scores.objects, scores.map) == (1, 1, pytest.approx(100))
        with pytest.raises(ValueError, match="No images"):
            DetectionMetrics(images).compute()

    def test_crowds_do_not_count(self, tmp_path):
        data = DetectionDataset.open(write_coco(tmp_path, make_coco()))
        found = {0: [[1, 0.9, 4, 2, 20, 10], [0, 0.9, 10, 5, 5, 5]], 1: []}  # the cat, and an owl in the crowd
        scores = measure(data, found).compute()
        assert (scores.objects, scores.map) == (1, pytest.approx(100))

    def test_at_most_a_hundred_a_image(self, images):
        noise = [[0, 0.95, 0, 0, 1, 1]] * 100
        scores = measure(images, RIGHT | {0: RIGHT[0] + noise}).compute()
        assert scores.per_class[0] == 0


class TestCounts:
    def test_parts_add_up(self, images):
        parts = [measure(images, {row: RIGHT[row]}) for row in range(3)]
        whole = DetectionMetrics(images)
        whole.load_state(torch.stack([part.state().double() for part in parts]).sum(0))
        assert whole.compute().to_dict() == measure(images, RIGHT).compute().to_dict()

    def test_another_number_of_images(self, images):
        with pytest.raises(ValueError, match="Expected 1806 counts; got 5"):
            DetectionMetrics(images).load_state(torch.zeros(5))

    def test_looking_again_replaces(self, images):
        metrics = measure(images, {0: RIGHT[1] * 2, 1: RIGHT[0], 2: RIGHT[0]})
        assert measure(images, RIGHT, metrics).compute().map == pytest.approx(100)
