"""Boxes and central points of masks."""

import torch

from kornia_tinyvit.ops import central_points, mask_boxes


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
