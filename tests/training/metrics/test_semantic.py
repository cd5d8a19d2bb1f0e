import numpy as np
import pytest
import torch
from kornia.metrics import mean_iou

from kornia_tinyvit.data import IGNORED
from kornia_tinyvit.training import SegmentationMetrics


class TestMetrics:
    def test_one_image_equals_kornia(self):
        classes, masks = torch.randint(0, 4, (2, 1, 30, 20), generator=torch.Generator().manual_seed(0))
        metrics = SegmentationMetrics(4)
        metrics.update(classes, masks)
        found = metrics.compute()
        assert found.per_class.tolist() == pytest.approx((100 * mean_iou(classes, masks, 4, eps=0))[0].tolist())
        assert found.mean_iou == pytest.approx(float(found.per_class.mean()))
        assert found.pixel_accuracy == pytest.approx(100 * float((classes == masks).double().mean()))
        assert (found.pixels, found.present) == (600, 4)

    def test_by_hand(self):
        metrics = SegmentationMetrics(5)
        metrics.update(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0]))
        metrics.update(torch.tensor([[3], [1]]), torch.tensor([[3], [IGNORED]]))
        found = metrics.compute()
        assert found.per_class.tolist() == pytest.approx([100 / 3, 50, np.nan, 100, np.nan], nan_ok=True)
        assert found.mean_iou == pytest.approx((100 / 3 + 50 + 100) / 3)  # of the classes in the masks
        assert (found.pixels, found.present, found.class_pixels.tolist()) == (5, 3, [2, 2, 0, 1, 0])
        assert found.confusion[0].tolist() == [1, 0, 1, 0, 0]

    def test_ignored_pixels_do_not_count(self):
        classes, masks = torch.randint(0, 3, (2, 40))
        some = SegmentationMetrics(3)
        some.update(classes[:20], masks[:20])
        masks[20:] = IGNORED
        all_of_them = SegmentationMetrics(3)
        all_of_them.update(classes, masks)
        assert torch.equal(some.state(), all_of_them.state())

    def test_counts_add_up(self):
        classes, masks = torch.randint(0, 3, (2, 40))
        parts = [SegmentationMetrics(3) for _ in range(3)]
        for part, rows in zip(parts, (slice(None), slice(20), slice(20, None)), strict=True):
            part.update(classes[rows], masks[rows])
        parts[1].load_state(parts[1].state() + parts[2].state())
        assert torch.equal(parts[0].compute().confusion, parts[1].compute().confusion)

    def test_one_class(self):
        metrics = SegmentationMetrics(1)
        metrics.update(torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long))
        assert metrics.compute().mean_iou == 100

    def test_errors(self):
        metrics = SegmentationMetrics(3)
        with pytest.raises(ValueError, match="No labeled pixels"):
            metrics.compute()
        with pytest.raises(ValueError, match="at least 1"):
            SegmentationMetrics(0)
        with pytest.raises(ValueError, match="shape"):
            metrics.update(torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match=r"classes in \[0, 3\)"):
            metrics.update(torch.zeros(1, dtype=torch.long), torch.full((1,), 3))
        with pytest.raises(ValueError, match="counts"):
            metrics.load_state(torch.zeros(3))
