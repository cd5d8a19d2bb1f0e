"""Options of the commands that train or distill, as requests that those of the commands extend."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from kornia_tinyvit.checkpoints import read_checkpoint
from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.requests import Request, argument, option
from kornia_tinyvit.config import VARIANTS, TinyViTConfig
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import count_noun
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.data.splits import MissingSplitError
from kornia_tinyvit.distillation.manifest import StoreError
from kornia_tinyvit.distillation.store import LabelStore
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.training import RECIPES, Recipe, find_recipe, train

Dataset = TypeVar("Dataset")

RECIPE_NAMES = ", ".join(RECIPES)
EPOCHS = "Epochs. Default: those of the recipe."
ON_BROKEN = "At an image that cannot be read: stop or skip."
OUT = "Folder for weights, metrics and state; the same command resumes from it, with more --epochs it extends it."
_TITLES = {"top1": "top-1", "mean_iou": "mean IoU", "box_iou": "mean IoU of boxes", "map": "mAP"}
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class DataRequest(Request):
    """The images, and the precision of the networks."""

    data: Path = argument("Images: folder of class folders, parquet files of the Hugging Face hub, or tar files.")
    limit: int | None = option("Data", "Number of images, sampled with a fixed seed.", None, min=2)
    img_size: int | None = option("Training", "Side of the input in pixels. Default: that of the recipe.", None, min=32)
    seed: int = option("Training", "Seed of order and augmentation.", 0, min=0)
    precision: str = option("Hardware", "no, bf16 or fp16.", "no")

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}.")

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of ``--precision``, ``None`` for that of the weights."""
        return PRECISIONS[self.precision]

    def sample(self, images: Any) -> Any:
        """Return the images that ``--limit`` leaves."""
        return images if self.limit is None else images.sample(self.limit)

    def augment(
        self, recipe: Recipe, on_broken: str, images: ClassificationDataset | None = None, **statistics: Any
    ) -> ReplayedSamples:
        """Return images, by default those of ``data``, with the augmentation of a recipe.

        Args:
            recipe: the recipe.
            on_broken: ``"stop"`` or ``"skip"`` at an image that cannot be read.
            images: the images.
            **statistics: ``mean`` and ``std`` of the normalization; by default ImageNet's.
        """
        images = self.sample(ClassificationDataset.open(self.data)) if images is None else images
        augmentation = ReplayableAugmentation(
            recipe.img_size, recipe.preset, seed=self.seed, num_samples=len(images), **statistics, **recipe.changes
        )
        return ReplayedSamples(images, augmentation, on_broken)


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(DataRequest):
    """The network, its first weights and its training."""

    variant: str = option(
        "Weights", "1m, 5m, 11m or 21m; or a file, e.g. of a contracted network, for its architecture.", "5m"
    )
    weights: str | None = option(
        "Weights",
        "Weights to start from: name in 'kornia-tinyvit pretrained', path, hub folder or URL. Default: random.",
        None,
    )
    recipe: str | None = option("Training", f"{RECIPE_NAMES}.", "in1k")
    validation: Path | None = option(
        "Data", "Images to evaluate on after each epoch. Default: the split val of the data.", None
    )
    on_broken: str = option("Data", ON_BROKEN, "stop")
    epochs: int | None = option("Training", EPOCHS, None, min=1)
    batch_size: int | None = option(
        "Training", "Global batch size. Default: that of the recipe, at most an eighth of the images.", None, min=2
    )
    base_lr: float | None = option("Training", "Learning rate for a batch of 512, scaled linearly.", None)
    process_batch: int | None = option("Hardware", "Batch size per process; gradients are accumulated.", None, min=2)
    device: str = option("Hardware", "auto (the choice of accelerate) or cpu.", "auto")
    out: Path = option("Output", OUT, Path("runs"))

    @property
    def cpu(self) -> bool:
        """Whether to train on the CPU although there is a GPU.

        Raises:
            ValueError: if accelerate would not use ``--device``.
        """
        if self.device in ("auto", "cpu"):
            return self.device == "cpu"
        device, default = options.find_device(self.device), options.find_device("auto")
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if device.type != default.type or device.index not in (None, rank):
            raise ValueError(
                f"--device {self.device} is not the device of this training, {default}; use --device auto, and choose "
                "GPUs by CUDA_VISIBLE_DEVICES."
            )
        return False

    def find_recipe(self, default: str = "", **changes: Any) -> Recipe:
        """Return the recipe, changed by the options that were given and by other fields."""
        return find_recipe(
            self.recipe or default,
            epochs=self.epochs,
            img_size=self.img_size,
            batch_size=self.batch_size,
            base_lr=self.base_lr,
            **changes,
        )

    def build(
        self, build: Callable[..., Any], recipe: Recipe, seed: int, scale_windows: bool = True, **settings: Any
    ) -> Any:
        """Build the network that is trained, and note how its weights were adapted.

        Args:
            build: e.g. ``TinyViT.from_config``.
            recipe: its training.
            seed: seed of random weights.
            scale_windows: scale the windows of ``--weights`` with the size of the images.
            **settings: for ``build``.
        """
        torch.manual_seed(seed)
        default = read_config(self.variant)
        windows: Literal["scale", "fit"] | None = None
        if self.weights and scale_windows and recipe.img_size >= default.img_size:
            windows = "scale"
        elif not self.weights and recipe.img_size < default.img_size:
            windows = "fit"  # or small feature maps would be padded to the window size
        network = build(
            self.variant if self.variant in VARIANTS else default,
            pretrained=self.weights or False,
            img_size=recipe.img_size,
            drop_path_rate=recipe.drop_path.get(self.variant, default.drop_path_rate),
            window_sizes=windows,
            **settings,
        )
        report = next(part.load_report for part in network.modules() if isinstance(part, TinyViT))
        if report is not None and report.adapted:
            self.note(f"Weights {self.weights}: {'; '.join(report.adapted)}.")
        return network

    def open_validation(self, open_split: Callable[[Path, str], Dataset], images: Any) -> Dataset | None:
        """Return the images of ``--validation``, by default of the validation split of the data, if it has one.

        Args:
            open_split: opens a split of a path.
            images: the training images.
        """
        if self.validation is not None:
            return open_split(self.validation, "val")
        if not images.is_divided:
            return None
        try:
            return open_split(self.data, "val")
        except MissingSplitError:
            return None

    def fit_batch(self, recipe: Recipe, images: Any) -> Recipe:
        """Return the recipe with a batch that fits the images, unless ``--batch-size`` is given."""
        if self.batch_size is not None:
            return recipe
        fitted = recipe.fit(len(images), (self.process_batch or 2) * int(os.environ.get("WORLD_SIZE", "1")))
        if fitted is not recipe:
            self.note(
                f"Batch {fitted.batch_size} instead of the recipe's {recipe.batch_size} for {len(images):,} images, "
                f"learning rate {fitted.peak_lr:.3g} instead of {recipe.peak_lr:.3g}."
            )
        return fitted


@dataclass(frozen=True, kw_only=True)
class LoopRequest(TrainingRequest):
    """A training of one network."""

    patience: int | None = option(
        "Training", "Epochs without a better score before training stops; 0: all. Default: the recipe's.", None, min=0
    )
    init_seed: int | None = option("Training", "Seed of random weights. Default: that of --seed.", None, min=0)
    workers: int = option("Hardware", options.WORKERS, 2, min=0)
    gradient_checkpointing: bool = option("Hardware", "Less memory for a third more work.", False)

    def find_recipe(self, default: str = "", **changes: Any) -> Recipe:
        """Return the recipe, changed by the options that were given and by other fields."""
        return super().find_recipe(default, patience=self.patience, **changes)

    @property
    def first_seed(self) -> int:
        """Seed of random weights."""
        return self.seed if self.init_seed is None else self.init_seed

    def build_network(self, build: Callable[..., Any], recipe: Recipe, **settings: Any) -> Any:
        """Return the network, see :meth:`build`."""
        return self.build(build, recipe, self.first_seed, use_checkpoint=self.gradient_checkpointing, **settings)

    def train(
        self, model: Any, samples: Any, objective: Any, recipe: Recipe, reason: str = "", **settings: Any
    ) -> None:
        """Train, or resume, and print the result; see :func:`~kornia_tinyvit.training.train`.

        Args:
            model: the network.
            samples: the images and their augmentation.
            objective: the loss.
            recipe: the recipe.
            reason: a note on the choice of the recipe.
            **settings: further arguments.
        """
        cpu = self.cpu
        images = samples.images
        device = "cpu" if cpu else options.find_device("auto")
        self.note_run(images, device, self.weights or "random", settings.get("validation"))
        if reason:
            self.note(reason)
        recipe = self.fit_batch(recipe, images)
        unpaired = (*images.without_mask, *images.without_image)
        self.note_names("Images and labels left out because the other is missing", unpaired)
        self.note_names("Boxes left out", getattr(images, "left_out", ()))
        settings |= {name: getattr(self, name) for name in ("process_batch", "workers", "precision")}
        origin = {"weights": self.weights, "init_seed": self.first_seed}
        settings |= {"origin": origin, "cpu": cpu, "progress": self.shows_progress, "note": self.note}
        result = train(model, samples, objective, recipe, self.out, **settings)
        if not result.is_main_process:
            return
        if self.as_json:
            print(json.dumps(result.to_dict()))
            return
        score = "" if result.score is None else f", {_TITLES[result.metric]} {result.score:.2f} %"
        if result.stopped_early:
            print(
                f"Stopped early: {_TITLES[result.metric]} did not improve for {count_noun(recipe.patience, 'epoch')}, "
                f"best in epoch {result.best_epoch} of {recipe.epochs}."
            )
        print(f"{result.steps} steps in {result.seconds:.0f} s{score}: {result.best}")
        self.note_names("Images left out because they cannot be read", result.broken)


def open_labels(path: Path, samples: ReplayedSamples) -> LabelStore:
    """Open a label store and check that it belongs to the samples."""
    store = LabelStore(path)
    store.require(samples.describe())
    return store


def match_labels(samples: ReplayedSamples, names: Sequence[str] | None, classes: int) -> None:
    """Replace the labels of samples by class indices of a teacher, matched by name where both sides have names.

    Args:
        samples: the samples.
        names: names of the teacher's classes, where known.
        classes: their number.

    Raises:
        ValueError: if the labels are no classes of the teacher.
    """
    images = samples.images.with_classes(names)
    if images.num_classes != classes:
        raise ValueError(
            f"The data has {images.num_classes} classes and the teacher {classes}, so its labels cannot be used; leave "
            "out --hard-weight and --validation."
        )
    samples.images = images


def find_epochs(store: LabelStore, epochs: int, request: Request) -> list[int]:
    """Return the complete epochs of a store to replay in a training of so many epochs.

    Raises:
        StoreError: if no epoch is complete.
    """
    complete = [epoch for epoch in store.epochs if not store.missing_shards(epoch)][:epochs]
    if not complete:
        raise StoreError(f"{store.path} has no complete epoch; resume 'kornia-tinyvit distill save'.")
    if len(complete) < epochs:
        request.note(f"{len(complete)} of {epochs} epochs are complete and are replayed in turn.")
    return complete


def read_config(variant: str) -> TinyViTConfig:
    """Return the configuration of a variant, or of the network in a file."""
    return read_checkpoint(variant).config if Path(variant).is_file() else TinyViTConfig.from_variant(variant)
