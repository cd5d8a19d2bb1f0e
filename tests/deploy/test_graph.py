import pytest
import torch
from kornia.enhance import normalize
from kornia.geometry.transform import hflip
from torch import nn
from torch.nn.utils import prune

from kornia_tinyvit import ImageClassifier, TinyViT
from kornia_tinyvit.deploy.graph import build_graph
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.conftest import TINY, liven

MEAN, STD = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    return ImageClassifier.from_config("1m", pretrained="cifar10").eval()


class TestNetwork:
    def test_pixels(self, tiny):
        pixels_uint8 = torch.randint(0, 256, (2, 3, 65, 70), dtype=torch.uint8)
        unit = pixels_uint8.float() / 255
        expected = tiny(normalize(unit, MEAN, STD))
        for pixels, images in (("normalized", normalize(unit, MEAN, STD)), ("unit", unit), ("uint8", pixels_uint8)):
            torch.testing.assert_close(build_graph(tiny, pixels=pixels)(images), expected, atol=1e-4, rtol=1e-4)

    def test_pixels_of_a_changed_stem(self, tiny):
        prune.l1_unstructured(tiny.patch_embed.seq[0].c, "weight", 0.5)
        images = torch.randint(0, 256, (2, 3, 65, 70), dtype=torch.uint8)
        expected = tiny(normalize(images.float() / 255, MEAN, STD))
        torch.testing.assert_close(build_graph(tiny, pixels="uint8")(images), expected, atol=1e-4, rtol=1e-4)

    def test_one_channel(self):
        model = liven(TinyViT(**TINY | {"in_chans": 1}))
        unit = torch.rand(1, 1, 64, 64)
        expected = ImageClassifier(model)(unit)  # its crop is smaller than the image
        prepared = ImageClassifier(model).preprocessing.resize_and_crop(unit)
        torch.testing.assert_close(build_graph(model, pixels="unit")(prepared), expected, atol=1e-4, rtol=1e-4)

    def test_methods(self, tiny):
        images = torch.randn(1, 3, 64, 64)
        features = build_graph(tiny, "forward_intermediates")(images)
        assert isinstance(features, tuple)
        for ours, theirs in zip(features, tiny.forward_intermediates(images), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        features = build_graph(tiny, "forward_features")(images)
        torch.testing.assert_close(features, tiny.forward_features(images), atol=1e-4, rtol=1e-4)

    def test_bfloat16_returns_floats(self, tiny):
        graph = build_graph(tiny, pixels="uint8").with_dtype(torch.bfloat16)
        out = graph(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
        assert out.dtype == torch.float32
        assert graph.network.head.weight.dtype == torch.bfloat16
        assert graph.mean.dtype == torch.float32

    def test_module_with_network(self, tiny):
        outer = nn.Sequential(tiny, nn.Softmax(1))
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(build_graph(outer)(images), outer(images), atol=1e-5, rtol=1e-4)


class TestClassifier:
    @pytest.mark.parametrize("size", [(48, 80), (120, 64), (64, 64)])
    @pytest.mark.parametrize("pixels", ["unit", "uint8"])
    def test_any_image_size(self, classifier, size, pixels):
        pixels_uint8 = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        unit = pixels_uint8.float() / 255
        graph = build_graph(classifier, pixels=pixels)
        images = pixels_uint8 if pixels == "uint8" else unit
        torch.testing.assert_close(graph(images), classifier(unit), atol=1e-3, rtol=1e-3)

    def test_views(self, classifier):
        both = ImageClassifier(classifier.model, views=(hflip,)).eval()
        images = torch.rand(2, 3, 70, 90)
        found = build_graph(both)(images)
        torch.testing.assert_close(found, both(images), atol=1e-3, rtol=1e-3)
        assert not torch.allclose(found, classifier(images), atol=1e-2)

    def test_other_preprocessing(self, classifier):
        other = ImageClassifier(classifier.model, preprocessing=nn.AvgPool2d(2)).eval()
        images = torch.rand(1, 3, 128, 128)
        torch.testing.assert_close(build_graph(other)(images), other(images), atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="uint8 images need"):
            build_graph(other, pixels="uint8")


class TestErrors:
    def test_errors(self, tiny, classifier):
        with pytest.raises(ValueError, match="method must be one of"):
            build_graph(tiny, "backward")
        with pytest.raises(ValueError, match="pixels must be"):
            build_graph(tiny, pixels="float")
        with pytest.raises(ValueError, match="forward_features is a method of a TinyViT, which"):
            build_graph(classifier, "forward_features")
        with pytest.raises(ValueError, match="ImageClassifier normalizes its images"):
            build_graph(classifier, pixels="normalized")
        with pytest.raises(ValueError, match="The preprocessing of Sequential is unknown"):
            build_graph(nn.Sequential(tiny), pixels="unit")
