import math

import pytest
import torch
import torch.nn.functional as F

from kornia_tinyvit.training.metrics.probes import extract_features, k_nearest_neighbors, linear_probe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestFeatures:
    def test_inputs_of_the_head(self, tiny, images):
        tiny.train()
        batches = [(images, torch.tensor([1, 0])), (images[:1], torch.tensor([4]))]
        features, labels = extract_features(tiny, iter(batches))
        assert tiny.training
        assert labels.tolist() == [1, 0, 4]
        tiny.eval()
        torch.testing.assert_close(tiny.head(features[:2]), tiny(images))
        torch.testing.assert_close(features[2], features[0])
        assert not features.requires_grad

    def test_no_images(self, tiny):
        with pytest.raises(ValueError, match="There are no images"):
            extract_features(tiny, [])


class TestNearestNeighbors:
    def test_by_hand(self):
        known = torch.randn(50, 6, generator=generator())
        labels = torch.randint(4, (50,), generator=generator(1))
        features = torch.randn(9, 6, generator=generator(2))
        votes = k_nearest_neighbors(known, labels, features, k=7, temperature=0.5, num_classes=5)
        assert votes.shape == (9, 5)
        for row, feature in zip(votes, features, strict=True):
            similarity = F.cosine_similarity(known, feature[None])
            expected = torch.zeros(5)
            for index in similarity.argsort(descending=True)[:7].tolist():
                expected[labels[index]] += math.exp((similarity[index].item() - 1) / 0.5)
            torch.testing.assert_close(row, expected)

    def test_chunks_and_norms_have_no_effect(self, monkeypatch):
        known, features = torch.randn(30, 4, generator=generator()), torch.randn(11, 4, generator=generator(1))
        labels = torch.arange(30) % 3
        whole = k_nearest_neighbors(known, labels, features)
        monkeypatch.setattr("kornia_tinyvit.training.metrics.probes._SIMILARITIES", 60)
        torch.testing.assert_close(k_nearest_neighbors(known * 9, labels, features / 7), whole)

    def test_fewer_images_than_neighbors(self):
        votes = k_nearest_neighbors(torch.eye(3), torch.tensor([2, 0, 1]), torch.eye(3), k=20, temperature=0.01)
        assert votes.argmax(1).tolist() == [2, 0, 1]
        assert torch.isfinite(votes).all()

    def test_errors(self):
        with pytest.raises(ValueError, match="k and temperature must be positive; got 0"):
            k_nearest_neighbors(torch.eye(3), torch.arange(3), torch.eye(3), k=0)
        with pytest.raises(ValueError, match="and as many labels; got 3 and 2"):
            k_nearest_neighbors(torch.eye(3), torch.arange(2), torch.eye(3))


class TestLinearProbe:
    @pytest.fixture
    def data(self):
        """Return features of three overlapping classes, of very different scales."""
        labels = torch.arange(300) % 3
        features = torch.randn(300, 5, generator=generator()) + 2 * F.one_hot(labels, 5)
        return features * torch.tensor([1000.0, 1.0, 0.01, 1.0, 0.0]) + 50, labels

    def test_optimum(self, data):
        features, labels = data
        layer = linear_probe(features, labels, 4, penalty=0.01)
        accuracy = (layer(features).argmax(1) == labels).double().mean()
        assert 0.8 < accuracy < 1
        spread = features.std(0, correction=0)
        spread[4] = 1  # the constant feature
        weight = (layer.weight * spread).double().requires_grad_()
        bias = (layer.bias + layer.weight @ features.mean(0)).double().requires_grad_()
        inputs = ((features - features.mean(0)) / spread).double()
        loss = F.cross_entropy(inputs @ weight.T + bias, labels) + 0.005 * weight[:, :4].square().sum()
        slopes = torch.autograd.grad(loss, (weight, bias))
        assert max(slope[:3].abs().max() for slope in slopes) < 1e-3
        assert not layer.weight.requires_grad

    def test_deterministic_and_in_inference_mode(self, data):
        first = linear_probe(*data, 3)
        torch.manual_seed(5)
        with torch.inference_mode():
            again = linear_probe(data[0] + 0, data[1], 3)
        assert torch.equal(first.weight, again.weight)
        assert torch.equal(first.bias, again.bias)

    def test_penalty(self, data):
        small, large = (linear_probe(*data, 3, penalty=penalty).weight.norm() for penalty in (1e-3, 1.0))
        assert large < small / 3

    def test_errors(self, data):
        with pytest.raises(ValueError, match=r"Labels must be in \[0, 2\); got one of 2"):
            linear_probe(*data, 2)
        with pytest.raises(ValueError, match="and as many labels; got 0 and 0"):
            linear_probe(torch.zeros(0, 3), torch.zeros(0).long(), 2)
