"""Conversion between kornia's and transformers' RT-DETR: equal outputs in both directions, and errors."""

from __future__ import annotations

import pytest
import torch
from kornia.enhance import normalize
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from kornia_tinyvit import TinyViT, TinyViTDetector
from kornia_tinyvit.huggingface.rt_detr import from_rt_detr, to_rt_detr
from kornia_tinyvit.preprocessing import Preprocessing
from tests.conftest import TINY
from tests.test_detection import NAMES, make_detector


def outputs(model, detector, images):
    found = model(normalize(images, detector.mean.to(images), detector.std.to(images)))
    return found.logits, found.pred_boxes


@pytest.fixture(scope="module")
def detector():
    return make_detector()


def test_same_outputs(detector):
    images = torch.rand(2, 3, 64, 64)
    model = to_rt_detr(detector)
    assert not model.training
    with torch.inference_mode():
        ours, theirs = detector(images), outputs(model, detector, images)
    assert ours[0].std() > 0.1
    assert ours[1].std() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_round_trip(detector):
    again = from_rt_detr(to_rt_detr(detector))
    assert (again.config, again.class_names, again.training) == (detector.config, NAMES, False)
    unused = ("backbone.norm_head.weight", "backbone.norm_head.bias")  # not used for feature maps
    own = detector.state_dict()
    assert all(torch.equal(own[name], x) for name, x in again.state_dict().items() if name not in unused)
    assert len(own) > 300


def test_preprocessing(tmp_path):
    backbone = TinyViT(**TINY | {"num_classes": 0})
    backbone.preprocessing = Preprocessing(64, 0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
    detector = TinyViTDetector(backbone, num_classes=3, hidden_dim=32, num_queries=5).eval()
    to_rt_detr(detector).save_pretrained(tmp_path)
    again = from_rt_detr(RTDetrForObjectDetection.from_pretrained(tmp_path).eval())
    assert again.backbone.preprocessing == backbone.preprocessing
    images = torch.rand(1, 3, 50, 70)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), detector(images))


def test_changed_weights(detector):
    model = to_rt_detr(detector)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        changed = from_rt_detr(model)
        torch.testing.assert_close(changed(images), outputs(model, detector, images), atol=1e-5, rtol=1e-4)
        assert (changed(images)[0] - detector(images)[0]).abs().max() > 1e-3


def test_files_of_transformers(detector, tmp_path):
    to_rt_detr(detector).save_pretrained(tmp_path)
    again = from_rt_detr(RTDetrForObjectDetection.from_pretrained(tmp_path).eval())
    images = torch.rand(1, 3, 50, 70)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), detector(images))
    assert (again.class_names, again.config) == (NAMES, detector.config)


def test_precision_mode_and_changes(detector):
    model = to_rt_detr(make_detector().double().train(), num_denoising=7)
    assert (model.dtype, model.training, model.config.num_denoising) == (torch.float64, True, 7)
    again = from_rt_detr(model)
    assert again.training
    assert next(again.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
            "encoder_attention_heads: kornia has 8",
        ),
        ({"normalize_before": True}, "normalize_before: kornia has False, the model True"),
        ({"encoder_ffn_dim": 32}, "encoder_ffn_dim: kornia has 64, the model 32"),
        ({"decoder_activation_function": "gelu"}, "decoder_activation_function: kornia has relu, the model gelu"),
    ],
)
def test_unsupported(detector, changes, message):
    config = to_rt_detr(detector).config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        from_rt_detr(RTDetrForObjectDetection(config))


def test_another_backbone():
    resnet = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=resnet, encoder_in_channels=[8, 8, 8], encoder_hidden_dim=16, d_model=16, decoder_layers=1,
        decoder_in_channels=[16, 16, 16], encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Expected a model on a TinyVitBackbone; got one on RTDetrResNetConfig"):
        from_rt_detr(RTDetrForObjectDetection(config))
