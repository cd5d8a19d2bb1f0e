"""Options and steps that the commands which train or distill share: the requests that their own extend."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.cli.options import Json
from kornia_tinyvit.cli.tables import print_names
from kornia_tinyvit.config import VARIANTS, TinyViTConfig
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.distillation.manifest import StoreError
from kornia_tinyvit.distillation.store import LabelStore
from kornia_tinyvit.training import RECIPES, Recipe, find_recipe, train

RecipeName = Annotated[str, typer.Option("--recipe", help=f"{', '.join(RECIPES)}.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs. Default: the recipe's.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
OnBroken = Annotated[str, typer.Option(help="What to do at an image that cannot be read: stop or skip.")]
Out = Annotated[Path, typer.Option(help="Folder for weights, metrics and state; the same one goes on after a stop.")]

_TITLES = {"top1": "top-1", "mean_iou": "mean IoU", "box_iou": "mean IoU of boxes", "map": "mAP"}
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """Which images are used, and in what precision networks compute."""

    data: Annotated[
        Path,
        typer.Argument(help="Images: class folders, parquet files of the Hugging Face hub, or tar files."),
    ]
    img_size: Annotated[int | None, typer.Option(min=32, help="Side in pixels. Default: the recipe's.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order and the augmentation.")] = 0
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no"
    limit: Annotated[int | None, typer.Option(min=2, help="Use so many images, drawn with a fixed seed.")] = None
    as_json: Json = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision is one of {', '.join(PRECISIONS)}; got {self.precision!r}.")

    @property
    def dtype(self) -> torch.dtype | None:
        """The data type to compute in, ``None`` for that of the weights."""
        return PRECISIONS[self.precision]

    def drawn(self, images: Any) -> Any:
        """Return the images that are used."""
        return images if self.limit is None else images.sample(self.limit)

    def samples(self, recipe: Recipe, on_broken: str, images: ClassificationDataset | None = None) -> ReplayedSamples:
        """Give images the augmentation of a recipe; by default those of the data."""
        images = self.drawn(ClassificationDataset.open(self.data)) if images is None else images
        augmentation = ReplayableAugmentation(
            recipe.img_size, recipe.preset, seed=self.seed, num_samples=len(images), **recipe.changes
        )
        return ReplayedSamples(images, augmentation, on_broken)


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(DataRequest):
    """What is trained, from which weights, and where it is written."""

    variant: Annotated[
        str, typer.Option(help="1m, 5m, 11m or 21m; or a file, for a network like the one it holds.")
    ] = "5m"
    out: Out
    validation: Annotated[Path | None, typer.Option(help="Images to measure the accuracy on after each epoch.")] = None
    pretrained: Annotated[str | None, typer.Option(help="Weights to start from: a name, a path or a URL.")] = None
    epochs: Epochs = None
    batch_size: Annotated[int | None, typer.Option(min=2, help="Global batch. Default: the recipe's.")] = None
    process_batch: Annotated[
        int | None, typer.Option(min=2, help="Images at a time; gradients add up to the batch.")
    ] = None
    base_lr: Annotated[float | None, typer.Option(help="Learning rate for a batch of 512.")] = None
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU where there is a GPU.")] = False
    on_broken: OnBroken = "stop"

    def find_recipe(self, name: str) -> Recipe:
        """Return a recipe with the options that were given in the place of its own."""
        return find_recipe(
            name, epochs=self.epochs, img_size=self.img_size, batch_size=self.batch_size, base_lr=self.base_lr
        )

    def build(self, build: Callable[..., Any], recipe: Recipe, seed: int, scaled: bool = True, **options: Any) -> Any:
        """Build what is trained, with first weights of a seed.

        Args:
            build: builds it, such as ``TinyViT.from_config``.
            recipe: how it is trained.
            seed: seed of the first weights.
            scaled: whether loaded windows follow the size of the images.
            **options: for ``build``.
        """
        torch.manual_seed(seed)
        usual = like(self.variant)
        windows: Literal["scale", "fit"] | None = None
        if self.pretrained and scaled and recipe.img_size >= usual.img_size:
            windows = "scale"
        elif not self.pretrained and recipe.img_size < usual.img_size:
            windows = "fit"  # or small maps would be padded to windows larger than they are
        return build(
            self.variant if self.variant in VARIANTS else usual,
            pretrained=self.pretrained or False,
            img_size=recipe.img_size,
            drop_path_rate=recipe.drop_path.get(self.variant, usual.drop_path_rate),
            window_sizes=windows,
            **options,
        )

    def validation_images(self, class_names: tuple[str, ...] | None) -> ClassificationDataset | None:
        """Return the images to measure the accuracy on, their classes those of the network."""
        if self.validation is None:
            return None
        return ClassificationDataset.open(self.validation).with_classes(class_names)


@dataclass(frozen=True, kw_only=True)
class LoopRequest(TrainingRequest):
    """A single training."""

    init_seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first weights. Default: that of --seed.")
    ] = None
    workers: Workers = 2
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more work.")
    ] = False

    @property
    def first_seed(self) -> int:
        """Seed of the first weights."""
        return self.seed if self.init_seed is None else self.init_seed

    def network(self, build: Callable[..., Any], recipe: Recipe, **options: Any) -> Any:
        """Return what is trained, as :meth:`build` builds it."""
        return self.build(build, recipe, self.first_seed, use_checkpoint=self.gradient_checkpointing, **options)

    def train(self, model: Any, samples: Any, objective: Any, recipe: Recipe, **options: Any) -> None:
        """Train, or resume, and print what it came to.

        Args:
            model: the network.
            samples: the images and their augmentation.
            objective: the loss.
            recipe: how it is trained.
            **options: for :func:`~kornia_tinyvit.training.train`.
        """
        result = train(
            model,
            samples,
            objective,
            recipe,
            self.out,
            origin={"pretrained": self.pretrained, "init_seed": self.first_seed},
            process_batch=self.process_batch,
            workers=self.workers,
            precision=self.precision,
            cpu=self.cpu,
            progress=not self.as_json,
            **options,
        )
        if not result.is_main_process:
            return
        if self.as_json:
            print(json.dumps(result.to_dict()))
            return
        score = "" if result.score is None else f", {_TITLES[result.metric]} {result.score:.2f} %"
        print(f"{result.steps} steps in {result.seconds:.0f} s{score}: {result.best}")
        print_names("Could not be read and were left out", result.broken)


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
    whole = [epoch for epoch in store.epochs if not store.missing_shards(epoch)][:wanted]
    if not whole:
        raise StoreError(f"{store.path} holds no whole epoch; kornia-tinyvit distill save goes on with it.")
    if len(whole) < wanted:
        print(f"Stored whole: {len(whole)} of {wanted} epochs, which are replayed in turn.", file=sys.stderr)
    return whole


def like(variant: str) -> TinyViTConfig:
    """Return the configuration of a variant, or of the network in a file such as a contracted one."""
    return read_checkpoint(variant).config if Path(variant).is_file() else TinyViTConfig.from_variant(variant)
