"""Hostile configurations, images and prompts for the networks."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kornia_tinyvit import ImageClassifier, MobileSAM, TinyViT, TinyViTConfig
from kornia_tinyvit.config import resolve_window_sizes
from kornia_tinyvit.detection import DetectorConfig, TinyViTDetector
from kornia_tinyvit.distillation import soft_target_cross_entropy
from kornia_tinyvit.ops.rle import decode_rle, encode_rle, uncompress_rle
from kornia_tinyvit.preprocessing import EvaluationPipeline
from tests.conftest import SHALLOW, liven
from tests.fuzz.harness import Target, a_number, a_thing, json_thing, tamper

DTYPES = (
    torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8,
    torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
BASE = TinyViTConfig(**SHALLOW)
FIELDS = [field.name for field in dataclasses.fields(TinyViTConfig)]


@cache
def network(channels: int = 3) -> TinyViT:
    torch.manual_seed(0)
    return liven(TinyViT(**SHALLOW | {"in_chans": channels}))


@cache
def sam() -> MobileSAM:
    torch.manual_seed(0)
    return MobileSAM.from_config(BASE, img_size=64).eval()


@cache
def detector() -> TinyViTDetector:
    torch.manual_seed(0)
    config = DetectorConfig(BASE.replace(num_classes=0), 3, hidden_dim=32, num_queries=8, decoder_layers=1)
    return TinyViTDetector.from_config(config).eval()


def a_value(rng: random.Random) -> Any:
    """Return a value for a field of a configuration."""
    if rng.random() < 0.5:
        return tuple(rng.choice((1, 1, 2, 3, 4, 8, 16, 0, -1, 2**40)) for _ in range(rng.choice((3, 4, 4, 4, 5))))
    return a_thing(rng)


def configuration(rng: random.Random, folder: Path) -> None:
    names = rng.sample(FIELDS, rng.choice((1, 1, 2, 3)))
    config = BASE.replace(**{name: a_value(rng) for name in names})
    assert TinyViTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, "JSON changes it"
    hash(config)
    small = max(config.embed_dims) < 200 and max(config.depths) < 9 and config.num_classes < 10**4
    if small and max(config.mlp_ratio, config.mbconv_expand_ratio) < 10 and max(config.window_sizes) < 16:
        if config.img_size > 100 or config.local_conv_size > 9 or config.in_chans > 9:
            return
        found = TinyViT.from_config(config)(torch.rand(2, config.in_chans, 33, 32))
        assert found.isfinite().all(), "not finite"


def configuration_from_json(rng: random.Random, folder: Path) -> None:
    values = tamper(rng, BASE.to_dict()) if rng.random() < 0.9 else json_thing(rng)
    config = TinyViTConfig.from_dict(json.loads(json.dumps(values)))
    assert TinyViTConfig.from_dict(config.to_dict()) == config, "the round trip changes it"


def from_config(rng: random.Random, folder: Path) -> None:
    windows = rng.choice(("scale", "fit", "", None, (4, 4, 4, 4), (0, 1, 2, 3), [4, 4], a_thing(rng), a_thing(rng)))
    asked: dict[str, Any] = {"window_sizes": windows} if rng.random() < 0.7 else {}
    if rng.random() < 0.7:
        asked[rng.choice((*FIELDS, "nonsense"))] = a_thing(rng)
    sizes = {name: value for name, value in asked.items() if name not in ("window_sizes", "img_size")}
    if rng.random() < 0.4:  # what would be built has any size; the policy alone
        resolve_window_sizes(BASE, rng.choice((32, 64, 1000, a_thing(rng))), windows)
    elif not any(
        isinstance(value, (int, float)) and value > 300 for value in (asked if windows == "scale" else sizes).values()
    ):
        TinyViT.from_config(rng.choice((BASE, BASE, BASE, "9m", "", None)), **asked)


def photos(rng: random.Random, channels: int = 3) -> Tensor:
    """Return a tensor of any shape, type and layout."""
    sides = (0, 1, 5, 31, 32, 33, 40, 63, 64, 65, 97, rng.choice((32, 700)))
    shape = [
        rng.choice((0, 1, 1, 2, 3)),
        rng.choice((channels,) * 6 + (0, 1, 2, 4)),
        rng.choice(sides),
        rng.choice(sides),
    ]
    if rng.random() < 0.15:
        shape = shape[: rng.randrange(4)] if rng.random() < 0.6 else [1, *shape]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))) * rng.choice((1, 1, 255))
    x = x.to(rng.choice(DTYPES))
    how = rng.randrange(6)
    if how == 0 and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif how == 1 and x.ndim >= 2:
        x = x.transpose(-1, -2)
    elif how == 2:
        x = x.unsqueeze(0).expand(2, *x.shape)[0]
    elif how == 3 and x.ndim and x.shape[0] == 1:
        x = x.expand(3, *x.shape[1:])
    elif how == 4 and x.is_floating_point():
        x = x.requires_grad_()
    elif how == 5 and x.ndim:
        x = x.flip(-1)[..., ::2]
    return x


def forward(rng: random.Random, folder: Path) -> None:
    channels = rng.choice((1, 3, 3, 4))
    model, x = network(channels), photos(rng, channels)
    if x.dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = _cast(channels, x.dtype)
    found = model(x)
    assert found.shape == (x.shape[0], 7), f"shape {tuple(found.shape)}"
    assert found.isfinite().all() or x.max() > 1, "not finite"
    plain = model(x.detach().clone().contiguous())
    assert torch.allclose(found, plain, rtol=0.05, atol=0.05 * max(1.0, float(plain.abs().max()) if len(x) else 1.0)), (
        "the layout changes the result"
    )
    maps = model.forward_intermediates(x)
    for each, stride, dim in zip(maps, model.feature_strides, model.feature_channels, strict=True):
        wanted = (x.shape[0], dim, -(-x.shape[2] // stride), -(-x.shape[3] // stride))
        assert each.shape == wanted, f"map {tuple(each.shape)}, not {wanted}"
    if x.requires_grad and x.numel():
        found.sum().backward()
        assert x.grad is not None, "no gradient"


@cache
def _cast(channels: int, dtype: torch.dtype) -> TinyViT:
    torch.manual_seed(0)
    return liven(TinyViT(**SHALLOW | {"in_chans": channels})).to(dtype)


def reset_classifier(rng: random.Random, folder: Path) -> None:
    model = TinyViT(**SHALLOW).eval()
    before = model.config
    asked = rng.choice((0, 1, 5, 3, a_thing(rng), -1, 2.0))
    try:  # heads that no memory holds are asked for rightly
        model.reset_classifier(5 if type(asked) is int and asked > 10**6 else asked)
    except (ValueError, TypeError):
        assert model.config == before, "a rejected head changed the network"
        raise
    assert model(torch.rand(1, 3, 32, 32)).shape[1] == (model.config.num_classes or 32)


def predict(rng: random.Random, folder: Path) -> None:
    classifier = ImageClassifier(network())
    settings = {name: a_thing(rng) for name in ("top_k", "batch_size") if rng.random() < 0.3}
    images: Any = photos(rng) if rng.random() < 0.6 else [photos(rng) for _ in range(3)]
    if rng.random() < 0.2:
        images = rng.choice((a_thing(rng), [a_thing(rng)], iter([]), [None], str(folder / "none.png"), folder))
    for found in classifier.predict(images, **settings):
        assert all(0 <= each.score <= 1 for each in found), "a score outside of [0, 1]"


def detect(rng: random.Random, folder: Path) -> None:
    settings = {name: a_thing(rng) for name in ("confidence_threshold", "batch_size") if rng.random() < 0.3}
    images: Any = photos(rng) if rng.random() < 0.6 else [photos(rng) for _ in range(2)]
    detector().predict(images, **settings)


def evaluation_pipeline(rng: random.Random, folder: Path) -> None:
    settings = {name: a_thing(rng) for name in ("img_size", "crop_fraction", "mean", "std") if rng.random() < 0.35}
    if settings.get("img_size", 0) in (2**16, 2**31, 2**31 - 1, 2**32, 2**63, 2**64, 10**30):
        settings["img_size"] = 16
    size = settings.setdefault("img_size", rng.choice((1, 16, 33)))
    pipeline, x = EvaluationPipeline(**settings), photos(rng)
    assert pipeline(x).shape == (x.shape[0], 3, size, size)


def prompts(rng: random.Random, folder: Path) -> None:
    embedding = _embedding()
    kinds = {name: _prompt(rng, name) for name in ("points", "labels", "boxes", "masks") if rng.random() < 0.4}
    for found in sam().predict_masks(embedding, **kinds, multimask_output=rng.random() < 0.5):
        assert found.masks().shape[-2:] == (48, 60), "masks of another size"
        assert found.scores.isfinite().all(), "scores that are not finite"


@cache
def _embedding() -> Any:
    return sam().embed(torch.rand(3, 48, 60, generator=torch.Generator().manual_seed(0)))


def _prompt(rng: random.Random, kind: str) -> Any:
    shapes = {"points": (2, 1, 2), "labels": (2, 1), "boxes": (2, 4), "masks": (2, 1, 16, 16)}
    shape = list(shapes[kind])
    if rng.random() < 0.15:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 3))
    x = 1 + 40 * torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    if kind == "labels":
        x = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    if kind == "boxes" and x.shape[-1] == 4:
        x[..., 2:] += x[..., :2]
    if rng.random() < 0.25 and x.numel():
        value = a_number(rng)
        x = x.double()
        x.view(-1)[rng.randrange(x.numel())] = float(value)
    if rng.random() < 0.15:
        x = x.to(rng.choice(DTYPES))
    return rng.choice((x, x, x, x, x, x, [x], x[0] if len(x) else x, a_thing(rng)))


def everything(rng: random.Random, folder: Path) -> None:
    names = (
        "points_per_side", "points_per_batch", "pred_iou_thresh", "stability_score_thresh", "stability_score_offset",
        "box_nms_thresh", "crop_n_layers", "crop_nms_thresh", "crop_overlap_ratio", "crop_n_points_downscale_factor",
        "min_mask_region_area", "output_mode",
    )  # fmt: skip
    settings = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    settings |= {name: a_thing(rng) for name in rng.sample(names, rng.choice((0, 1, 1, 2)))}
    small = {"points_per_side": 8, "crop_n_layers": 1, "crop_n_points_downscale_factor": 8}
    for name, most in small.items():  # larger ones are asked for rightly, and take what they take
        value = settings.get(name)
        if isinstance(value, (int, float)) and most < value < float("inf"):
            settings[name] = most
    size = rng.choice(((3, 40, 50), (3, 1, 1), (3, 3, 64), (3, 0, 5), (1, 40, 40), (3, 40)))
    for each in sam().generate_masks(torch.rand(size), **settings):
        assert each.area >= 0


def runs(rng: random.Random, folder: Path) -> None:
    rle: Any = encode_rle(torch.rand(5, 6) > 0.5, compressed=rng.random() < 0.5)
    rle = json.loads(json.dumps(rle))
    if isinstance(rle["counts"], str) and rng.random() < 0.5:
        characters = [chr(rng.randrange(40, 130)) for _ in range(rng.randrange(12))]
        rle["counts"] = rle["counts"][: rng.randrange(9)] + "".join(characters)
    else:
        rle = tamper(rng, rle)
    mask = decode_rle(rle)
    assert list(mask.shape) == list(rle["size"]), "a mask of another size"
    assert decode_rle(uncompress_rle(rle)).sum() == mask.sum()


def soft_targets(rng: random.Random, folder: Path) -> None:
    classes, k, batch = rng.choice((1, 5, 9)), rng.choice((0, 1, 3)), rng.choice((0, 1, 4))
    logits = torch.randn(rng.choice((batch, batch, batch, 2)), classes)
    indices = torch.randint(-1 if rng.random() < 0.2 else 0, classes + (rng.random() < 0.2), (batch, k))
    indices = indices.to(rng.choice((torch.int64, torch.uint8, torch.int32, torch.float32)))
    shares = torch.rand(batch, k) / max(k, 1)
    if rng.random() < 0.2 and shares.numel():
        shares.view(-1)[0] = rng.choice((-1.0, 2.0, float("nan"), float("inf")))
    found = soft_target_cross_entropy(logits, indices, shares)
    assert found.isfinite() or not batch or not shares.isfinite().all(), "a loss that is not finite"


TARGETS = (
    Target("configurations", configuration, typed=True),
    Target("configurations in JSON", configuration_from_json),
    Target("from_config", from_config, typed=True),
    Target("images for the network", forward, typed=True),
    Target("reset_classifier", reset_classifier, typed=True),
    Target("ImageClassifier.predict", predict, typed=True),
    Target("TinyViTDetector.predict", detect, typed=True),
    Target("EvaluationPipeline", evaluation_pipeline, typed=True),
    Target("prompts of MobileSAM", prompts, typed=True),
    Target("settings of generate_masks", everything, typed=True),
    Target("run lengths", runs),
    Target("soft targets", soft_targets),
)
