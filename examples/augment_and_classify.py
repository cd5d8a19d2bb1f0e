"""Combine kornia's augmentations and the classifier in one module, and measure how stable its predictions are.

    python examples/augment_and_classify.py [PHOTO ...] --out augmented.png

Augmentation, resizing, normalization and network are one `nn.Sequential` on one device, without copies to the CPU in
between. Each image is classified unchanged and in augmented copies. The contact sheet has one row per image: the image
with a gray frame, then its copies, with a green frame if the prediction is the same and a red one if it changed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import kornia.augmentation as K
import torch
from kornia.image import make_grid
from kornia.io import write_image
from torch import Tensor, nn

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.images import read_image
from kornia_tinyvit.preprocessing import EvaluationPipeline

PHOTOS = sorted(path for path in (ASSETS / "photos").iterdir() if path.suffix in {".jpg", ".png"})
SAME, CHANGED, ORIGINAL = (0.2, 0.7, 0.3), (0.85, 0.25, 0.25), (0.5, 0.5, 0.5)


def build_augmentations(size: int) -> nn.Module:
    """Return augmentations that keep images in [0, 1] and the object in view, with parameters drawn per sample."""
    return K.ImageSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(degrees=12.0, padding_mode="reflection", p=0.8),
        K.RandomResizedCrop((size, size), scale=(0.5, 1.0), ratio=(0.8, 1.25)),
        K.ColorJiggle(brightness=0.3, contrast=0.3, saturation=0.4, hue=0.05, p=0.8),
        K.RandomGaussianBlur((7, 7), (0.5, 2.0), p=0.3),
    )


def frame(image: Tensor, color: tuple[float, float, float], width: int = 4) -> Tensor:
    """Return an image (3, H, W) with a colored frame."""
    _, height, length = image.shape
    framed = image.new_tensor(color).view(3, 1, 1).repeat(1, height + 2 * width, length + 2 * width)
    framed[:, width:-width, width:-width] = image
    return framed


@torch.inference_mode()
def images_per_second(module: nn.Module, batch: Tensor, repeats: int) -> float:
    """Return the throughput of the median batch, which is robust to other load on the machine."""
    seconds = []
    for repeat in range(repeats + 2):  # two batches of warm-up
        began = time.perf_counter()
        module(batch)
        if batch.is_cuda:
            torch.cuda.synchronize()  # kernels run asynchronously
        if repeat >= 2:
            seconds.append(time.perf_counter() - began)
    return len(batch) / statistics.median(seconds)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="*", default=PHOTOS, help="default: the photos of the package")
    parser.add_argument("--out", type=Path, default=Path("augmented.png"), help="file for the contact sheet")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="a name of the catalog, a path or a URL")
    parser.add_argument("--copies", type=int, default=6, help="augmented copies per image")
    parser.add_argument("--size", type=int, default=160, help="height and width of the copies in pixels")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size for timing")
    parser.add_argument("--repeats", type=int, default=7, help="batches to time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    classifier = ImageClassifier.from_config(args.variant, pretrained=args.weights)
    pipeline = nn.Sequential(build_augmentations(args.size), classifier).to(args.device).eval()

    # A batch needs one size, so a central square of each image is augmented.
    square = EvaluationPipeline(args.size, crop_fraction=1.0)
    photos = torch.cat([square.resize_and_crop(read_image(path)[None].to(args.device)) for path in args.photos])
    copies = pipeline[0](photos.repeat_interleave(args.copies, dim=0))  # separately, to show the copies in the sheet
    before = classifier(photos).softmax(1)
    after = classifier(copies).softmax(1).unflatten(0, (len(photos), args.copies))
    copies = copies.unflatten(0, (len(photos), args.copies))

    tiles = []
    print(f"{'photo':<16} {'class':<12} {'score':>6}   {'stable':>7} {'score in copies':>16}   other predictions")
    for row, path in enumerate(args.photos):
        score, index = before[row].max(0)
        predictions = after[row].argmax(1)
        stable = predictions == index
        others = sorted({classifier.class_names[each] for each in predictions[~stable].tolist()})
        in_copies = f"{after[row, :, index].mean():.1%}"
        count = f"{int(stable.sum())} of {args.copies}"
        name = classifier.class_names[int(index)]
        print(f"{path.name:<16} {name:<12} {score:>6.1%}   {count:>7} {in_copies:>16}   {', '.join(others) or '-'}")
        tiles.append(frame(photos[row], ORIGINAL))
        tiles += [frame(copy, SAME if same else CHANGED) for copy, same in zip(copies[row], stable, strict=True)]

    batch = photos[torch.arange(args.batch_size) % len(photos)]
    settings = f"median of {args.repeats} batches of {args.batch_size}, {args.size} pixels, {args.device}"
    print(f"augment and classify: {images_per_second(pipeline, batch, args.repeats):.1f} images/s ({settings})")
    print(f"classify alone: {images_per_second(classifier, batch, args.repeats):.1f} images/s")

    sheet = make_grid(torch.stack(tiles), n_row=args.copies + 1, padding=6)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_image(args.out, (sheet.clamp(0, 1) * 255).round().byte().cpu())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
