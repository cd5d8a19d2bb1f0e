"""Train the `1m` network on CIFAR-10 at 64x64 pixels with kornia's augmentations, as a loop in one file.

    python examples/train_cifar10.py DATA --out runs/cifar10

DATA is a folder with `train.parquet` and `test.parquet` in the Hugging Face layout (column `image` a struct of `bytes`
and `path`, column `label`). The best epoch is selected on 2,000 random held-out training images; the test images are
evaluated once, at the end. Run the same command again to resume from the last finished epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from kornia_rs.io import decode_image_jpeg
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from kornia_tinyvit import TinyViT, save_checkpoint
from kornia_tinyvit.preprocessing import EvaluationPipeline, TrainingPipeline

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMG_SIZE = 64


def read_split(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images of a parquet file, (N, 3, 32, 32) uint8, and their labels."""
    table = pq.read_table(path)
    images = [torch.from_numpy(decode_image_jpeg(row["bytes"])) for row in table["image"].to_pylist()]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in [0, 1]."""
    model.eval()
    prepare = EvaluationPipeline(IMG_SIZE)
    correct = 0
    for start in range(0, len(labels), 250):
        logits = model(prepare(images[start : start + 250].float() / 255))
        correct += int((logits.argmax(1) == labels[start : start + 250]).sum())
    return correct / len(labels)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return a linear warm-up over the first 5 % of the steps followed by a cosine down to 1 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def moving_average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """Update a moving average over about 500 steps, fewer at the start to discount the initial random weights."""
    count = float(count)
    decay = min(0.998, (1 + count) / (10 + count))
    return torch.lerp(averaged, current, 1 - decay) if averaged.is_floating_point() else current


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--epochs", type=int, default=26)
    parser.add_argument("--mild-epochs", type=int, default=6, help="last epochs with weaker augmentation")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=2000, help="training images to select the best epoch on")
    parser.add_argument("--limit", type=int, default=None, help="number of training images (default: all)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    images, labels = read_split(args.data / "train.parquet")
    shuffled = torch.randperm(len(labels))  # the file may be sorted by class
    images, labels = images[shuffled], labels[shuffled]
    held_out = (images[-args.held_out :], labels[-args.held_out :])
    images, labels = images[: -args.held_out][: args.limit], labels[: -args.held_out][: args.limit]
    if len(labels) < args.batch_size:
        parser.error(f"{len(labels)} training images are fewer than the batch size {args.batch_size}")
    model = TinyViT.from_config("1m", num_classes=len(CLASSES), drop_path_rate=0.05)
    averaged = AveragedModel(model, avg_fn=moving_average, use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameter_groups(args.lr, args.weight_decay))
    augment = TrainingPipeline(IMG_SIZE, len(CLASSES), preset="small")
    # The last epochs use larger crops, closer to the evaluation.
    mild = TrainingPipeline(IMG_SIZE, len(CLASSES), preset="small", crop_scale=(0.75, 1.0), erasing=0.0)
    steps_per_epoch = len(labels) // args.batch_size
    steps = steps_per_epoch * args.epochs

    state_file, start, best, seconds = args.out / "state.pt", 0, 0.0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        start, best, seconds = state["epoch"], state["best"], state["seconds"]

    for epoch in range(start, args.epochs):
        began, total = time.perf_counter(), 0.0
        model.train()
        order = torch.randperm(len(labels))
        for step in range(steps_per_epoch):
            rows = order[step * args.batch_size : (step + 1) * args.batch_size]
            change = augment if epoch < args.epochs - args.mild_epochs else mild
            inputs, targets = change(images[rows].float() / 255, labels[rows])
            loss = F.cross_entropy(model(inputs), targets)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps_per_epoch + step, steps, args.lr)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            averaged.update_parameters(model)
            total += loss.item()
        held = accuracy(averaged, *held_out)
        seconds += time.perf_counter() - began
        line = {"epoch": epoch + 1, "loss": round(total / steps_per_epoch, 4), "held_out": held, "s": round(seconds)}
        print(json.dumps(line), flush=True)
        if held >= best:
            best = held
            save_checkpoint(averaged.module, args.out / "best.safetensors", class_names=CLASSES)
        save_atomically(
            {
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "epoch": epoch + 1,
                "best": best,
                "seconds": seconds,
            },
            state_file,
        )

    # The weights in the package are float16, so evaluate the rounded weights.
    kept = TinyViT.from_config(pretrained=args.out / "best.safetensors").half()
    save_checkpoint(kept, args.out / "tiny_vit_1m_cifar10.safetensors", class_names=CLASSES)
    test = accuracy(kept.float(), *read_split(args.data / "test.parquet"))
    print(json.dumps({"held_out_best": best, "test_top1": test, "s": round(seconds)}), flush=True)


if __name__ == "__main__":
    main()
