"""Train and evaluate a semantic segmenter.

    python examples/segment_semantic.py coco128/semantic_segmentation/config.yaml --images 32

DATA is a YAML file with the folders of images and masks of `train` and `val` and the class names of the ids in the
masks, or a folder with `images` and `masks`. The training is that of `kornia-tinyvit train DATA --task semantic`; run
the script again to resume. Then it evaluates the segmenter on the training images and on those of `val`, and draws
image, ground truth, prediction and a legend for some of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from kornia_tinyvit.data import SegmentationDataset
from kornia_tinyvit.images import to_pil
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import (
    SEMANTIC,
    MaskAugmentation,
    SegmentationLoss,
    SegmentationSamples,
    balanced_weights,
    evaluate,
    find_recipe,
    train,
)
from kornia_tinyvit.visualization import distinct_colors, draw_class_map, save_rows

TILE, GAP, LEGEND, LINE = 320, 8, 190, 17


def to_tile(image: Image.Image, resampling: Image.Resampling) -> Image.Image:
    """Resize an image to the size of a tile."""
    scale = TILE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], resampling)


def draw_sheet(
    segmenter: SemanticSegmenter, images: SegmentationDataset, rows: list[int], path: Path, hide_photos: bool = False
) -> None:
    """Write a figure with one row per image: image, ground truth, prediction, and a legend of the largest areas."""
    colors, font = distinct_colors(len(segmenter.class_names)), ImageFont.load_default(13)
    strips = []
    for row in rows:
        photo, truth = images[row]
        prediction = segmenter.predict(photo)[0].cpu()
        tiles = [] if hide_photos else [to_tile(to_pil(photo), Image.Resampling.BICUBIC)]
        tiles += [to_tile(draw_class_map(classes), Image.Resampling.NEAREST) for classes in (truth, prediction)]
        width, height = tiles[0].size
        strip = Image.new("RGB", (len(tiles) * (TILE + GAP) + LEGEND, max(height, 8 * LINE) + GAP), "white")
        for column, tile in enumerate(tiles):
            strip.paste(tile, (column * (TILE + GAP) + (TILE - width) // 2, 0))
        draw = ImageDraw.Draw(strip)
        areas = torch.cat([truth[truth >= 0], prediction[truth >= 0]]).bincount(minlength=len(colors))
        largest = areas.argsort(descending=True)[: strip.height // LINE]
        for line, index in enumerate(index for index in largest.tolist() if areas[index]):
            left, top = len(tiles) * (TILE + GAP), line * LINE
            draw.rectangle((left, top + 2, left + 12, top + 14), fill=tuple((colors[index] * 255).int().tolist()))
            draw.text((left + 18, top), segmenter.class_names[index], fill="black", font=font)
        strips.append(strip)
    save_rows(path, strips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a YAML file, or a folder with images and masks")
    parser.add_argument("--images", type=int, default=32, help="size of a random training subset with a fixed seed")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="weights of the backbone or of a segmenter, or 'none'")
    parser.add_argument("--img-size", type=int, default=192)
    parser.add_argument("--width", type=int, default=128, help="channels of the decoder")
    parser.add_argument("--epochs", type=int, default=180)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--base-lr", type=float, default=0.064, help="learning rate for a batch size of 512")
    parser.add_argument("--shown", type=int, default=6, help="images to draw of each split")
    parser.add_argument("--hide-photos", action="store_true", help="draw class maps only")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/segment"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    args = parser.parse_args()
    torch.manual_seed(0)

    images = SegmentationDataset.open(args.data, "train")
    validation = images.open_split(args.data, "val")
    images = images.sample(args.images)
    # To fit a few images: the same learning rate for all layers, and weak augmentation.
    recipe = dataclasses.replace(
        find_recipe(
            "semantic", epochs=args.epochs, img_size=args.img_size, batch_size=args.batch_size, base_lr=args.base_lr
        ),
        min_lr=args.base_lr / 100,
        layer_decay=1.0,
        changes={"crop_scale": (0.7, 1.0), "flip": 0.0, "color_jitter": 0.0},
    )
    segmenter = SemanticSegmenter.from_config(
        args.variant,
        pretrained=False if args.weights == "none" else args.weights,
        class_names=images.class_names,
        width=args.width,
        img_size=args.img_size,
        window_sizes="scale",
    )
    samples = SegmentationSamples(images, MaskAugmentation(recipe.img_size, recipe.preset, **recipe.changes))
    result = train(
        segmenter,
        samples,
        SegmentationLoss(class_weights=balanced_weights(images)),
        recipe,
        args.out,
        task=SEMANTIC,
        class_names=images.class_names,
        origin={"weights": args.weights},
        workers=args.workers,
        log_every=5,
        cpu=args.device == "cpu",
    )
    print(f"{len(images)} images, {images.num_classes} classes, {result.steps} steps in {result.seconds:.0f} s")

    kept = SemanticSegmenter.from_config(pretrained=result.last)
    for split, photos in (("train", images), ("val", validation)):
        scores = evaluate(kept, photos)
        numbers = {"mean_iou": round(scores.mean_iou, 2), "pixel_accuracy": round(scores.pixel_accuracy, 2)}
        print(json.dumps({"split": split, "images": len(photos), "classes_present": scores.present, **numbers}))
        sheet = args.out / f"{split}.png"
        draw_sheet(kept, photos, list(range(min(args.shown, len(photos)))), sheet, args.hide_photos)
        print(f"wrote {sheet}")


if __name__ == "__main__":
    main()
