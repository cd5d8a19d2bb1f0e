import math

import numpy as np
import pytest
import torch

from kornia_tinyvit.sam import Geometry
from kornia_tinyvit.sam.prompts import prepare_prompts, split_prompts

GEOMETRY = Geometry.fit((300, 400), (256, 256))  # resized to 192 x 256


def points(*pairs: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(pairs)[:, None]


class TestMapping:
    def test_points(self):
        prompts = prepare_prompts(GEOMETRY, points((0, 0), (400, 300), (100, 150)), None, None, None)
        coordinates, labels = prompts.points
        torch.testing.assert_close(coordinates[:, 0], torch.tensor([[0.0, 0.0], [256.0, 192.0], [64.0, 96.0]]))
        assert torch.equal(labels, torch.ones(3, 1, dtype=torch.int64))

    def test_boxes(self):
        prompts = prepare_prompts(GEOMETRY, None, None, torch.tensor([[0, 0, 400, 300], [100, 150, 200, 300]]), None)
        expected = torch.tensor([[0.0, 0.0, 256.0, 192.0], [64.0, 96.0, 128.0, 192.0]])
        torch.testing.assert_close(prompts.boxes, expected)

    def test_masks(self):
        masks = torch.rand(5, 1, 64, 64)
        prompts = prepare_prompts(GEOMETRY, None, None, None, masks)
        assert prompts.masks is masks

    def test_half_precision_is_widened(self):
        wide = Geometry.fit((3000, 4000), (256, 256))
        prompts = prepare_prompts(wide, points((3999, 1)).half(), None, None, None)
        assert prompts.points[0].dtype == torch.float32

    def test_gradients_reach_the_boxes(self):
        boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]], requires_grad=True)
        prepare_prompts(GEOMETRY, None, None, boxes, None).boxes.sum().backward()
        assert torch.equal(boxes.grad, torch.full((1, 4), 0.64))

    def test_boxes_beyond_the_image(self):
        prompts = prepare_prompts(GEOMETRY, None, None, torch.tensor([[-50.0, -50.0, 500.0, 10.0]]), None)
        torch.testing.assert_close(prompts.boxes, torch.tensor([[-32.0, -32.0, 320.0, 6.4]]))

    def test_bool_labels(self):
        pairs, labels = points((1.0, 2.0), (3.0, 4.0)), torch.tensor([[True], [False]])
        assert prepare_prompts(GEOMETRY, pairs, labels, None, None).points[1].tolist() == [[1], [0]]

    def test_padding_points(self):
        """Padding points with label -1 may have any coordinates."""
        pairs = torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0], [-9.0, 900.0]]])
        labels = torch.tensor([[1, 0], [1, -1]])
        assert prepare_prompts(GEOMETRY, pairs, labels, None, None).points[1] is labels


BOX = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
POINT = torch.tensor([[[1.0, 2.0]]])
MASK = torch.zeros(1, 1, 64, 64)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "There are no prompts: pass points, boxes or masks"),
        ({"labels": torch.ones(1, 1)}, "Got labels without points"),
        ({"points": POINT[0]}, r"Points must be \(P, N, 2\).*got \(1, 2\)"),
        ({"points": torch.zeros(1, 1, 3)}, r"Points must be \(P, N, 2\).*got \(1, 1, 3\)"),
        ({"points": torch.zeros(2, 0, 2)}, r"at least one, each x and y; got \(2, 0, 2\)"),
        ({"points": POINT, "labels": torch.ones(1)}, r"Labels must be \(1, 1\), one per point; got \(1,\)"),
        ({"points": POINT, "labels": torch.tensor([[2]])}, r"-1 \(padding\); got \[2\]"),
        ({"points": POINT, "labels": torch.tensor([[math.nan]])}, r"Labels are 1 \(foreground\)"),
        ({"points": points((400.5, 10))}, r"Point \(400.5, 10\) lies outside.*width 400 and height 300"),
        ({"points": points((5, 5), (10, -1))}, r"Point \(10, -1\) lies outside"),
        ({"points": points((5, 301))}, r"Point \(5, 301\) lies outside"),
        ({"points": points((math.nan, 1))}, "The points contain NaN or infinity"),
        ({"points": points((math.inf, 1))}, "The points contain NaN or infinity"),
        ({"points": POINT, "labels": torch.ones(1, 1) + 0j}, r"Labels are 1 \(foreground\).*got torch.complex64"),
        ({"boxes": torch.tensor([[0.0, 0.0, 1e30, 9.0]])}, r"Coordinates of boxes reach 1e\+30; the limit is 16777216"),
        ({"masks": MASK.double() + 1e300}, "finite floating point logits"),
        ({"points": POINT + 0j}, "The points must be real numbers; got torch.complex64"),
        ({"boxes": BOX[0]}, r"Boxes must be \(P, 4\).*got \(4,\)"),
        ({"boxes": BOX[:, :3]}, r"Boxes must be \(P, 4\).*got \(1, 3\)"),
        ({"boxes": torch.tensor([[30.0, 20.0, 10.0, 40.0]])}, r"Box \(30, 20, 10, 40\) is empty"),
        ({"boxes": torch.tensor([[10.0, 20.0, 30.0, 20.0]])}, r"Box \(10, 20, 30, 20\) is empty"),
        ({"boxes": torch.tensor([[400.0, 20.0, 500.0, 40.0]])}, r"Box \(400, 20, 500, 40\) lies outside.*width 400"),
        ({"boxes": torch.tensor([[10.0, -20.0, 30.0, 0.0]])}, "lies outside"),
        ({"boxes": BOX * math.nan}, "The boxes contain NaN or infinity"),
        ({"masks": MASK[0]}, r"logits \(P, 1, 64, 64\).*got \(1, 64, 64\)"),
        ({"masks": torch.zeros(1, 1, 256, 256)}, r"logits \(P, 1, 64, 64\).*got \(1, 1, 256, 256\)"),
        ({"masks": torch.zeros(1, 3, 64, 64)}, r"got \(1, 3, 64, 64\)"),
        ({"masks": MASK > 0}, "finite floating point logits; got torch.bool"),
        ({"masks": MASK * math.nan}, "finite floating point logits"),
        ({"points": POINT, "boxes": BOX.repeat(2, 1)}, "the same number of prompts; got 1 points, 2 boxes"),
        ({"boxes": BOX, "masks": MASK.repeat(3, 1, 1, 1)}, "the same number of prompts; got 1 boxes, 3 masks"),
    ],
)
def test_errors(prompts, message):
    given = {"points": None, "labels": None, "boxes": None, "masks": None} | prompts
    with pytest.raises(ValueError, match=message):
        prepare_prompts(GEOMETRY, **given)


class TestSplitPrompts:
    def test_lists(self):
        assert split_prompts("boxes", None, 2) == [None, None]
        assert split_prompts("boxes", BOX, 1)[0] is BOX
        assert split_prompts("boxes", [None, BOX], 2)[1] is BOX

    def test_arrays(self):
        for array in (BOX.numpy(), BOX.double().numpy(), np.flip(BOX.numpy(), 0), BOX.numpy().astype(">i4")):
            for given, images in ((array, 1), ([None, array], 2)):
                found = split_prompts("boxes", given, images)[-1]
                assert torch.equal(found.float(), BOX)

    @pytest.mark.parametrize(
        ("given", "images", "error", "message"),
        [
            (BOX, 2, ValueError, "boxes of one image; for 2 images pass a list"),
            (BOX.numpy(), 2, ValueError, "boxes of one image; for 2 images pass a list"),
            (np.array([["a"]]), 1, TypeError, "boxes must be a tensor or an array, .*; got an array of <U1"),
            ([BOX], 2, ValueError, "Got boxes for 1 images; the embedding has 2"),
            ([[1, 2, 3, 4]], 1, TypeError, "boxes must be a tensor or an array, or a list with one or None per image"),
        ],
    )
    def test_errors(self, given, images, error, message):
        with pytest.raises(error, match=message):
            split_prompts("boxes", given, images)
