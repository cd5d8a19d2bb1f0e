import pytest
import torch

from kornia_tinyvit.training import PromptMetrics


class TestMetrics:
    def test_by_hand(self):
        metrics = PromptMetrics()
        wanted = torch.tensor([[[True, True, False, False]], [[False, True, True, True]]])
        found = torch.tensor([[[True, False, False, False]], [[True, True, True, True]]])
        metrics.update("box", found, wanted)
        metrics.update("point", found[:1], wanted[:1])
        metrics.update("point", torch.zeros_like(found), wanted)
        scores = metrics.compute()
        assert vars(scores) == pytest.approx({"instances": 3, "box_iou": 62.5, "point_iou": 50 / 3})

    def test_counts_add_up(self):
        found, wanted = torch.rand(2, 4, 8, 8) > 0.5
        parts = [PromptMetrics() for _ in range(3)]
        for part, rows in zip(parts, (slice(None), slice(3), slice(3, None)), strict=True):
            part.update("box", found[rows], wanted[rows])
        parts[1].load_state(parts[1].state() + parts[2].state())
        assert vars(parts[0].compute()) == pytest.approx(vars(parts[1].compute()), nan_ok=True)

    def test_shapes(self):
        with pytest.raises(ValueError, match="Expected masks of the shape"):
            PromptMetrics().update("box", torch.zeros(1, 2, 2) > 0, torch.zeros(1, 2, 3) > 0)
