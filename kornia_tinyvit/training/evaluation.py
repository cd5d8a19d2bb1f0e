"""Evaluation of the networks of all tasks."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack, overload

from torch import nn

from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.data import ClassificationDataset, DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.metrics.average_precision import DetectionScores
from kornia_tinyvit.training.metrics.classification import ClassificationScores
from kornia_tinyvit.training.metrics.promptable import PromptScores
from kornia_tinyvit.training.metrics.semantic import SegmentationScores
from kornia_tinyvit.training.tasks.base import Evaluator, Task, evaluate_network
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION, ClassificationEvaluator
from kornia_tinyvit.training.tasks.detection import DETECTION
from kornia_tinyvit.training.tasks.promptable import PromptedSAM, PromptEvaluator
from kornia_tinyvit.training.tasks.semantic import SEMANTIC

__all__ = ["create_evaluator", "evaluate"]


class _Options(TypedDict, total=False):
    batch_size: int
    workers: int
    progress: bool


class _DetectorOptions(_Options, total=False):
    nms_threshold: float | None


@overload
def evaluate(
    network: ImageClassifier, images: ClassificationDataset, **options: Unpack[_Options]
) -> ClassificationScores: ...


@overload
def evaluate(
    network: SemanticSegmenter, images: SegmentationDataset, **options: Unpack[_Options]
) -> SegmentationScores: ...


@overload
def evaluate(
    network: TinyViTDetector, images: DetectionDataset, **options: Unpack[_DetectorOptions]
) -> DetectionScores: ...


@overload
def evaluate(network: MobileSAM, images: InstanceDataset, **options: Unpack[_Options]) -> PromptScores: ...


def evaluate(
    network: Any, images: Any, batch_size: int = 8, workers: int = 0, progress: bool = False, **options: Any
) -> Any:
    """Evaluate a network on whole images with the preprocessing of its ``predict``.

    A MobileSAM is prompted with the tight box of each instance and with one point at
    :func:`~kornia_tinyvit.ops.central_points`, for which the mask of the highest predicted IoU counts.

    Args:
        network: the network; a MobileSAM needs a square input.
        images: the data set. Classes are matched by name where both sides have names, else by index. Data may have some
            of the classes.
        batch_size: images per forward pass of a classifier or a detector.
        workers: number of loader processes.
        progress: show a progress bar.
        **options: ``nms_threshold`` of a detector, see :meth:`TinyViTDetector.predict`.

    Returns:
        :class:`~kornia_tinyvit.training.metrics.classification.ClassificationScores`,
        :class:`~kornia_tinyvit.training.metrics.semantic.SegmentationScores`,
        :class:`~kornia_tinyvit.training.DetectionScores` or
        :class:`~kornia_tinyvit.training.metrics.promptable.PromptScores`.

    Raises:
        TypeError: if the network is of another class, or does not have an option.
        ValueError: if the data set has other classes than the network, or no labels.
        BrokenImageError: if an image cannot be read.
        MissingExtraError: for detectors, if pycocotools is missing.
    """
    module, evaluator = create_evaluator(network, images, batch_size=batch_size, **options)
    evaluate_network(module, evaluator, workers, progress)
    return evaluator.counts.compute()


def create_evaluator(network: nn.Module, images: Any, **options: Any) -> tuple[nn.Module, Evaluator]:
    """Return the module and the evaluator for :func:`~kornia_tinyvit.training.tasks.base.evaluate_network`.

    Args:
        network: see :func:`evaluate`.
        images: see :func:`evaluate`.
        **options: ``batch_size`` and ``skip_broken``, see :class:`~kornia_tinyvit.training.tasks.base.Evaluator`, and
            ``nms_threshold`` of a detector.

    Raises:
        TypeError: if the network is not supported by :func:`evaluate`.
        ValueError: if the data set has other classes than the network.
    """
    options["device"] = next(network.parameters()).device
    match network:
        case ImageClassifier():
            images = CLASSIFICATION.match(images, network.model.config, network.class_names)
            return network, ClassificationEvaluator(images, len(network.class_names), **options)
        case SemanticSegmenter() | TinyViTDetector():
            task: Task = SEMANTIC if isinstance(network, SemanticSegmenter) else DETECTION
            images = task.match(images, network.config, network.class_names)
            return network, task.evaluator(images, network.config, network.backbone.preprocessing, **options)
        case MobileSAM():
            prompted = PromptedSAM(network)
            return prompted, PromptEvaluator(images, prompted.config, **options)
    raise TypeError(
        f"Expected an ImageClassifier, SemanticSegmenter, TinyViTDetector or MobileSAM; got {type(network)}."
    )
