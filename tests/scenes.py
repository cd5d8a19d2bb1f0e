"""Data sets of the tests: noise in class folders, discs and boxes, in the formats of COCO, YOLO and Pascal VOC."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from kornia_tinyvit.data import ReplayableAugmentation, ReplayedSamples
from kornia_tinyvit.data.classification import ClassificationDataset

#: The class folders of :func:`make_images`.
CLASSES = ("blue", "green", "red")
#: The classes of :func:`make_scenes`.
NAMES = ("ground", "disc", "box")
#: The classes of :func:`make_boxes`; no object has the last one.
BOX_NAMES = ("disc", "box", "none")
#: The classes of :func:`write_yolo`, and without the dog of :func:`make_coco`.
ANIMALS = ("cat", "dog", "owl")
COLORS = np.array([[60, 60, 60], [220, 40, 40], [40, 80, 220]])


def make_images(root: Path, each: int = 8, size: int = 40, seed: int = 0) -> Path:
    """Write images of noise in which the channel of their class is brighter."""
    random = np.random.default_rng(seed)
    for channel, name in zip((2, 1, 0), CLASSES, strict=True):
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 120, (size, size + 8, 3))
            pixels[..., channel] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02}.png")
    return root


def samples_of(folder: Path, preset: str = "distill", size: int = 32, on_broken: str = "stop", seed: int = 3):
    """Return the images of class folders with an augmentation."""
    images = ClassificationDataset.open(folder)
    return ReplayedSamples(images, ReplayableAugmentation(size, preset, seed, num_samples=len(images)), on_broken)


def damage(path: Path) -> bytes:
    """Corrupt an image without changing its size; return its previous content."""
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(len(whole) - 40))
    return whole


def write_scene(root: Path, name: str, seed: int, height: int = 44, width: int = 60, frame: int | None = None) -> None:
    """Write an image of a disc, id 1, and a box, id 2, and its mask, with an optional id for the frame."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    ids = np.zeros((height, width), dtype=np.uint8)
    ids[(y - random.integers(14, 20)) ** 2 + (x - random.integers(14, 18)) ** 2 < 144] = 1
    ids[16 : random.integers(34, 42), 34 : random.integers(50, 58)] = 2
    pixels = COLORS[ids] + random.integers(-25, 25, (height, width, 3))
    if frame is not None:
        ids[[0, -1]] = frame
    for kind, content in (("images", pixels.clip(0, 255).astype(np.uint8)), ("masks", ids)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(root / kind / f"{name}.png")


def make_instances(root: Path, count: int = 4, seed: int = 0) -> Path:
    """Write scenes whose ids are instances."""
    for number in range(count):
        write_scene(root, f"{number:02}", seed + number)
    return root


def make_scenes(root: Path, count: int = 6, seed: int = 0) -> Path:
    """Write scenes whose ids are classes; the upper and lower edges are unlabeled."""
    for number in range(count):
        write_scene(root, f"{number:02}", seed + number, frame=255)
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def write_boxes(root: Path, name: str, seed: int, height: int = 60, width: int = 80) -> None:
    """Write an image of a disc and a box on noisy ground, and their boxes; every third is empty."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 60) + random.integers(-25, 25, (height, width, 3))
    lines = []
    if seed % 3:
        y, x = np.mgrid[:height, :width]
        cx, cy, r = random.integers(15, 25), random.integers(20, 40), 12
        pixels[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = COLORS[1]
        left, top = random.integers(42, 50), random.integers(5, 30)
        pixels[top : top + 24, left : left + 28] = COLORS[2]
        boxes = ((0, cx + 0.5, cy + 0.5, 2 * r, 2 * r), (1, left + 14, top + 12, 28, 24))
        lines = [f"{c} {x / width} {y / height} {w / width} {h / height}" for c, x, y, w, h in boxes]
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{name}.png")
    (root / "labels" / f"{name}.txt").write_text("\n".join(lines))


def make_boxes(root: Path, count: int = 6, seed: int = 0) -> Path:
    """Write scenes with boxes in YOLO's format."""
    for number in range(count):
        write_boxes(root, f"{number:02}", seed + number)
    (root / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames: {json.dumps(BOX_NAMES)}\n")
    return root


def write_image(path: Path, width: int = 40, height: int = 20) -> None:
    """Write a red image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "red").save(path)


def write_yolo(root: Path, labels: dict[str, str | None], names=ANIMALS, yaml: str | None = None) -> Path:
    """Write images of 40 x 20 pixels and their labels; ``None`` writes no label file."""
    for stem, text in labels.items():
        write_image(root / "images" / "train" / f"{stem}.png")
        if text is not None:
            file = root / "labels" / "train" / f"{stem}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    listed = "\n".join(f"  {index}: {name}" for index, name in enumerate(names))
    (root / "data.yaml").write_text(yaml or f"path: .\ntrain: images/train\nval: images/train\nnames:\n{listed}\n")
    return root / "data.yaml"


def make_coco(**changes) -> dict:
    """Return annotations of an image with a cat and a crowd of owls, and of an empty one."""
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
            {"id": 9, "file_name": "b.png", "width": 40, "height": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [4, 2, 20, 10], "area": 120, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [10, 5, 5, 5], "area": 25, "iscrowd": 1},
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 3, "name": "owl"}],
    }
    return content | changes


def write_coco(root: Path, content: dict, folder: str = "val2017") -> Path:
    """Write red images and COCO's annotation file."""
    for image in content["images"]:
        write_image(root / folder / image["file_name"])
    path = root / "annotations" / "instances_val2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_voc(
    root: Path, objects: dict[str, list[str]], size: tuple[int, int] = (40, 20), split: str = "train"
) -> Path:
    """Write red images and Pascal VOC's annotations of ``name xmin ymin xmax ymax``, and 1 if difficult."""
    for stem, lines in objects.items():
        write_image(root / "JPEGImages" / f"{stem}.jpg")
        found = []
        for line in lines:
            name, *corners, difficult = (*line.split(), "0")[:6]
            box = "".join(
                f"<{key}>{x}</{key}>" for key, x in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
            )
            found.append(
                f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
            )
        sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        file = root / "Annotations" / f"{stem}.xml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"<annotation><filename>{stem}.jpg</filename>{sides}{''.join(found)}</annotation>")
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("\n".join(objects) + "\n")
    return root
