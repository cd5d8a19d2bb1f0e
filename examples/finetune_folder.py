"""Fine-tune a pretrained network on a folder of your own and leave a file that names your classes.

    python examples/finetune_folder.py PHOTOS --variant 5m --pretrained in1k --preset finetune --out runs/mine
    kornia-tinyvit classify --pretrained runs/mine/best.safetensors PHOTO.jpg

PHOTOS holds a folder for each class, named after it, with images of any sizes and kinds. The images are kept in
memory as squares of the network's resolution: 12 kB each at 64 pixels, 150 kB at 224. A fifth of every class is held
out; the epoch that is best on it becomes `best.safetensors`, the end of the training `last.safetensors`.
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


def split(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and those held out: at least one of every class that has two images or more."""
    training, held_out = [], []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows))]
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        held_out.append(rows[:count])
        training.append(rows[count:])
    return torch.cat(training), torch.cat(held_out)


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms use what they learned from the large data set: small batches tell less. Their weights train."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, prepare: EvaluationPipeline, squares: Tensor, labels: Tensor, batch_size: int) -> float:
    """Return the share of images, already cropped to squares, whose most likely class is their label."""
    model.eval()
    right = 0
    for photos, expected in zip(squares.split(batch_size), labels.split(batch_size), strict=True):
        inputs = normalize(photos.to(prepare.mean.device).float() / 255, prepare.mean, prepare.std)
        right += int((model(inputs).argmax(1).cpu() == expected).sum())
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of class folders")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--pretrained", default="cifar10", help="a name of the catalog, a path or a URL")
    parser.add_argument("--img-size", type=int, default=None, help="default: what the weights were made for")
    parser.add_argument("--preset", choices=list(TRAINING_PRESETS), default="small")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the head; earlier blocks learn slower")
    parser.add_argument("--layer-decay", type=float, default=0.8)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--validation", type=float, default=0.2, help="share of the images to hold out")
    parser.add_argument("--freeze-statistics", action="store_true", help="keep the batch norms' running statistics")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    images = ClassificationDataset.open(args.folder)
    if images.class_names is None:
        parser.error(f"{args.folder} is no folder of class folders, which give the classes their names")
    names, labels = images.class_names, torch.tensor(images.labels)
    size = {} if args.img_size is None else {"img_size": args.img_size, "window_sizes": "scale"}
    model = TinyViT.from_config(args.variant, pretrained=args.pretrained, **size)
    # Always a new head: one for as many other classes would fit, and would begin with the wrong answers.
    model.reset_classifier(len(names))
    classifier = ImageClassifier(model, class_names=names).to(args.device)
    prepare = classifier.preprocessing
    # As the finished classifier will crop them; 8 bits take a quarter of the memory.
    squares = torch.cat([(prepare.resize_and_crop(image[None]) * 255).round().byte() for image, _ in images])
    training, held_out = split(labels, args.validation)
    if not len(held_out):
        parser.error(f"no class in {args.folder} has a second image to hold out")
    print(f"{len(names)} classes, {len(training)} images to train on, {len(held_out)} held out")

    augment = TrainingPipeline(prepare.img_size, len(names), preset=args.preset)
    optimizer = torch.optim.AdamW(model.parameter_groups(args.lr, args.weight_decay, args.layer_decay))
    steps = math.ceil(len(training) / args.batch_size) * args.epochs
    # A short rise, so that the new head settles first, then a cosine; each group keeps its own peak.
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, steps, pct_start=0.1, cycle_momentum=False)
    best = -1.0
    for epoch in range(1, args.epochs + 1):
        model.train()
        if args.freeze_statistics:
            freeze_statistics(model)
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
        if held >= best:  # of equals the later one, which has seen more
            best = held
            save_checkpoint(model, args.out / "best.safetensors", class_names=names)
    save_checkpoint(model, args.out / "last.safetensors", class_names=names)

    kept = TinyViT.from_config(pretrained=args.out / "best.safetensors").to(args.device)
    train = accuracy(kept, prepare, squares[training], labels[training], args.batch_size)
    print(json.dumps({"held_out_best": best, "train": train}))
    print(f"kornia-tinyvit classify --pretrained {args.out / 'best.safetensors'} PHOTO")


if __name__ == "__main__":
    main()
