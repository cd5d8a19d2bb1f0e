"""The loss of classifiers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kornia_tinyvit.training import ClassificationLoss
from tests.distillation.test_losses import SIZE, augment, batch_of


@pytest.fixture
def outputs():
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)


class TestClassificationLoss:
    def test_smoothing(self, outputs):
        augmentation = augment("finetune")
        batch = batch_of(augmentation)
        expected = F.cross_entropy(outputs, batch.labels, reduction="none", label_smoothing=0.1)
        loss = ClassificationLoss(augmentation)(outputs, None, batch)
        assert torch.allclose(loss, expected, atol=1e-6)
        assert loss.shape == (6,)

    def test_plain(self, outputs):
        augmentation = augment("finetune", label_smoothing=0.0)
        batch = batch_of(augmentation)
        expected = F.cross_entropy(outputs, batch.labels, reduction="none")
        assert torch.allclose(ClassificationLoss(augmentation)(outputs, None, batch), expected, atol=1e-6)

    @pytest.mark.parametrize("changes", [{"cutmix": 0.0}, {"mixup": 0.0}, {}])
    def test_mixing(self, outputs, changes):
        augmentation = augment("in1k", **changes)
        batch = batch_of(augmentation)
        share = batch.params.mixup_weight + batch.params.pasted[:, 2] * batch.params.pasted[:, 3] / SIZE**2
        assert (share > 0).any()
        partner = batch.labels.reshape(-1, 2).flip(1).flatten()
        weight = torch.from_numpy(share).float()
        expected = (1 - weight) * F.cross_entropy(outputs, batch.labels, reduction="none", label_smoothing=0.1)
        expected += weight * F.cross_entropy(outputs, partner, reduction="none", label_smoothing=0.1)
        assert torch.allclose(ClassificationLoss(augmentation)(outputs, None, batch), expected, atol=1e-5)

    def test_lower_precision(self, outputs):
        augmentation = augment("finetune")
        loss = ClassificationLoss(augmentation)(outputs.bfloat16(), None, batch_of(augmentation))
        assert loss.dtype == torch.float32
