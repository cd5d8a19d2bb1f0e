"""Options and steps that the commands which train or distill share."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.config import VARIANTS, TinyViTConfig
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.recipes import RECIPES, Recipe


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


def build_student(
    variant: str, pretrained: str | None, recipe: Recipe, num_classes: int, seed: int, gradient_checkpointing: bool
) -> TinyViT:
    """Build what is trained, with first weights of a seed; loaded windows follow the size of the pictures."""
    torch.manual_seed(seed)
    options = _network_options(variant, pretrained, recipe, gradient_checkpointing)
    network: str | TinyViTConfig = variant if variant in VARIANTS else like(variant)
    return TinyViT.from_config(network, pretrained=pretrained or False, num_classes=num_classes, **options)


def build_segmenter(
    variant: str,
    pretrained: str | None,
    recipe: Recipe,
    class_names: Sequence[str],
    seed: int,
    gradient_checkpointing: bool,
) -> SemanticSegmenter:
    """Build the segmenter that is trained, as :func:`build_student` builds its backbone."""
    torch.manual_seed(seed)
    options = _network_options(variant, pretrained, recipe, gradient_checkpointing)
    return SemanticSegmenter.from_config(variant, pretrained=pretrained or False, class_names=class_names, **options)


def build_promptable(
    variant: str, pretrained: str | None, recipe: Recipe, seed: int, gradient_checkpointing: bool
) -> MobileSAM:
    """Build the MobileSAM that is trained, with first weights of a seed; windows are MobileSAM's own at every size."""
    from kornia_tinyvit.training.tasks.promptable import build_sam

    torch.manual_seed(seed)
    options = _network_options(variant, pretrained, recipe, gradient_checkpointing)
    if options["window_sizes"] == "scale":
        options["window_sizes"] = None
    return build_sam(variant, pretrained, **options)


def build_detector(
    variant: str,
    pretrained: str | None,
    recipe: Recipe,
    class_names: Sequence[str],
    queries: int,
    seed: int,
    gradient_checkpointing: bool,
) -> TinyViTDetector:
    """Build the detector that is trained; loaded windows stay as they are, since its pictures are large."""
    torch.manual_seed(seed)
    options = _network_options(variant, pretrained, recipe, gradient_checkpointing)
    if options["window_sizes"] == "scale":
        options["window_sizes"] = None
    return TinyViTDetector.from_config(
        variant, pretrained=pretrained or False, class_names=class_names, num_queries=queries, **options
    )


def like(variant: str) -> TinyViTConfig:
    """Return the configuration of a variant, or of the network in a file such as a contracted one."""
    return read_checkpoint(variant).config if Path(variant).is_file() else TinyViTConfig.from_variant(variant)


def _network_options(
    variant: str, pretrained: str | None, recipe: Recipe, gradient_checkpointing: bool
) -> dict[str, Any]:
    usual = like(variant)
    windows: Literal["scale", "fit"] | None = None
    if pretrained and recipe.img_size >= usual.img_size:
        windows = "scale"
    elif not pretrained and recipe.img_size < usual.img_size:
        windows = "fit"  # or small maps would be padded to windows larger than they are
    return {
        "img_size": recipe.img_size,
        "use_checkpoint": gradient_checkpointing,
        "drop_path_rate": recipe.drop_path.get(variant, usual.drop_path_rate),
        "window_sizes": windows,
    }
