"""Fine-tune MobileSAM on images with a mask for each object, and evaluate it with boxes and points.

    python examples/segment_promptable.py coco128/images/train2017 coco128/instance_segmentation/labels/train2017

PHOTOS is a folder of images, INSTANCES the folder of their masks (YOLO's text files, or images with an object id per
pixel) or a COCO file. The training is that of `kornia-tinyvit train DATA --task promptable`; run the script again to
resume. The training images are evaluated before and after with one box and with one point per instance, at the size of
the images, and afterwards held-out images. Ground truth and predictions from boxes and points are drawn for some.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kornia_tinyvit import MobileSAM
from kornia_tinyvit.data import InstanceDataset
from kornia_tinyvit.ops import central_points, mask_boxes
from kornia_tinyvit.training import (
    PROMPTABLE,
    MaskLoss,
    PromptAugmentation,
    PromptedSAM,
    PromptedSamples,
    Prompting,
    build_sam,
    evaluate,
    find_recipe,
    train,
)
from kornia_tinyvit.visualization import draw_overlay, save_rows

TILE, GAP = 320, 8


def report(when: str, split: str, sam: MobileSAM, images: InstanceDataset) -> None:
    """Print the IoU of masks predicted from boxes and points."""
    scores = {name: round(value, 2) for name, value in vars(evaluate(sam.eval(), images)).items()}
    print(json.dumps({"when": when, "split": split, "images": len(images), **scores}), flush=True)


def draw_sheet(sam: MobileSAM, images: InstanceDataset, rows: list[int], path: Path, hide_photos: bool) -> None:
    """Write a figure with one row per image: ground truth, masks from boxes, masks from points."""
    strips = []
    for row in rows:
        photo, truth = images[row]
        boxes, points = mask_boxes(truth), central_points(truth)[:, None]
        embedding = sam.embed(photo)
        (from_boxes,) = sam.predict_masks(embedding, boxes=boxes, multimask_output=False)
        (from_points,) = sam.predict_masks(embedding, points)
        strip = Image.new("RGB", (3 * (TILE + GAP), TILE), "white")
        columns: tuple[tuple[Tensor, dict[str, Tensor]], ...] = (
            (truth, {}),
            (from_boxes.masks()[:, 0], {"boxes": boxes}),
            (from_points.best().masks()[:, 0], {}),
        )
        for column, (masks, prompts) in enumerate(columns):
            background = torch.ones_like(photo) if hide_photos else photo
            tile = draw_overlay((background * 255).byte(), masks, **prompts)
            tile.thumbnail((TILE, TILE))
            strip.paste(tile, (column * (TILE + GAP), 0))
        strips.append(strip.crop((0, 0, strip.width, tile.height + GAP)))
    save_rows(path, strips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of images")
    parser.add_argument("instances", type=Path, help="folder of masks, or COCO file")
    parser.add_argument("--images", type=int, default=32, help="size of a random training subset with a fixed seed")
    parser.add_argument("--min-area", type=int, default=1024, help="smallest area of an instance in pixels")
    parser.add_argument("--others", nargs=2, type=Path, help="folders of held-out images and their masks")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="weights of the encoder or of a MobileSAM, or 'none'")
    parser.add_argument("--freeze", nargs="*", default=[], help="backbone, stages=N, prompt_encoder")
    parser.add_argument("--img-size", type=int, default=256)
    parser.add_argument("--windows", nargs=4, type=int, default=(8, 8, 16, 8), help="attention windows of the stages")
    parser.add_argument("--instances-per-image", type=int, default=8, help="maximum number of prompted objects")
    parser.add_argument("--box-fraction", type=float, default=0.85, help="fraction of box prompts; the rest are points")
    parser.add_argument("--jitter", type=float, default=0.0, help="noise on the boxes, as a fraction of their sides")
    parser.add_argument("--focal", type=float, default=2.0, help="weight of the focal loss; that of the dice loss is 1")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--base-lr", type=float, default=0.128, help="learning rate for a batch size of 512")
    parser.add_argument("--measure-every", type=int, default=10, help="epochs between evaluations")
    parser.add_argument("--shown", type=int, default=6, help="images to draw")
    parser.add_argument("--hide-photos", action="store_true", help="draw masks on white")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/promptable"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    args = parser.parse_args()
    torch.manual_seed(0)

    images = (
        InstanceDataset.open(args.photos, min_area=args.min_area, instances=args.instances)
        .with_instances()
        .sample(args.images)
    )
    # To fit a few images: the same learning rate for all layers, and no augmentation. With SAM's weight 20 of the focal
    # loss the masks of a randomly initialized decoder are empty for a long time.
    recipe = dataclasses.replace(
        find_recipe(
            "promptable", epochs=args.epochs, img_size=args.img_size, batch_size=args.batch_size, base_lr=args.base_lr
        ),
        min_lr=args.base_lr / 100,
        layer_decay=1.0,
        freeze=tuple(args.freeze),
        clip_norm=0.5,
        changes={"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "color_jitter": 0.0},
    )
    pretrained = False if args.weights == "none" else args.weights
    sam = build_sam(args.variant, pretrained=pretrained, img_size=args.img_size, window_sizes=tuple(args.windows))
    report("before", "train", sam, images)
    prompting = Prompting(args.instances_per_image, args.box_fraction, jitter=args.jitter)
    augmentation = PromptAugmentation(recipe.img_size, recipe.preset, prompting=prompting, **recipe.changes)
    result = train(
        PromptedSAM(sam),
        PromptedSamples(images, augmentation),
        MaskLoss(args.focal),
        recipe,
        args.out,
        task=PROMPTABLE,
        validation=images,
        validate_every=args.measure_every,
        origin={"weights": args.weights},
        workers=args.workers,
        log_every=5,
        cpu=args.device == "cpu",
    )
    print(f"{len(images)} images, {result.steps} steps in {result.seconds:.0f} s")

    kept = MobileSAM.from_config(pretrained=result.last)
    report("after", "train", kept, images)
    if args.others:
        photos, instances = args.others
        report("after", "others", kept, InstanceDataset.open(photos, min_area=args.min_area, instances=instances))
    sheet = args.out / "masks.png"
    draw_sheet(kept, images, list(range(min(args.shown, len(images)))), sheet, args.hide_photos)
    print(f"wrote {sheet}")


if __name__ == "__main__":
    main()
