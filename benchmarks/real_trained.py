"""Networks trained on real images, for real.py: nuclei, blood cells, street scenes, and the near-duplicates of each."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from original import load_masks
from real_masks import cache, digest, pairwise_ious, segment
from torch import Tensor

from kornia_tinyvit import MobileSAM, TinyViTDetector
from kornia_tinyvit.data import DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import evaluate

#: Classes of CamVid as prepared for SegNet; 11 is unlabeled.
STREET = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
#: Arguments of ``kornia-tinyvit train``, after the data and the weights.
RECIPES = {
    # Crops of images of 1024 pixels, a quarter of the work; most objects sampled from an image are outside of its crop.
    "nuclei": "--task promptable --img-size 512 --crop-scale 0.2,0.5 --prompts 32 --epochs 8",
    "cells": "--task detection --img-size 256 --hidden-dim 128 --queries 60 --epochs 40 --rotate",
    "camvid": "--task semantic --img-size 384 --epochs 40",
}
#: No choice of weights by held-out images: those of the last epoch are evaluated.
COMMON = "--precision bf16 --patience 0 --validate-every 100"
#: Sizes of the input for the evaluation of trained networks: that of the training, and larger ones, because random
#: crops magnify objects.
SIZES = {"nuclei": (512, 1024), "cells": (256, 320), "camvid": (384, 480, 576)}
SIMILAR = (0.9, 0.95, 0.99)  # cosines
LARGE = 0.5  # a mask of more than this fraction of the image is one of the background


def train(args: argparse.Namespace, section: str, data: Path) -> Path:
    """Start or resume the training of a section, and return its last weights."""
    options = [*RECIPES[section].split(), *COMMON.split(), "--out", str(args.train)]
    command = ["train", str(data), "--weights", args.weights, *options]
    print(f"$ kornia-tinyvit {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "kornia_tinyvit", *command], check=True, stdout=subprocess.DEVNULL)
    last = args.train / "last.safetensors"
    print(f"last weights, SHA-256 {digest(str(last))}\n", flush=True)
    return last


# Nuclei


def nuclei(args: argparse.Namespace) -> None:
    """Evaluate boxes, points and everything in held-out microscopy images, before and after training."""
    rows = {"published": args.weights}
    if args.train is not None:
        rows["trained"] = str(train(args, "nuclei", args.data))
    images = InstanceDataset.open(args.data, "val")
    images = images.sample(min(args.photos, len(images)), args.seed)
    for name, weights in rows.items():
        for size in SIZES["nuclei"]:
            scores = evaluate(MobileSAM.from_config(pretrained=weights, img_size=size), images)
            print(f"{name}, input {size}: {len(images)} images, {scores.instances} nuclei")
            print(f"    mean IoU   boxes {scores.box_iou:5.2f} %   points {scores.point_iou:5.2f} %", flush=True)
        print(f"    everything {describe_everything(args, weights, images)}", flush=True)


def describe_everything(args: argparse.Namespace, weights: str, images: InstanceDataset) -> str:
    """Return how many objects are found, and how many masks are false, with masks of the background left out."""
    photos = [Path(images.place(index)) for index in range(len(images))]
    files = segment(args, weights, "ours bfloat16", photos, max_area=LARGE)
    objects = hits = masks = false = large = 0
    seconds = []
    for index, file in enumerate(files):
        found, truth = load_masks(file), images.read(index)[1].numpy()
        ious = pairwise_ious(truth, found["masks"])
        objects, hits = objects + len(truth), hits + int((ious.max(1, initial=0) >= 0.5).sum())
        masks, false = masks + len(found["masks"]), false + int((ious.max(0, initial=0) < 0.5).sum())
        large += int((found["masks"].mean((1, 2)) > LARGE).sum())
        seconds.append(float(found["cpu_s"]))
    counts = f"{masks / len(images):.1f}, without a nucleus {false / len(images):.1f}, of the background {large}"
    recall = f"found at IoU 0.5 {100 * hits / objects:5.2f} %"
    return f"{recall}   masks per image {counts}   {np.mean(seconds):.1f} CPU s per image"


# Blood cells and street scenes


def cells(args: argparse.Namespace) -> None:
    """Evaluate a detector of blood cells on the test split."""
    weights = args.weights if args.train is None else train(args, "cells", args.data)
    images = DetectionDataset.open(args.data, "test")
    for size, nms in itertools.product(SIZES["cells"], (None, 0.7)):
        detector = TinyViTDetector.from_config(pretrained=weights, img_size=size)
        scores = evaluate(detector, images, nms_threshold=nms)
        if nms is None:
            print(f"{scores.images} images of the test split, {scores.objects} cells, input {size}")
        print("all detections" if nms is None else f"non-maximum suppression at IoU {nms}")
        print(f"    mAP {scores.map:5.2f} %   AP50 {scores.map50:5.2f} %   AP75 {scores.map75:5.2f} %")
        print(f"    best F1 {scores.best_f1:5.2f} % at scores of {scores.threshold:.2f} or more")
        show_classes("mAP", detector.class_names, scores.per_class)


def camvid(args: argparse.Namespace) -> None:
    """Evaluate a segmenter of street scenes on the validation split."""
    data = describe_camvid(args)
    weights = args.weights if args.train is None else train(args, "camvid", data)
    images = SegmentationDataset.open(data, "val")
    for size in SIZES["camvid"]:
        segmenter = SemanticSegmenter.from_config(pretrained=weights, img_size=size)
        scores = evaluate(segmenter, images)
        print(f"{len(images)} images of the validation split, {scores.present} classes, input of {size}x{size} pixels")
        print(f"    mean IoU {scores.mean_iou:5.2f} %   pixel accuracy {scores.pixel_accuracy:5.2f} %", flush=True)
        show_classes("IoU", segmenter.class_names, scores.per_class)


def describe_camvid(args: argparse.Namespace) -> Path:
    """Write the description of the data set, which names the classes and the unlabeled id, and return its path."""
    args.cache.mkdir(parents=True, exist_ok=True)
    folders = {
        split: {kind: str((args.data / kind / split).absolute()) for kind in ("images", "masks")}
        for split in ("train", "val")
    }
    path = args.cache / "camvid.json"
    path.write_text(json.dumps(folders | {"classes": STREET, "ignored": [len(STREET)]}))
    return path


def show_classes(title: str, names: Sequence[str], values: Tensor) -> None:
    print(
        f"    {title} of "
        + "   ".join(f"{name} {value:.1f} %" for name, value in zip(names, values.tolist(), strict=True))
    )


# Near-duplicates


def duplicates(args: argparse.Namespace) -> None:
    """Count held-out images that nearly equal a training image; --data is the folder with all three sets."""
    for name, (training, held_out) in list_splits(args.data).items():
        others, images = (describe_images(args, paths, f"{name}_{len(paths)}") for paths in (training, held_out))
        print(f"{name}: nearest of {len(training)} training images for each of {len(held_out)} held-out images")
        for kind, left, right in zip(("features", "pixels"), images, others, strict=True):
            common = right.mean(0) if kind == "features" else 0  # of features a large part is common to all images
            cosines = F.normalize(left - common, dim=1) @ F.normalize(right - common, dim=1).T
            best, rows = cosines.max(1)
            counts = "   ".join(f">= {limit}: {int((best >= limit).sum())}" for limit in SIMILAR)
            print(f"    cosine of {kind:8} median {best.median():.3f}   {counts}", flush=True)
            for index in best.argsort(descending=True)[:5].tolist():
                print(f"        {best[index]:.3f} {held_out[index].name} {training[rows[index]].name}", flush=True)


def list_splits(data: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Return the training and the held-out images of each set."""
    voc = data / "blood_cells"
    stems = [(voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split() for split in ("train", "test")]
    return {
        "nuclei": tuple(sorted((data / "nuclei" / split / "images").iterdir()) for split in ("train", "val")),
        "blood_cells": tuple([voc / "JPEGImages" / f"{stem}.jpg" for stem in each] for each in stems),
        "camvid": tuple(sorted((data / "camvid" / "images" / split).iterdir()) for split in ("train", "val")),
    }


@torch.no_grad()
def describe_images(args: argparse.Namespace, photos: Sequence[Path], name: str) -> tuple[Tensor, Tensor]:
    """Return mean features of MobileSAM at 512 pixels, and 32x32 pixels without their mean; both are kept."""
    path = cache(args, args.weights, "descriptions") / f"{name}.pt"
    if not path.exists():
        sam = MobileSAM.from_config(pretrained=args.weights, img_size=512)
        found = []
        for photo in photos:
            inputs, (geometry,) = sam.preprocess(photo)
            height, width = geometry.input_size
            features = sam.image_encoder(inputs)[0, :, : max(1, height // 16), : max(1, width // 16)].mean((1, 2))
            pixels = F.interpolate(inputs[..., :height, :width], (32, 32), mode="area").flatten()
            found.append((features, pixels - pixels.mean()))
        torch.save(tuple(torch.stack(each) for each in zip(*found, strict=True)), path)
    return torch.load(path)
