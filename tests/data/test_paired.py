"""Augmentation of images with their masks and boxes."""

from __future__ import annotations

import pytest
import torch

from kornia_tinyvit.data import ReplayableAugmentation
from kornia_tinyvit.data.detection import Objects
from kornia_tinyvit.preprocessing import TrainingPipeline
from kornia_tinyvit.training import BoxAugmentation, MaskAugmentation

WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "color_jitter": 0.0}


def orientations(values: torch.Tensor) -> list[torch.Tensor]:
    """Return the eight orientations of a square."""
    turned = [values.rot90(count, (-2, -1)) for count in range(4)]
    return [*turned, *(each.flip(-1) for each in turned)]


class TestRotation:
    def image(self):
        return torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def test_masks(self):
        """All eight orientations occur, and the mask follows the image exactly."""
        image, mask = self.image(), self.image()[0].long()
        augment, seen = MaskAugmentation(32, rotate=True, **WHOLE), []
        for index in range(60):
            crop, moved = augment(image, mask, 0, index)
            assert torch.equal(crop[0], moved)
            seen += [number for number, each in enumerate(orientations(mask)) if torch.equal(each, moved)]
        assert len(seen) == 60
        assert set(seen) == set(range(8))
        assert min(seen.count(number) for number in range(8)) >= 2

    def test_boxes(self):
        mask = torch.zeros(32, 32)
        mask[2:7, 4:20] = 1
        objects = Objects(
            torch.tensor([[4.0, 2, 20, 7]]), torch.tensor([1]), torch.tensor([80.0]), torch.tensor([False])
        )
        augment, found = BoxAugmentation(32, rotate=True, **WHOLE), set()
        for index in range(40):
            crop, target = augment((255 * mask).to(torch.uint8).expand(3, -1, -1), objects, 0, index)
            x, y, width, height = (target["boxes"][0] * 32).tolist()
            rows, columns = (crop[0] > 127).nonzero().unbind(1)
            edges = [int(each) for each in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
            box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            assert box == pytest.approx(edges, abs=1e-3)
            found.add(tuple(edges))
        assert len(found) == 8

    def test_off_by_default(self):
        image = self.image()
        found = [MaskAugmentation(32, **WHOLE)(image, image[0].long(), 0, index)[0] for index in range(20)]
        assert all(torch.equal(each, image) or torch.equal(each, image.flip(-1)) for each in found)
        assert MaskAugmentation(32).describe()["rotate"] is False
        assert MaskAugmentation(32, rotate=True).describe()["rotate"] is True

    def test_classification(self):
        with pytest.raises(ValueError, match="does not support rotate"):
            ReplayableAugmentation(32, "finetune", rotate=True)
        torch.manual_seed(0)
        pipeline = TrainingPipeline(32, 2, "small", rotate=True, erasing=0.0, mean=(0.0,) * 3, std=(1.0,) * 3, **WHOLE)
        image = self.image()[None].float() / 255
        for _ in range(10):
            turned = pipeline(image, torch.tensor([0]))[0]
            assert any(torch.allclose(each, turned, atol=1e-4) for each in orientations(image))
