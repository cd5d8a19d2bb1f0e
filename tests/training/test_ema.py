"""The exponential moving average of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kornia_tinyvit.training.ema import MovingAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def shake(model: nn.Module) -> None:
    """Change all weights and statistics."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) * 3)


def values(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values() if tensor.is_floating_point()]


def assert_same(one, other):
    assert len(one) == len(other) == 6
    for first, second in zip(one, other, strict=True):
        assert torch.allclose(first, second, atol=1e-6)


class TestMovingAverage:
    @pytest.mark.parametrize("decay", [0.05, 0.15, 0.9])
    def test_formula(self, decay):
        model = network()
        average = MovingAverage(model, decay)
        expected = values(model)
        for number in range(5):
            shake(model)
            average.update(model)
            kept = min(decay, (1 + number) / (10 + number))
            expected = [kept * old + (1 - kept) * new for old, new in zip(expected, values(model), strict=True)]
        with average.applied(model):
            assert_same(values(model), expected)

    def test_integers_are_not_averaged(self):
        model = network()
        average = MovingAverage(model, 0.9)
        model[1].num_batches_tracked += 7
        average.update(model)
        with average.applied(model):
            assert model[1].num_batches_tracked == 7

    def test_own_weights_are_restored(self):
        model = network()
        average = MovingAverage(model, 0.5)
        shake(model)
        own = values(model)
        with average.applied(model):
            inside = values(model)
            shake(model)  # has no effect on the average
        assert_same(values(model), own)
        assert not torch.allclose(inside[0], own[0])
        with average.applied(model):
            assert_same(values(model), inside)

    def test_own_weights_are_restored_after_an_error(self):
        model = network()
        average = MovingAverage(model, 0.5)
        shake(model)
        own = values(model)
        with pytest.raises(KeyError), average.applied(model):
            raise KeyError
        assert_same(values(model), own)

    def test_training_continues(self):
        model = network()
        average = MovingAverage(model, 0.5)
        model(torch.rand(2, 3, 4, 4)).sum().backward()
        average.update(model)
        with average.applied(model):
            pass
        model(torch.rand(2, 3, 4, 4)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_state(self, tmp_path):
        model = network()
        average = MovingAverage(model, 0.8)
        for _ in range(3):
            shake(model)
            average.update(model)
        torch.save(average.state_dict(), tmp_path / "state.pt")
        weights = copy.deepcopy(model)
        shake(model)
        average.update(model)
        other = MovingAverage(network(), 0.8)
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert other.updates == 3
        other.update(model)
        for one, two in zip(average.tensors, other.tensors, strict=True):
            assert torch.equal(one, two)
        with average.applied(model), other.applied(weights):
            assert_same(values(model), values(weights))

    def test_state_of_another_network(self):
        average = MovingAverage(network(), 0.8)
        with pytest.raises((ValueError, RuntimeError)):
            average.load_state_dict(MovingAverage(nn.Linear(2, 2), 0.8).state_dict())
