"""Training classifiers: loss, evaluator and task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.data.augmentation import ReplayableAugmentation
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import Batch, ReplayedSamples
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import EvaluationPipeline, Preprocessing
from kornia_tinyvit.training.metrics.classification import ClassificationMetrics
from kornia_tinyvit.training.tasks.base import Evaluator, Task

__all__ = ["CLASSIFICATION", "ClassificationEvaluator", "ClassificationLoss", "ClassificationTask"]


class ClassificationLoss:
    """Cross-entropy with the labels, which are mixed and smoothed as the augmentation's preset defines.

    Args:
        augmentation: augmentation of the batches.
    """

    def __init__(self, augmentation: ReplayableAugmentation) -> None:
        self.augmentation = augmentation

    def describe(self) -> dict[str, Any]:
        """Return its kind and the label smoothing."""
        return {"kind": "labels", "label_smoothing": self.augmentation.preset.label_smoothing}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)` of logits :math:`(B, C)`."""
        targets = self.augmentation.soft_labels(batch.labels, batch.params, outputs.shape[1])
        return F.cross_entropy(outputs.float(), targets.to(outputs.device), reduction="none")


class ClassificationEvaluator(Evaluator):
    """Evaluate a classifier on labeled images.

    Args:
        images: the data set, with the classes of the network.
        num_classes: number of classes of the network.
        pipeline: preprocessing of an image :math:`(1, 3, H, W)` in [0, 1]; ``None`` for a network that takes lists of
            images, as :class:`~kornia_tinyvit.ImageClassifier`.
        **options: see :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(
        self, images: ClassificationDataset, num_classes: int, pipeline: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(images, ClassificationMetrics(num_classes), **options)
        self.pipeline = pipeline

    def update(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, int]]]) -> None:
        """Update the metrics; a sample is an image :math:`(3, H, W)` in [0, 1] and its class index."""
        images = [image.to(self.device) for _, (image, _) in samples] or [torch.zeros(3, 32, 32, device=self.device)]
        inputs = images if self.pipeline is None else torch.cat([self.pipeline(image[None]) for image in images])
        logits = network(inputs)[: len(samples)]
        self.counts.update(logits, torch.tensor([label for _, (_, label) in samples]))


class ClassificationTask(Task):
    """Classification: top-1 and top-5 accuracy on a :class:`~kornia_tinyvit.data.ClassificationDataset`."""

    metrics = ("top1", "top5")
    may_lack_classes = True

    def evaluator(
        self, images: ClassificationDataset, config: TinyViTConfig, preprocessing: Preprocessing, **options: Any
    ) -> ClassificationEvaluator:
        """Create an evaluator with the preprocessing that is saved."""
        pipeline = EvaluationPipeline.from_preprocessing(preprocessing).to(options["device"])
        return ClassificationEvaluator(images, config.num_classes, pipeline, **options)

    def preprocessing(self, model: nn.Module, samples: ReplayedSamples) -> Preprocessing:
        """Return size, mean and standard deviation of the augmentation, with the network's crop and interpolation."""
        augmentation = samples.augmentation
        # The shortest decimals that round to the same float32.
        mean, std = (tuple(float(str(value)) for value in x.numpy()) for x in (augmentation.mean, augmentation.std))
        sized = cast("TinyViT", model).preprocessing.resize(augmentation.img_size)
        return dataclasses.replace(sized, mean=mean, std=std)

    def build(self, config: TinyViTConfig, class_names: Sequence[str] | None) -> TinyViT:
        """Build the network to save, with random weights."""
        network = TinyViT.from_config(config)
        network.class_names = None if class_names is None else tuple(class_names)
        return network

    def draw(self, network: TinyViT, image: Image.Image, target: int) -> list[tuple[Image.Image, str]]:
        """Return the image with its label and the prediction."""
        classifier = ImageClassifier(network)
        (found,) = classifier.predict(image, top_k=1)[0]
        mark = "right" if found.index == target else "wrong"
        return [(image, f"{mark}: {classifier.class_names[target]}, predicted {found.label} {100 * found.score:.0f} %")]

    def save(self, network: TinyViT, path: Path) -> None:
        """Write a file for :meth:`TinyViT.from_config`."""
        save_checkpoint(network, path)


#: The default task of :func:`~kornia_tinyvit.training.train`.
CLASSIFICATION = ClassificationTask()
