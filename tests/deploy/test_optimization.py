import ctypes
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import kornia_tinyvit
from kornia_tinyvit import ImageClassifier, TinyViT, TinyViTDetector, allocator
from kornia_tinyvit.deploy import graph, optimization
from kornia_tinyvit.deploy.engines import EagerEngine
from kornia_tinyvit.deploy.optimization import Optimized, optimize
from tests.conftest import SHALLOW, liven

pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    return ImageClassifier.from_config("1m", pretrained="cifar10").eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def eager(model: nn.Module, **kwargs: object) -> Optimized:
    return optimize(model, "eager", tune_allocator=False, **kwargs)


class TestSignatureAndResults:
    def test_logits(self, model, images):
        fast = eager(model)
        torch.testing.assert_close(fast(images), model(images).detach(), atol=1e-4, rtol=1e-4)
        assert fast.engine == "eager"
        assert fast.dtype == torch.float32
        assert fast.warmup_s > 0

    def test_intermediates(self, model, images):
        found = eager(model, method="forward_intermediates")(images)
        assert isinstance(found, list)
        expected = [each.detach() for each in model.forward_intermediates(images)]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("size", [(64, 64), (96, 70)])
    def test_mobile_sam(self, size):
        encoder = liven(TinyViT(**SHALLOW | {"mobile_sam": True}))
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(eager(encoder)(images), encoder(images).detach(), atol=1e-4, rtol=1e-4)

    def test_uint8(self, model):
        pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        unit = eager(model, pixels="unit")(pixels / 255)
        torch.testing.assert_close(eager(model, pixels="uint8")(pixels), unit, atol=1e-4, rtol=1e-4)

    def test_empty_batch(self, model, images):
        assert eager(model)(images[:0]).shape == (0, 7)
        features = eager(model, method="forward_intermediates")(images[:0])
        assert [each.shape for each in features] == [each.shape for each in model.forward_intermediates(images[:0])]

    def test_copies_weights(self, images):
        model = liven(TinyViT(**SHALLOW))
        fast = eager(model)
        before = fast(images)
        with torch.no_grad():
            model.head.weight.zero_()
        assert torch.equal(fast(images), before)


class TestInt8:
    def test_labeled_images_and_other_sizes(self, model, images):
        labeled = [(images, torch.zeros(2, dtype=torch.long)), (images.flip(3), torch.zeros(2, dtype=torch.long))]
        fast = optimize(model, "onnxruntime", torch.int8, calibration=labeled)
        for size in (64, 96):  # the second size compiles and calibrates dynamic shapes
            images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear")
            error = (fast(images) - model(images)).norm() / model(images).norm()
            assert 1e-4 < error < 0.3


class TestClassifier:
    def test_predict(self, classifier):
        fast = optimize(classifier, "eager", tune_allocator=False)
        photos = sorted((Path(kornia_tinyvit.__file__).parent / "assets" / "photos").glob("*.[jp][pn]g"))
        assert isinstance(fast, ImageClassifier)
        assert fast.model.engine == "eager"
        for ours, theirs in zip(fast.predict(photos, 3), classifier.predict(photos, 3), strict=True):
            assert [each.label for each in ours] == [each.label for each in theirs]
            assert [each.score for each in ours] == pytest.approx([each.score for each in theirs], abs=1e-4)

    def test_any_image_size(self, classifier):
        fast = optimize(classifier, "eager", tune_allocator=False)
        for size in ((48, 80), (200, 150)):
            photos = torch.rand(2, 3, *size)
            torch.testing.assert_close(fast(photos), classifier(photos).detach(), atol=1e-4, rtol=1e-4)

    def test_pixels(self, classifier):
        with pytest.raises(ValueError, match="pixels is supported for a TinyViT"):
            optimize(classifier, "eager", pixels="uint8")


class TestAuto:
    def test_fastest_within_tolerance(self, classifier, monkeypatch):
        photos = torch.rand(8, 3, 64, 64)
        delays = {torch.float32: 2.0, torch.bfloat16: 1.0}
        monkeypatch.setattr(
            optimization, "interleaved", lambda steps, _repetitions: {key: delays[key[1]] for key in steps}
        )
        if torch.bfloat16 not in EagerEngine.dtypes(torch.device("cpu")):
            pytest.skip("bfloat16 is not supported here")
        settings = {"dtype": None, "calibration": [photos], "tune_allocator": False}
        fast = optimize(classifier, ["eager"], tolerance=1.0, **settings).model
        assert fast.dtype == torch.bfloat16
        choices = {choice.dtype: choice for choice in fast.choices}
        assert choices[torch.bfloat16].ms == 1000
        assert choices[torch.bfloat16].agreement.images == 8
        assert "not torch.int8" in choices[torch.int8].rejected
        # The same with bfloat16 beyond the tolerance.
        monkeypatch.setattr(
            optimization, "_disagreement", lambda found, _: "too large" if found.mean_error > 1e-4 else None
        )
        fast = optimize(classifier, ["eager"], **settings).model
        assert fast.dtype == torch.float32

    def test_measures(self, model, images):
        fast = optimize(model, ["eager", "onnxruntime"], example=images, tune_allocator=False)
        measured = [choice for choice in fast.choices if choice.rejected is None]
        assert {choice.engine for choice in measured} == {"eager", "onnxruntime"}
        assert fast.engine == measured[0].engine
        assert 0 < measured[0].ms <= measured[1].ms
        torch.testing.assert_close(fast(images), model(images).detach(), atol=1e-4, rtol=1e-4)

    def test_folds_and_exports_once(self, model, images, monkeypatch):
        counts = Counter()

        def counting(function):
            return lambda *args, **kwargs: counts.update([function.__name__]) or function(*args, **kwargs)

        monkeypatch.setattr(graph, "fold", counting(graph.fold))
        monkeypatch.setattr(graph, "to_onnx", counting(graph.to_onnx))
        settings = {"dtype": None, "calibration": [images], "tolerance": 1.0, "tune_allocator": False}
        fast = optimize(model, ["eager", "onnxruntime"], **settings)
        assert sum(choice.rejected is None for choice in fast.choices) >= 3
        assert counts == {"fold": 1, "to_onnx": 1}

    def test_without_images(self, model):
        fast = optimize(model, "eager", None, tune_allocator=False)
        assert fast.dtype == torch.float32
        assert all("images" in choice.rejected for choice in fast.choices if choice.dtype == torch.bfloat16)

    def test_tolerance_of_feature_maps(self, model, images, monkeypatch):
        monkeypatch.setattr(optimization, "DTYPES", (torch.bfloat16,))
        settings = {"method": "forward_features", "calibration": [images], "tune_allocator": False}
        with pytest.raises(ValueError, match="mean relative error"):
            optimize(model, ["eager"], None, tolerance=1e-9, **settings)


class TestMobileSAM:
    """The image encoder is optimized, and low precision is compared by the masks."""

    def test_results(self, sam, photos):
        fast = optimize(sam, "eager", tune_allocator=False)
        assert isinstance(fast.image_encoder, Optimized)
        assert isinstance(sam.image_encoder, TinyViT)
        found, expected = fast.embed(photos), sam.embed(photos)
        torch.testing.assert_close(found.features, expected.features, atol=1e-4, rtol=1e-4)
        point = torch.tensor([[[20.0, 20.0]]])
        masks = [net.predict_masks(net.embed(photos[0]), point)[0].masks() for net in (fast, sam)]
        assert (masks[0] == masks[1]).float().mean() > 0.999
        settings = {"points_per_side": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0}
        assert len(fast.generate_masks(photos[0], **settings)) == len(sam.generate_masks(photos[0], **settings)) > 0

    def test_tolerance_of_masks(self, sam, photos, monkeypatch):
        if torch.bfloat16 not in EagerEngine.dtypes(torch.device("cpu")):
            pytest.skip("bfloat16 is not supported here")
        delays = {torch.float32: 2.0, torch.bfloat16: 1.0}
        monkeypatch.setattr(
            optimization, "interleaved", lambda steps, _repetitions: {key: delays[key[1]] for key in steps}
        )

        def choose(tolerance):
            settings = {"calibration": photos, "tolerance": tolerance, "tune_allocator": False}
            encoder = optimize(sam, ["eager"], None, **settings).image_encoder
            return encoder.dtype, {choice.dtype: choice for choice in encoder.choices}[torch.bfloat16]

        dtype, choice = choose(0.5)
        assert dtype == torch.bfloat16
        lost = 1 - choice.agreement.mask_iou / 100
        assert 0 < lost < 0.1
        assert choose(lost + 1e-6)[0] == torch.bfloat16
        dtype, choice = choose(lost - 1e-6)
        assert dtype == torch.float32
        expected = f"the mean IoU with the masks of the model is {choice.agreement.mask_iou:.2f} %"
        assert choice.rejected == expected

    def test_errors(self, sam):
        for options in ({"pixels": "unit"}, {"method": "forward_features"}):
            with pytest.raises(ValueError, match="A MobileSAM takes images in any form"):
                optimize(sam, "eager", **options)
        fast = optimize(sam, "eager", None, tune_allocator=False).image_encoder
        assert fast.dtype == torch.float32  # nothing to compare on


class TestErrors:
    def test_settings(self, model):
        with pytest.raises(ValueError, match="engine must be auto"):
            optimize(model, "tensorrt")
        with pytest.raises(ValueError, match="dtype must be one of"):
            optimize(model, "eager", torch.float64)
        with pytest.raises(ValueError, match=r"not torch\.int8"):
            optimize(model, "eager", torch.int8)
        with pytest.raises(ValueError, match="needs calibration images"):
            optimize(model, "onnxruntime", torch.int8)
        with pytest.raises(ValueError, match="give an example"):
            optimize(nn.Conv2d(3, 3, 1), "eager")

    def test_missing_package(self, model, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install"):
            optimize(model, "openvino")

    def test_images(self, model, images):
        fast = eager(model)
        with pytest.raises(TypeError, match=r"floating-point images .*got torch.uint8"):
            fast(images.byte())
        with pytest.raises(TypeError, match="got list"):
            fast([images])
        with pytest.raises(ValueError, match=r"got \(3, 64, 64\)"):
            fast(images[0])
        with pytest.raises(ValueError, match="on meta"):
            fast(images.to("meta"))
        with pytest.raises(RuntimeError, match="no gradients"):
            fast(images.requires_grad_())
        with torch.no_grad():
            assert fast(images).shape == (2, 7)

    def test_move(self, model):
        fast = eager(model)
        fast.eval().float().cpu()
        with pytest.raises(RuntimeError, match="cannot be moved or cast"):
            fast.half()


class TestAllocator:
    def test_tuned_by_default(self, model, monkeypatch):
        calls = []
        monkeypatch.setattr(optimization, "keep_memory", lambda: calls.append(1))
        eager(model)
        assert calls == []
        optimize(model, "eager")
        assert calls == [1]

    @pytest.mark.parametrize(("rejects_threshold", "done"), [(False, True), (True, True)])
    def test_mallopt(self, monkeypatch, rejects_threshold, done):
        parameters = []

        class Libc:
            gnu_get_libc_version = None

            @staticmethod
            def mallopt(parameter: int, value: int) -> int:
                parameters.append(parameter)
                return 0 if rejects_threshold and parameter == allocator.M_MMAP_THRESHOLD else 1

        monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
        monkeypatch.setattr(sys, "platform", "linux")
        assert allocator.keep_memory() is done
        assert (allocator.M_MMAP_MAX in parameters) is rejects_threshold
        assert allocator.M_TRIM_THRESHOLD in parameters

    def test_elsewhere(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert allocator.keep_memory() is False
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
        assert allocator.keep_memory() is False


@pytest.mark.slow  # traces and converts a detector
def test_detector():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    settings = {"num_classes": 3, "hidden_dim": 32, "num_queries": 9, "decoder_layers": 1}
    detector = TinyViTDetector(liven(TinyViT(**SHALLOW | {"num_classes": 0})), **settings).eval()
    fast = optimize(detector, "onnxruntime", tune_allocator=False)
    assert fast.pixels == "unit"
    photos = torch.nn.functional.interpolate(torch.rand(2, 3, 5, 6), (64, 64))
    for found, expected in zip(fast(photos), detector(photos), strict=True):
        torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)
