import argparse
import http.server
import io
import json
import os
import resource
import signal
import stat
import threading
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import kornia.core.download
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from kornia_tinyvit import ImageClassifier, MobileSAM, TinyViT, TinyViTConfig
from kornia_tinyvit.checkpoints import (
    CheckpointError,
    PretrainedWeights,
    catalog,
    load_checkpoint,
    open_pretrained,
    read_checkpoint,
    save_checkpoint,
)
from kornia_tinyvit.checkpoints.catalog import imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.contraction import inherit
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.preprocessing import Preprocessing
from kornia_tinyvit.semantic import SemanticSegmenter
from tests.checkpoints.test_layouts import to_timm
from tests.conftest import TINY, liven, shared
from tests.processes import PROCESSES, start

NAMES = tuple("abcdefg")
TABLE = "layers.2.blocks.1.attn.attention_biases"
STEM = "patch_embed.seq.0.c.weight"
CONFIG = "kornia_tinyvit.config"
CLASSES = "kornia_tinyvit.class_names"


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Compare bitwise, including NaN."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def fresh(**changes) -> TinyViT:
    """Return a network with other weights than the fixture."""
    torch.manual_seed(7)
    return TinyViT(**TINY | changes)


class TestRoundTrip:
    @pytest.mark.parametrize("kind", ["path", "text", "file_url"])
    def test_own_file(self, tiny, images, tmp_path, kind):
        path = save_checkpoint(tiny, tmp_path / "new" / "model.safetensors", NAMES)
        source = {"path": path, "text": str(path), "file_url": path.as_uri()}[kind]
        model = TinyViT.from_config(pretrained=source)
        assert not model.training
        assert model.config == tiny.config
        assert_same(model, weights_of(tiny))
        assert torch.equal(model(images), tiny(images))
        assert read_checkpoint(source).class_names == NAMES

    def test_all_fields(self, tmp_path):
        config = TinyViTConfig(
            **TINY | {"num_heads": (4, 2, 3, 4)},
            in_chans=4,
            mlp_ratio=3.7,
            mbconv_expand_ratio=2.3,
            drop_rate=0.1,
            drop_path_rate=0.2,
            use_checkpoint=True,
            local_conv_size=5,
            activation=nn.SiLU,
            mobile_sam=True,
        )
        path = save_checkpoint(TinyViT.from_config(config), tmp_path / "model.safetensors")
        assert TinyViT.from_config(pretrained=path).config == config
        assert TinyViT.from_config(config, pretrained=path).config == config
        assert read_checkpoint(path).class_names is None

    def test_any_suffix(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "model.pth")
        assert_same(TinyViT.from_config(pretrained=path), weights_of(tiny))

    def test_no_suffix_in_the_working_folder(self, tiny, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_checkpoint(tiny, "model")
        assert_same(TinyViT.from_config(pretrained="model"), weights_of(tiny))

    def test_other_tools(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "model.safetensors", NAMES)
        tensors = load_file(path)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in tiny.state_dict().items())
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert json.loads(file.metadata()[CONFIG]) == json.loads(json.dumps(tiny.config.to_dict()))

    def test_replaces_an_older_file(self, tiny, tmp_path):
        path = save_checkpoint(fresh(), tmp_path / "model.safetensors")
        save_checkpoint(tiny, path)
        assert_same(TinyViT.from_config(pretrained=path), weights_of(tiny))
        assert os.listdir(tmp_path) == ["model.safetensors"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precision(self, tiny, images, tmp_path, dtype):
        path = save_checkpoint(tiny.to(dtype), tmp_path / "model.safetensors")
        assert load_file(path)["head.weight"].dtype == dtype
        model = TinyViT.from_config(pretrained=path)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert_same(model, weights_of(tiny.float()))
        assert torch.equal(model(images), tiny(images))

    def test_channels_last(self, tiny, tmp_path):
        path = save_checkpoint(tiny.to(memory_format=torch.channels_last), tmp_path / "model.safetensors")
        assert_same(TinyViT.from_config(pretrained=path), weights_of(tiny))


class TestForeignFiles:
    @pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
    @pytest.mark.parametrize("layout", ["official", "timm"])
    def test_config_from_shapes(self, tiny, images, tmp_path, layout, suffix):
        path = tmp_path / f"weights.{suffix}"
        named = {to_timm(name) if layout == "timm" else name: t for name, t in weights_of(tiny).items()}
        if suffix == "safetensors":
            save_file(named, path)
        else:
            torch.save({"model": named, "epoch": 3}, path)
        found = read_checkpoint(path)
        assert found.layout == layout
        # The image size cannot be derived; in published networks one window covers the last feature map, 3 tokens here.
        assert found.config == tiny.config.replace(img_size=96)
        model = TinyViT.from_config(pretrained=path)
        assert not model.training
        assert torch.equal(model(images), tiny(images))

    def test_older_file_format(self, tiny, tmp_path):
        torch.save(tiny.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        assert_same(TinyViT.from_config(pretrained=tmp_path / "old.pth"), weights_of(tiny))

    @pytest.mark.parametrize(
        "changes",
        [
            {"mlp_ratio": 2.0, "mbconv_expand_ratio": 3.0},
            {"local_conv_size": 5},
            {"in_chans": 4},
            {"num_classes": 0},
            {"depths": (2, 1, 3, 2)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_other_shapes(self, changes):
        model = fresh(**changes)
        assert read_checkpoint(model.state_dict()).config == model.config.replace(img_size=96)

    def test_mobile_sam(self):
        model = fresh(mobile_sam=True)
        whole = {f"image_encoder.{name}": tensor for name, tensor in model.state_dict().items()}
        found = read_checkpoint(whole | {"mask_decoder.weight": torch.zeros(1)})
        assert (found.layout, found.left_out) == ("mobile_sam", ("mask_decoder.weight",))
        assert found.config == model.config.replace(img_size=1024)
        assert_same(TinyViT.from_config(pretrained=found), weights_of(model))

    def test_given_configuration(self, tiny, tmp_path):
        """Fields that cannot be derived from shapes are those of the given configuration."""
        given = TinyViTConfig(
            **TINY | {"num_heads": (4, 2, 3, 4)}, mlp_ratio=3.7, drop_path_rate=0.3, activation=nn.SiLU
        )
        model = TinyViT.from_config(given)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        for source in (tmp_path / "weights.pth", read_checkpoint(tmp_path / "weights.pth", given)):
            loaded = TinyViT.from_config(given, pretrained=source)
            assert loaded.config == given
            assert_same(loaded, weights_of(model))

    def test_variant(self, tmp_path):
        model = TinyViT.from_config("1m", num_classes=3)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        loaded = TinyViT.from_config("1m", pretrained=tmp_path / "weights.pth")
        assert loaded.config == model.config
        assert_same(loaded, weights_of(model))

    def test_load_state_dict(self, tiny, images):
        report = load_checkpoint(model := fresh(), {"model": tiny.state_dict(), "epoch": 3})
        assert_same(model, weights_of(tiny))
        assert (report.source, report.layout, report.adapted) == ("a state dict", "official", ())
        assert report.left_out == ("epoch",)
        assert report.complete

    def test_left_out(self, tiny):
        derived = {"layers.1.blocks.0.attn.attention_bias_idxs": torch.zeros(16, 16).long()}
        report = load_checkpoint(fresh(), tiny.state_dict() | derived)
        assert report.left_out == tuple(derived)
        report = load_checkpoint(fresh(), tiny.state_dict() | {"epoch": 3, 5: "five"})
        assert report.left_out == ("epoch", "5")
        assert "Left out: epoch, 5." in str(report)

    def test_missing_step_counters(self, tiny):
        weights = {n: t for n, t in tiny.state_dict().items() if not n.endswith("num_batches_tracked")}
        assert len(weights) < len(tiny.state_dict())
        report = load_checkpoint(model := fresh(), weights)
        assert report.complete
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


class TestAverages:
    @pytest.fixture
    def path(self, tiny, tmp_path):
        """A checkpoint of timm with an average, whose weights are one larger."""
        content = {"arch": "tiny_vit_5m_224", "state_dict": tiny.state_dict(), "args": argparse.Namespace(lr=0.1)}
        content["state_dict_ema"] = {name: tensor + 1 for name, tensor in tiny.state_dict().items()}
        torch.save(content, tmp_path / "last.pth.tar")
        return tmp_path / "last.pth.tar"

    def test_report(self, tiny, path):
        report = load_checkpoint(model := fresh(), path)
        assert_same(model, weights_of(tiny))
        assert report.left_out == ("arch", "args (argparse.Namespace)")
        assert report.ema == ("state_dict_ema",)
        assert str(report).splitlines()[1:] == [
            "Left out: arch, args (argparse.Namespace).",
            "Also holds EMA weights (state_dict_ema); load them with use_ema=True.",
        ]

    def test_load(self, tiny, path):
        report = load_checkpoint(model := fresh(), path, use_ema=True)
        assert_same(model, {name: tensor + 1 for name, tensor in tiny.state_dict().items()})
        assert report.left_out == ("arch", "state_dict", "args (argparse.Namespace)")
        assert report.ema == ()
        checkpoint = read_checkpoint(path, use_ema=True)
        assert_same(TinyViT.from_config(pretrained=checkpoint), weights_of(model))

    def test_errors(self, tiny, path):
        with pytest.raises(CheckpointError, match="a state dict has no EMA weights; omit use_ema=True"):
            load_checkpoint(fresh(), tiny.state_dict(), use_ema=True)
        with pytest.raises(ValueError, match="pass use_ema=True to read_checkpoint"):
            load_checkpoint(fresh(), read_checkpoint(path), use_ema=True)


class TestWrappedNetworks:
    @pytest.mark.parametrize("part", ["", "layers.1", "layers.2.blocks.0", "patch_embed.seq.0", "head"])
    @pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
    def test_round_trip(self, tiny, tmp_path, wrap, part):
        """A network that is wrapped in whole or in part is saved and loaded like the plain one."""

        def wrapped(network: nn.Module) -> nn.Module:
            if part:
                parent, _, name = part.rpartition(".")
                network.get_submodule(parent)._modules[name] = wrap(network.get_submodule(part))
                return network
            return wrap(network)

        expected = weights_of(tiny)
        path = save_checkpoint(wrapped(tiny), tmp_path / "model.safetensors", NAMES)
        assert load_file(path).keys() == expected.keys()
        assert_same(TinyViT.from_config(pretrained=path), expected)
        assert read_checkpoint(path).class_names == NAMES
        model = wrapped(fresh())
        assert load_checkpoint(model, path).complete
        assert all(map(torch.equal, model.state_dict().values(), expected.values()))
        torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
        assert_same(TinyViT.from_config(pretrained=tmp_path / "model.pth"), expected)

    def test_average_of_torch(self, tiny, tmp_path):
        path = save_checkpoint(AveragedModel(tiny), tmp_path / "model.safetensors")
        assert load_file(path).keys() == tiny.state_dict().keys()


class TestEncoderOfMobileSAM:
    """A TinyViT, and every network with such a backbone, starts from the weights of a whole MobileSAM."""

    @pytest.fixture
    def sam(self) -> MobileSAM:
        encoder = liven(fresh(mobile_sam=True))
        encoder.norm_head.requires_grad_(False).weight.fill_(3)
        return MobileSAM(encoder).eval()

    @pytest.fixture
    def path(self, sam, tmp_path) -> Path:
        """The layout of the published file."""
        path = tmp_path / "sam.pt"
        torch.save(sam.state_dict(), path)
        return path

    def assert_same_features(self, model, encoder, images):
        *expected, last = encoder.forward_intermediates(images)
        *found, coarse = model.forward_intermediates(images)
        assert all(map(torch.equal, found, expected))
        merged = encoder.layers[2].downsample(expected[-1])
        assert torch.allclose(model.layers[2].downsample(found[-1]), merged[..., ::2, ::2], atol=1e-5)
        assert last.shape[-2:] == tuple(2 * side for side in coarse.shape[-2:])

    @pytest.mark.parametrize("options", [{"num_classes": 3}, {"class_names": "abc"}])
    def test_classifier(self, sam, path, images, tmp_path, options):
        model = TinyViT.from_config(pretrained=path, **options)
        assert (model.config.mobile_sam, model.config.num_classes, model.config.img_size) == (False, 3, 96)
        assert (model.feature_strides, model.training) == ((4, 8, 16, 32), True)
        assert model.preprocessing == Preprocessing(96)
        assert model.eval()(images).shape == (2, 3)
        assert torch.equal(model.norm_head.weight, torch.ones(32))
        self.assert_same_features(model, sam.image_encoder, images)
        again = TinyViT.from_config(pretrained=save_checkpoint(model, tmp_path / "model.safetensors"))
        assert again.config == model.config
        assert_same(again, weights_of(model))
        classifier = ImageClassifier.from_config(pretrained=path, class_names="abc", img_size=64)
        assert classifier.predict(images.sigmoid(), top_k=1)[0][0].label in "abc"

    def test_report(self, path):
        report = TinyViT.from_config(pretrained=path, num_classes=3).load_report
        assert report == load_checkpoint(fresh(num_classes=3), path)
        assert report.left_out[:3] == ("norm_head", "head", "neck")
        assert report.adapted == (
            "MobileSAM's encoder gets stride 32, without its neck and with a new norm",
            "the head has 3 classes and is missing in the file; it is initialized with zeros",
        )
        assert TinyViT.from_config("1m").load_report is None

    def test_choice(self, sam, path):
        """Without a number of classes it is MobileSAM's encoder; 0 are the pooled features; a field decides."""
        encoder = TinyViT.from_config(pretrained=path)
        assert (encoder.config.mobile_sam, encoder.config.img_size) == (True, 1024)
        assert_same(encoder, weights_of(sam.image_encoder))
        features = TinyViT.from_config(pretrained=path, num_classes=0)
        assert (features.config.mobile_sam, features.training) == (False, False)
        assert features(torch.rand(1, 3, 64, 64)).shape == (1, 32)
        assert TinyViT.from_config(pretrained=path, num_classes=0, mobile_sam=True).config.mobile_sam
        assert not TinyViT.from_config(pretrained=path, mobile_sam=False).config.mobile_sam
        config = TinyViTConfig(**TINY)
        assert TinyViT.from_config(config, pretrained=path).config == config

    @pytest.mark.parametrize("options", [{"num_classes": 3}, {"class_names": [str(each) for each in range(7)]}])
    def test_encoder_with_classes_is_rejected(self, path, options):
        """The encoder returns an image embedding, not logits."""
        with pytest.raises(ValueError, match=r"embedding without classes\. Omit num_classes"):
            TinyViT.from_config(pretrained=path, mobile_sam=True, **options)
        with pytest.raises(ValueError, match=r"holds MobileSAM's encoder, which has no classes\. Use MobileSAM"):
            ImageClassifier.from_config(pretrained=path)

    def test_detector(self, sam, path, images):
        options = {"num_classes": 3, "img_size": 64, "hidden_dim": 8, "num_queries": 5}
        detector = TinyViTDetector.from_config(pretrained=path, **options).eval()
        assert detector(images.sigmoid())[0].shape == (2, 5, 3)
        self.assert_same_features(detector.backbone, sam.image_encoder, images)

    def test_segmenter(self, sam, path, images, tmp_path):
        """Dense features stay at stride 16, as MobileSAM's own."""
        segmenter = SemanticSegmenter.from_config(pretrained=path, num_classes=3, width=8).eval()
        config = segmenter.config.backbone
        assert (config.stage_strides, config.img_size) == ((4, 8, 16, 16), 96)
        expected = sam.image_encoder.forward_intermediates(images)
        assert all(map(torch.equal, segmenter.backbone.forward_intermediates(images), expected))
        again = SemanticSegmenter.from_config(pretrained=segmenter.save(tmp_path / "semantic.safetensors"))
        assert again.config == segmenter.config
        plain = SemanticSegmenter.from_config(pretrained=path, num_classes=3, width=8, mobile_sam=False)
        assert plain.config.backbone.stage_strides == (4, 8, 16, 32)

    def test_inherited(self, path, images):
        parent = TinyViT.from_config(pretrained=path, num_classes=3)
        child = inherit(parent, parent.config.replace(mlp_ratio=2.0))
        assert child(images).shape == (2, 3)

    def test_transformers(self, path, images):
        conversion = pytest.importorskip("kornia_tinyvit.huggingface.conversion")
        network = TinyViT.from_config(pretrained=path, num_classes=3).eval()
        assert torch.allclose(conversion.from_tinyvit(network)(images).logits, network(images), atol=1e-5)

    def test_published_weights(self):
        path = shared("data/mobile_sam/mobile_sam.pt")
        model = TinyViT.from_config("5m", pretrained=path, num_classes=2).eval()
        assert (model.config.img_size, model.preprocessing) == (224, Preprocessing(224))
        self.assert_same_features(model, TinyViT.from_config("5m", pretrained=path), torch.randn(1, 3, 64, 64))


class TestKindsOfFiles:
    """Every network names what a file of another kind holds, and a missing file."""

    @pytest.fixture
    def files(self, tmp_path):
        folder, backbone = tmp_path, fresh()
        detector = TinyViTDetector(fresh(), num_classes=3, hidden_dim=8, num_queries=5)
        sam = MobileSAM.from_config("1m", img_size=64).eval()
        return {
            "TinyViT": save_checkpoint(backbone, folder / "a.safetensors"),
            "segmenter": SemanticSegmenter(fresh(), num_classes=3, width=8).save(folder / "b.safetensors"),
            "detector": detector.save(folder / "c.safetensors"),
            "embedding": sam.embed(torch.rand(3, 32, 32)).save(folder / "d.safetensors"),
            "missing": folder / "missing.safetensors",
        }

    READERS = {
        "TinyViT": lambda path: TinyViT.from_config(pretrained=path),
        "load": lambda path: load_checkpoint(fresh(), path),
        "classifier": lambda path: ImageClassifier.from_config(pretrained=path),
        "MobileSAM": lambda path: MobileSAM.from_config(pretrained=path),
        "segmenter": lambda path: SemanticSegmenter.from_config(pretrained=path),
        "detector": lambda path: TinyViTDetector.from_config(pretrained=path),
        "segmenter with classes": lambda path: SemanticSegmenter.from_config(pretrained=str(path), num_classes=3),
        "detector with classes": lambda path: TinyViTDetector.from_config(pretrained=path, num_classes=3),
    }
    HELD = {
        "segmenter": r"holds a semantic segmenter; use SemanticSegmenter\.from_config or --task semantic",
        "detector": r"holds a detector; use TinyViTDetector\.from_config or kornia-tinyvit detect",
        "embedding": r"holds an image embedding; use ImageEmbedding\.load",
        "missing": "There is no checkpoint file",
    }

    @pytest.mark.parametrize("reader", READERS)
    @pytest.mark.parametrize("kind", HELD)
    def test_other_kind(self, files, kind, reader):
        if reader.split(" ")[0] == kind:
            assert self.READERS[reader](files[kind]).config.num_classes == 3
        else:
            with pytest.raises(CheckpointError, match=rf"{files[kind].name} {self.HELD[kind]}|{self.HELD['missing']}"):
                self.READERS[reader](files[kind])

    @pytest.mark.parametrize("network", [SemanticSegmenter, TinyViTDetector])
    def test_names_without_a_file(self, network):
        with pytest.raises(CheckpointError, match="There are no weights and no file 'nothere'"):
            network.from_config(pretrained="nothere")

    def test_url(self, files):
        assert SemanticSegmenter.from_config(pretrained=files["segmenter"].as_uri()).config.num_classes == 3

    @pytest.mark.parametrize(("network", "kind"), [(SemanticSegmenter, "segmenter"), (TinyViTDetector, "detector")])
    def test_backbone_only(self, files, network, kind):
        with pytest.raises(ValueError, match=rf"pass num_classes or class_names\. .*a\.safetensors stores no {kind}"):
            network.from_config(pretrained=files["TinyViT"])


class TestWindows:
    @pytest.mark.parametrize("side", [3, 5, 8])
    def test_interpolate(self, tiny, side):
        report = load_checkpoint(model := fresh(window_sizes=(4, 4, side, 3)), tiny.state_dict())
        table = tiny.state_dict()[TABLE].view(1, -1, 5, 5)
        expected = F.interpolate(table, (side, side), mode="bicubic", align_corners=False).view(-1, side**2)
        assert torch.equal(model.state_dict()[TABLE], expected)
        for name, tensor in tiny.state_dict().items():
            if not (name.startswith("layers.2.") and name.endswith("attention_biases")):
                assert torch.equal(model.state_dict()[name], tensor), name
        changes = () if side == 5 else (f"bias tables interpolated from window size 5 to {side}",)
        assert report.adapted == changes
        assert report.complete

    def test_crop(self, tiny):
        report = load_checkpoint(model := fresh(window_sizes=(4, 4, 3, 3)), tiny.state_dict(), "crop")
        table = tiny.state_dict()[TABLE].view(-1, 5, 5)
        assert torch.equal(model.state_dict()[TABLE], table[:, :3, :3].reshape(-1, 9))
        assert report.adapted == ("bias tables cropped from window size 5 to 3",)
        assert report.complete

    def test_half_precision_table(self, tiny):
        load_checkpoint(model := fresh(window_sizes=(4, 4, 8, 3)), tiny.half().state_dict())
        table = tiny.float().state_dict()[TABLE].view(1, -1, 5, 5)
        expected = F.interpolate(table, (8, 8), mode="bicubic", align_corners=False).view(-1, 64)
        torch.testing.assert_close(model.state_dict()[TABLE], expected)

    def test_report(self, tiny):
        report = load_checkpoint(fresh(window_sizes=(4, 5, 4, 3)), tiny.state_dict())
        assert report.adapted == (
            "bias tables interpolated from window size 4 to 5",
            "bias tables interpolated from window size 5 to 4",
        )

    def test_from_config(self, tiny, images, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "model.safetensors")
        scaled = TinyViT.from_config(pretrained=path, img_size=128, window_sizes="scale")
        assert scaled.config == tiny.config.replace(img_size=128, window_sizes=(8, 8, 10, 6))
        assert not scaled.training
        # At 64 pixels the last two feature maps have sides of 4 and 2, smaller than the windows of 5 and 3.
        fit = TinyViT.from_config(pretrained=path, window_sizes="fit")
        assert fit.config.window_sizes == (4, 4, 4, 2)
        table = tiny.state_dict()[TABLE].view(-1, 5, 5)
        assert torch.equal(fit.state_dict()[TABLE], table[:, :4, :4].reshape(-1, 16))
        kept = TinyViT.from_config(pretrained=path, img_size=128)
        assert torch.equal(kept(images), tiny(images))

    def test_unknown_adaptation(self, tiny):
        with pytest.raises(ValueError, match="must be 'interpolate' or 'crop'; got 'nearest'"):
            load_checkpoint(tiny, tiny.state_dict(), "nearest")


class TestHead:
    def test_other_classes(self, tiny, images):
        report = load_checkpoint(model := fresh(num_classes=3), tiny.state_dict())
        assert not report.complete
        assert report.adapted == ("the head has 3 classes instead of 7; it is initialized with zeros",)
        assert not model.state_dict()["head.weight"].any()
        assert not model.state_dict()["head.bias"].any()
        assert torch.equal(model.eval().forward_features(images), tiny.forward_features(images))

    def test_missing_head(self, tiny):
        weights = {name: tensor for name, tensor in tiny.state_dict().items() if not name.startswith("head.")}
        report = load_checkpoint(model := fresh(), weights)
        assert not report.complete
        assert report.adapted == ("the head has 7 classes and is missing in the file; it is initialized with zeros",)
        assert not model.state_dict()["head.weight"].any()

    def test_network_without_head(self, tiny, images):
        report = load_checkpoint(model := fresh(num_classes=0), tiny.state_dict())
        assert report.complete
        assert report.left_out == ("head.weight", "head.bias")
        pooled = tiny.forward_head(tiny.forward_features(images), pre_logits=True)
        assert torch.equal(model.eval()(images), pooled)

    def test_imagenet_22k_to_1k(self, tiny, tmp_path):
        """As load_pretrained of the official code: the class missing in ImageNet-22k gets the mean of the others."""
        weights = tiny.state_dict() | {"head.weight": torch.randn(21841, 32), "head.bias": torch.randn(21841)}
        torch.save(weights, tmp_path / "22k.pth")
        model = TinyViT.from_config(pretrained=tmp_path / "22k.pth", num_classes=1000)
        mapping = imagenet_1k_in_22k()
        for name in ("head.weight", "head.bias"):
            mean = weights[name][mapping[mapping != -1]].mean(0, keepdim=True)
            assert torch.equal(model.state_dict()[name], torch.cat([weights[name], mean])[mapping])
        assert not model.training
        assert model.class_names == imagenet_classes()
        report = load_checkpoint(fresh(num_classes=1000), weights)
        assert report.complete
        assert report.adapted == (
            "the head has 1000 classes instead of 21841; it has the weights of ImageNet-1k's classes, and for class "
            "850, teddy bear, which ImageNet-22k does not have, their mean",
        )

    def test_matched_names(self, tiny, images, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "model.safetensors", tuple("abcdefg"))
        model = TinyViT.from_config(pretrained=path, class_names=tuple("gfedcba"))
        torch.testing.assert_close(model(images), tiny(images).flip(1))
        assert not model.training
        assert model.class_names == tuple("gfedcba")
        part = ImageClassifier.from_config(pretrained=path, num_classes=3, class_names=("c", "new", "a")).eval()
        assert part.model.class_names == part.class_names == ("c", "new", "a")
        torch.testing.assert_close(part.model(images)[:, [0, 2]], tiny(images)[:, [2, 0]])
        assert not part.model.head.weight[1].any()
        model = fresh(num_classes=3)
        model.class_names = ("c", "new", "a")
        report = load_checkpoint(model, path)
        assert not report.complete
        assert report.adapted == (
            "2 of the 3 classes of the head are matched by name, the others are initialized with zeros",
        )

    def test_other_names(self, tiny, images, tmp_path):
        """Without a common name, the same number of names renames the classes."""
        path = save_checkpoint(tiny, tmp_path / "model.safetensors", tuple("abcdefg"))
        model = TinyViT.from_config(pretrained=path, class_names=tuple("ABCDEFG"))
        assert torch.equal(model(images), tiny(images))
        assert model.class_names == tuple("ABCDEFG")
        model = TinyViT.from_config(pretrained=path, num_classes=2, class_names=("A", "B"))
        assert model.training
        assert not model.head.weight.any()
        with pytest.raises(ValueError, match="Got 2 class names for 7 classes"):
            TinyViT.from_config(pretrained=path, class_names=("A", "B"))

    def test_file_without_head(self, tiny, tmp_path):
        tiny.reset_classifier(0)
        torch.save(tiny.state_dict(), tmp_path / "weights.pth")
        model = TinyViT.from_config(pretrained=tmp_path / "weights.pth")
        assert model.config.num_classes == 0
        assert not model.training

    def test_training_mode(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "model.safetensors")
        assert TinyViT.from_config(pretrained=path, num_classes=3).training
        assert not TinyViT.from_config(pretrained=path, num_classes=0).training
        assert not TinyViT.from_config(pretrained=path).training


class TestChannels:
    def test_gray(self, tiny, images):
        report = load_checkpoint(model := fresh(in_chans=1), tiny.state_dict())
        gray = images[:, :1]
        torch.testing.assert_close(model.eval()(gray), tiny(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
        assert report.adapted == ("the first convolution has 1 input channel instead of 3",)
        assert report.complete

    @pytest.mark.parametrize("channels", [2, 4, 6])
    def test_more(self, tiny, images, channels):
        load_checkpoint(model := fresh(in_chans=channels), tiny.state_dict())
        old, new = tiny.state_dict()[STEM], model.state_dict()[STEM]
        for channel in range(channels):
            torch.testing.assert_close(new[:, channel], old[:, channel % 3] * 3 / channels)

    def test_repeated_image(self, tiny, images):
        load_checkpoint(model := fresh(in_chans=6), tiny.state_dict())
        twice = torch.cat([images, images], 1)
        torch.testing.assert_close(model.eval()(twice), tiny(images), rtol=1e-4, atol=1e-5)

    def test_from_config(self, tiny, tmp_path):
        path = save_checkpoint(tiny, tmp_path / "model.safetensors")
        model = TinyViT.from_config(pretrained=path, in_chans=4)
        assert (model.config.in_chans, model.training) == (4, False)

    def test_all_at_once(self, tiny):
        model = fresh(in_chans=1, num_classes=3, window_sizes=(4, 4, 8, 3))
        report = load_checkpoint(model, tiny.state_dict())
        assert str(report).splitlines() == [
            "Loaded a state dict (official layout).",
            "Adapted: the head has 3 classes instead of 7; it is initialized with zeros.",
            "Adapted: the first convolution has 1 input channel instead of 3.",
            "Adapted: bias tables interpolated from window size 5 to 8.",
        ]


class Runs:
    """Pickles to a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


#: Networks that no test changes.
cached = cache(fresh)


def assert_rejected(source: object, message: str, **changes) -> None:
    """Assert that loading a source raises an error and leaves the network unchanged."""
    model = cached(**changes)
    before = weights_of(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, source)
    assert_same(model, before)
    if not isinstance(source, dict):
        with pytest.raises(CheckpointError):
            TinyViT.from_config(model.config, pretrained=source)


class TestDamagedFiles:
    @pytest.mark.parametrize("fraction", [0.001, 0.3, 0.9, 0.999])
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_truncated(self, tiny, tmp_path, suffix, fraction):
        path = tmp_path / f"weights.{suffix}"
        if suffix == "pth":
            torch.save({"model": tiny.state_dict()}, path)
        else:
            save_checkpoint(tiny, path)
        os.truncate(path, int(path.stat().st_size * fraction))
        assert_rejected(path, rf"weights.{suffix} is damaged or not a checkpoint")

    def test_damaged_anywhere(self, tiny, tmp_path):
        """torch's reader raises errors of many types for damaged bytes; all become a CheckpointError."""
        torch.save(tiny.state_dict(), tmp_path / "whole.pth", _use_new_zipfile_serialization=False)
        whole, path = (tmp_path / "whole.pth").read_bytes(), tmp_path / "damaged.pth"
        generator = torch.Generator().manual_seed(0)
        rejected = 0
        for _ in range(150):
            damaged = bytearray(whole)
            for place in torch.randint(len(whole) // 8, (20,), generator=generator).tolist():
                damaged[place] = int(torch.randint(256, (), generator=generator))
            path.write_bytes(damaged[: int(torch.randint(1, len(whole), (), generator=generator))])
            try:
                read_checkpoint(path)
            except CheckpointError:
                rejected += 1
        assert rejected > 100

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("content", [b"", b"no weights here\n", b"<!DOCTYPE html><p>404", b"\0" * 4096])
    def test_something_else(self, tmp_path, suffix, content):
        path = tmp_path / f"weights.{suffix}"
        path.write_bytes(content)
        assert_rejected(path, rf"weights.{suffix} is damaged or not a checkpoint")

    @pytest.mark.parametrize("where", ["beside", "inside", "alone"])
    def test_code_does_not_run(self, tiny, tmp_path, where):
        marker, path = tmp_path / "marker", tmp_path / "weights.pth"
        content = {
            "beside": {"model": tiny.state_dict(), "optimizer": Runs(marker)},
            "inside": tiny.state_dict() | {"norm_head.weight": Runs(marker)},
            "alone": Runs(marker),
        }[where]
        torch.save(content, path)
        if where == "beside":
            report = load_checkpoint(model := fresh(), path)
            assert report.left_out == ("optimizer (builtins.getattr)",)
            assert_same(model, weights_of(tiny))
        else:
            message = {"inside": r"missing keys norm_head\.weight", "alone": r"no state dict.* builtins\.getattr"}[
                where
            ]
            assert_rejected(path, message)
        assert not marker.exists()
        torch.load(path, weights_only=False)  # the file does execute code
        assert marker.exists()

    def test_whole_module(self, tiny, images, tmp_path):
        torch.save(tiny, tmp_path / "module.pth")
        model = TinyViT.from_config(pretrained=tmp_path / "module.pth")
        assert_same(model, weights_of(tiny))
        assert torch.equal(model(images), tiny(images))

    @pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "a\0b.pth", "http://[", "file:///\0"])
    def test_invalid_name(self, name):
        assert_rejected(name, "is not a valid path or URL|There is no checkpoint file")
        with pytest.raises(CheckpointError):
            TinyViT.from_config(pretrained=name)

    def test_no_values(self, tiny):
        with torch.device("meta"):
            empty = TinyViT(**TINY).state_dict()
        assert_rejected(empty, "has no values for .*, which are on the meta device")

    def test_sparse(self, tiny):
        weights = weights_of(tiny)
        assert_rejected(weights | {"head.weight": weights["head.weight"].to_sparse()}, "sparse tensors in head.weight")

    def test_no_file(self, tmp_path):
        assert_rejected(tmp_path / "missing.pth", r"There is no checkpoint file .*missing\.pth")
        assert_rejected(tmp_path, r"has no config\.json; expected a folder of the Hugging Face hub")
        assert_rejected((tmp_path / "missing.pth").as_uri(), r"There is no checkpoint file .*missing\.pth")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"epoch": 3}, "has no TinyViT in the official, kornia, timm, transformers or MobileSAM layout.*epoch"),
            ({"conv1.weight": torch.zeros(3)}, r"has no TinyViT.*its first entries are conv1\.weight"),
            ({0: torch.zeros(3), 1: 2}, "has no TinyViT.*its first entries are 0, 1"),
            ({}, "has no state dict; .* got dict"),
            ({"model": {}}, "has no TinyViT.*its first entries are model"),
            ([torch.zeros(3)], "has no state dict; .* got list"),
            (torch.zeros(3), "has no state dict; .* got Tensor"),
        ],
    )
    def test_no_network(self, tmp_path, content, message):
        torch.save(content, tmp_path / "weights.pth")
        assert_rejected(tmp_path / "weights.pth", message)


class TestMismatchedWeights:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("name", ["head.bias", "layers.0.blocks.0.conv1.bn.running_var", TABLE])
    def test_not_finite(self, tiny, tmp_path, name, value):
        tiny.state_dict()[name].view(-1)[-1] = value
        path = save_checkpoint(tiny, tmp_path / "model.safetensors")
        assert_rejected(
            path, f"NaN or infinite values in {name}, probably from a diverged training. Nothing was loaded"
        )

    def test_not_finite_in_an_adapted_table(self, tiny):
        tiny.state_dict()[TABLE][0, 0] = float("nan")
        assert_rejected(tiny.state_dict(), "NaN or infinite", window_sizes=(4, 4, 8, 3))

    def test_missing(self, tiny):
        weights = tiny.state_dict()
        del weights["norm_head.weight"], weights["layers.1.blocks.0.mlp.fc2.bias"]
        assert_rejected(
            weights, r"missing keys layers\.1\.blocks\.0\.mlp\.fc2\.bias, norm_head\.weight\. Nothing was loaded"
        )

    @pytest.mark.parametrize("name", [STEM, TABLE, "layers.1.blocks.0.attn.attention_biases", "head.bias"])
    def test_each_missing(self, tiny, name):
        weights = tiny.state_dict()
        del weights[name]
        assert_rejected(weights, name.replace(".", r"\."))

    def test_unexpected(self, tiny):
        extra = {f"layers.3.adapter.{number}": torch.zeros(2) for number in range(6)}
        assert_rejected(
            tiny.state_dict() | extra,
            r"unexpected keys layers\.3\.adapter\.0, .*layers\.3\.adapter\.3 and 2 more\. Nothing was loaded",
        )

    def test_wrong_shape(self, tiny):
        weights = tiny.state_dict() | {"norm_head.bias": torch.zeros(33)}
        assert_rejected(
            weights, r"norm_head\.bias is \(33,\) in the file and \(32,\) in the network\. Nothing was loaded"
        )

    @pytest.mark.parametrize("shape", [(), (3,), (3, 0), (3, 24), (24, 3, 5, 5)])
    @pytest.mark.parametrize(
        "name",
        [
            STEM,
            "patch_embed.seq.2.c.weight",
            "layers.0.downsample.conv3.c.weight",
            "layers.0.blocks.0.conv1.c.weight",
            "layers.2.blocks.0.attn.attention_biases",
            "layers.1.blocks.0.mlp.fc1.weight",
            "layers.1.blocks.0.local_conv.c.weight",
            "head.weight",
        ],
    )
    def test_every_wrong_shape(self, tiny, name, shape):
        assert_rejected(tiny.state_dict() | {name: torch.zeros(shape)}, "TinyViT|architecture")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"depths": (1, 1, 3, 1)}, r"missing keys layers\.2\.blocks\.2\."),
            ({"depths": (1, 1, 1, 1)}, r"unexpected keys layers\.2\.blocks\.1\."),
            ({"embed_dims": (16, 16, 24, 64)}, r"and \d+ more shapes differ"),
            ({"num_heads": (1, 2, 6, 4)}, r"attention_biases is \(3, 25\) in the file and \(6, 25\) in the network"),
            ({"mlp_ratio": 2.0}, r"mlp\.fc1\.weight is \(64, 16\) in the file and \(32, 16\) in the network"),
            ({"local_conv_size": 5}, "local_conv"),
            ({"mobile_sam": True}, r"missing keys neck\.0\.weight"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_other_architecture(self, tiny, changes, message):
        assert_rejected(tiny.state_dict(), message, **changes)
        (field,) = changes
        if field != "mobile_sam":
            with pytest.raises(CheckpointError, match=f"has another architecture: {field} is .* in the network"):
                TinyViT.from_config(TinyViTConfig(**TINY | changes), pretrained=read_checkpoint(tiny.state_dict()))

    def test_other_module(self, tiny):
        with pytest.raises(CheckpointError, match=r"unexpected keys .*Nothing was loaded"):
            load_checkpoint(nn.Linear(2, 2), tiny.state_dict())

    @pytest.mark.parametrize("read", [False, True])
    def test_other_variant(self, tiny, tmp_path, read):
        path = save_checkpoint(tiny, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            TinyViT.from_config("5m", pretrained=read_checkpoint(path) if read else path)
        message = str(error.value)
        for part in (
            "embed_dims is (16, 16, 24, 32) in the file and (64, 128, 160, 320) in the network",
            "depths is (1, 1, 2, 1) in the file and (2, 2, 6, 2) in the network",
            "num_heads",
            "Omit the variant",
        ):
            assert part in message
        assert "mlp_ratio" not in message


class TestInvalidMetadata:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ('{"img_size": 64', "configuration stored in .* cannot be used"),
            ("not json", "configuration stored in .* cannot be used"),
            ("[]" * 3, "configuration stored in .* cannot be used"),
            ("7", "configuration stored in .* cannot be used"),
            ("null", "configuration stored in .* cannot be used"),
            ("[" * 100_000, "configuration stored in .* cannot be used"),
            ({"color": 1}, "no field color"),
            ({"activation": "system"}, "torch.nn has no activation 'system'"),
            ({"activation": "init"}, "torch.nn has no activation 'init'"),
            ({"activation": "Parameter"}, "torch.nn has no activation 'Parameter'"),
            ({"depths": "1121"}, "depths must be 4 positive integers"),
            ({"depths": [1, 1, 2]}, "depths must be 4 positive integers"),
            ({"drop_rate": "0.5"}, "configuration stored in .* cannot be used"),
            ({"mlp_ratio": float("nan")}, "mlp_ratio must be positive"),
            ({"mlp_ratio": float("inf")}, "mlp_ratio must be positive"),
            ({"num_classes": 10**12}, "num_classes is 1000000000000 in the configuration and 7 in the tensors"),
            ({"depths": [1, 1, 10**9, 1]}, "depths is .* in the configuration"),
            ({"window_sizes": [4, 4, 10**6, 3]}, "window_sizes is .* in the configuration"),
            ({"embed_dims": [16, 2 * 10**9, 24, 32]}, "embed_dims is .* in the configuration"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_config(self, tiny, tmp_path, config, message):
        path = tmp_path / "model.safetensors"
        text = config if isinstance(config, str) else json.dumps(tiny.config.to_dict() | config)
        save_file(tiny.state_dict(), path, {CONFIG: text})
        model = fresh()
        before = weights_of(model)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(model, path)
        assert_same(model, before)
        with pytest.raises(CheckpointError, match=message):
            TinyViT.from_config(pretrained=path)

    @pytest.mark.parametrize("text", ['["a", ', "7", "null"])
    def test_class_names(self, tiny, tmp_path, text):
        path = tmp_path / "model.safetensors"
        save_file(tiny.state_dict(), path, {CLASSES: text})
        with pytest.raises(CheckpointError, match=r"configuration stored in .* cannot be used"):
            read_checkpoint(path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server whose responses are set by path, with an empty cache and without delays between retries."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KORNIA_DOWNLOAD_TIMEOUT", "5")
    monkeypatch.setattr(kornia.core.download, "_BACKOFF_SECONDS", 0.0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.requests.append(self.path)
            body = site.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"") + site.missing))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.files, site.requests, site.missing = {}, [], 0
    site.url = f"http://127.0.0.1:{site.server_address[1]}"
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    site.shutdown()
    thread.join()
    site.server_close()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    return TinyViT.from_config("1m", num_classes=10)


@pytest.fixture(scope="module")
def pth(model):
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "epoch": 1}, buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Failed to download", "ignore:Transient failure")
class TestDownloads:
    @pytest.fixture
    def weights(self, server, monkeypatch):
        """An entry of the catalog for a small network with two URLs and one in timm's layout."""
        entry = PretrainedWeights(
            variant="1m",
            name="small",
            trained_on="nothing",
            num_classes=10,
            img_size=64,
            urls=(f"{server.url}/mirror/small.pth", f"{server.url}/original/small.pth"),
            fallback=f"{server.url}/timm/tiny_vit_small/resolve/main/model.safetensors",
        )
        # list_pretrained and its users read CATALOG from this module.
        monkeypatch.setattr(catalog, "CATALOG", (*catalog.CATALOG, entry))
        return entry

    @staticmethod
    def cached(tmp_path) -> list[str]:
        return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())

    def test_mirror_first(self, server, weights, model, pth, tmp_path):
        server.files = {"/mirror/small.pth": pth, "/original/small.pth": b"not requested"}
        loaded = TinyViT.from_config("1m", pretrained="small")
        assert server.requests == ["/mirror/small.pth"]
        assert not loaded.training
        assert loaded.config == weights.config
        assert_same(loaded, weights_of(model))

    def test_given_configuration(self, server, weights, model, pth):
        server.files = {"/mirror/small.pth": pth}
        given = weights.config.replace(drop_path_rate=0.3, img_size=128)
        assert TinyViT.from_config(given, pretrained="small").config == given
        with pytest.raises(CheckpointError, match=r"depths is \(2, 2, 4, 2\) in the file and \(2, 2, 6, 2\)"):
            TinyViT.from_config(given.replace(depths=(2, 2, 6, 2)), pretrained="small")

    def test_original_second(self, server, weights, model, pth):
        server.files = {"/original/small.pth": pth}
        assert_same(TinyViT.from_config("1m", pretrained="small"), weights_of(model))
        assert server.requests == ["/mirror/small.pth", "/original/small.pth"]

    def test_original_second_after_invalid_file(self, server, weights, model, pth):
        server.files = {"/mirror/small.pth": b"<!DOCTYPE html>", "/original/small.pth": pth}
        assert_same(TinyViT.from_config("1m", pretrained="small"), weights_of(model))

    def test_timm_last(self, server, weights, model, tmp_path):
        save_file({to_timm(name): tensor for name, tensor in model.state_dict().items()}, tmp_path / "timm")
        server.files = {"/timm/tiny_vit_small/resolve/main/model.safetensors": (tmp_path / "timm").read_bytes()}
        found = open_pretrained("small", "1m")
        assert found.layout == "timm"
        assert_same(TinyViT.from_config("1m", pretrained=found), weights_of(model))
        assert server.requests == ["/mirror/small.pth", "/original/small.pth", weights.fallback[len(server.url) :]]
        # All files of timm are named model.safetensors, so the cache uses the name of the repository.
        assert self.cached(tmp_path) == ["tiny_vit_small.safetensors"]

    def test_all_urls_fail(self, server, weights, tmp_path):
        with pytest.raises(CheckpointError) as error:
            TinyViT.from_config("1m", pretrained="small")
        message = str(error.value)
        for url in (*weights.urls, weights.fallback):
            assert url in message
        assert "404" in message
        assert "Without a network connection, download one of these files elsewhere and pass its path" in message
        assert self.cached(tmp_path) == []

    def test_no_server(self, server, weights, monkeypatch):
        monkeypatch.setattr(catalog, "CATALOG", (replace(weights, urls=("http://127.0.0.1:9/a.pth",), fallback=None),))
        with pytest.raises(CheckpointError, match=r"127\.0\.0\.1:9/a\.pth(?s:.)*pass its path"):
            TinyViT.from_config("1m", pretrained="small")

    def test_cache(self, server, weights, model, pth, tmp_path):
        server.files = {"/mirror/small.pth": pth}
        TinyViT.from_config("1m", pretrained="small")
        assert len(server.requests) == 1
        assert self.cached(tmp_path) == ["small.pth"]
        server.files = {}
        assert_same(TinyViT.from_config("1m", pretrained="small"), weights_of(model))
        assert len(server.requests) == 1

    def test_truncated_cache(self, server, weights, model, pth, tmp_path):
        server.files = {"/mirror/small.pth": pth}
        TinyViT.from_config("1m", pretrained="small")
        (entry,) = (tmp_path / "cache").rglob("small.pth")
        os.truncate(entry, len(pth) // 2)
        assert_same(TinyViT.from_config("1m", pretrained="small"), weights_of(model))
        assert entry.read_bytes() == pth

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("announced", [True, False])
    def test_truncated_download(self, server, model, pth, tmp_path, suffix, announced):
        """A truncated file is rejected and not cached, with and without the correct Content-Length."""
        whole = pth if suffix == "pth" else save_checkpoint(model, tmp_path / "served.safetensors").read_bytes()
        half = len(whole) // 2
        server.files = {f"/weights.{suffix}": whole[:half]}
        server.missing = len(whole) - half if announced else 0
        with pytest.raises(CheckpointError, match=rf"could not be downloaded from\s+{server.url}/weights.{suffix}"):
            read_checkpoint(f"{server.url}/weights.{suffix}")
        assert self.cached(tmp_path) == []
        server.files, server.missing = {f"/weights.{suffix}": whole}, 0
        assert read_checkpoint(f"{server.url}/weights.{suffix}").config.num_classes == 10

    def test_same_file_name(self, server, model, tiny, tmp_path):
        """Files of the same name from different URLs are cached separately."""
        for name, network in {"one": model, "two": tiny}.items():
            path = save_checkpoint(network, tmp_path / f"{name}.safetensors")
            server.files[f"/{name}/model.safetensors"] = path.read_bytes()
        for name, network in {"one": model, "two": tiny}.items():
            url = f"{server.url}/{name}/model.safetensors"
            assert_same(TinyViT.from_config(pretrained=url), weights_of(network))
            read_checkpoint(url)
        assert server.requests == ["/one/model.safetensors", "/two/model.safetensors"]

    def test_file_url_is_not_cached(self, server, model, tmp_path):
        path = tmp_path / "a model.safetensors"
        for network in (model, TinyViT.from_config("1m", num_classes=10)):
            save_checkpoint(network, path)
            assert_same(TinyViT.from_config(pretrained=path.as_uri()), weights_of(network))
        assert self.cached(tmp_path) == []


class NoActivation(nn.GELU):
    """An activation outside of torch.nn."""


def child_save_limited(path, queue):
    model = TinyViT.from_config(pretrained=path, num_classes=3)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_checkpoint(model, path)
    except OSError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


def child_fork_savers(path, connection):
    """For each message, fork a process that saves in a loop; send its process ID, and a message when it has ended."""
    torch.set_num_threads(1)
    model = TinyViT.from_config(pretrained=path)
    names = [f"class {index}" for index in range(7)]
    while connection.recv():
        pid = os.fork()
        while pid == 0:
            for value in range(5):
                for parameter in model.parameters():
                    parameter.data.fill_(value)
                save_checkpoint(model, path, names)
        connection.send(pid)
        os.waitpid(pid, 0)
        connection.send("ended")


class TestSaving:
    def test_wrong_number_of_names(self, tiny, tmp_path):
        with pytest.raises(ValueError, match="Got 2 class names for 7 classes"):
            save_checkpoint(tiny, tmp_path / "model.safetensors", ["cat", "dog"])
        assert os.listdir(tmp_path) == []

    def test_no_tinyvit(self, tmp_path):
        with pytest.raises(TypeError, match="Expected a TinyViT; got Linear"):
            save_checkpoint(nn.Linear(2, 2), tmp_path / "model.safetensors")

    def test_custom_activation(self, tmp_path):
        with pytest.raises(ValueError, match=r"Only activations of torch\.nn can be written"):
            save_checkpoint(TinyViT(**TINY, activation=NoActivation), tmp_path / "model.safetensors")
        assert os.listdir(tmp_path) == []

    def test_folder_that_is_a_file(self, tiny, tmp_path):
        (tmp_path / "folder").write_text("a file")
        with pytest.raises(OSError, match="folder"):
            save_checkpoint(tiny, tmp_path / "folder" / "model.safetensors")
        assert (tmp_path / "folder").read_text() == "a file"

    def test_file_that_is_a_folder(self, tiny, tmp_path):
        (tmp_path / "model.safetensors").mkdir()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            save_checkpoint(tiny, tmp_path / "model.safetensors")
        assert os.listdir(tmp_path) == ["model.safetensors"]

    @pytest.mark.slow
    def test_disk_full(self, tiny, tmp_path):
        """With a limit on the file size, as on a full disk, the old file is kept."""
        path = save_checkpoint(tiny, tmp_path / "model.safetensors")
        before = path.read_bytes()
        queue = PROCESSES.Queue()
        process = start(child_save_limited, path, queue)
        message = queue.get(timeout=60)
        process.join()
        assert message.startswith("[Errno")
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["model.safetensors"]

    def test_interrupted(self, tiny, tmp_path, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        path = save_checkpoint(fresh(), tmp_path / "model.safetensors")
        before = path.read_bytes()
        monkeypatch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tiny, path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["model.safetensors"]

    @pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
    @pytest.mark.parametrize("mask", [0o022, 0o077])
    def test_permissions_follow_the_mask(self, tiny, tmp_path, mask):
        old = os.umask(mask)
        try:
            path = save_checkpoint(tiny, tmp_path / "model.safetensors")
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
            assert os.umask(mask) == mask
        finally:
            os.umask(old)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_killed(self, tiny, tmp_path):
        """A killed process leaves the complete old or new file and at most one temporary file."""
        path = save_checkpoint(tiny, tmp_path / "model.safetensors", NAMES)
        connection, child_connection = PROCESSES.Pipe()
        process = start(child_fork_savers, path, child_connection)
        leftovers, replaced = 0, 0
        for attempt in range(30):
            before = path.stat().st_ino
            connection.send(True)
            saver = connection.recv()
            deadline = time.monotonic() + 60
            while path.stat().st_ino == before and time.monotonic() < deadline:  # a busy machine is slow
                time.sleep(0.001)
            time.sleep(0.0017 * attempt)
            os.kill(saver, signal.SIGKILL)
            assert connection.recv() == "ended"
            found = read_checkpoint(path)
            others = [name for name in os.listdir(tmp_path) if name != path.name]
            assert len(others) <= leftovers + 1
            assert all(name.startswith(".model.safetensors.") and name.endswith(".tmp") for name in others)
            leftovers = len(others)
            replaced += found.class_names[0] == "class 0"
            if found.class_names[0] == "class 0":  # no mixture of two files
                values = {float(found.state_dict[name].unique()) for name, _ in tiny.named_parameters()}
                assert len(values) == 1
        connection.send(False)
        process.join()
        assert replaced > 0
