"""Masks of everything in photos for real.py: generated in processes of their own, and kept."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from original import measured, save_masks

from kornia_tinyvit import MobileSAM

HERE = Path(__file__).parent
GENERATORS = {"original": None, "ours": None, "ours bfloat16": torch.bfloat16}


@functools.cache
def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def cache(args: argparse.Namespace, weights: str, *names: str) -> Path:
    """Return a folder for the masks of these weights."""
    folder = args.cache.joinpath(digest(weights)[:12], *names)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def child(args: argparse.Namespace, task: dict, original: bool = False) -> str:
    """Run a task in a process of its own, of the original code or of real.py, and return the last line that it prints.

    The original code prints the versions of its packages.
    """
    script = (
        [args.original, "-W", "ignore", str(HERE / "original.py")]
        if original
        else [sys.executable, "-W", "ignore", str(HERE / "real.py"), "child"]
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)} | ({"PYTHONPATH": ""} if original else {})
    output = subprocess.run(
        [*script, json.dumps(task)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return (output.splitlines() or [""])[-1]


def segment(args: argparse.Namespace, weights: str, who: str, photos: Sequence[Path], **settings: Any) -> list[Path]:
    """Segment everything in photos, in one process, and return the files of their masks, which are kept.

    Args:
        args: options of real.py.
        weights: file of a MobileSAM.
        who: one of :data:`GENERATORS`.
        photos: the photos.
        **settings: arguments of ``generate_masks``; the original code has its defaults.
    """
    folder = cache(
        args, weights, "everything", "_".join([*who.split(), *(f"{key}={settings[key]}" for key in settings)])
    )
    files = [folder / f"{photo.stem}.npz" for photo in photos]
    missing = [
        (str(photo.absolute()), str(file.absolute()))
        for photo, file in zip(photos, files, strict=True)
        if not file.exists()
    ]
    if missing:
        names, out = zip(*missing, strict=True)
        task = {"what": "everything", "who": who, "weights": weights, "photos": names, "files": out}
        child(args, task | {"settings": settings}, original=who == "original")
    return files


def segment_ours(task: dict) -> None:
    """Segment everything in the photos of a task."""
    sam = MobileSAM.from_config(pretrained=task["weights"], img_size=1024)  # also if trained on smaller crops
    settings = task["settings"] | {"dtype": GENERATORS[task["who"]]}
    for photo, out in zip(task["photos"], task["files"], strict=True):
        found, times = measured(lambda photo=photo: sam.generate_masks(photo, **settings))
        boxes = np.array([each.bbox for each in found]).reshape(-1, 4)
        scores = np.array([each.predicted_iou for each in found])
        save_masks(out, [each.segmentation for each in found], boxes=boxes, scores=scores, **times)


def pairwise_ious(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoUs of masks (N, H, W) with others (M, H, W) as (N, M)."""
    if not (len(masks) and len(others)):
        return np.zeros((len(masks), len(others)))
    left, right = (each.reshape(len(each), -1).astype(np.float32) for each in (masks, others))
    both = left @ right.T
    return both / np.maximum(left.sum(1)[:, None] + right.sum(1) - both, 1)


def standard_error(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
