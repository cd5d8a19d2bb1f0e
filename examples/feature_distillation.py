"""Distill stored dense features of a teacher into a student, like MobileSAM's decoupled distillation.

    python examples/feature_distillation.py coco128/images --out runs/features

MobileSAM (arXiv:2306.14289) trains a TinyViT on the embeddings of SAM's large image encoder. The encoder runs once: its
embeddings are stored in a `FeatureStore` with a checksum of the augmentation, which is replayed for the student. Here a
stage of the network in the package at twice the resolution replaces SAM's encoder, so no download is needed; the result
is not a good segmenter. The images need no labels: `train2017` in the given folder is used for training and `val2017`
for evaluation. Run the same command again to resume: stored records and finished epochs are not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.enhance import denormalize
from kornia.image import make_grid
from kornia.io import write_image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kornia_tinyvit import TinyViT
from kornia_tinyvit.data import ReplayableAugmentation, ReplayedSamples
from kornia_tinyvit.distillation import FeatureStore, Manifest, StoredFeatureLoss, Teacher, save_records
from kornia_tinyvit.images import read_image, read_pixels
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.training import Recipe, train
from kornia_tinyvit.visualization import feature_colors

CHANNELS, STRIDE = 256, 16  # of MobileSAM's embedding
STAGE, ZOOM = 2, 2  # of the teacher: its third stage, at twice the student's resolution
SUFFIXES = (".jpg", ".jpeg", ".png")


class Photos:
    """A folder of images without labels, with the interface of `ClassificationDataset` that `train` needs.

    Args:
        folder: folder of the images, without subfolders.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        self.labels = [0] * len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Return a uint8 image (3, H, W) and the label 0."""
        return read_pixels(self.files[index]), self.labels[index]

    def name(self, index: int) -> str:
        """Return the file name of an image."""
        return self.files[index].name

    def fingerprint(self) -> str:
        """Return a hash of the names and sizes of the files, independent of their location."""
        listing = "".join(f"{file.name}\0{file.stat().st_size}\n" for file in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()[:16]

    def squares(self, side: int) -> Tensor:
        """Return all images with the evaluation preprocessing: center crops, normalized, (N, 3, S, S)."""
        prepare = EvaluationPipeline(side)
        return torch.cat([prepare(read_image(file)[None]) for file in self.files])


class DenseTeacher(nn.Module):
    """A replacement for SAM's image encoder: a stage of the network in the package, (B, 256, H/16, W/16).

    Each channel of the stage is standardized over the training images, the channels are projected to 256 by a fixed
    random matrix with orthonormal columns, which preserves angles, and each cell is normalized over its channels, like
    the output of SAM's encoder.

    Attributes:
        num_images: number of images that were passed to the teacher.
    """

    mean: Tensor
    std: Tensor
    projection: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyViT.from_config("1m", pretrained="cifar10")
        width = self.network.feature_channels[STAGE]
        self.register_buffer("mean", torch.zeros(width, 1, 1))
        self.register_buffer("std", torch.ones(width, 1, 1))
        matrix = nn.init.orthogonal_(torch.empty(CHANNELS, width), generator=torch.Generator().manual_seed(0))
        self.register_buffer("projection", matrix[..., None, None].contiguous())
        self.num_images = 0
        self.eval()

    def stage_features(self, images: Tensor) -> Tensor:
        """Return the stage's features of normalized images (B, 3, H, W), pooled to the student's resolution."""
        self.num_images += len(images)
        cells = tuple(side // STRIDE for side in images.shape[-2:])
        images = F.interpolate(images, scale_factor=ZOOM, mode="bicubic")
        return F.adaptive_avg_pool2d(self.network.forward_intermediates(images)[STAGE], cells)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images (B, 3, H, W) to features (B, 256, H/16, W/16)."""
        features = F.conv2d((self.stage_features(images) - self.mean) / self.std, self.projection)
        return F.layer_norm(features.movedim(1, -1), (CHANNELS,)).movedim(-1, 1)

    @torch.inference_mode()
    def fit_statistics(self, images: Tensor) -> None:
        """Compute mean and standard deviation of each channel."""
        features = torch.cat([self.stage_features(part) for part in images.split(32)])
        self.mean.copy_(features.mean((0, 2, 3))[:, None, None])
        self.std.copy_(features.std((0, 2, 3))[:, None, None])


def build_teacher(photos: Photos, img_size: int, file: Path) -> Teacher:
    """Return the teacher; its weights are saved, because the statistics differ in the last bits between machines."""
    teacher = DenseTeacher()
    if not file.exists():
        teacher.fit_statistics(photos.squares(img_size))
        temporary = file.with_suffix(".tmp")
        save_file(teacher.state_dict(), temporary)
        os.replace(temporary, file)
    teacher.load_state_dict(load_file(file))
    return Teacher(teacher, f"stage {STAGE + 1} of 1m/cifar10 at {ZOOM}x")


def fill_store(path: Path, teacher: Teacher, samples: ReplayedSamples, epochs: int) -> FeatureStore:
    """Write the missing features of the teacher for a number of epochs."""
    augmentation = samples.augmentation
    cells = augmentation.img_size // STRIDE
    shape = (CHANNELS, cells, cells)
    manifest = Manifest(kind="features", shape=shape, teacher=teacher.describe(), **samples.describe())
    began = time.process_time()
    store = FeatureStore.create(path, manifest)
    saved = save_records(store, teacher, samples, range(epochs), batch_size=32)
    seconds = time.process_time() - began
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    shape = " x ".join(map(str, manifest.shape))
    print(f"store: {saved.written} records of {shape} written, {saved.present} already present")
    print(f"store: {size / 1e6:.1f} MB on disk for {epochs} epochs, {seconds:.1f} CPU s", flush=True)
    return store


@torch.inference_mode()
def features(network: nn.Module, images: Tensor, device: str) -> Tensor:
    """Return a network's features of normalized images, in evaluation mode."""
    network = network.to(device).eval()
    return torch.cat([network(part.to(device)).cpu() for part in images.split(32)])


def compare(features: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the mean squared error and the mean cosine similarity of feature maps (B, C, H, W)."""
    cosine = F.cosine_similarity(features, expected, dim=1)
    return float((features - expected).square().mean()), float(cosine.mean())


def mean_features(store: FeatureStore, epochs: list[int]) -> Tensor:
    """Return the mean of all stored features for each cell, (1, C, H, W)."""
    rows = range(store.manifest.num_samples)
    means = [store.read(epoch, rows).features.float().mean(0) for epoch in epochs]
    return torch.stack(means).mean(0, keepdim=True)


def draw(path: Path, images: Tensor, teacher: Tensor, student: Tensor, side: int = 256) -> None:
    """Write a PNG file with one row per image: the image, the teacher's and the student's features."""
    prepare = EvaluationPipeline(images.shape[-1])
    photos = denormalize(images, prepare.mean, prepare.std).clamp(0, 1)
    # In one batch, because the principal components are computed per batch.
    colors = feature_colors(torch.cat([teacher, student])).chunk(2)
    tiles = [F.interpolate(tile, (side, side), mode="nearest") for tile in (photos, *colors)]
    sheet = make_grid(torch.stack(tiles, 1).flatten(0, 1), n_row=3, padding=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, (sheet * 255).round().byte())
    print(f"wrote {path}")


def build_student(img_size: int, seed: int) -> TinyViT:
    torch.manual_seed(seed)
    windows = (8, 8, 8, 8)  # at 128 pixels one window of the last two stages covers the whole image
    return TinyViT.from_config("1m", img_size=img_size, num_classes=0, mobile_sam=True, window_sizes=windows)


def epochs_in(metrics: Path) -> int:
    """Return the number of finished epochs of a training."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return max((line["epoch"] for line in lines if "seconds" in line), default=0)


def train_student(
    student: TinyViT, teacher: Teacher, samples: ReplayedSamples, store: FeatureStore, args: argparse.Namespace
) -> TinyViT:
    """Train on the stored epochs cyclically and return the network with the last weights."""
    out = args.out / "student"
    done, before, began = epochs_in(out / "metrics.jsonl"), teacher.network.num_images, time.process_time()
    result = train(
        student,
        samples,
        StoredFeatureLoss(store),
        args.recipe,
        out,
        replays=list(range(args.stored)),
        cpu=args.device == "cpu",
    )
    new, seconds = args.epochs - done, time.process_time() - began
    print(f"student: {new} epochs trained, {done} resumed, {result.steps} steps and {result.seconds:.0f} s in total")
    if new:
        print(f"student: {seconds / new:.1f} CPU s per epoch")
    print(f"student: {teacher.network.num_images - before} images passed to the teacher during training", flush=True)
    return TinyViT.from_config(pretrained=result.last)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with images in train2017 and val2017")
    parser.add_argument("--out", type=Path, default=Path("runs/features"))
    parser.add_argument("--img-size", type=int, default=128, help="size of the student's images, a multiple of 16")
    parser.add_argument("--stored", type=int, default=10, help="epochs to store")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the student, which reuses the stored ones")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=4, help="images of val2017 in the figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name in ("train2017", "val2017"):
        if not (args.folder / name).is_dir():
            parser.error(f"there is no folder {args.folder / name} with images")
    if args.img_size % 16 or args.img_size < 32:
        parser.error(f"--img-size must be a multiple of 16 and at least 32, got {args.img_size}")
    args.recipe = Recipe(
        img_size=args.img_size,
        epochs=args.epochs,
        warmup_epochs=min(2, args.epochs),
        batch_size=args.batch_size,
        base_lr=args.lr * 512 / args.batch_size,  # recipes have rates for a batch size of 512
        min_lr=args.lr * 512 / args.batch_size / 100,
        preset="small",
        changes={"crop_scale": (0.2, 1.0), "erasing": 0.0},
    )
    return args


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    photos, held_out = Photos(args.folder / "train2017"), Photos(args.folder / "val2017")
    print(f"{len(photos)} training images, {len(held_out)} held-out images")

    recipe = args.recipe
    augmentation = ReplayableAugmentation(args.img_size, recipe.preset, args.seed, **recipe.changes)
    samples = ReplayedSamples(photos, augmentation)
    teacher = build_teacher(photos, args.img_size, args.out / "teacher.safetensors").to(args.device)
    store = fill_store(args.out / "store", teacher, samples, args.stored)

    images = held_out.squares(args.img_size)
    untrained = features(build_student(args.img_size, args.seed), images, args.device)
    trained = train_student(build_student(args.img_size, args.seed), teacher, samples, store, args)

    began = time.process_time()
    expected = features(teacher, images, args.device)
    seconds = (time.process_time() - began) * len(photos) / len(images)
    print(f"teacher: {seconds:.1f} CPU s more per epoch if it ran in every step")
    student = features(trained, images, args.device)
    mean = mean_features(store, list(range(args.stored))).expand_as(expected)
    print(f"{len(held_out)} held-out images: {'error':>9} {'cosine':>7}")
    for name, each in (("mean of training set", mean), ("untrained student", untrained), ("trained student", student)):
        error, cosine = compare(each, expected)
        print(f"  {name:<22} {error:>9.3f} {cosine:>7.3f}")
    draw(args.out / "features.png", images[: args.show], expected[: args.show], student[: args.show])


if __name__ == "__main__":
    main()
