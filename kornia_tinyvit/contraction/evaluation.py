"""Proxy training: a short training of each candidate to measure its accuracy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.contraction.inheritance import inherit
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.training.loop import train
from kornia_tinyvit.training.recipes import Recipe
from kornia_tinyvit.training.tasks.base import Loss
from kornia_tinyvit.training.tasks.classification import ClassificationLoss

__all__ = ["ProxyTraining"]


@dataclass(frozen=True)
class ProxyTraining:
    """Evaluation for :func:`contract` that trains each candidate with a recipe and measures its top-1 accuracy.

    It can be pickled for searches with several processes. An interrupted training is resumed.

    Args:
        samples: the training images and their augmentation.
        validation: the held-out images.
        recipe: the training recipe, usually of a few epochs.
        folder: folder for the state of unfinished trainings.
        objective: training objective, such as :class:`~kornia_tinyvit.distillation.StoredLabelLoss`, which needs no
            teacher; ``None`` for the labels.
        start: ``"inherit"`` inherits the parent's weights, see :func:`~kornia_tinyvit.contraction.inherit`;
            ``"fresh"`` starts from random weights.
        replays: epochs of the augmentation to cycle through, such as those of a store; ``None`` for all.
        seed: seed of random initial weights.
        process_batch: batch size per step; gradients are accumulated to the recipe's batch size.
        workers: data loader workers per candidate.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: train on the CPU.

    Raises:
        ValueError: if ``start`` is neither ``"inherit"`` nor ``"fresh"``.
    """

    samples: ReplayedSamples
    validation: ClassificationDataset
    recipe: Recipe
    folder: Path
    objective: Loss | None = None
    start: Literal["inherit", "fresh"] = "inherit"
    replays: list[int] | None = None
    seed: int = 0
    process_batch: int | None = None
    workers: int = 0
    precision: str = "no"
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("inherit", "fresh"):
            raise ValueError(f"start must be 'inherit' or 'fresh'; got {self.start!r}.")

    def describe(self) -> dict[str, Any]:
        """Return all settings that affect the accuracies, for JSON."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "samples": self.samples.describe(),
            "validation": self.validation.fingerprint(),
            "objective": self._objective().describe(),
            "start": self.start,
            "replays": self.replays,
            "seed": self.seed,
            "precision": self.precision,
        }

    def __call__(self, config: TinyViTConfig, parent: TinyViT | None) -> tuple[float, TinyViT]:
        """Train a candidate.

        Args:
            config: the candidate.
            parent: the trained network it was contracted from; ``None`` for the first.

        Returns:
            Top-1 accuracy on the validation images in percent, and the trained network.
        """
        torch.manual_seed(self.seed)
        source = parent if self.start == "inherit" else None
        model = TinyViT.from_config(config) if source is None else inherit(source, config)
        out = self.folder / hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:16]
        result = train(
            model,
            self.samples,
            self._objective(),
            self.recipe,
            out,
            validation=self.validation,
            validate_every=self.recipe.epochs,
            replays=self.replays,
            origin={"start": "fresh" if source is None else "inherit", "seed": self.seed},
            process_batch=self.process_batch,
            workers=self.workers,
            precision=self.precision,
            cpu=self.cpu,
        )
        assert result.score is not None  # noqa: S101 - there are validation images
        trained = TinyViT.from_config(pretrained=result.best)
        shutil.rmtree(out)
        return result.score, trained

    def _objective(self) -> Loss:
        return ClassificationLoss(self.samples.augmentation) if self.objective is None else self.objective
