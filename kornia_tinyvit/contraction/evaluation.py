"""How good a candidate is: a brief training on a proxy split, by the repository's loop."""

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

Start = Literal["inherit", "fresh"]


@dataclass(frozen=True)
class ProxyTraining:
    """Train a candidate as a recipe says and measure its top-1: an evaluation for :func:`contract`.

    It can be pickled, so that :func:`contract` can run it in several processes. A training that was killed goes on.

    Args:
        samples: the images to train on, and their augmentation.
        validation: others, to measure the accuracy on.
        recipe: the training; a few epochs are usual.
        folder: where trainings in progress keep their state; each one's is removed at its end.
        objective: what to learn, such as :class:`~kornia_tinyvit.distillation.StoredLabelLoss`, which needs no teacher;
            ``None`` for the labels.
        start: ``"inherit"`` begins with what is left of the parent's weights, see
            :func:`~kornia_tinyvit.contraction.inherit`; ``"fresh"`` with random ones.
        replays: epochs of the augmentation that are shown in turn, such as those of a store; ``None`` for all.
        seed: seed of random first weights.
        process_batch: images at a time; gradients add up to the recipe's batch.
        workers: processes that read images, for each candidate.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        cpu: stay on the CPU.

    Raises:
        ValueError: if ``start`` is neither.
    """

    samples: ReplayedSamples
    validation: ClassificationDataset
    recipe: Recipe
    folder: Path
    objective: Loss | None = None
    start: Start = "inherit"
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
        """Return what decides the accuracies, as JSON's types."""
        told = {
            "recipe": dataclasses.asdict(self.recipe),
            "samples": self.samples.describe(),
            "validation": self.validation.fingerprint(),
            "objective": self._objective().describe(),
            "start": self.start,
            "replays": self.replays,
            "seed": self.seed,
            "precision": self.precision,
        }
        described: dict[str, Any] = json.loads(json.dumps(told))
        return described

    def __call__(self, config: TinyViTConfig, parent: TinyViT | None) -> tuple[float, TinyViT]:
        """Train a candidate.

        Args:
            config: the candidate.
            parent: the trained network it was contracted from, if there is one.

        Returns:
            Its top-1 on the validation images in per cent, and the trained network.
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
