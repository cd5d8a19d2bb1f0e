"""Options and steps that the commands which train or distill share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import typer

from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.config import VARIANTS, TinyViTConfig
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.distillation.manifest import StoreError
from kornia_tinyvit.distillation.store import LabelStore
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.training.recipes import RECIPES, Recipe

Network = TypeVar("Network")


class Frozen(StrEnum):
    """Parts of MobileSAM whose weights may stay as they are."""

    image_encoder = "image_encoder"
    prompt_encoder = "prompt_encoder"


Data = Annotated[
    Path,
    typer.Argument(help="Pictures: a folder of class folders, parquet files of the Hugging Face hub, or tar files."),
]
Store = Annotated[Path, typer.Argument(help="Folder of the stored soft labels.")]
RecipeName = Annotated[str, typer.Option("--recipe", help=f"{', '.join(RECIPES)}.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs. Default: the recipe's.")]
Side = Annotated[int | None, typer.Option("--img-size", min=32, help="Side in pixels. Default: the recipe's.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the order and the augmentation.")]
InitSeed = Annotated[int | None, typer.Option(min=0, help="Seed of the first weights. Default: that of --seed.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read pictures.")]
OnBroken = Annotated[str, typer.Option(help="What to do at a picture that cannot be read: stop or skip.")]
Limit = Annotated[int | None, typer.Option(min=2, help="Use so many pictures, drawn with a fixed seed.")]
Validation = Annotated[Path | None, typer.Option(help="Pictures to measure the accuracy on after each epoch.")]
Out = Annotated[Path, typer.Option(help="Folder for weights, metrics and state; the same one goes on after a stop.")]
TrainedVariant = Annotated[
    str, typer.Option("--variant", help="1m, 5m, 11m or 21m; or a file, for a network like the one it holds.")
]
Start = Annotated[str | None, typer.Option("--pretrained", help="Weights to start from: a name, a path or a URL.")]
BatchSize = Annotated[int | None, typer.Option(min=2, help="Global batch. Default: the recipe's.")]
ProcessBatch = Annotated[int | None, typer.Option(min=2, help="Pictures at a time; gradients add up to the batch.")]
Precision = Annotated[str, typer.Option(help="no, bf16 or fp16.")]
Rate = Annotated[float | None, typer.Option("--base-lr", help="Learning rate for a batch of 512.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more work.")]
OnCpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU where there is a GPU.")]

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_precision(name: str) -> torch.dtype | None:
    """Return the data type to compute in, ``None`` for that of the weights.

    Raises:
        ValueError: if there is no such precision.
    """
    if name not in PRECISIONS:
        raise ValueError(f"--precision is one of {', '.join(PRECISIONS)}; got {name!r}.")
    return PRECISIONS[name]


def build_samples(
    data: Path, recipe: Recipe, seed: int, on_broken: str = "stop", limit: int | None = None
) -> ReplayedSamples:
    """Build the pictures and the augmentation of a recipe."""
    images = ClassificationDataset.open(data)
    return augment_samples(images if limit is None else images.sample(limit), recipe, seed, on_broken)


def augment_samples(images: ClassificationDataset, recipe: Recipe, seed: int, on_broken: str) -> ReplayedSamples:
    """Give pictures the augmentation of a recipe."""
    augmentation = ReplayableAugmentation(
        recipe.img_size, recipe.preset, seed=seed, num_samples=len(images), **recipe.changes
    )
    return ReplayedSamples(images, augmentation, on_broken)


def open_labels(path: Path, samples: ReplayedSamples) -> LabelStore:
    """Open stored labels, which have to be those of the samples."""
    store = LabelStore(path)
    store.require(samples.describe())
    return store


def whole_epochs(store: LabelStore, wanted: int) -> list[int]:
    """Return the stored epochs that a training of so many replays.

    Raises:
        StoreError: if none is stored whole.
    """
    whole = [epoch for epoch in store.epochs if store.is_complete(epoch)][:wanted]
    if not whole:
        raise StoreError(f"{store.path} holds no whole epoch; kornia-tinyvit distill save goes on with it.")
    if len(whole) < wanted:
        print(f"Stored whole: {len(whole)} of {wanted} epochs, which are replayed in turn.", file=sys.stderr)
    return whole


def build_student(
    variant: str, pretrained: str | None, recipe: Recipe, num_classes: int, seed: int, gradient_checkpointing: bool
) -> TinyViT:
    """Build the classifier that is trained; see :func:`build_network`."""
    build = TinyViT.from_config
    return build_network(build, variant, pretrained, recipe, seed, gradient_checkpointing, num_classes=num_classes)


def build_network(
    build: Callable[..., Network],
    variant: str,
    pretrained: str | None,
    recipe: Recipe,
    seed: int,
    gradient_checkpointing: bool,
    scaled: bool = True,
    **options: Any,
) -> Network:
    """Build what is trained, with first weights of a seed.

    Args:
        build: builds it, such as ``TinyViT.from_config``.
        variant: variant of the TinyViT, or a file with one like it.
        pretrained: weights to start from.
        recipe: how it is trained.
        seed: seed of the first weights.
        gradient_checkpointing: whether to trade time for memory.
        scaled: whether loaded windows follow the size of the images.
        **options: for ``build``.
    """
    torch.manual_seed(seed)
    usual = like(variant)
    windows: Literal["scale", "fit"] | None = None
    if pretrained and scaled and recipe.img_size >= usual.img_size:
        windows = "scale"
    elif not pretrained and recipe.img_size < usual.img_size:
        windows = "fit"  # or small maps would be padded to windows larger than they are
    return build(
        variant if variant in VARIANTS else usual,
        pretrained=pretrained or False,
        img_size=recipe.img_size,
        use_checkpoint=gradient_checkpointing,
        drop_path_rate=recipe.drop_path.get(variant, usual.drop_path_rate),
        window_sizes=windows,
        **options,
    )


def like(variant: str) -> TinyViTConfig:
    """Return the configuration of a variant, or of the network in a file such as a contracted one."""
    return read_checkpoint(variant).config if Path(variant).is_file() else TinyViTConfig.from_variant(variant)
