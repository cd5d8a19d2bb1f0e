"""Train and evaluate a detector.

    python examples/detect_objects.py coco128/object_detection/config.yaml --images 16

DATA is a data set of `kornia-tinyvit train --task detection`: the YAML file of a YOLO data set, a JSON file of COCO, or
a folder with one of them. The training is that of the command; run the script again to resume. Then it evaluates the
detector on the training images and on those of `val`, and draws ground truth and predictions of some of both. It needs
`pip install 'kornia-tinyvit[train,hf]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image

from kornia_tinyvit.data import DetectionDataset
from kornia_tinyvit.detection import Detection, TinyViTDetector
from kornia_tinyvit.training import (
    DETECTION,
    BoxAugmentation,
    DetectionLoss,
    DetectionSamples,
    DetectorTraining,
    evaluate,
    find_recipe,
    train,
)
from kornia_tinyvit.visualization import draw_detections, save_rows

TILE, GAP = 320, 8


def draw_sheet(
    detector: TinyViTDetector, images: DetectionDataset, rows: list[int], path: Path, hide_photos: bool = False
) -> None:
    """Write a figure with one row per image: ground-truth boxes and predicted boxes."""
    strips = []
    for row in rows:
        photo, objects = images[row]
        pairs = zip(objects.labels.tolist(), objects.boxes.tolist(), strict=True)
        truth = [Detection(images.class_names[index], index, 1.0, tuple(box)) for index, box in pairs]
        (predictions,) = detector.predict(photo)
        strip = Image.new("RGB", (2 * TILE + GAP, TILE + GAP), "white")
        for column, (boxes, scores) in enumerate(((truth, False), (predictions, True))):
            tile = draw_detections(torch.ones_like(photo) if hide_photos else photo, boxes, scores)
            tile.thumbnail((TILE, TILE))
            strip.paste(tile, (column * (TILE + GAP) + (TILE - tile.width) // 2, 0))
        strips.append(strip.crop((0, 0, strip.width, tile.height + GAP)))
    save_rows(path, strips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a YAML or JSON file, or a folder with one")
    parser.add_argument("--images", type=int, default=16, help="size of a random training subset with a fixed seed")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="weights of the backbone or of a detector, or 'none'")
    parser.add_argument("--img-size", type=int, default=256)
    parser.add_argument("--hidden-dim", type=int, default=128, help="channels of encoder and decoder")
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--denoising", type=int, default=40, help="denoising queries in training")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--shown", type=int, default=4, help="images to draw of each split")
    parser.add_argument("--hide-photos", action="store_true", help="draw boxes on white")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/detect"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    args = parser.parse_args()
    torch.manual_seed(0)

    images, validation = DetectionDataset.open(args.data, "train"), DetectionDataset.open(args.data, "val")
    images = images.sample(args.images)
    base = args.lr * 512 / args.batch_size
    # To fit a few images: the same learning rate for all layers, and weak augmentation.
    recipe = dataclasses.replace(
        find_recipe("detection", epochs=args.epochs, img_size=args.img_size, batch_size=args.batch_size, base_lr=base),
        min_lr=base / 100,
        layer_decay=1.0,
        ema_decay=0.99,
        changes={"crop_scale": (0.7, 1.0), "flip": 0.0, "color_jitter": 0.0},
    )
    detector = TinyViTDetector.from_config(
        args.variant,
        pretrained=False if args.weights == "none" else args.weights,
        class_names=images.class_names,
        img_size=args.img_size,
        hidden_dim=args.hidden_dim,
        num_queries=args.queries,
        decoder_layers=args.decoder_layers,
    )
    model = DetectorTraining(detector, num_denoising=args.denoising)
    result = train(
        model,
        DetectionSamples(images, BoxAugmentation(recipe.img_size, recipe.preset, **recipe.changes)),
        DetectionLoss(model),
        recipe,
        args.out,
        task=DETECTION,
        class_names=images.class_names,
        origin={"weights": args.weights},
        workers=args.workers,
        log_every=5,
        cpu=args.device == "cpu",
    )
    print(f"{len(images)} images, {images.num_classes} classes, {result.steps} steps in {result.seconds:.0f} s")

    kept = TinyViTDetector.from_config(pretrained=result.last)
    for split, photos in (("train", images), ("val", validation)):
        print(json.dumps({"split": split, **evaluate(kept, photos).to_dict()}))
        sheet = args.out / f"{split}.png"
        draw_sheet(kept, photos, list(range(min(args.shown, len(photos)))), sheet, args.hide_photos)
        print(f"wrote {sheet}")


if __name__ == "__main__":
    main()
