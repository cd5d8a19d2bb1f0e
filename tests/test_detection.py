"""The detector: kornia's RT-DETR on our feature maps, boxes in pixels of each image, and checkpoints."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from kornia.enhance import normalize
from kornia.models.rt_detr import RTDETR
from PIL import Image
from torch import Tensor, nn

from kornia_tinyvit import CheckpointError, TinyViT, TinyViTConfig, save_checkpoint
from kornia_tinyvit.checkpoints.tensors import read_tensors, write_tensors
from kornia_tinyvit.detection import DetectorConfig, TinyViTDetector, suppress_duplicates
from kornia_tinyvit.preprocessing import resize_images
from tests.conftest import TINY

NAMES = ("cat", "dog", "owl")
BACKBONE = TinyViTConfig(**TINY | {"num_classes": 0, "window_sizes": (4, 4, 2, 1)})
CONFIG = DetectorConfig(BACKBONE, 3, hidden_dim=16, num_queries=10, decoder_layers=2)


@torch.no_grad()
def make_detector(**changes) -> TinyViTDetector:
    """A detector whose outputs depend on the image and on every weight."""
    torch.manual_seed(0)
    detector = TinyViTDetector.from_config(dataclasses.replace(CONFIG, **changes), class_names=NAMES)
    for name, tensor in [*detector.named_parameters(), *detector.named_buffers()]:
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and name not in ("mean", "std"):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return detector.eval()


@pytest.fixture(scope="module")
def detector() -> TinyViTDetector:
    return make_detector()


def make_images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


class TestForward:
    @pytest.mark.parametrize("size", [(64, 64), (45, 70), (200, 33)])
    def test_shapes(self, detector, size):
        logits, boxes = detector(torch.rand(2, 3, *size))
        assert (logits.shape, boxes.shape) == ((2, 10, 3), (2, 10, 4))
        assert 0 <= boxes.min() <= boxes.max() <= 1

    def test_equals_kornias_rtdetr_on_our_feature_maps(self, detector):
        class Backbone(nn.Module):
            def forward(self, images):
                return detector.backbone.forward_intermediates(images)[1:]

        reference = RTDETR(Backbone(), detector.encoder, detector.decoder)
        (photo,) = make_images((50, 90))
        square = normalize(resize_images(photo[None], 64, 64), detector.mean, detector.std)
        for ours, theirs in zip(detector(photo[None]), reference(square), strict=True):
            assert torch.equal(ours, theirs)

    def test_images_of_mixed_sizes(self, detector):
        mixed = make_images((40, 64), (90, 50))
        logits, boxes = detector(mixed)
        for row, photo in enumerate(mixed):
            alone = detector(photo[None])
            torch.testing.assert_close((logits[row], boxes[row]), (alone[0][0], alone[1][0]), atol=1e-5, rtol=1e-4)

    def test_no_images(self, detector):
        logits, boxes = detector(torch.rand(0, 3, 40, 50))
        assert (logits.shape, boxes.shape) == ((0, 10, 3), (0, 10, 4))
        with pytest.raises(ValueError, match="empty list of images"):
            detector([])

    def test_gradients_reach_the_pixels(self, detector):
        images = torch.rand(1, 3, 50, 60, requires_grad=True)
        logits, boxes = detector(images)
        (logits.sum() + boxes.sum()).backward()
        assert images.grad.abs().amax((0, 1)).count_nonzero() > 2000

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "floating point"),
            (torch.rand(1, 4, 64, 64), ValueError, "4"),
            ([torch.rand(3, 64, 64), torch.rand(1, 64, 64)], ValueError, "1"),
        ],
    )
    def test_exceptions(self, detector, images, error, message):
        with pytest.raises(error, match=message):
            detector(images)


class TestInitialization:
    def test_nothing_is_found_before_training(self):
        torch.manual_seed(0)
        detector = TinyViTDetector.from_config(CONFIG).eval()
        logits, boxes = detector(torch.rand(2, 3, 64, 64))
        assert 0.001 < logits.sigmoid().mean() < 0.05
        # Boxes equal their anchors: squares of 0.05, 0.1 or 0.2 of the side, by the stride.
        assert {round(side, 4) for side in boxes[..., 2:].unique().tolist()} <= {0.05, 0.1, 0.2}

    def test_points_lie_on_rings(self):
        offsets = TinyViTDetector.from_config(CONFIG).decoder.decoder.layers[1].cross_attn.sampling_offsets.bias
        rings = offsets.view(8, 3, 4, 2).abs().amax(-1)
        assert torch.allclose(rings, torch.arange(1.0, 5).expand(8, 3, 4))


class TestConfig:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_classes": 0}, "num_classes must be a positive integer"),
            ({"num_queries": 2.0}, "num_queries must be a positive integer"),
            ({"hidden_dim": 20}, "multiple of 8"),
            ({"expansion": 0.0}, "expansion must be in"),
            ({"num_queries": 85}, "num_queries=85 exceeds the 84 cells"),
            ({"backbone": BACKBONE.replace(img_size=80)}, "multiple of 32; got 80"),
            ({"backbone": TinyViTConfig.from_variant("5m", mobile_sam=True)}, "stride 32"),
        ],
    )
    def test_exceptions(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes)

    def test_round_trip(self):
        assert DetectorConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
        with pytest.raises(ValueError, match="DetectorConfig has the fields"):
            DetectorConfig.from_dict({"num_classes": 3})

    def test_default_img_size(self):
        detector = TinyViTDetector.from_config("1m", class_names=NAMES, hidden_dim=16)
        config = detector.config
        assert (config.backbone.img_size, config.num_classes, config.num_queries) == (640, 3, 300)
        assert detector.training
        assert not detector.backbone.norm_head.weight.requires_grad

    def test_weights_of_the_backbone(self):
        detector = TinyViTDetector.from_config(
            "1m", num_classes=2, pretrained="cifar10", hidden_dim=16, img_size=64, num_queries=5
        )
        whole = TinyViT.from_config("1m", pretrained="cifar10")
        assert torch.equal(detector.backbone.patch_embed.seq[0].c.weight, whole.patch_embed.seq[0].c.weight)
        assert detector.training
        assert detector.class_names == ("class 0", "class 1")

    def test_unknown_classes(self):
        with pytest.raises(ValueError, match="num_classes or class_names"):
            TinyViTDetector.from_config("1m")
        with pytest.raises(ValueError, match="2 class names for 3 classes"):
            TinyViTDetector.from_config(CONFIG, num_classes=3, class_names=["a", "b"])


class TestPredict:
    def test_boxes_are_in_the_pixels_of_each_image(self, detector):
        sizes = [(40, 80), (120, 60), (64, 64)]
        photos = make_images(*sizes)
        found = detector.predict(photos, confidence_threshold=0.0, batch_size=2)
        for photo, (height, width), objects in zip(photos, sizes, found, strict=True):
            logits, boxes = (each[0] for each in detector(photo[None]))
            scores, index = logits.sigmoid().flatten().topk(10)
            assert [each.score for each in objects] == pytest.approx(scores.tolist(), abs=1e-5)
            assert [each.index for each in objects] == (index % 3).tolist()
            assert all(each.label == NAMES[each.index] for each in objects)
            x, y, w, h = boxes[index // 3].T
            expected = torch.stack(
                [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
            )
            bounds = torch.tensor([width, height, width, height]).unsqueeze(1)
            expected = expected.clamp(min=torch.zeros(4, 1), max=bounds).T
            assert torch.allclose(torch.tensor([each.box for each in objects]), expected, atol=1e-3)

    def test_tensors_files_and_pil(self, detector, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photo.png")
        tensor = torch.from_numpy(pixels).movedim(-1, 0) / 255
        one = detector.predict(tensor, 0.0)
        assert one == detector.predict(tmp_path / "photo.png", 0.0) == detector.predict(Image.fromarray(pixels), 0.0)
        assert one == detector.predict(tensor[None], 0.0) == detector.predict(pixels, 0.0)
        assert one == detector.predict(torch.from_numpy(pixels).movedim(-1, 0), 0.0)

    def test_threshold(self, detector):
        (everything,) = detector.predict(make_images((64, 64)), 0.0)
        middle = everything[4].score
        (best,) = detector.predict(make_images((64, 64)), middle)
        assert best == everything[:4]
        assert detector.predict(make_images((64, 64)), 0.999) == [[]]

    def test_nms(self, detector, monkeypatch):
        """The best of all boxes of a class at one place is kept, and those of other classes there."""
        generator = torch.Generator().manual_seed(0)
        boxes = 0.5 + 0.01 * torch.randn(1, 10, 4, generator=generator)
        logits = torch.randn(1, 10, 3, generator=generator)
        monkeypatch.setattr(TinyViTDetector, "forward", lambda self, images: (logits, boxes))
        image = make_images((64, 64))
        (everything,) = detector.predict(image, 0.0)
        (found,) = detector.predict(image, 0.0, nms_threshold=0.5)
        assert (len(everything), len(found)) == (10, 3)
        for each in found:
            assert each == next(other for other in everything if other.index == each.index)
        assert detector.predict(image, 0.0, nms_threshold=1.0) == [everything]
        with pytest.raises(ValueError, match=r"IoU threshold of duplicates must be in \[0, 1\]; got 1\.5"):
            detector.predict(image, 0.0, nms_threshold=1.5)

    def test_duplicates(self):
        rows = torch.tensor([
            [0, 0.9, 0, 0, 10, 10], [1, 0.8, 0, 0, 10, 10], [0, 0.7, 1, 0, 10, 10],
            [0, 0.6, 5, 0, 10, 10], [1, 0.5, 0, 1, 10, 10],
        ])  # fmt: skip
        assert torch.equal(suppress_duplicates(rows, 0.5), rows[[0, 1, 3]])  # IoU 0.82, 0.33 and 0.82
        assert torch.equal(suppress_duplicates(rows, 0.3), rows[:2])
        assert torch.equal(suppress_duplicates(rows.flip(0), 0.5), rows[[3, 1, 0]])
        assert suppress_duplicates(rows[:0], 0.5).shape == (0, 6)

    def test_predict_keeps_the_modes(self):
        detector = make_detector().train()
        detector.encoder.eval()
        before = detector.decoder.input_proj[0].norm.running_mean.clone()
        detector.predict(make_images((64, 64)))
        assert detector.training
        assert not detector.encoder.training
        assert torch.equal(detector.decoder.input_proj[0].norm.running_mean, before)

    def test_kornias_object_detector(self, detector):
        photos = make_images((40, 80), (70, 70))
        everything = sorted(each.score for found in detector.predict(photos, 0.0) for each in found)
        threshold = everything[len(everything) // 2]
        rows = detector.object_detector(threshold)(photos)
        for found, table in zip(detector.predict(photos, threshold), rows, strict=True):
            assert [each.score for each in found] == pytest.approx(table[:, 1].tolist(), abs=1e-5)
            assert [each.index for each in found] == table[:, 0].long().tolist()

    @pytest.mark.parametrize(
        ("images", "options", "error", "message"),
        [
            ("no_such.png", {}, FileNotFoundError, "no_such.png"),
            (torch.rand(3, 64, 64), {"confidence_threshold": 1.0}, ValueError, r"in \[0, 1\)"),
            (torch.rand(3, 64, 64), {"batch_size": 0}, ValueError, "batch_size"),
            (torch.zeros(3, 64, 64, dtype=torch.int64), {}, TypeError, "floating point"),
            (torch.full((3, 64, 64), 255.0), {}, ValueError, "Divide them by 255"),
        ],
    )
    def test_exceptions(self, detector, images, options, error, message):
        with pytest.raises(error, match=message):
            detector.predict(images, **options)


class TestFiles:
    @pytest.fixture
    def path(self, detector, tmp_path):
        return detector.save(tmp_path / "new" / "detector.safetensors")

    def spoil(self, path, change):
        tensors, metadata = read_tensors(path)
        change(tensors, metadata)
        write_tensors(path, tensors, metadata)

    def test_round_trip(self, detector, path):
        again = TinyViTDetector.from_config(pretrained=path)
        assert (again.config, again.class_names, again.training) == (detector.config, NAMES, False)
        images = torch.rand(1, 3, 40, 60)
        assert all(torch.equal(a, b) for a, b in zip(again(images), detector(images), strict=True))

    def test_other_classes(self, detector, path):
        other = TinyViTDetector.from_config(pretrained=path, class_names=["fox", "hen"])
        assert other.training
        assert other.class_names == ("fox", "hen")
        assert other.decoder.enc_score_head.out_features == 2
        assert torch.equal(other.decoder.enc_output[0].weight, detector.decoder.enc_output[0].weight)
        assert torch.equal(other.encoder.input_proj[1][0].weight, detector.encoder.input_proj[1][0].weight)

    def test_matched_names(self, detector, path):
        other = TinyViTDetector.from_config(pretrained=path, class_names=["owl", "cat", "dog"])
        assert not other.training
        images = torch.rand(1, 3, 40, 60)
        (logits, boxes), (expected, places) = other(images), detector(images)
        torch.testing.assert_close(logits, expected[..., [2, 0, 1]])
        torch.testing.assert_close(boxes, places)
        old, new = (each.decoder.denoising_class_embed.weight for each in (detector, other))
        assert torch.equal(new, old[[2, 0, 1, 3]])
        other = TinyViTDetector.from_config(pretrained=path, class_names=["owl", "hen"])
        assert other.training
        assert torch.equal(other.decoder.enc_score_head.weight[0], detector.decoder.enc_score_head.weight[2])

    def test_another_size(self, path):
        larger = TinyViTDetector.from_config(pretrained=path, img_size=96)
        assert larger.squares.size == 96
        assert larger(torch.rand(1, 3, 40, 60))[0].shape == (1, 10, 3)

    def test_backbone_from_a_plain_network(self, tmp_path):
        network = TinyViT.from_config(BACKBONE)
        file = save_checkpoint(network, tmp_path / "network.safetensors")
        detector = TinyViTDetector.from_config(pretrained=file, num_classes=2, hidden_dim=16, num_queries=5)
        assert torch.equal(detector.backbone.patch_embed.seq[0].c.weight, network.patch_embed.seq[0].c.weight)

    def test_another_variant(self, path):
        with pytest.raises(CheckpointError):
            TinyViTDetector.from_config("5m", pretrained=path)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("hidden_dim", 24), ("hidden_dim", 8 * 10**11), ("decoder_layers", 3), ("num_classes", 4), ("expansion", 1.0)],
    )
    def test_wrong_configuration(self, path, field, value):
        def change(tensors, metadata):
            stored = json.loads(metadata["kornia_tinyvit.detector"])
            metadata["kornia_tinyvit.detector"] = json.dumps(stored | {field: value})

        self.spoil(path, change)
        with pytest.raises(CheckpointError, match=r"another (network|architecture)"):
            TinyViTDetector.from_config(pretrained=path)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"class_names": ["a"], "backbone": 3}'])
    def test_invalid_configuration(self, path, content):
        self.spoil(path, lambda _, metadata: metadata.update({"kornia_tinyvit.detector": content}))
        with pytest.raises(CheckpointError, match="an invalid configuration"):
            TinyViTDetector.from_config(pretrained=path)

    def test_nan(self, path):
        self.spoil(path, lambda tensors, _: tensors["decoder.enc_score_head.bias"].fill_(float("nan")))
        with pytest.raises(CheckpointError, match=r"NaN or infinite values in enc_score_head\.bias"):
            TinyViTDetector.from_config(pretrained=path)

    def test_truncated(self, path):
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(CheckpointError):
            TinyViTDetector.from_config(pretrained=path, num_classes=3)
