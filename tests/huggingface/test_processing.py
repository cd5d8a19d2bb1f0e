import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd import gradcheck

pytest.importorskip("transformers")

from transformers import AutoImageProcessor

from kornia_tinyvit.checkpoints.catalog import ASSETS, CATALOG
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.huggingface import TinyVitImageProcessor
from kornia_tinyvit.images import read_image
from kornia_tinyvit.preprocessing import EvaluationPipeline, default_preprocessing
from tests.huggingface.helpers import tiny_config

PHOTO = ASSETS / "photos" / "chelsea.png"


@pytest.fixture
def photo() -> Image.Image:
    return Image.open(PHOTO).convert("RGB")


@pytest.fixture
def processor() -> TinyVitImageProcessor:
    return TinyVitImageProcessor(size=64)


class TestEquivalence:
    @pytest.mark.parametrize("size", [48, 224, 384])
    @pytest.mark.parametrize("crop", ["auto", None, 0.8])
    def test_evaluation_pipeline(self, photo, size, crop):
        evaluation = EvaluationPipeline(size, crop, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
        found = TinyVitImageProcessor.from_preprocessing(evaluation.settings)(photo, return_tensors="pt")[
            "pixel_values"
        ]
        assert torch.equal(found, evaluation(read_image(photo)[None]))

    @pytest.mark.parametrize("weights", CATALOG, ids=lambda weights: f"{weights.variant}-{weights.name}")
    def test_published_weights(self, photo, weights):
        found = TinyVitImageProcessor.from_preprocessing(weights.preprocessing)(photo)["pixel_values"]
        assert torch.equal(found, EvaluationPipeline.from_preprocessing(weights.preprocessing)(read_image(photo)[None]))

    def test_gray_and_many_channels(self, photo):
        for channels in (1, 5):
            preprocessing = default_preprocessing(TinyViTConfig(in_chans=channels))
            images = torch.rand(2, channels, 70, 90)
            found = TinyVitImageProcessor.from_preprocessing(preprocessing)(images)["pixel_values"]
            assert torch.equal(found, EvaluationPipeline.from_preprocessing(preprocessing)(images))
        gray = TinyVitImageProcessor.from_preprocessing(default_preprocessing(TinyViTConfig(in_chans=1)))
        assert gray(photo)["pixel_values"].shape[1] == 1


class TestInputs:
    def test_types(self, processor, photo):
        pixels = np.array(photo)
        expected = processor(photo)["pixel_values"]
        assert expected.shape == (1, 3, 64, 64)
        inputs = [
            str(PHOTO),
            PHOTO,
            pixels,
            pixels.transpose(2, 0, 1),
            pixels[None],
            pixels.astype(np.float32) / 255,
            torch.from_numpy(pixels),
            read_image(photo),
            read_image(photo)[None],
            [photo],
            [[photo]],
        ]
        for image in inputs:
            assert torch.equal(processor(image)["pixel_values"], expected), type(image)

    def test_different_sizes(self, processor):
        images = [torch.rand(3, 50, 90), torch.rand(3, 120, 70), np.zeros((80, 80, 3), np.uint8)]
        together = processor(images)["pixel_values"]
        assert together.shape == (3, 3, 64, 64)
        for one, image in zip(together, images, strict=True):
            assert torch.equal(one, processor(image)["pixel_values"][0])

    def test_batches(self, processor):
        images = torch.rand(4, 3, 50, 90)
        assert torch.equal(processor(images)["pixel_values"], processor(list(images))["pixel_values"])
        assert processor(torch.rand(0, 3, 50, 90))["pixel_values"].shape == (0, 3, 64, 64)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
    def test_modes(self, processor, photo, mode):
        image = Image.fromarray(np.full((70, 90), 40000, np.uint16)) if mode == "I;16" else photo.convert(mode)
        assert torch.equal(processor(image)["pixel_values"], processor(read_image(image))["pixel_values"])

    def test_gray_arrays(self, processor):
        gray = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
        expected = processor(np.repeat(gray[..., None], 3, -1))["pixel_values"]
        for image in (gray, gray[None], gray[..., None]):
            assert torch.equal(processor(image)["pixel_values"], expected)

    def test_ambiguous_shape(self, processor):
        image = np.zeros((3, 40, 3), np.uint8)
        image[0] = 255
        first = processor(image, input_data_format="channels_first")["pixel_values"]
        last = processor(image, input_data_format="channels_last")["pixel_values"]
        assert not torch.equal(first, last)
        assert torch.equal(processor(image)["pixel_values"], last)
        assert torch.equal(processor(torch.from_numpy(image))["pixel_values"], first)
        assert torch.equal(processor(torch.from_numpy(image), input_data_format="channels_last")["pixel_values"], last)

    def test_numpy_output(self, processor, photo):
        found = processor(photo, return_tensors="np")["pixel_values"]
        assert isinstance(found, np.ndarray)
        assert np.array_equal(found, processor(photo)["pixel_values"].numpy())


class TestTensors:
    def test_gradients(self, processor):
        images = torch.rand(2, 3, 80, 60, requires_grad=True)
        processor(images, return_tensors="pt")["pixel_values"].square().sum().backward()
        assert (images.grad != 0).float().mean() > 0.6  # all but the cropped pixels

    def test_gradcheck(self):
        processor = TinyVitImageProcessor(size=4, image_mean=[0.5], image_std=[0.5])
        images = 0.2 + 0.6 * torch.rand(1, 1, 6, 7, dtype=torch.float64)
        assert gradcheck(lambda x: processor(x)["pixel_values"], images.requires_grad_())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, processor, dtype):
        assert processor(torch.rand(1, 3, 80, 60, dtype=dtype))["pixel_values"].dtype == dtype

    def test_device(self, processor):
        """Tensors stay on their device or move to the given one; the meta device represents any other."""
        assert processor(torch.rand(1, 3, 80, 60, device="meta"))["pixel_values"].device.type == "meta"
        assert processor(torch.rand(3, 80, 60), device="meta")["pixel_values"].device.type == "meta"


class TestSettings:
    def test_call(self, processor, photo):
        plain = processor(photo, do_normalize=False)["pixel_values"]
        assert plain.min() >= -1e-6
        assert plain.max() <= 1 + 1e-6
        assert processor(photo, size=96)["pixel_values"].shape[-1] == 96
        whole = processor(photo, size={"height": 40, "width": 60}, do_center_crop=False)["pixel_values"]
        assert whole.shape == (1, 3, 40, 60)
        unchanged = processor(read_image(photo), do_resize=False, do_normalize=False, do_rescale=False)["pixel_values"]
        assert torch.equal(unchanged[0], read_image(photo))

    def test_files(self, tmp_path):
        processor = TinyVitImageProcessor(size=96, crop_pct=0.9, do_center_crop=False, image_mean=[0.5] * 3)
        processor.save_pretrained(tmp_path)
        values = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert values["image_processor_type"] == "TinyVitImageProcessor"
        assert values["size"] == {"height": 96, "width": 96}
        again = TinyVitImageProcessor.from_pretrained(tmp_path)
        assert again.to_dict() == processor.to_dict()
        assert TinyVitImageProcessor.from_pretrained(tmp_path, size=32).size.height == 32
        assert json.loads(processor.to_json_string()) == values

    @pytest.mark.parametrize("backend", [None, "pil", "torchvision"])
    def test_auto_class(self, tmp_path, backend, caplog):
        TinyVitImageProcessor(size=96).save_pretrained(tmp_path)
        tiny_config().save_pretrained(tmp_path)
        found = AutoImageProcessor.from_pretrained(tmp_path, **({} if backend is None else {"backend": backend}))
        assert type(found) is TinyVitImageProcessor
        assert found.size.height == 96
        assert "Falling back" not in caplog.text


class TestErrors:
    @pytest.mark.parametrize(
        ("image", "error", "message"),
        [
            (np.full((40, 40, 3), 200.0), ValueError, r"must be in \[0, 1\]; got values from 200 to 200\. Divide"),
            (np.zeros((40, 40, 5), np.uint8), ValueError, "An image must have 1 .gray., 3 .RGB. or 4 .RGBA. channels"),
            (
                torch.zeros(3, 40, 40, dtype=torch.int32),
                TypeError,
                r"must be uint8, uint16, bool or floating point; got torch.int32",
            ),
            (torch.zeros(1, 1, 3, 40, 40), ValueError, r"An image must be a tensor \(C, H, W\)"),
            (torch.zeros(3, 0, 40), ValueError, "An image must have pixels"),
            ({"image": 1}, TypeError, "a PIL image, an array or a tensor; got dict"),
            ([], ValueError, "Got no images"),
        ],
    )
    def test_images(self, processor, image, error, message):
        with pytest.raises(error, match=message):
            processor(image)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"size": {"height": 40, "width": 60}}, "Center crops must be square; got 40x60"),
            ({"size": {"shortest_edge": 40}}, "size must be an integer"),
            ({"crop_pct": 1.5}, "crop_fraction in"),
            ({"do_rescale": False}, "With do_rescale=False images must be floating point"),
        ],
    )
    def test_settings(self, processor, settings, message):
        with pytest.raises((ValueError, TypeError), match=message):
            processor(np.zeros((50, 50, 3), np.uint8), **settings)

    def test_sizes_without_resizing(self, processor):
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            processor([torch.rand(3, 40, 40), torch.rand(3, 50, 50)], do_resize=False)
