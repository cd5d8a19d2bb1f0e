"""Hyperparameters of published and other trainings, by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RECIPES", "Recipe", "choose_recipe", "find_recipe"]

LR_BATCH = 512  # global batch size of the base learning rates, for the linear scaling rule of Swin

_STEPS_PER_EPOCH = 8  # at least; what does not fill the last batch is dropped


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training.

    Args:
        img_size: side of the images in pixels.
        epochs: number of epochs.
        warmup_epochs: epochs of linear warm-up of the learning rate.
        batch_size: global batch size, over all ranks and accumulated batches; even.
        base_lr: peak learning rate for a global batch of 512, scaled linearly with the batch size.
        min_lr: final learning rate of the cosine schedule, for a global batch of 512.
        weight_decay: weight decay of the matrices.
        layer_decay: factor of the learning rate from one block to the one before.
        frozen_batch_norm: keep the running statistics of batch norm in the backbone.
        freeze: parts that are not trained, see :func:`~kornia_tinyvit.training.freeze_parts`.
        clip_norm: maximum norm of the gradient.
        ema_decay: decay of the moving average of the weights, which is evaluated and saved; 0 disables it.
        patience: number of epochs without a better score after which the training stops; 0 disables this.
        drop_path: drop path rates by variant that replace the variant's own.
        preset: name of the augmentation in :data:`~kornia_tinyvit.preprocessing.TRAINING_PRESETS`.
        changes: fields of the preset to replace.

    Raises:
        ValueError: if a value is out of its range.
    """

    img_size: int = 224
    epochs: int = 300
    warmup_epochs: float = 20
    batch_size: int = 1024
    base_lr: float = 5e-4
    min_lr: float = 5e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    frozen_batch_norm: bool = False
    freeze: tuple[str, ...] = ()
    clip_norm: float = 5.0
    ema_decay: float = 0.0
    patience: int = 0
    drop_path: dict[str, float] = field(default_factory=dict)
    preset: str = "in1k"
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranges = {
            "epochs": self.epochs >= 1,
            "warmup_epochs": 0 <= self.warmup_epochs <= self.epochs,
            "batch_size": self.batch_size >= 2 and self.batch_size % 2 == 0,
            "base_lr": self.base_lr > 0,
            "min_lr": 0 <= self.min_lr <= self.base_lr,
            "layer_decay": 0 < self.layer_decay <= 1,
            "ema_decay": 0 <= self.ema_decay < 1,
            "patience": self.patience >= 0,
        }
        wrong = [f"{name}={getattr(self, name)}" for name, good in ranges.items() if not good]
        if wrong:
            raise ValueError(
                f"Out of range: {', '.join(wrong)}. Expected epochs >= 1, 0 <= warmup_epochs <= epochs, an even "
                "batch_size, 0 <= min_lr <= base_lr, layer_decay in (0, 1], ema_decay in [0, 1) and patience >= 0."
            )

    @property
    def peak_lr(self) -> float:
        """Peak learning rate for the recipe's batch size, by the linear scaling rule."""
        return self.base_lr * self.batch_size / LR_BATCH

    def fit(self, num_samples: int, multiple: int = 2) -> Recipe:
        """Return the recipe with a batch of at most an eighth of the samples, so that an epoch drops few of them.

        The learning rate follows by the linear scaling rule, see :attr:`peak_lr`.

        Args:
            num_samples: number of training samples.
            multiple: the batch is a multiple of this even number, such as 2 for each rank.

        Returns:
            The recipe itself if its batch fits; else one with ``multiple`` times a power of two, at least ``multiple``.
        """
        limit = max(num_samples // _STEPS_PER_EPOCH, multiple)
        if self.batch_size <= limit:
            return self
        return dataclasses.replace(self, batch_size=multiple << (limit // multiple).bit_length() - 1)

    def lr_factor(self, epoch: float) -> float:
        """Return the factor of the peak learning rate after some epochs: linear warm-up, then a cosine schedule."""
        if epoch < self.warmup_epochs:
            return max(epoch / self.warmup_epochs, 1e-3)
        lowest = self.min_lr / self.base_lr
        done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


_FINE = Recipe(
    epochs=30, warmup_epochs=5, base_lr=2.5e-4, min_lr=1e-5, weight_decay=1e-8, layer_decay=0.8,
    frozen_batch_norm=True, drop_path={"21m": 0.1}, preset="finetune",
)  # fmt: skip
_LARGER = dataclasses.replace(_FINE, base_lr=2e-5, min_lr=2e-7, layer_decay=1.0)

#: Recipes of arXiv:2207.10666 and its code, and two for images of 32 pixels resized to 64: ``"cifar10"`` with labels,
#: ``"cifar10_distill"`` with a teacher, which also labels images mixed by CutMix.
#: ``"semantic"`` fine-tunes a segmenter; as in SegFormer (arXiv:2105.15203) the learning rate of the decoder is ten
#: times that of the first layers. ``"promptable"`` fine-tunes MobileSAM with MedSAM's learning rate of 1e-4 and weight
#: decay (arXiv:2304.12306), and SAM's layer decay. ``"detection"`` is RT-DETR's (arXiv:2304.08069): a learning rate of
#: 1e-4 for batches of 16, 72 epochs, a moving average of the weights, and a tenth of the learning rate in the first
#: layers of the backbone.
#: Those that end in ``"_small"`` fine-tune pretrained weights on hundreds of images, see :func:`choose_recipe`: small
#: batches, layer-wise decay, few epochs and early stopping.
RECIPES: dict[str, Recipe] = {
    "in1k": Recipe(drop_path={"21m": 0.2}),
    "in22k_distill": Recipe(
        epochs=90, warmup_epochs=5, batch_size=4096, base_lr=2.5e-4, weight_decay=0.01, drop_path={"21m": 0.1},
        preset="distill",
    ),
    "in22k_to_in1k": _FINE,
    "224_to_384": dataclasses.replace(_LARGER, img_size=384),
    "384_to_512": dataclasses.replace(_LARGER, img_size=512),
    "cifar10": Recipe(
        img_size=64, epochs=30, warmup_epochs=1, batch_size=128, base_lr=8e-3, min_lr=8e-5, ema_decay=0.998,
        drop_path={"1m": 0.05}, preset="small",
    ),
    "cifar10_distill": Recipe(
        img_size=64, epochs=30, warmup_epochs=1, batch_size=128, base_lr=4e-3, min_lr=4e-5, ema_decay=0.998,
        drop_path={"1m": 0.0}, preset="small", changes={"cutmix": 1.0, "mix_probability": 0.5},
    ),
    "semantic": Recipe(
        img_size=512, epochs=160, warmup_epochs=5, batch_size=16, base_lr=0.0192, min_lr=1.92e-4, weight_decay=0.01,
        layer_decay=0.8, preset="semantic",
    ),
    "promptable": Recipe(
        img_size=1024, epochs=50, warmup_epochs=2, batch_size=16, base_lr=3.2e-3, min_lr=3.2e-5, weight_decay=0.01,
        layer_decay=0.8, preset="promptable",
    ),
    "detection": Recipe(
        img_size=640, epochs=72, warmup_epochs=2, batch_size=16, base_lr=3.2e-3, min_lr=3.2e-5, weight_decay=1e-4,
        layer_decay=0.8, clip_norm=0.1, ema_decay=0.9999, preset="detection",
    ),
    "classification_small": Recipe(
        epochs=30, warmup_epochs=2, batch_size=32, base_lr=0.016, min_lr=1.6e-4, layer_decay=0.8,
        frozen_batch_norm=True, patience=10, preset="finetune",
    ),
    "semantic_small": Recipe(
        img_size=512, epochs=60, warmup_epochs=2, batch_size=8, base_lr=0.05, min_lr=5e-4, weight_decay=0.01,
        layer_decay=0.8, patience=20, preset="semantic",
    ),
    "promptable_small": Recipe(
        img_size=1024, epochs=15, warmup_epochs=0.5, batch_size=4, base_lr=0.0256, min_lr=2.56e-4, weight_decay=0.01,
        layer_decay=0.8, frozen_batch_norm=True, freeze=("prompt_encoder",), ema_decay=0.97, patience=5,
        preset="promptable",
    ),
    "detection_small": Recipe(
        img_size=640, epochs=60, warmup_epochs=2, batch_size=8, base_lr=0.0256, min_lr=2.56e-4, weight_decay=1e-4,
        layer_decay=0.8, freeze=("stages=1",), clip_norm=0.1, ema_decay=0.99, patience=20, preset="detection",
        changes={"crop_scale": (0.4, 1.0), "crop_ratio": (0.8, 1.25)},
    ),
}  # fmt: skip


# The recipe of each task, its recipe for small sets, and the number of images below which a set is small. The paper's
# batch of 1,024 gives fewer than ten steps per epoch for less than 10,000 images. The other recipes are those of ADE20K
# (20,000 images), SA-1B and COCO (118,000); with 2,000 images 60 epochs of batches of 8 are 15,000 steps.
_CHOICES = {
    "classification": ("in1k", "classification_small", 10_000),
    "semantic": ("semantic", "semantic_small", 2_000),
    "promptable": ("promptable", "promptable_small", 2_000),
    "detection": ("detection", "detection_small", 2_000),
}


def choose_recipe(task: str, num_images: int, pretrained: bool) -> tuple[str, str]:
    """Return the name of the recipe for a task and a number of images, and the reason.

    Args:
        task: ``"classification"``, ``"semantic"``, ``"promptable"`` or ``"detection"``.
        num_images: number of training images.
        pretrained: whether the training starts from pretrained weights. Few images cannot replace them, so a training
            from random weights has the long schedule.

    Returns:
        A name of :data:`RECIPES`: the one for small sets with pretrained weights and fewer than 10,000 (classification)
        or 2,000 images, else the task's; and the reason, as a clause.

    Raises:
        ValueError: if the task is unknown.

    Example:
        >>> choose_recipe("semantic", 150, pretrained=True)
        ('semantic_small', 'fine-tuning on fewer than 2,000 images')
    """
    if task not in _CHOICES:
        raise ValueError(f"There is no task {task!r}; choose one of {', '.join(_CHOICES)}.")
    usual, small, limit = _CHOICES[task]
    if not pretrained:
        return usual, "random weights"
    if num_images < limit:
        return small, f"fine-tuning on fewer than {limit:,} images"
    return usual, f"{limit:,} images or more"


def find_recipe(name: str, **changes: Any) -> Recipe:
    """Return a recipe by its name, with fields replaced.

    With fewer ``epochs`` the warm-up is limited to half of them, and ``min_lr`` follows ``base_lr`` in proportion,
    unless they are given.

    Args:
        name: a name of :data:`RECIPES`.
        **changes: fields to replace; ``None`` keeps the recipe's value.

    Raises:
        ValueError: if the recipe or a field is unknown, or a value is out of its range.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    unknown = sorted(changes.keys() - {entry.name for entry in dataclasses.fields(Recipe)})
    if unknown:
        raise ValueError(f"Recipe has no field {', '.join(unknown)}.")
    given = {key: value for key, value in changes.items() if value is not None}
    recipe = RECIPES[name]
    given.setdefault("warmup_epochs", min(recipe.warmup_epochs, given.get("epochs", recipe.epochs) / 2))
    given.setdefault("min_lr", recipe.min_lr * given.get("base_lr", recipe.base_lr) / recipe.base_lr)
    return dataclasses.replace(recipe, **given)
