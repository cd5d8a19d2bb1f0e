"""Images in every form that the package takes; Pillow and numpy give the right pixels."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor, nn

from kornia_tinyvit import ImageClassifier, TinyViT
from kornia_tinyvit.images import check_images
from kornia_tinyvit.semantic import SemanticSegmenter
from tests.conftest import SHALLOW, liven
from tests.fuzz.harness import Rejected, Target
from tests.fuzz.known import Verdict, check, same
from tests.fuzz.networks import detector, network, sam

VALID, OPEN, INVALID = Verdict.VALID, Verdict.OPEN, Verdict.INVALID
SIDES = (1, 2, 3, 4, 5, 8, 17, 24, 33, 40)
PLAIN_SIDES = (5, 8, 17, 24, 33, 40)  # no number of channels
#: The difference between a value and its 8-bit rounding.
ROUNDING = 0.503 / 255
#: The difference of values outside of [0, 1] that is tolerated, and values beyond.
OVERSHOOT, BEYOND = 5e-4, (1.01, -0.01, 2.0, 255.0, -1.0, 65535.0)


@dataclass(frozen=True)
class Sample:
    """An input, and what is known of it.

    Args:
        what: its form in a few words; faults of one form are counted as one.
        image: the input.
        pixels: the right pixels (3, H, W) in [0, 1]; (B, 3, H, W) for a batch; ``None`` if it is invalid.
        verdict: whether it must be accepted.
        tolerance: allowed difference of the pixels.
        naming: text of the error.
        detail: more about the form.
    """

    what: str
    image: Any
    pixels: np.ndarray[Any, Any] | None
    verdict: Verdict = VALID
    tolerance: float = 1e-6
    naming: str = ""
    detail: str = ""


def size(rng: random.Random, sides: tuple[int, ...] = SIDES) -> tuple[int, int]:
    return rng.choice(sides), rng.choice(sides)


def noise(rng: random.Random, shape: tuple[int, ...], most: int = 255, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rng.getrandbits(32)).integers(0, most, shape, endpoint=True).astype(dtype)


def planes(levels: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
    """Return levels (H, W) or (H, W, C) as pixels (3, H, W); further channels are dropped."""
    pixels = levels[..., None].repeat(3, 2) if levels.ndim == 2 else levels[..., :3]
    return pixels.transpose(2, 0, 1).astype(np.float64) / scale


#: What shows an image upright by its EXIF orientation (TIFF 6.0, tag 274).
UPRIGHT: dict[int, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
MODES = ("RGB", "RGB", "L", "RGBA", "LA", "P", "P", "1", "CMYK", "YCbCr", "HSV", "RGBa", "La", "RGBX", "PA")
WRITERS = {
    "RGB": ("png", "jpg", "bmp", "tif", "webp", "ppm", "tga"), "L": ("png", "jpg", "tif", "pgm", "bmp"),
    "RGBA": ("png", "webp", "tif", "tga"), "LA": ("png", "tif"), "P": ("png", "gif", "bmp", "tif"),
    "1": ("png", "tif", "pbm"), "CMYK": ("jpg", "tif"), "YCbCr": ("jpg", "tif"),
}  # fmt: skip
ORIENTED = ("png", "jpg", "tif", "webp")


def eight_bits(rng: random.Random, folder: Path) -> Sample:
    """A PIL image of 8 bits or less, or its file; Pillow's own conversion gives the right pixels."""
    mode, (height, width) = rng.choice(MODES), size(rng)
    image = Image.fromarray(noise(rng, (height, width, 3)))
    alpha = Image.fromarray(noise(rng, (height, width)))
    if mode in ("RGBA", "LA", "RGBa", "La", "PA"):
        image.putalpha(alpha)
        image = image.convert({"La": "LA", "PA": "RGBA"}.get(mode, "RGBA" if mode == "RGBa" else mode))
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    elif mode == "P":
        image = image.quantize(rng.choice((2, 16, 200)))
        if rng.random() < 0.5:
            image.info["transparency"] = rng.choice((0, bytes((0, 128, 255))))
    else:
        image = image.convert(mode)
        if mode in ("RGB", "L") and rng.random() < 0.2:
            image.info["transparency"] = 7 if mode == "L" else (1, 2, 3)
    suffix = rng.choice(WRITERS.get(mode, ("",)))
    if not suffix or rng.random() < 0.3:
        verdict = OPEN if mode == "La" else VALID  # which Pillow converts to no other mode than LA
        converted = (image.convert("LA") if mode == "La" else image).convert("RGB")
        return Sample("a PIL image", image, planes(np.asarray(converted), 255), verdict, detail=mode)
    orientation = rng.choice((1, *range(1, 9))) if suffix in ORIENTED else 1
    settings: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    if "transparency" in image.info and suffix in ("png", "gif"):
        image.info["transparency"] = image.info["transparency"] if suffix == "png" else 1
        settings["transparency"] = image.info["transparency"]
    content, detail = encoded(image, suffix, orientation, **settings), f"{mode} {suffix}, orientation {orientation}"
    try:
        with Image.open(io.BytesIO(encoded(image, suffix, 1, **settings))) as stored:
            pixels = planes(UPRIGHT[orientation](np.asarray(stored.convert("RGB"))), 255)
    except OSError:  # Pillow writes some YCbCr files that it does not read
        return as_file(rng, folder, content, suffix, detail, None, INVALID)
    return as_file(rng, folder, content, suffix, detail, pixels)


def encoded(image: Image.Image, suffix: str, orientation: int, **settings: Any) -> bytes:
    if orientation > 1:
        exif = Image.Exif()
        exif[274] = orientation
        settings["exif"] = exif
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()["." + suffix], **settings)
    return file.getvalue()


def as_file(
    rng: random.Random, folder: Path, content: bytes, suffix: str, detail: str, pixels: Any, verdict: Verdict = VALID,
    tolerance: float = 1e-6, what: str = "",
) -> Sample:  # fmt: skip
    """Return encoded bytes as a path, as bytes or as an opened PIL image."""
    how = rng.randrange(4)
    if how == 0:
        return Sample(f"the bytes of a file{what}", content, pixels, verdict, tolerance, detail=detail)
    if how == 1:
        image = Image.open(io.BytesIO(content))
        return Sample(f"an opened file{what}", image, pixels, verdict, tolerance, detail=detail)
    path = folder / f"{rng.choice(('a', 'ü b', '-c'))}{rng.getrandbits(24)}.{suffix}"
    path.write_bytes(content)
    name = path.name if verdict is INVALID else ""
    return Sample(f"a file{what}", path if how == 2 else str(path), pixels, verdict, tolerance, name, detail)


def sixteen_bits(rng: random.Random, folder: Path) -> Sample:
    """16 bits per channel: divided by 65,535, or by the maximum that the header states."""
    shape = size(rng)
    levels = noise(rng, shape, 65535, np.uint16)
    kind = rng.randrange(6)
    if kind == 0:
        image = Image.fromarray(levels)
        return Sample("a PIL image", image, planes(levels, 65535), tolerance=ROUNDING, detail="I;16")
    if kind == 1:
        most = rng.choice((65535, 1000, 4095))
        levels = np.minimum(levels, most)
        content = f"P5 {shape[1]} {shape[0]} {most}\n".encode() + levels.astype(">u2").tobytes()
        return as_file(rng, folder, content, "pgm", "PGM of 16 bits", planes(levels, most), OPEN, ROUNDING)
    if kind == 2:
        colors = noise(rng, (*shape, 3), 65535, np.uint16)
        upper = (colors >> 8).astype(np.uint8)  # all that Pillow decodes of 16-bit colors
        return as_file(rng, folder, deep_png(colors), "png", "RGB png of 16 bits", planes(upper, 255))
    suffix = rng.choice(("png", "tif"))
    image = Image.fromarray(levels)
    if kind == 3:  # large and small values alike
        levels = noise(rng, shape, rng.choice((1, 200, 3000)), np.uint16)
        image = Image.fromarray(levels)
    orientation = rng.choice((1, 1, 3, 6, 8))
    pixels = planes(UPRIGHT[orientation](levels), 65535)
    detail = f"I;16 {suffix}, orientation {orientation}"
    return as_file(rng, folder, encoded(image, suffix, orientation), suffix, detail, pixels, tolerance=ROUNDING)


def deep_png(levels: np.ndarray[Any, Any]) -> bytes:
    """Return a PNG of 16 bits per channel, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def thirty_two_bits(rng: random.Random, folder: Path) -> Sample:
    """The modes I and F: in [0, 1], or in the range that the file declares, or rejected."""
    shape, mode = size(rng), rng.choice("FFI")
    if mode == "F":
        levels = noise(rng, shape, 1000, np.float32) / np.float32(1000)
        kind = rng.choice(("in [0, 1]", "in [0, 1]", "overshoot", "too large", "NaN", "declared"))
        if kind == "overshoot":
            levels = levels * np.float32(1 + 2 * OVERSHOOT) - np.float32(OVERSHOOT)
        elif kind == "too large":
            levels.flat[rng.randrange(levels.size)] = rng.choice(BEYOND)
        elif kind == "NaN":
            levels.flat[rng.randrange(levels.size)] = rng.choice((np.nan, np.inf, -np.inf))
        elif kind == "declared":
            levels = levels * 255
            levels.flat[0] = 255
    else:
        kind = rng.choice(("in [0, 1]", "too large", "too large", "negative"))
        levels = noise(rng, shape, 1, np.int32)
        if kind == "too large":
            levels.flat[rng.randrange(levels.size)] = rng.choice((2, 200, 255, 65535, 70000, 2**31 - 1))
        elif kind == "negative":
            levels.flat[rng.randrange(levels.size)] = -rng.choice((1, 200))
    image = Image.fromarray(levels)
    bad = kind in ("too large", "NaN", "negative")
    verdict = INVALID if bad else OPEN if kind == "declared" or mode == "I" else VALID
    pixels = None if bad else planes(levels, 255 if kind == "declared" else 1)
    tolerance = ROUNDING + (2 * OVERSHOOT if kind == "overshoot" else 0)
    what = f" {mode} {kind}"
    if kind != "declared" and rng.random() < 0.4:
        return Sample(f"a PIL image{what}", image, pixels, verdict, tolerance)
    file, tags = io.BytesIO(), ImageFileDirectory_v2()
    if kind == "declared":
        tags[340], tags[341] = 0.0, 255.0  # SMinSampleValue and SMaxSampleValue
        tags.tagtype[340] = tags.tagtype[341] = 11
    image.save(file, "TIFF", tiffinfo=tags)
    return as_file(rng, folder, file.getvalue(), "tif", "", pixels, verdict, tolerance, what)


def values(rng: random.Random, shape: tuple[int, ...], what: str) -> tuple[np.ndarray[Any, Any], float, Verdict, str]:
    """Return an array of any type, its scale, and whether its values are valid."""
    kind = rng.randrange(8)
    if kind <= 2:
        return noise(rng, shape), 255, VALID, f"{what} of uint8"
    dtype = rng.choice((np.float32, np.float32, np.float64, np.float16))
    levels = noise(rng, shape, 1000, np.float64) / 1000
    if kind <= 4:
        return levels.astype(dtype), 1, VALID, f"{what} of {np.dtype(dtype).name}"
    if kind == 5:
        levels = levels * (1 + 2 * OVERSHOOT) - OVERSHOOT
        return levels.astype(np.float32), 1, VALID, f"{what} with a tolerated overshoot"
    if kind == 6 and levels.size:
        levels.flat[rng.randrange(levels.size)] = rng.choice((np.nan, np.inf, -np.inf, *BEYOND))
        return levels.astype(np.float32), 1, INVALID, f"{what} with NaN or values outside of [0, 1]"
    levels = 2 + 250 * levels
    return levels.astype(rng.choice((np.float32, np.int64, np.int32))), 1, INVALID, f"{what} of values up to 255"


def array(rng: random.Random, folder: Path) -> Sample:
    """A numpy array in any layout."""
    layout = rng.choice(("HWC",) * 5 + ("HW", "HW", "HWA", "HWA", "CHW", "HW1", "1HW", "uint16", "odd", "row"))
    height, width = size(rng, PLAIN_SIDES if layout in ("CHW", "HW1", "1HW", "odd") else SIDES)
    shapes = {
        "HWC": (height, width, 3), "HW": (height, width), "HWA": (height, width, 4), "CHW": (3, height, width),
        "HW1": (height, width, 1), "1HW": (1, height, width), "row": (1, 1000, 3), "uint16": (height, width, 3),
        "odd": rng.choice(((height,), (height, width, 2), (height, width, 5), (0, width, 3), (height, 0, 3), (),
                           (1, 1, 1, height, width))),
    }  # fmt: skip
    what = f"an array {layout}"
    if layout == "uint16":
        levels: Any = noise(rng, rng.choice((shapes["HWC"], shapes["HW"])), 65535, np.uint16)
        return Sample("an array of uint16", levels, planes(levels, 65535), tolerance=ROUNDING)
    levels, scale, verdict, what = values(rng, shapes[layout], what)
    if layout == "odd":
        return Sample(f"{what}", levels, None, INVALID)
    straight = {"CHW": lambda x: x.transpose(1, 2, 0), "HW1": lambda x: x[..., 0], "1HW": lambda x: x[0]}
    pixels = planes(straight.get(layout, lambda x: x)(levels), scale) if verdict is VALID else None
    if verdict is VALID and layout in ("CHW", "HW1", "1HW"):
        verdict = OPEN
    how = rng.randrange(5)  # the memory does not matter
    if how == 0:
        levels = np.asfortranarray(levels)
    elif how == 1:
        levels = levels[::-1].copy()[::-1]
    elif how == 2:
        levels = levels.copy()
        levels.flags.writeable = False
    elif how == 3:
        levels = np.repeat(levels, 2, 1)[:, ::2]
    tolerance = ROUNDING + 2 * OVERSHOOT if "overshoot" in what else ROUNDING if scale == 1 else 1e-6
    return Sample(what, levels, pixels, verdict, tolerance)


def tensor(rng: random.Random, folder: Path) -> Sample:
    """A tensor in any layout."""
    layout = rng.choice(("CHW",) * 5 + ("BCHW",) * 4 + ("HWC", "1HW", "HW", "4HW", "odd"))
    sides = SIDES if layout in ("CHW", "BCHW") else PLAIN_SIDES
    (height, width), batch = size(rng, sides), rng.choice((1, 2, 3))
    shapes = {
        "CHW": (3, height, width), "BCHW": (batch, 3, height, width), "HWC": (height, width, 3),
        "1HW": (1, height, width), "HW": (height, width), "4HW": (4, height, width),
        "odd": rng.choice(((height,), (2, height, width), (5, height, width), (3, 0, width), (1, 1, 3, 5, 5))),
    }  # fmt: skip
    levels, scale, verdict, what = values(rng, shapes[layout], f"a tensor {layout}")
    image = torch.from_numpy(levels.copy())
    if layout == "odd":
        return Sample(what, image, None, INVALID)
    straight: dict[str, Callable[[Any], Any]] = {
        "CHW": lambda x: x.transpose(1, 2, 0), "HWC": lambda x: x, "1HW": lambda x: x[0], "HW": lambda x: x,
        "4HW": lambda x: x[:3].transpose(1, 2, 0),
    }  # fmt: skip
    pixels: Any = None
    if verdict is VALID and layout == "BCHW":
        pixels = levels.astype(np.float64) / scale
    elif verdict is VALID:
        pixels = planes(straight[layout](levels), scale)
        verdict = VALID if layout == "CHW" else OPEN
    how = rng.randrange(7)
    if how == 0:
        image = image.flip(-1).contiguous().flip(-1)
    elif how == 1 and image.ndim == 4:
        image = image.contiguous(memory_format=torch.channels_last)
    elif how == 2:
        image = image.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif how == 3 and image.is_floating_point():
        image = image.requires_grad_()
    elif how == 4 and image.dtype == torch.float32 and layout in ("CHW", "BCHW"):
        image = image.bfloat16()
        pixels = None if pixels is None else image.double().numpy()
    tolerance = 3 * OVERSHOOT if "overshoot" in what else 1e-6
    return Sample(what, image, pixels, verdict, tolerance)


NOT_IMAGES = (int, dict, type(None))


def no_image(rng: random.Random, folder: Path) -> Sample:
    """What is no image at all."""
    path = folder / rng.choice(("none.png", "a.png", "b.jpg"))
    if path.name == "a.png":
        path.write_bytes(rng.choice((b"", b"no image", b"\x89PNG\r\n\x1a\n")))
    elif path.name == "b.jpg":
        path.mkdir(exist_ok=True)
    thing = rng.choice((path, str(path), path, None, 3, {"a": 1}, b"", b"no image"))
    naming = path.name if thing == path or thing == str(path) else ""
    return Sample("what is no image", thing, None, INVALID, naming=naming)


KINDS = (
    *(eight_bits,) * 6, *(sixteen_bits,) * 2, *(thirty_two_bits,) * 2, *(array,) * 5, *(tensor,) * 5, no_image,
)  # fmt: skip


def several(rng: random.Random, folder: Path) -> tuple[str, Any, list[Sample]]:
    """Return an input of one or several images, and what is known of each."""
    one = rng.choice(KINDS)(rng, folder)
    if rng.random() < 0.7 or isinstance(one.image, NOT_IMAGES):
        return one.what, one.image, split(one)
    samples = [one, *(rng.choice(KINDS)(rng, folder) for _ in range(rng.choice((1, 2))))]
    singles = [each for each in samples if getattr(each.image, "ndim", 3) != 4]
    if not singles:
        return one.what, one.image, split(one)
    wrap = rng.choice((list, list, tuple))
    bad = next((each.what for each in singles if each.verdict is INVALID), "")
    return f"several images{', among them ' * bool(bad)}{bad}", wrap(each.image for each in singles), singles


def split(sample: Sample) -> list[Sample]:
    if sample.pixels is not None and sample.pixels.ndim == 4:
        return [replace(sample, pixels=each) for each in sample.pixels]
    return [sample]


SEEN: list[Tensor] = []


class Recorder(nn.Module):
    """A preprocessing that notes the images it gets; its network may be copied."""

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        SEEN.extend(image.detach().clone() for image in images)
        return F.adaptive_avg_pool2d(images, 32)


@cache
def classifier() -> ImageClassifier:
    return ImageClassifier(network())


@cache
def recording() -> ImageClassifier:
    return ImageClassifier(network(), preprocessing=Recorder())


@cache
def segmenter() -> SemanticSegmenter:
    torch.manual_seed(0)
    backbone = liven(TinyViT(**SHALLOW | {"num_classes": 0}))
    return SemanticSegmenter(backbone, num_classes=3, width=16).eval()


def as_tensor(sample: Sample) -> Tensor:
    assert sample.pixels is not None
    return torch.from_numpy(sample.pixels.clip(0, 1)).float()


def pixels_of_classifier(images: Any) -> list[Tensor]:
    SEEN.clear()
    recording().predict(images, batch_size=2)
    return list(SEEN)


def compare_pixels(found: list[Tensor], samples: list[Sample], what: str) -> None:
    assert len(found) == len(samples), f"another number of answers: {what}: {len(found)}, not {len(samples)}"
    for each, sample in zip(found, samples, strict=True):
        assert sample.pixels is not None
        same(each, sample.pixels, sample.what, sample.tolerance, sample.detail)


def compare_classes(found: Any, samples: list[Sample], what: str) -> None:
    assert len(found) == len(samples), f"another number of answers: {what}: {len(found)}, not {len(samples)}"
    for each, sample in zip(found, samples, strict=True):
        (wanted,) = classifier().predict(as_tensor(sample), top_k=7)
        scores = {one.index: one.score for one in wanted}
        far = max(abs(scores[one.index] - one.score) for one in each)
        assert far <= 1e-4 + 8 * sample.tolerance, (
            f"another class for {sample.what}: {sample.detail}: the scores differ by {far:.3g}"
        )


def compare_maps(found: Any, samples: list[Sample], what: str) -> None:
    assert len(found) == len(samples), f"another number of answers: {what}: {len(found)}, not {len(samples)}"
    for each, sample in zip(found, samples, strict=True):
        (wanted,) = segmenter().predict(as_tensor(sample))
        assert each.shape == wanted.shape, f"a map of another size for {sample.what}: {sample.detail}"
        off = (each != wanted).float().mean().item()
        assert off <= (0.02 if sample.tolerance <= 1e-6 else 0.2), (
            f"another map for {sample.what}: {sample.detail}: {off:.2f} differ"
        )


def compare_objects(found: Any, samples: list[Sample], what: str) -> None:
    assert len(found) == len(samples), f"another number of answers: {what}: {len(found)}, not {len(samples)}"
    for each, sample in zip(found, samples, strict=True):
        (wanted,) = detector().predict(as_tensor(sample), 0.0)
        pairs = zip(each, wanted, strict=True)
        far = max((abs(one.score - other.score) for one, other in pairs), default=0.0)
        assert far <= 1e-3 + 8 * sample.tolerance, (
            f"other objects for {sample.what}: {sample.detail}: the scores differ by {far:.3g}"
        )


MEAN = torch.tensor((123.675, 116.28, 103.53)).view(3, 1, 1) / 255
STD = torch.tensor((58.395, 57.12, 57.375)).view(3, 1, 1) / 255


def sam_inputs(sample: Sample, side: int = 64) -> list[Tensor]:
    """Return the input of MobileSAM as segment-anything computes it: resized in 8 bits by Pillow, or in floats."""
    pixels = as_tensor(sample)
    height, width = pixels.shape[1:]
    scale = side / max(height, width)
    target = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    levels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    rounded = np.asarray(Image.fromarray(levels).resize(target[::-1], Image.Resampling.BILINEAR))
    exact = F.interpolate(pixels[None], target, mode="bilinear", antialias=True, align_corners=False)[0]
    routes = torch.from_numpy(rounded.copy()).permute(2, 0, 1).float() / 255, exact
    return [F.pad((each - MEAN) / STD, (0, side - target[1], 0, side - target[0])) for each in routes]


def compare_inputs(found: Tensor, samples: list[Sample], what: str) -> None:
    assert len(found) == len(samples), f"another number of inputs: {what}: {len(found)}, not {len(samples)}"
    for each, sample in zip(found, samples, strict=True):
        far = min((each - wanted).abs().max().item() for wanted in sam_inputs(sample))
        limit = 1e-5 if sample.tolerance <= 1e-6 else 3 / 255 / 0.224
        assert far <= limit, f"another input of MobileSAM for {sample.what}: {sample.detail}: it differs by {far:.3g}"


def compare_features(found: Any, samples: list[Sample], what: str) -> None:
    assert len(found) == len(samples), f"another number of embeddings: {what}: {len(found)}, not {len(samples)}"
    for each, sample in zip(found.features, samples, strict=True):
        with torch.no_grad():
            routes = sam().image_encoder(torch.stack(sam_inputs(sample)))
        far = min((each - wanted).abs().max().item() for wanted in routes)
        limit = 1e-3 if sample.tolerance <= 1e-6 else 0.5
        assert far <= limit, f"another embedding for {sample.what}: {sample.detail}: it differs by {far:.3g}"


def everything(images: Any) -> Any:
    settings: dict[str, Any] = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
    return sam().generate_masks(images, **settings)


def compare_everything(found: Any, samples: list[Sample], what: str) -> None:
    lists = [found] if len(samples) == 1 and (not found or not isinstance(found[0], list)) else found
    assert len(lists) == len(samples), f"another number of answers: {what}: {len(lists)}, not {len(samples)}"
    for masks, sample in zip(lists, samples, strict=True):
        shapes = {tuple(np.asarray(mask.segmentation).shape) for mask in masks}
        assert sample.pixels is not None
        assert shapes <= {sample.pixels.shape[1:]}, f"masks of another size for {sample.what}: {sample.detail}"


@cache
def processor() -> Any:
    from kornia_tinyvit.huggingface import TinyVitImageProcessor  # whose import takes seconds

    return TinyVitImageProcessor(size=32, do_normalize=False)


def processed(images: Any) -> tuple[Tensor, bool]:
    """Return the output of transformers' image processor, without resizing where the sizes allow it."""
    if isinstance(images, (list, tuple)):
        return processor()(images)["pixel_values"], True
    return processor()(images, do_resize=False)["pixel_values"], False


def compare_processed(found: tuple[Tensor, bool], samples: list[Sample], what: str) -> None:
    pixels, resized = found
    assert len(pixels) == len(samples), f"another number of images: {what}: {len(pixels)}, not {len(samples)}"
    if not resized:
        compare_pixels(list(pixels), samples, what)


ENTRIES: tuple[tuple[int, Callable[[Any], Any], Callable[[Any, list[Sample], str], None]], ...] = (
    (10, pixels_of_classifier, compare_pixels),
    (4, lambda images: classifier().predict(images, top_k=7), compare_classes),
    (3, lambda images: segmenter().predict(images), compare_maps),
    (3, lambda images: detector().predict(images, 0.0), compare_objects),
    (5, lambda images: sam().preprocess(images)[0], compare_inputs),
    (4, lambda images: sam().embed(images), compare_features),
    (1, everything, compare_everything),
    (1, processed, compare_processed),
)


def known_images(rng: random.Random, folder: Path) -> None:
    what, image, samples = several(rng, folder)
    _, entry, compare = rng.choices(ENTRIES, [weight for weight, *_ in ENTRIES])[0]
    verdicts = {sample.verdict for sample in samples}
    verdict = next(each for each in (INVALID, OPEN, VALID) if each in verdicts)
    naming, detail = (samples[0].naming, samples[0].detail) if len(samples) == 1 else ("", "")
    try:
        check(verdict, what, lambda: entry(image), lambda found: compare(found, samples, what), naming, detail)
    except TypeError as error:
        if isinstance(image, NOT_IMAGES):
            raise Rejected("an argument of another type than declared") from error
        raise


TARGETS = (Target("images with known pixels", known_images, num_cases=400),)
