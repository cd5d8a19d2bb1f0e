"""Fine-tune a pretrained network on a folder of images.

    python examples/finetune_folder.py PHOTOS --variant 5m --weights in1k --preset finetune --out runs/mine
    kornia-tinyvit classify --weights runs/mine/best.safetensors PHOTO.jpg

PHOTOS is a folder with one subfolder per class, named after the class, with images of any size and format. The images
are kept in memory as squares of the network's resolution: 12 kB each at 64 pixels, 150 kB at 224. A fifth of every
class is held out; the weights of the best epoch are saved to `best.safetensors`, the last weights to
`last.safetensors`, both with the class names.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit import ImageClassifier, TinyViT, save_checkpoint
from kornia_tinyvit.data import ClassificationDataset
from kornia_tinyvit.preprocessing import TRAINING_PRESETS, EvaluationPipeline, TrainingPipeline
from kornia_tinyvit.training import freeze_statistics


def split(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Return training and held-out indices, the latter with at least one of every class of two or more images."""
    training, held_out = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows))]
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        held_out.append(rows[:count])
        training.append(rows[count:])
    return torch.cat(training), torch.cat(held_out)


@torch.inference_mode()
def accuracy(model: nn.Module, prepare: EvaluationPipeline, squares: Tensor, labels: Tensor, batch_size: int) -> float:
    """Return the top-1 accuracy in [0, 1] on images that are already cropped to squares."""
    model.eval()
    correct = 0
    for photos, expected in zip(squares.split(batch_size), labels.split(batch_size), strict=True):
        inputs = normalize(photos.to(prepare.mean.device).float() / 255, prepare.mean, prepare.std)
        correct += int((model(inputs).argmax(1).cpu() == expected).sum())
    return correct / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with one subfolder per class")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="a name of the catalog, a path or a URL")
    parser.add_argument("--img-size", type=int, default=None, help="default: that of the weights")
    parser.add_argument("--preset", choices=list(TRAINING_PRESETS), default="small")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the head")
    parser.add_argument("--layer-decay", type=float, default=0.8)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--validation", type=float, default=0.2, help="fraction of the images to hold out")
    parser.add_argument("--freeze-statistics", action="store_true", help="keep the batch norms' running statistics")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    images = ClassificationDataset.open(args.folder)
    if images.class_names is None:
        parser.error(f"{args.folder} must be a folder with one subfolder per class")
    names, labels = images.class_names, torch.tensor(images.labels)
    size = {} if args.img_size is None else {"img_size": args.img_size, "window_sizes": "scale"}
    model = TinyViT.from_config(args.variant, pretrained=args.weights, **size)
    # Reset the head also if the number of classes is equal: the classes are others.
    model.reset_classifier(len(names))
    classifier = ImageClassifier(model, class_names=names).to(args.device)
    prepare = classifier.preprocessing
    # Resize and crop as in evaluation, once; uint8 takes a quarter of the memory.
    squares = torch.cat([(prepare.resize_and_crop(image[None]) * 255).round().byte() for image, _ in images])
    training, held_out = split(labels, args.validation)
    if not len(held_out):
        parser.error(f"no class in {args.folder} has a second image to hold out")
    print(f"{len(names)} classes, {len(training)} training images, {len(held_out)} held-out images")

    if args.freeze_statistics:
        freeze_statistics(model)
    augment = TrainingPipeline(prepare.img_size, len(names), preset=args.preset, **model.preprocessing.statistics)
    optimizer = torch.optim.AdamW(model.parameter_groups(args.lr, args.weight_decay, args.layer_decay))
    steps = math.ceil(len(training) / args.batch_size) * args.epochs
    # A short warm-up, then a cosine schedule; each group has its learning rate as the peak.
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps, pct_start=0.1, cycle_momentum=False)
    best = -1.0
    for epoch in range(1, args.epochs + 1):
        model.train()
        total = 0.0
        for rows in training[torch.randperm(len(training))].split(args.batch_size):
            photos = squares[rows].to(args.device).float() / 255
            inputs, targets = augment(photos, labels[rows].to(args.device))
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        held = accuracy(model, prepare, squares[held_out], labels[held_out], args.batch_size)
        print(json.dumps({"epoch": epoch, "loss": round(total / len(training), 4), "held_out": held}), flush=True)
        if held >= best:  # of equal epochs keep the later one, which was trained longer
            best = held
            save_checkpoint(model, args.out / "best.safetensors", class_names=names)
    save_checkpoint(model, args.out / "last.safetensors", class_names=names)

    kept = TinyViT.from_config(pretrained=args.out / "best.safetensors").to(args.device)
    train = accuracy(kept, prepare, squares[training], labels[training], args.batch_size)
    print(json.dumps({"held_out_best": best, "train": train}))
    print(f"kornia-tinyvit classify --weights {args.out / 'best.safetensors'} PHOTO")


if __name__ == "__main__":
    main()
