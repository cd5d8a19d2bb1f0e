"""The segmenter: output sizes, gradients and checkpoints."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kornia_tinyvit import ImageClassifier, TinyViT, save_checkpoint
from kornia_tinyvit.checkpoints import CheckpointError
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.preprocessing import resize_images
from kornia_tinyvit.semantic import MlpDecoder, SegmenterConfig, SemanticSegmenter, class_maps, fitted_size
from tests.conftest import TINY

NAMES = ("sky", "road", "tree")


def make_segmenter(**changes) -> SemanticSegmenter:
    torch.manual_seed(0)
    return SemanticSegmenter(
        TinyViT(**(TINY | {"num_classes": 0} | changes)), num_classes=3, width=16, class_names=NAMES
    )


@pytest.fixture
def segmenter() -> SemanticSegmenter:
    found = make_segmenter()
    found(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2)))  # updates the running statistics
    return found.eval()


class TestForward:
    @pytest.mark.parametrize("size", [(64, 64), (32, 32), (45, 71), (33, 100), (130, 64)])
    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_sizes(self, segmenter, size, batch):
        logits = segmenter(torch.rand(batch, 3, *size))
        assert logits.shape == (batch, 3, *size)
        assert logits.isfinite().all()

    def test_it_normalizes(self, segmenter, images):
        features = segmenter.backbone.forward_intermediates(
            (images - segmenter.mean[:, None, None]) / segmenter.std[:, None, None]
        )
        logits = segmenter.decoder(features)
        assert logits.shape == (2, 3, 16, 16)
        expected = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")
        assert torch.allclose(segmenter(images), expected, atol=1e-5)

    @pytest.mark.parametrize("stage", range(4))
    def test_every_stage_affects_the_logits(self, segmenter, images, stage):
        features = segmenter.backbone.forward_intermediates(images)
        other = [x + (number == stage) * torch.randn(x.shape) for number, x in enumerate(features)]
        assert not torch.allclose(segmenter.decoder(features), segmenter.decoder(other), atol=1e-3)

    def test_gradients(self, segmenter):
        segmenter = segmenter.double()
        images = torch.rand(1, 3, 33, 40, dtype=torch.double, requires_grad=True)
        rows = torch.randn(3, dtype=torch.double)[None, :, None, None]

        def scores(shift):
            return (segmenter(images + shift) * rows).mean()

        direction = torch.randn(images.shape, dtype=torch.double)
        (gradient,) = torch.autograd.grad(scores(0), images)
        step = 1e-5
        numeric = (scores(step * direction) - scores(-step * direction)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5)

    def test_trainable_parameters_have_gradients(self, images):
        segmenter = make_segmenter()
        segmenter(images).square().mean().backward()
        for name, parameter in segmenter.named_parameters():
            assert (parameter.grad is None) == (not parameter.requires_grad), name
        frozen = {name for name, parameter in segmenter.named_parameters() if not parameter.requires_grad}
        assert frozen == {"backbone.norm_head.weight", "backbone.norm_head.bias"}

    def test_dropout(self, images):
        segmenter = make_segmenter()
        assert not torch.equal(segmenter(images), segmenter(images))
        segmenter.eval()
        assert torch.equal(segmenter(images), segmenter(images))

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, r"x\.float\(\) / 255"),
            (torch.rand(3, 64, 64), ValueError, r"\(3, 64, 64\)"),
            (torch.rand(1, 1, 64, 64), ValueError, r"\(B, 3, H, W\)"),
            (torch.rand(1, 3, 31, 64), ValueError, "at least 32x32"),
        ],
    )
    def test_exceptions(self, segmenter, images, error, message):
        with pytest.raises(error, match=message):
            segmenter(images)

    def test_compile(self, segmenter, images):
        compiled = torch.compile(segmenter, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(images), segmenter(images), atol=1e-5)

    def test_one_channel(self):
        segmenter = make_segmenter(in_chans=1).eval()
        assert segmenter(torch.rand(2, 1, 64, 64)).shape == (2, 3, 64, 64)

    def test_stages_of_mobile_sam(self):
        segmenter = make_segmenter(mobile_sam=True)
        assert segmenter(torch.rand(2, 3, 64, 64)).shape == (2, 3, 64, 64)
        assert not any(parameter.requires_grad for parameter in segmenter.backbone.neck.parameters())


class TestPredict:
    def test_sizes(self, segmenter, tmp_path):
        wide = torch.rand(3, 40, 90)
        Image.new("RGB", (30, 20), "red").save(tmp_path / "small.png")
        found = segmenter.train().predict([wide, tmp_path / "small.png", Image.new("L", (1, 70))])
        assert [tuple(each.shape) for each in found] == [(40, 90), (20, 30), (70, 1)]
        assert all(each.dtype == torch.int64 for each in found)
        assert segmenter.training
        assert [each.shape for each in segmenter.predict(torch.rand(2, 3, 33, 50))] == [(33, 50)] * 2
        assert segmenter.predict([]) == []

    def test_arrays(self, segmenter):
        levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        (wanted,) = segmenter.predict(torch.from_numpy(levels).movedim(2, 0) / 255)
        for image in (levels, torch.from_numpy(levels), levels.astype(np.float32) / np.float32(255)):
            assert torch.equal(segmenter.predict(image)[0], wanted)

    def test_equals_the_largest_logit(self, segmenter):
        image = torch.rand(3, 50, 77)
        logits = segmenter(resize_images(image[None], *fitted_size(50, 77, segmenter.config.backbone)))
        expected = torch.nn.functional.interpolate(logits, (50, 77), mode="bilinear").argmax(1)[0]
        assert torch.equal(segmenter.predict(image)[0], expected)
        assert expected.unique().numel() > 1

    def test_many_classes(self):
        logits = torch.randn(2, 21, 32, 32)
        found = class_maps(lambda images: logits, torch.rand(2, 3, 70, 70), TinyViTConfig(img_size=32))
        expected = torch.nn.functional.interpolate(logits, (70, 70), mode="bilinear").argmax(1)
        assert torch.equal(found, expected)
        assert found.max() > 16

    @pytest.mark.parametrize(
        ("image", "error"),
        [
            ("gone.png", FileNotFoundError),
            (torch.rand(2, 40, 40), ValueError),
            (255 * torch.rand(3, 40, 40), ValueError),
            (3, TypeError),
        ],
    )
    def test_exceptions(self, segmenter, image, error):
        with pytest.raises(error):
            segmenter.predict([image])

    @pytest.mark.parametrize("size", [(480, 640), (12000, 900), (3000, 4000), (40, 40)])
    def test_fitted_size(self, size):
        """Windows of 7 tokens tile no image of 512 pixels, so sides are multiples of 32."""
        height, width = fitted_size(*size, TinyViTConfig(img_size=512))
        assert (height % 32, width % 32) == (0, 0)
        assert height * width == pytest.approx(512**2, rel=0.1)
        assert height / width == pytest.approx(size[0] / size[1], rel=0.15)

    def test_no_padded_windows(self):
        config = TinyViTConfig(img_size=224)  # 7 tokens of 8, 14 of 16 and 7 of 32 pixels
        assert fitted_size(480, 640, config) == (224, 224)
        assert fitted_size(480, 1200, config) == (224, 448)
        assert fitted_size(480, 640, config.replace(img_size=672)) == (672, 672)
        assert fitted_size(480, 640, TinyViTConfig.from_variant("1m", img_size=256)) == (192, 320)

    def test_fitted_size_of_a_line(self):
        assert fitted_size(1, 12000, TinyViTConfig(img_size=64)) == (32, 7008)


class TestFiles:
    def test_saved_and_loaded(self, segmenter, images, tmp_path):
        path = segmenter.save(tmp_path / "new" / "segmenter.safetensors")
        again = SemanticSegmenter.from_config(pretrained=path)
        assert not again.training
        assert (again.config, again.class_names) == (segmenter.config, NAMES)
        assert torch.equal(again(images), segmenter(images))
        assert torch.equal(SemanticSegmenter.from_config(pretrained=str(path))(images), segmenter(images))

    def test_another_size(self, segmenter, tmp_path):
        path = segmenter.save(tmp_path / "segmenter.safetensors")
        again = SemanticSegmenter.from_config(pretrained=path, img_size=128, window_sizes="scale")
        assert again.config.backbone.window_sizes == (8, 8, 10, 6)
        assert again.config.width == 16
        assert again(torch.rand(1, 3, 128, 128)).shape == (1, 3, 128, 128)

    def test_other_classes(self, segmenter, images, tmp_path):
        path = segmenter.save(tmp_path / "segmenter.safetensors")
        again = SemanticSegmenter.from_config(pretrained=path, class_names=("a", "b"))
        assert again.training
        assert again.class_names == ("a", "b")
        assert torch.equal(again.decoder.fuse.c.weight, segmenter.decoder.fuse.c.weight)
        assert again.eval()(images).shape == (2, 2, 64, 64)

    def test_matched_names(self, segmenter, images, tmp_path):
        path = segmenter.save(tmp_path / "segmenter.safetensors")
        again = SemanticSegmenter.from_config(pretrained=path, class_names=("tree", "sky", "road"))
        assert not again.training
        torch.testing.assert_close(again(images), segmenter(images)[:, [2, 0, 1]])
        again = SemanticSegmenter.from_config(pretrained=path, class_names=("car", "tree"))
        assert again.training
        torch.testing.assert_close(again.eval()(images)[:, 1], segmenter(images)[:, 2])

    @pytest.mark.parametrize("layout", ["file", "catalog"])
    def test_a_backbone(self, tmp_path, layout):
        start = TinyViT.from_config("1m", pretrained="cifar10")
        pretrained = save_checkpoint(start, tmp_path / "start.safetensors") if layout == "file" else "cifar10"
        segmenter = SemanticSegmenter.from_config("1m", num_classes=5, pretrained=pretrained, width=8)
        assert segmenter.training
        assert torch.equal(
            segmenter.backbone.layers[2].blocks[1].mlp.fc1.weight, start.layers[2].blocks[1].mlp.fc1.weight
        )
        assert segmenter.class_names == tuple(f"class {index}" for index in range(5))

    def test_a_configuration(self, segmenter):
        again = SemanticSegmenter.from_config(segmenter.config, class_names=NAMES)
        assert again.config == segmenter.config
        again.load_state_dict(segmenter.state_dict())
        assert SegmenterConfig.from_dict(json.loads(json.dumps(segmenter.config.to_dict()))) == segmenter.config

    def test_copies(self, segmenter, images):
        assert torch.equal(copy.deepcopy(segmenter)(images), segmenter(images))

    def spoil(self, path, change):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    def test_truncated(self, segmenter, tmp_path):
        path = segmenter.save(tmp_path / "segmenter.safetensors")
        whole = path.read_bytes()
        path.write_bytes(whole[:-100])
        with pytest.raises(CheckpointError, match=r"segmenter\.safetensors"):
            SemanticSegmenter.from_config(num_classes=3, pretrained=path)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("width", 17, "another architecture: .*project.0"),
            ("width", 10**12, "another network"),
            ("num_classes", 4, "classifier"),
            ("num_classes", 0, "positive integer"),
            ("depth", 3, "has the fields"),
        ],
    )
    def test_wrong_configuration(self, segmenter, tmp_path, field, value, message):
        path = segmenter.save(tmp_path / "segmenter.safetensors")

        def change(tensors, metadata):
            stored = json.loads(metadata["kornia_tinyvit.segmenter"])
            metadata["kornia_tinyvit.segmenter"] = json.dumps(stored | {field: value})

        self.spoil(path, change)
        with pytest.raises(CheckpointError, match=message):
            SemanticSegmenter.from_config(pretrained=path)

    def test_not_finite(self, segmenter, tmp_path):
        path = segmenter.save(tmp_path / "segmenter.safetensors")
        self.spoil(path, lambda tensors, metadata: tensors["decoder.classifier.bias"].fill_(torch.nan))
        with pytest.raises(CheckpointError, match=r"NaN or infinite values in classifier\.bias"):
            SemanticSegmenter.from_config(pretrained=path)

    def test_another_variant(self, tmp_path):
        path = SemanticSegmenter.from_config("1m", num_classes=2, width=8).save(tmp_path / "one.safetensors")
        assert SemanticSegmenter.from_config("1m", pretrained=path).config.backbone == TinyViTConfig.from_variant(
            "1m", num_classes=0
        )
        with pytest.raises(CheckpointError, match="embed_dims"):
            SemanticSegmenter.from_config("5m", pretrained=path)

    def test_not_for_a_classifier(self, segmenter, tmp_path):
        path = segmenter.save(tmp_path / "segmenter.safetensors")
        with pytest.raises(CheckpointError, match=r"holds a semantic segmenter; use SemanticSegmenter\.from_config"):
            ImageClassifier.from_config(pretrained=path)


class TestExceptions:
    def test_no_classes(self):
        with pytest.raises(ValueError, match="number of classes is unknown"):
            SemanticSegmenter.from_config("1m")

    def test_names(self):
        with pytest.raises(ValueError, match="2 class names for 3 classes"):
            SemanticSegmenter.from_config("1m", num_classes=3, class_names=("a", "b"))

    @pytest.mark.parametrize("change", [{"num_classes": 0}, {"width": 0}, {"width": 2.0}, {"dropout": 1.0}])
    def test_numbers(self, change):
        with pytest.raises(ValueError, match=next(iter(change))):
            SegmenterConfig(**({"backbone": TinyViTConfig(), "num_classes": 3} | change))


class TestParameterGroups:
    def test_rates(self):
        segmenter = make_segmenter()
        groups = segmenter.parameter_groups(1e-3, 0.1, layer_decay=0.5)
        rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert len(rates) == sum(len(group["params"]) for group in groups)
        learns = {name: p for name, p in segmenter.named_parameters() if p.requires_grad}
        assert len(rates) == len(learns)
        assert rates[id(learns["decoder.classifier.weight"])] == (1e-3, 0.1)
        assert rates[id(learns["decoder.classifier.bias"])] == (1e-3, 0)
        assert rates[id(learns["backbone.patch_embed.seq.0.c.weight"])] == (1e-3 * 0.5**4, 0.1)
        assert groups[-1]["lr"] == 1e-3  # the rate in the training's metrics

    def test_frozen_backbone(self):
        segmenter = make_segmenter()
        segmenter.backbone.requires_grad_(False)
        groups = segmenter.parameter_groups(1e-3)
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in segmenter.decoder.parameters()}


def test_decoder():
    decoder = MlpDecoder((4, 8), num_classes=5, width=6).eval()
    assert decoder([torch.rand(2, 4, 9, 7), torch.rand(2, 8, 5, 4)]).shape == (2, 5, 9, 7)
