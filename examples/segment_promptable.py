"""Fine-tune MobileSAM on photos with a mask for each object and see how well a box finds them again.

    python examples/segment_promptable.py coco128/images/train2017 coco128/instance_segmentation/labels/train2017

PHOTOS is a folder, INSTANCES the folder of their masks (YOLO's text files, or images with an id a pixel) or a COCO
file. The training is that of `kornia-tinyvit train DATA --task promptable`: killed and started again it goes on. Before
and after it the photos it trains on are measured by one box and by one point for each instance, at the photos' own
size, and afterwards others that it never saw. Some are drawn: truth, what boxes found, what points found.
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


def tell(when: str, split: str, sam: MobileSAM, images: InstanceDataset) -> None:
    """Print how well boxes and points find the instances of some photos."""
    found = evaluate(sam.eval(), images)
    told = {name: round(value, 2) for name, value in vars(found).items()}
    print(json.dumps({"when": when, "split": split, "images": len(images), **told}), flush=True)


def draw_sheet(sam: MobileSAM, images: InstanceDataset, rows: list[int], path: Path, hide_photos: bool) -> None:
    """Write an image with a row for each of some photos: truth, masks of boxes, masks of points."""
    strips = []
    for row in rows:
        photo, truth = images[row]
        boxes, points = mask_boxes(truth), central_points(truth)[:, None]
        embedding = sam.embed(photo)
        (boxed,) = sam.predict_masks(embedding, boxes=boxes, multimask_output=False)
        (pointed,) = sam.predict_masks(embedding, points)
        strip = Image.new("RGB", (3 * (TILE + GAP), TILE), "white")
        shown: tuple[tuple[Tensor, dict[str, Tensor]], ...] = (
            (truth, {}),
            (boxed.masks()[:, 0], {"boxes": boxes}),
            (pointed.best().masks()[:, 0], {}),
        )
        for column, (masks, prompts) in enumerate(shown):
            below = torch.ones_like(photo) if hide_photos else photo
            tile = draw_overlay((below * 255).byte(), masks, **prompts)
            tile.thumbnail((TILE, TILE))
            strip.paste(tile, (column * (TILE + GAP), 0))
        strips.append(strip.crop((0, 0, strip.width, tile.height + GAP)))
    save_rows(path, strips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of the photos")
    parser.add_argument("instances", type=Path, help="folder or COCO file of their instances")
    parser.add_argument("--images", type=int, default=32, help="how many to train on, drawn with a fixed seed")
    parser.add_argument("--min-area", type=int, default=1024, help="leave out instances of fewer pixels")
    parser.add_argument("--others", nargs=2, type=Path, help="folders of photos to measure and not to train on")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--pretrained", default="cifar10", help="weights of the encoder or of a MobileSAM, or 'none'")
    parser.add_argument("--freeze", nargs="*", default=[], help="image_encoder, prompt_encoder")
    parser.add_argument("--img-size", type=int, default=256)
    parser.add_argument("--windows", nargs=4, type=int, default=(8, 8, 16, 8), help="attention windows of the stages")
    parser.add_argument("--asked", type=int, default=8, help="objects of a photo to ask for each time")
    parser.add_argument("--box-fraction", type=float, default=0.85, help="share of boxes; the other prompts are points")
    parser.add_argument("--jitter", type=float, default=0.0, help="noise on the boxes, as a share of their sides")
    parser.add_argument("--focal", type=float, default=2.0, help="weight of the focal loss beside the dice loss")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--base-lr", type=float, default=0.128, help="for a batch of 512")
    parser.add_argument("--measure-every", type=int, default=10, help="epochs from one measurement to the next")
    parser.add_argument("--shown", type=int, default=6, help="photos to draw")
    parser.add_argument("--hide-photos", action="store_true", help="draw masks on white, as photos may not be shown")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/promptable"))
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    images = (
        InstanceDataset.open(args.photos, min_area=args.min_area, instances=args.instances)
        .with_instances()
        .sample(args.images)
    )
    # To fit a few photos from weights made for something else: all layers learn alike, from what will be asked later.
    # SAM's 20 times heavier focal loss keeps a random decoder's masks empty for a long time.
    recipe = dataclasses.replace(
        find_recipe(
            "promptable", epochs=args.epochs, img_size=args.img_size, batch_size=args.batch_size, base_lr=args.base_lr
        ),
        min_lr=args.base_lr / 100,
        layer_decay=1.0,
        clip_norm=0.5,
        changes={"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0, "color_jitter": 0.0},
    )
    pretrained = False if args.pretrained == "none" else args.pretrained
    sam = build_sam(args.variant, pretrained=pretrained, img_size=args.img_size, window_sizes=tuple(args.windows))
    tell("before", "train", sam, images)
    prompting = Prompting(args.asked, args.box_fraction, jitter=args.jitter)
    augmentation = PromptAugmentation(recipe.img_size, recipe.preset, prompting=prompting, **recipe.changes)
    result = train(
        PromptedSAM(sam, args.freeze),
        PromptedSamples(images, augmentation),
        MaskLoss(args.focal),
        recipe,
        args.out,
        task=PROMPTABLE,
        validation=images,
        validate_every=args.measure_every,
        origin={"pretrained": args.pretrained},
        workers=args.workers,
        log_every=5,
        cpu=args.cpu,
    )
    print(f"{len(images)} images, {result.steps} steps in {result.seconds:.0f} s")

    kept = MobileSAM.from_config(pretrained=result.last)
    tell("after", "train", kept, images)
    if args.others:
        photos, instances = args.others
        tell("after", "others", kept, InstanceDataset.open(photos, min_area=args.min_area, instances=instances))
    sheet = args.out / "masks.png"
    draw_sheet(kept, images, list(range(min(args.shown, len(images)))), sheet, args.hide_photos)
    print(f"wrote {sheet}")


if __name__ == "__main__":
    main()
