"""Small scenes for detectors: a disc and a box on noisy ground, and where they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("disc", "box", "none")


def write_scene(root: Path, name: str, seed: int, height: int = 60, width: int = 80) -> None:
    """Write a picture of a disc and a box on noisy ground, and where they are; every third shows nothing."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 60) + random.integers(-25, 25, (height, width, 3))
    lines = []
    if seed % 3:
        y, x = np.mgrid[:height, :width]
        cx, cy, r = random.integers(15, 25), random.integers(20, 40), 12
        pixels[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = (220, 40, 40)
        left, top = random.integers(42, 50), random.integers(5, 30)
        pixels[top : top + 24, left : left + 28] = (40, 80, 220)
        boxes = ((0, cx + 0.5, cy + 0.5, 2 * r, 2 * r), (1, left + 14, top + 12, 28, 24))
        lines = [f"{c} {x / width} {y / height} {w / width} {h / height}" for c, x, y, w, h in boxes]
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{name}.png")
    (root / "labels" / f"{name}.txt").write_text("\n".join(lines))


def make_scenes(root: Path, count: int = 6, seed: int = 0) -> Path:
    for number in range(count):
        write_scene(root, f"{number:02}", seed + number)
    (root / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames: {json.dumps(NAMES)}\n")
    return root
