"""Let a student regress dense features that a teacher wrote down once: MobileSAM's decoupled way, in small.

    python examples/feature_distillation.py coco128/images --out runs/features

MobileSAM (arXiv:2306.14289) trains a TinyViT to return what SAM's large image encoder returns. The encoder is asked
only once: its embeddings go to a `FeatureStore` together with a checksum of the augmentation, which is replayed for
the student. Here the teacher is a stand-in that needs no download, a middle stage of the network in the package that
looks at twice the pixels, so what is shown is the way and its costs, not a good segmenter. The photos need no labels:
`train2017` in the given folder is trained on and `val2017` only measured. The same command again goes on where it
was: stored records are not asked for again, and a finished training is not done again.
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
STAGE, ZOOM = 2, 2  # of the teacher: its third stage, looking at images of twice the student's side
SUFFIXES = (".jpg", ".jpeg", ".png")


class Photos:
    """A folder of photos without classes, with what `ReplayedSamples` and `train` ask of `ClassificationDataset`.

    Args:
        folder: where the photos lie, without further folders.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        self.labels = [0] * len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Return a photo as it is stored, (3, H, W) in 8 bits, and its class, the only one."""
        return read_pixels(self.files[index]), self.labels[index]

    def name(self, index: int) -> str:
        """Tell a photo from the others."""
        return self.files[index].name

    def fingerprint(self) -> str:
        """Tell these photos from others by their names and sizes in bytes, wherever they lie."""
        told = "".join(f"{file.name}\0{file.stat().st_size}\n" for file in self.files)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def squares(self, side: int) -> Tensor:
        """Return all photos as the networks take them in the test: the middle square, normalized, (N, 3, S, S)."""
        prepare = EvaluationPipeline(side)
        return torch.cat([prepare(read_image(file)[None]) for file in self.files])


class DenseTeacher(nn.Module):
    """Stands in for SAM's image encoder: a stage of the network in the package as maps (B, 256, H/16, W/16).

    Each channel of the stage is brought to mean 0 and deviation 1 over the training photos, the channels are turned
    into 256 by a fixed random matrix with orthonormal columns, which keeps all angles, and every cell is normalized
    over its channels, as at the end of SAM's encoder.

    Attributes:
        asked: how many images it was shown.
    """

    mean: Tensor
    deviation: Tensor
    projection: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyViT.from_config("1m", pretrained="cifar10")
        width = self.network.feature_channels[STAGE]
        self.register_buffer("mean", torch.zeros(width, 1, 1))
        self.register_buffer("deviation", torch.ones(width, 1, 1))
        matrix = nn.init.orthogonal_(torch.empty(CHANNELS, width), generator=torch.Generator().manual_seed(0))
        self.register_buffer("projection", matrix[..., None, None].contiguous())
        self.asked = 0
        self.eval()

    def maps(self, images: Tensor) -> Tensor:
        """Return the stage's maps of normalized images (B, 3, H, W), averaged to the student's cells."""
        self.asked += len(images)
        cells = tuple(side // STRIDE for side in images.shape[-2:])
        images = F.interpolate(images, scale_factor=ZOOM, mode="bicubic")
        return F.adaptive_avg_pool2d(self.network.forward_intermediates(images)[STAGE], cells)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images (B, 3, H, W) to features (B, 256, H/16, W/16)."""
        maps = F.conv2d((self.maps(images) - self.mean) / self.deviation, self.projection)
        return F.layer_norm(maps.movedim(1, -1), (CHANNELS,)).movedim(-1, 1)

    @torch.inference_mode()
    def fit_statistics(self, images: Tensor) -> None:
        """Take mean and deviation of each channel from images."""
        maps = torch.cat([self.maps(part) for part in images.split(32)])
        self.mean.copy_(maps.mean((0, 2, 3))[:, None, None])
        self.deviation.copy_(maps.std((0, 2, 3))[:, None, None])


def build_teacher(photos: Photos, img_size: int, file: Path) -> Teacher:
    """Return the teacher; its numbers are kept in a file, as their last bits may differ from machine to machine."""
    teacher = DenseTeacher()
    if not file.exists():
        teacher.fit_statistics(photos.squares(img_size))
        temporary = file.with_suffix(".tmp")
        save_file(teacher.state_dict(), temporary)
        os.replace(temporary, file)
    teacher.load_state_dict(load_file(file))
    return Teacher(teacher, f"stage {STAGE + 1} of 1m/cifar10 at {ZOOM}x")


def fill_store(path: Path, teacher: Teacher, samples: ReplayedSamples, epochs: int) -> FeatureStore:
    """Write what the teacher says about epochs of augmented photos, but for what is there already."""
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
    print(f"store: {saved.written} records of {shape} written, {saved.present} were there")
    print(f"store: {size / 1e6:.1f} MB on disk for {epochs} epochs, {seconds:.1f} s of the processor", flush=True)
    return store


@torch.inference_mode()
def features(network: nn.Module, images: Tensor, device: str) -> Tensor:
    """Return a network's maps of normalized images, in evaluation mode."""
    network = network.to(device).eval()
    return torch.cat([network(part.to(device)).cpu() for part in images.split(32)])


def compare(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the mean squared error of maps (B, C, H, W) and the mean cosine of their cells' vectors."""
    cosine = F.cosine_similarity(found, expected, dim=1)
    return float((found - expected).square().mean()), float(cosine.mean())


def mean_map(store: FeatureStore, epochs: list[int]) -> Tensor:
    """Return the mean of all stored features, a vector of its own for each cell, (1, C, H, W)."""
    rows = range(store.manifest.num_samples)
    means = [store.read(epoch, rows).features.float().mean(0) for epoch in epochs]
    return torch.stack(means).mean(0, keepdim=True)


def draw(path: Path, images: Tensor, teacher: Tensor, student: Tensor, side: int = 256) -> None:
    """Write a PNG with a row for each photo: the photo, the teacher's features, the student's."""
    prepare = EvaluationPipeline(images.shape[-1])
    photos = denormalize(images, prepare.mean, prepare.std).clamp(0, 1)
    # In one batch, so that the same color is the same direction for both.
    colors = feature_colors(torch.cat([teacher, student])).chunk(2)
    # Nearest neighbors show the cells as they are.
    tiles = [F.interpolate(tile, (side, side), mode="nearest") for tile in (photos, *colors)]
    sheet = make_grid(torch.stack(tiles, 1).flatten(0, 1), n_row=3, padding=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, (sheet * 255).round().byte())
    print(f"wrote {path}")


def build_student(img_size: int, seed: int) -> TinyViT:
    torch.manual_seed(seed)
    windows = (8, 8, 8, 8)  # at 128 pixels the last two stages see the whole image
    return TinyViT.from_config("1m", img_size=img_size, num_classes=0, mobile_sam=True, window_sizes=windows)


def epochs_in(metrics: Path) -> int:
    """Return how many epochs a training has behind it."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return max((line["epoch"] for line in lines if "seconds" in line), default=0)


def train_student(
    student: TinyViT, teacher: Teacher, samples: ReplayedSamples, store: FeatureStore, args: argparse.Namespace
) -> TinyViT:
    """Train on the stored epochs, in turn, and return the last weights."""
    out = args.out / "student"
    done, asked, began = epochs_in(out / "metrics.jsonl"), teacher.network.asked, time.process_time()
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
    print(f"student: {new} epochs trained, {done} were, {result.steps} steps and {result.seconds:.0f} s in all")
    if new:
        print(f"student: {seconds / new:.1f} s of the processor for an epoch")
    print(f"student: the teacher was shown {teacher.network.asked - asked} images meanwhile", flush=True)
    return TinyViT.from_config(pretrained=result.last)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with photos in train2017 and others in val2017")
    parser.add_argument("--out", type=Path, default=Path("runs/features"))
    parser.add_argument("--img-size", type=int, default=128, help="side of the student's images, a multiple of 16")
    parser.add_argument("--stored", type=int, default=10, help="epochs that the teacher looks at")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of the student, replaying those in turn")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=4, help="photos of val2017 in the image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name in ("train2017", "val2017"):
        if not (args.folder / name).is_dir():
            parser.error(f"there is no folder {args.folder / name} with photos")
    if args.img_size % 16 or args.img_size < 32:
        parser.error(f"--img-size must be a multiple of 16 of at least 32; got {args.img_size}")
    args.recipe = Recipe(
        img_size=args.img_size,
        epochs=args.epochs,
        warmup_epochs=min(2, args.epochs),
        batch_size=args.batch_size,
        base_lr=args.lr * 512 / args.batch_size,  # recipes tell rates for batches of 512
        min_lr=args.lr * 512 / args.batch_size / 100,
        preset="small",
        changes={"crop_scale": (0.2, 1.0), "erasing": 0.0},
    )
    return args


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    photos, held_out = Photos(args.folder / "train2017"), Photos(args.folder / "val2017")
    print(f"{len(photos)} photos to train on, {len(held_out)} held out")

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
    print(f"teacher: beside the student it would take {seconds:.1f} s of the processor more for an epoch")
    found = features(trained, images, args.device)
    mean = mean_map(store, list(range(args.stored))).expand_as(expected)
    print(f"{len(held_out)} photos held out: {'error':>9} {'cosine':>7}")
    for name, maps in (("mean of the training", mean), ("untrained student", untrained), ("trained student", found)):
        error, cosine = compare(maps, expected)
        print(f"  {name:<22} {error:>9.3f} {cosine:>7.3f}")
    draw(args.out / "features.png", images[: args.show], expected[: args.show], found[: args.show])


if __name__ == "__main__":
    main()
