"""Boxes and central points of masks."""

import pytest
import torch

from kornia_tinyvit.ops import central_points, mask_boxes, nms


class TestBoxes:
    def test_boxes(self):
        masks = torch.zeros(2, 9, 12, dtype=torch.bool)
        masks[0, 2:5, 3:4], masks[1, 0, 0], masks[1, 8, 11] = True, True, True
        assert mask_boxes(masks).tolist() == [[3, 2, 4, 5], [0, 0, 12, 9]]
        assert mask_boxes(masks[:0]).shape == (0, 4)

    def test_central_points(self):
        mask = torch.zeros(3, 30, 40, dtype=torch.bool)
        mask[0, 5:14, 10:19] = True  # a square
        mask[1, 2:28, 30:33], mask[1, 15:28, 20:33] = True, True  # a stroke with a head
        mask[2, 7, 9] = True
        points = central_points(mask)
        assert points.tolist() == [[14.5, 9.5], [26.5, 21.5], [9.5, 7.5]]
        assert central_points(mask[:0]).shape == (0, 2)

    def test_central_point_of_a_ring_is_on_it(self):
        y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
        radius = (y - 20) ** 2 + (x - 20) ** 2
        ring = (radius < 300) & (radius > 100)
        ((column, row),) = central_points(ring[None]).long().tolist()
        assert ring[row, column]


class TestSuppress:
    def test_best_stays(self):
        boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 9, 10]])
        kept = nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.7]), 0.7)
        assert kept.tolist() == [1, 2]

    def test_first_of_equals_stays(self):
        boxes = torch.tensor([[0, 0, 10, 10]]).repeat(50, 1)
        assert nms(boxes, torch.ones(50), 0.7).tolist() == [0]
        apart = torch.arange(50)[:, None] * 20 + boxes
        assert nms(apart, torch.ones(50), 0.7).tolist() == list(range(50))

    def test_lines_stay(self):
        """Boxes without area have no IoU; torchvision keeps them all."""
        boxes = torch.tensor([[5, 0, 5, 10], [5, 0, 5, 10], [0, 0, 10, 10]])
        assert nms(boxes, torch.tensor([0.1, 0.2, 0.3]), 0.7).tolist() == [2, 1, 0]

    @pytest.mark.parametrize(("threshold", "kept"), [(0.8, [0]), (0.7, [0]), (0.81, [0, 1])])
    def test_iou_at_the_threshold(self, threshold, kept):
        """An IoU of 0.8 is 0.80000001 in float32, which torchvision compares with 0.8 in float64."""
        boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 8]])
        assert nms(boxes, torch.tensor([0.9, 0.1]), threshold).tolist() == kept

    def test_none(self):
        assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
