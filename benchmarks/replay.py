"""Measure the time of replayable augmentation, and its reproducibility without SIMD instructions.

python benchmarks/replay.py [--photos FOLDER]
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kornia_tinyvit.data import ReplayableAugmentation
from kornia_tinyvit.data.params import crop_box
from kornia_tinyvit.images import read_pixels

BATCH, SIZE, RUNS = 128, 224, 7


def median_ms(step: Callable[[], object]) -> float:
    """Return the median time of a call in milliseconds per sample."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000 / BATCH


def load_photos(folder: Path | None) -> list[torch.Tensor]:
    """Return uint8 images: photos of a folder, or noise of 480 x 640 pixels."""
    if folder is None:
        random = torch.Generator().manual_seed(0)
        return [torch.randint(256, (3, 480, 640), dtype=torch.uint8, generator=random) for _ in range(8)]
    return [read_pixels(path) for path in sorted(folder.rglob("*.jpg"))[:BATCH]]


def augment(photos: list[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """Return the pixels and checksums of a batch with the preset of ImageNet-1k."""
    module = ReplayableAugmentation(SIZE, "in1k", seed=1, num_samples=BATCH)
    params = module.sample_params(0, module.order.permutation(0))
    crops = torch.stack([module.crop(photos[row % len(photos)], params, row) for row in range(BATCH)])
    return module(crops, params), params.checksums().tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=None, help="folder of JPEG photos; noise without it")
    parser.add_argument("--save", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    photos = load_photos(args.photos)
    if args.save is not None:
        torch.save(augment(photos), args.save)
        return
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{datetime.date.today()}  {threads}, numpy {np.__version__}, Python {platform.python_version()}")
    print(f"recipe in1k (mixup and cutmix), batch {BATCH}, {SIZE} pixels, milliseconds per sample, median of {RUNS}")
    module = ReplayableAugmentation(SIZE, "in1k", seed=1, num_samples=BATCH)
    order = module.order.permutation(0)
    params = module.sample_params(0, order)

    def crop_and_resize() -> list[torch.Tensor]:
        return [module.crop(photos[row % len(photos)], params, row) for row in range(BATCH)]

    crops = torch.stack(crop_and_resize())
    steps: dict[str, Callable[[], object]] = {
        "sample parameters": lambda: module.sample_params(0, order),
        "crop boxes": lambda: [crop_box(tries, 480, 640, module.preset) for tries in params.crop],
        "checksums": params.checksums,
        "crop and resize": crop_and_resize,
        "pixels on this device": lambda: module(crops, params),
    }
    for name, step in steps.items():
        print(f"  {name:24} {median_ms(step):8.4f}")
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for capability in ("avx2", "default"):
            file = Path(folder) / capability
            command = [sys.executable, __file__, "--save", str(file)]
            command += [] if args.photos is None else ["--photos", str(args.photos)]
            subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
            results.append(torch.load(file))
    (pixels, sums), (other, other_sums) = results
    differ = ((pixels - other).abs() > 1e-3).float().mean()
    equal = "equal" if sums == other_sums else "DIFFER"
    print(f"AVX2 and no SIMD: parameters {equal}, fraction of pixels that differ by more than 0.001: {differ:.2e}")


if __name__ == "__main__":
    main()
