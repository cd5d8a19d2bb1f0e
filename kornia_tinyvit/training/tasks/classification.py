"""Training classifiers: the loss of their labels, and their accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import save_checkpoint
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
    """Cross-entropy of the labels, mixed and smoothed as the augmentation's preset says.

    Args:
        augmentation: what the batches are augmented with.
    """

    def __init__(self, augmentation: ReplayableAugmentation) -> None:
        self.augmentation = augmentation

    def describe(self) -> dict[str, Any]:
        """Return its kind and the smoothing."""
        return {"kind": "labels", "label_smoothing": self.augmentation.preset.label_smoothing}

    def __call__(self, outputs: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """Return the losses :math:`(B,)`."""
        targets = self.augmentation.soft_labels(batch.labels, batch.draws, outputs.shape[1])
        return F.cross_entropy(outputs.float(), targets.to(outputs.device), reduction="none")


class ClassificationEvaluator(Evaluator):
    """A single measurement of a classifier on labeled images.

    Args:
        images: the data set, with the classes of the network.
        num_classes: classes of the network.
        prepare: makes the network's input of a list of images :math:`(3, H, W)` in [0, 1] on the device.
        **options: as for :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.
    """

    def __init__(
        self, images: ClassificationDataset, num_classes: int, prepare: Callable[[list[Tensor]], Any], **options: Any
    ) -> None:
        super().__init__(images, ClassificationMetrics(num_classes), **options)
        self.prepare = prepare

    def measure(self, network: nn.Module, samples: list[tuple[int, tuple[Tensor, int]]]) -> None:
        """Count right answers; samples are indices with an image :math:`(3, H, W)` in [0, 1] and its class."""
        images = [image.to(self.device) for _, (image, _) in samples]
        logits = network(self.prepare(images or [torch.zeros(3, 32, 32, device=self.device)]))
        if samples:
            self.counts.update(logits, torch.tensor([label for _, (_, label) in samples]))

    def measures(self) -> dict[str, float]:
        """Return top-1 and top-5 in per cent."""
        found = self.counts.compute()
        return {"top1": round(found.top1, 4), "top5": round(found.top5, 4)}


class ClassificationTask(Task):
    """One class an image: top-1 and top-5 in per cent of :class:`ClassificationDataset`."""

    metric = "top1"
    may_lack_classes = True

    def evaluator(
        self, images: ClassificationDataset, config: TinyViTConfig, samples: ReplayedSamples, **options: Any
    ) -> ClassificationEvaluator:
        """Begin to count right answers."""
        settings = _validated(samples)
        pipeline = EvaluationPipeline.from_preprocessing(settings).to(options["device"])

        def prepare(raw: list[Tensor]) -> Tensor:
            return torch.cat([pipeline(image[None]) for image in raw])

        return ClassificationEvaluator(images, config.num_classes, prepare, **options)

    def preprocessing(self, model: nn.Module, samples: ReplayedSamples) -> Preprocessing:
        """Return the statistics that the samples are normalized with, at the network's own size."""
        return _validated(samples).resize(cast("TinyViT", model).config.img_size)

    def writer(
        self,
        config: TinyViTConfig,
        state: dict[str, Tensor],
        class_names: Sequence[str] | None,
        preprocessing: Preprocessing,
    ) -> Callable[[Path], object]:
        """Write files for :meth:`TinyViT.from_config`."""
        plain = TinyViT.from_config(config)
        plain.preprocessing = preprocessing
        plain.load_state_dict(state)
        return partial(save_checkpoint, plain, class_names=class_names)


def _validated(samples: ReplayedSamples) -> Preprocessing:
    """Return the preprocessing of validation: size and statistics are the augmentation's."""
    augmentation = samples.augmentation
    # The shortest numbers that are these in single precision.
    mean, std = (tuple(float(str(each)) for each in x.numpy()) for x in (augmentation.mean, augmentation.std))
    return Preprocessing(augmentation.img_size, mean=mean, std=std)


#: The task of classifiers, which :func:`~kornia_tinyvit.training.train` takes if no other is named.
CLASSIFICATION = ClassificationTask()
