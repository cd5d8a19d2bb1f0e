from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kornia_tinyvit import ImageClassifier, TinyViT
from kornia_tinyvit.visualization import (
    feature_colors,
    overlay_heatmap,
    saliency,
    stage_features,
)
from tests.conftest import TINY


@pytest.fixture
def classifier(tiny) -> ImageClassifier:
    return ImageClassifier(tiny).eval()


class Corner(nn.Module):
    """Two logits that read the top left corner, and the bottom right one."""

    def forward(self, images):
        weights = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        corners = (images[..., :4, :6], images[..., -4:, -6:])
        return torch.stack([(weights * corner).square().sum((1, 2, 3)) for corner in corners], 1)


class TestSaliency:
    @pytest.mark.parametrize("size", [(64, 64), (48, 90), (90, 33), (40, 1), (2, 3), (1, 1)])
    def test_shape_and_range(self, classifier, size):
        heat = saliency(classifier, torch.rand(2, 3, *size))
        assert heat.shape == (2, 1, *size)
        assert ((heat >= 0) & (heat <= 1)).all()
        assert (heat.amax((1, 2, 3)) == 1).all()

    def test_where_the_gradient_is(self):
        images = 0.1 + 0.9 * torch.rand(2, 3, 40, 60)
        images[0, :, :4, :6] = 1  # the first image's larger logit is the first, the second's the second
        images[0, :, -4:, -6:] = 0.1
        images[1, :, :4, :6] = 0.1
        images[1, :, -4:, -6:] = 1
        heat = saliency(Corner(), images)
        assert heat[0, 0, 1, 1] == 1
        assert heat[1, 0, -2, -2] == 1
        for image, top, left in ((heat[0, 0], 0, 0), (heat[1, 0], 34, 52)):
            elsewhere = torch.ones(40, 60, dtype=torch.bool)
            elsewhere[top : top + 6, left : left + 8] = False  # two pixels of blur around the corner
            assert (image[elsewhere] == 0).all()

    def test_classes(self):
        images = torch.rand(2, 3, 40, 60)
        heat = saliency(Corner(), images, torch.tensor([1, 0]))
        assert heat[0, 0, :10].max() == 0 < heat[0, 0, -4:].max()
        assert heat[1, 0, -10:].max() == 0 < heat[1, 0, :4].max()

    def test_largest_over_channels_and_blur(self):
        images = torch.full((1, 3, 200, 200), 0.5)
        narrow, wide = (saliency(Corner(), images, torch.tensor([0]), blur)[0, 0] for blur in (0.01, 0.05))
        assert 40 < (narrow > 0).sum() < (wide > 0).sum()

    def test_no_gradient(self):
        heat = saliency(lambda x: x.sum((2, 3)) * 0, torch.rand(1, 3, 8, 8))
        assert (heat == 0).all()

    def test_sign_does_not_matter(self):
        heat = saliency(lambda x: -x.sum((2, 3)), torch.rand(1, 3, 8, 8))
        torch.testing.assert_close(heat, torch.ones(1, 1, 8, 8))

    def test_leaves_no_trace(self, classifier, images):
        with torch.no_grad():
            expected = saliency(classifier, images)
        assert not images.requires_grad
        assert not expected.requires_grad
        assert all(parameter.grad is None for parameter in classifier.parameters())
        assert torch.equal(saliency(classifier, images), expected)


class TestFeatureColors:
    @pytest.mark.parametrize("shape", [(2, 24, 8, 6), (1, 3, 5, 5), (1, 32, 2, 2), (3, 7, 1, 4), (1, 9, 1, 1)])
    def test_shape_and_range(self, shape):
        torch.manual_seed(0)
        features = torch.randn(shape)
        colors = feature_colors(features)
        assert colors.shape == (shape[0], 3, *shape[2:])
        assert ((colors >= 0) & (colors <= 1)).all()
        assert torch.equal(feature_colors(features.clone()), colors)

    def test_components(self):
        torch.manual_seed(0)
        features = torch.randn(2, 12, 9, 9) * torch.linspace(5, 1, 12).view(-1, 1, 1)
        cells = features.movedim(1, -1).reshape(-1, 12).double().numpy()
        _, vectors = np.linalg.eigh(np.cov(cells.T))
        colors = feature_colors(features)
        for number in range(3):
            axis = vectors[:, -1 - number]
            axis = axis * np.sign(axis[np.abs(axis).argmax()])
            plain = torch.from_numpy((cells - cells.mean(0)) @ axis).view(2, 81)
            shown = colors[:, number].flatten(1)
            inside = (shown > 0) & (shown < 1)
            assert inside.float().mean() > 0.9
            for ours, theirs, mask in zip(shown.double(), plain, inside, strict=True):
                assert torch.corrcoef(torch.stack([ours[mask], theirs[mask]]))[0, 1] > 0.9999  # and so of one sign

    def test_signs_do_not_depend_on_the_order_of_cells(self):
        torch.manual_seed(0)
        features = torch.randn(1, 12, 8, 8) * torch.linspace(5, 1, 12).view(-1, 1, 1)
        colors = feature_colors(features)
        for dim in (2, 3):
            torch.testing.assert_close(feature_colors(features.flip(dim)), colors.flip(dim), rtol=1e-3, atol=1e-3)

    def test_constant(self):
        assert (feature_colors(torch.ones(1, 8, 4, 4)) == 0).all()

    def test_half_precision_and_gradients(self):
        features = torch.randn(1, 8, 4, 4, dtype=torch.float16, requires_grad=True)
        colors = feature_colors(features)
        assert colors.dtype == torch.float32
        assert not colors.requires_grad


class TestStageFeatures:
    def test_preprocessing_of_the_network(self, classifier):
        """The images are resized and normalized as the network's own preprocessing says, not as ImageNet's."""
        model = classifier.model
        images = torch.rand(2, 3, 40, 60)
        usual = stage_features(classifier, images)
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        model.preprocessing = replace(model.preprocessing, interpolation="nearest", mean=mean, std=std)
        size = (4 * model.config.img_size, 6 * model.config.img_size)
        resized = F.interpolate(images, size, mode="nearest-exact")
        normalized = (resized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        found = stage_features(classifier, images)
        for ours, expected, other in zip(found, model.forward_intermediates(normalized), usual, strict=True):
            torch.testing.assert_close(ours, expected)
            assert (ours - other).abs().max() > 1e-2

    def test_channels(self):
        classifier = ImageClassifier(TinyViT(**{**TINY, "in_chans": 1})).eval()
        maps = stage_features(classifier, torch.rand(1, 1, 40, 40))
        assert [features.shape[1] for features in maps] == list(classifier.model.feature_channels)


class TestOverlay:
    def test_heat_covers_the_gray(self):
        images = torch.rand(2, 3, 8, 10)
        heat = torch.zeros(2, 1, 8, 10)
        heat[..., 5:] = 1
        laid = overlay_heatmap(images, heat)
        assert laid.shape == images.shape
        assert ((laid >= 0) & (laid <= 1)).all()
        gray = images.mean(1, keepdim=True).expand_as(images) * 0.6
        torch.testing.assert_close(laid[..., :5], gray[..., :5])
        color = (laid - 0.25 * gray)[..., 5:] / 0.75
        torch.testing.assert_close(color, color[:1, :, :1, :1].expand_as(color))
        assert color.std(1).mean() > 0.1  # a color, and no gray
        torch.testing.assert_close(overlay_heatmap(images, heat, opacity=0.0), gray)
