"""Hostile images, masks, labels and archives."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.data import DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.images import read_image, read_pixels
from tests.fuzz.harness import Target, mutate, tamper
from tests.fuzz.networks import detector, network, sam

WIDTH, HEIGHT = 40, 30
KINDS = (
    ("RGB", "jpg"), ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("L", "png"),
    ("1", "png"), ("P", "png"), ("I;16", "png"), ("P", "gif"), ("RGB", "webp"), ("RGBA", "webp"), ("RGB", "tif"),
    ("CMYK", "tif"), ("F", "tif"), ("I;16", "tif"), ("I", "tif"), ("LAB", "tif"), ("RGB", "bmp"), ("RGB", "ppm"),
    ("I;16", "pgm"), ("RGB", "tga"), ("RGBA", "ico"), ("F", "pfm"), ("RGB", "jp2"), ("P", "pcx"), ("1", "xbm"),
)  # fmt: skip
ANIMATED = ("gif", "png", "webp", "tif")
#: Widths and heights in the header of a file of a few bytes.
SIDES = (0, 1, 2**15, 2**16 - 1, 2**20, 2**31 - 1)


@cache
def valid(mode: str, suffix: str) -> bytes:
    levels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    if mode == "RGBA":
        image = Image.fromarray(levels)
    elif mode in ("I;16", "I"):
        image = Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(levels[..., 0].astype(np.float32) / 255)
    else:
        image = Image.fromarray(levels[..., :3]).convert(mode)
    file = io.BytesIO()
    extension = "." + suffix
    image.save(file, Image.registered_extensions()[extension])
    return file.getvalue()


@cache
def animated(suffix: str) -> bytes:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, Image.registered_extensions()["." + suffix], save_all=True, append_images=frames[1:])
    return file.getvalue()


def bomb(rng: random.Random) -> bytes:
    """Return a small file that says it is large."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    kind = rng.randrange(4)
    if kind == 0:
        header = struct.pack(">IIBBBBB", width, height, rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 6)), 0, 0, 0)
        rows = zlib.compress(bytes(rng.choice((10, 10**6))))
        return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")
    if kind == 1:
        return b"GIF89a" + struct.pack("<HHBBB", width % 2**16, height % 2**16, 0x80, 0, 0) + valid("P", "gif")[13:]
    if kind == 2:
        header = struct.pack("<IiiHHIIiiII", 40, width % 2**31, -(height % 2**31), 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + header + bytes(46)
    return f"P6 {width} {height} 255\n".encode() + bytes(99)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def a_image(rng: random.Random, folder: Path) -> Path:
    """Write an image, whole or not; return its path, whose ending may lie."""
    mode, suffix = rng.choice(KINDS)
    how = rng.randrange(10)
    if how == 0:
        content = bomb(rng)
    elif how == 1:
        content = animated(rng.choice(ANIMATED))
    elif how == 2:
        content = rng.choice(
            (b"", b"\0", b"no image\n" * 20, b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"<svg/>")
        )
    elif how == 3:
        content = _with_exif(rng)
    else:
        content = valid(mode, suffix)
        if how > 4:
            content = mutate(rng, content, 100)
    name = rng.choice((f"a.{suffix}", "a.jpg", "a.png", "a", "ü\n[red]x.png", "-a.png", " .gif", "a" * 200 + ".jpg"))
    path = folder / name
    path.write_bytes(content)
    return path


def _with_exif(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 65535))
    file = io.BytesIO()
    Image.open(io.BytesIO(valid("RGB", "jpg"))).save(file, "JPEG", exif=exif)
    return mutate(rng, file.getvalue(), 80) if rng.random() < 0.5 else file.getvalue()


def image_files(rng: random.Random, folder: Path) -> None:
    path, channels = a_image(rng, folder), rng.choice((1, 3, 3, 4))
    x = read_image(path, channels)
    assert x.dtype == torch.float32
    assert x.shape[0] == channels, f"{x.shape[0]} channels"
    assert x.numel() == 0 or (x.min() >= 0 and x.max() <= 1), f"values from {x.min()} to {x.max()}"
    pixels = read_pixels(path, channels)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == x.shape, "two sizes of one image"
    assert x.numel() == 0 or (pixels / 255 - x).abs().max() <= 0.503 / 255, "two images of one file"


def images_for_networks(rng: random.Random, folder: Path) -> None:
    path = a_image(rng, folder)
    which = rng.randrange(3)
    if which == 0:
        assert len(ImageClassifier(network()).predict(path)[0]) == 5
    elif which == 1:
        detector().predict([path])
    else:
        sam().embed(path)


def labeled_folder(rng: random.Random, folder: Path) -> None:
    """Class folders, tar and parquet files."""
    kind = rng.randrange(3)
    if kind == 0:
        for name in ("cat", "dog"):
            (folder / "data" / name).mkdir(parents=True)
            a_image(rng, folder / "data" / name)
        path = folder / "data"
    elif kind == 1:
        path = folder / "a.tar"
        path.write_bytes(mutate(rng, _tar(), 5000) if rng.random() < 0.9 else _hostile_tar(rng))
    else:
        path = folder / "a.parquet"
        path.write_bytes(mutate(rng, _parquet(), 0) if rng.random() < 0.8 else _parquet(tamper(rng, [0, 1]), rng))
    images = ClassificationDataset.open(path)
    for index in range(min(len(images), 3)):
        pixels, label = images.read(index)
        assert 0 <= label < images.num_classes
        assert pixels.shape[0] == 3
    images.fingerprint()


@cache
def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
            member = tarfile.TarInfo(name)
            member.size = len(valid("RGB", "png"))
            tar.addfile(member, io.BytesIO(valid("RGB", "png")))
    return file.getvalue()


def _hostile_tar(rng: random.Random) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("../../x/1.png", "/etc/1.png", "cat/a\n.png", "cat/1.png", "cat/1.png", "cat/in.tar"):
            member = tarfile.TarInfo(name)
            member.type = rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE))
            member.linkname = "/etc/passwd"
            content = valid("RGB", "png") if member.type == tarfile.REGTYPE else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _parquet(labels: Any = (0, 1), rng: random.Random | None = None) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content: list[Any] = [{"bytes": valid("RGB", "png")}, {"bytes": valid("RGB", "png")}]
    if rng is not None:
        content[0] = rng.choice((None, {"bytes": None}, {"bytes": b""}, {"bytes": bomb(rng)}))
    file = io.BytesIO()
    try:
        table = pa.table({"image": content, "label": labels})
    except (pa.ArrowException, TypeError, OverflowError):  # no table at all is nothing to read
        table = pa.table({"image": content, "label": [-1, 2**62]})
    pq.write_table(table, file)
    return file.getvalue()


def _scene(folder: Path) -> None:
    for kind in ("images", "labels", "masks"):
        (folder / kind).mkdir()
    for name in "ab":
        (folder / "images" / f"{name}.png").write_bytes(valid("RGB", "png"))


def _check_objects(data: DetectionDataset) -> None:
    for index in range(len(data)):
        pixels, objects = data.read(index)
        height, width = pixels.shape[1:]
        boxes = objects.boxes
        assert boxes.isfinite().all(), "a box that is not finite"
        assert (boxes >= 0).all(), "a box that juts out"
        assert (boxes <= torch.tensor([width, height, width, height])).all(), "a box that juts out"
        assert (objects.areas >= 0).all(), "an area below 0 or NaN"
        assert ((objects.labels >= 0) & (objects.labels < data.num_classes)).all()
    data.fingerprint()


def a_word(rng: random.Random) -> str:
    return rng.choice(
        ("0", "1", "0.5", "0.25", "-0.5", "nan", "inf", "1e999", "2", "x", "1e-300", "0x1", "1_0", "٣", "")
    )


def yolo_labels(rng: random.Random, folder: Path) -> None:
    _scene(folder)
    for name in "ab":
        lines = ["0 0.5 0.5 0.25 0.5", "1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5"]
        for _ in range(rng.randrange(3)):
            words = rng.choice(lines).split()
            words[rng.randrange(len(words))] = a_word(rng)
            lines.append(" ".join(words[: rng.choice((3, 5, 9, 9))]))
        content = "\n".join(lines).encode()
        (folder / "labels" / f"{name}.txt").write_bytes(mutate(rng, content) if rng.random() < 0.2 else content)
    data: Any = {"path": ".", "train": "images", "val": "images", "names": ["a", "b"]}
    data = tamper(rng, data) if rng.random() < 0.4 else data
    text = json.dumps(data).encode()  # which is YAML too
    (folder / "data.yaml").write_bytes(mutate(rng, text) if rng.random() < 0.2 else text)
    if rng.random() < 0.7:
        _check_objects(DetectionDataset.open(folder / "data.yaml", "val"))
    else:
        _check_instances(InstanceDataset.open(folder / rng.choice(("data.yaml", ".")), "val"))


def coco_labels(rng: random.Random, folder: Path) -> None:
    _scene(folder)
    runs = rng.choice((
        {"size": [HEIGHT, WIDTH], "counts": [100, 5, HEIGHT * WIDTH - 105]}, {"size": [HEIGHT, WIDTH], "counts": "11"},
        {"size": [10**6, 10**6], "counts": [10**12]}, [[1, 1, 20, 1, 20, 20]], [[1, 1]], [],
        [[float("nan"), 1, 1e300, 3, 5, 5]],
    ))  # fmt: skip
    data = {
        "images": [{"id": n, "file_name": f"{x}.png", "width": WIDTH, "height": HEIGHT} for n, x in enumerate("ab")],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 2, 10, 9], "area": 90, "segmentation": runs},
            {"id": 2, "image_id": 1, "category_id": 5, "bbox": [5, 5, 99, 99], "iscrowd": 0, "segmentation": runs},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    data = tamper(rng, data) if rng.random() < 0.9 else data
    text = json.dumps(data).encode()
    path = folder / "images" / "coco.json"
    path.write_bytes(mutate(rng, text) if rng.random() < 0.2 else text)
    if rng.random() < 0.5:
        _check_objects(DetectionDataset.open(path))
    else:
        _check_instances(InstanceDataset.open(folder / "images", instances=path))


def _check_instances(data: InstanceDataset) -> None:
    data.fingerprint()
    for index in range(len(data)):
        pixels, masks = data.read(index)
        assert masks.shape[1:] == pixels.shape[1:], "masks of another size"
        assert masks.flatten(1).any(1).all(), "an empty instance"


def mask_files(rng: random.Random, folder: Path) -> None:
    _scene(folder)
    for name in "ab":
        file = io.BytesIO()
        levels = np.random.default_rng(0).integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)
        Image.fromarray(levels).save(file, "PNG")
        content = file.getvalue()
        if rng.random() < 0.5:
            content = rng.choice((bomb(rng), mutate(rng, content, 60), valid(*rng.choice(KINDS)), animated("gif")))
        (folder / "masks" / f"{name}.png").write_bytes(content)
    (folder / "classes.txt").write_bytes(mutate(rng, b"sky\nroad\ncar\n") if rng.random() < 0.3 else b"sky\nroad\ncar")
    data = {"val": {"images": "images", "masks": "masks"}, "classes": {"0": "sky", "1": "road", "2": "car"}}
    (folder / "data.json").write_text(json.dumps(tamper(rng, data | {"ignored": [9]}) if rng.random() < 0.6 else data))
    which = rng.randrange(3)
    if which == 2:
        _check_instances(InstanceDataset.open(folder / "images", instances=folder / "masks"))
        return
    data = SegmentationDataset.open(folder / rng.choice((".", "data.json")), "val")
    data.fingerprint()
    for index in range(len(data)):
        pixels, mask = data.read(index)
        assert mask.shape == pixels.shape[1:]
        assert ((mask >= 0) & (mask < data.num_classes) | (mask == -100)).all()


TARGETS = (
    Target("image files", image_files),
    Target("images for networks", images_for_networks),
    Target("archives of images", labeled_folder),
    Target("YOLO's labels", yolo_labels),
    Target("COCO's labels", coco_labels),
    Target("masks", mask_files),
)
