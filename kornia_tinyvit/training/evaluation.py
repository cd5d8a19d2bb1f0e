"""Measuring networks for a task on data sets of their own."""

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
from kornia_tinyvit.training.metrics.semantic import SegmentationScores
from kornia_tinyvit.training.tasks.base import Evaluator, Task, evaluate_network
from kornia_tinyvit.training.tasks.classification import ClassificationEvaluator
from kornia_tinyvit.training.tasks.detection import DETECTION
from kornia_tinyvit.training.tasks.promptable import PromptedSAM, PromptEvaluator
from kornia_tinyvit.training.tasks.semantic import SEMANTIC

__all__ = ["create_evaluator", "evaluate"]


class _Options(TypedDict, total=False):
    batch_size: int
    workers: int
    progress: bool


@overload
def evaluate(
    network: ImageClassifier, images: ClassificationDataset, **options: Unpack[_Options]
) -> ClassificationScores: ...


@overload
def evaluate(
    network: SemanticSegmenter, images: SegmentationDataset, **options: Unpack[_Options]
) -> SegmentationScores: ...


@overload
def evaluate(network: TinyViTDetector, images: DetectionDataset, **options: Unpack[_Options]) -> DetectionScores: ...


@overload
def evaluate(network: MobileSAM, images: InstanceDataset, **options: Unpack[_Options]) -> dict[str, float]: ...


def evaluate(network: Any, images: Any, batch_size: int = 8, workers: int = 0, progress: bool = False) -> Any:
    """Measure a network on whole images, at their own size.

    Args:
        network: the network, which sees images as its ``predict`` does; a MobileSAM must have a square input.
        images: the data set. The classes of a classifier are matched by name, or by position where none agrees; those
            of other networks must be the same in the same order.
        batch_size: how many images a classifier or a detector takes at a time.
        workers: processes that read images.
        progress: show a bar.

    Returns:
        :class:`~kornia_tinyvit.training.metrics.classification.ClassificationScores` of a classifier,
        :class:`~kornia_tinyvit.training.metrics.semantic.SegmentationScores` of a segmenter,
        :class:`~kornia_tinyvit.training.DetectionScores` of a detector. Of a MobileSAM a dictionary: how many
        ``instances`` there were, and the mean IoU in per cent of one tight box each, ``box_iou``, and of one point each
        at :func:`~kornia_tinyvit.ops.central_points`, ``point_iou``, for which the mask with the highest score counts.

    Raises:
        TypeError: if the network is none of these.
        ValueError: if the data set has other classes than the network, or no labels.
        BrokenImageError: if an image cannot be read.
        MissingExtraError: for detectors if pycocotools is missing.
    """
    module, evaluator = create_evaluator(network, images, batch_size=batch_size)
    evaluate_network(module, evaluator, workers, progress)
    return evaluator.counts.compute()


def create_evaluator(network: nn.Module, images: Any, **options: Any) -> tuple[nn.Module, Evaluator]:
    """Return what :func:`evaluate_network` takes to measure a network on a data set.

    Args:
        network: as for :func:`evaluate`.
        images: as for :func:`evaluate`.
        **options: ``batch_size`` and ``skip_broken``, as for :class:`~kornia_tinyvit.training.tasks.base.Evaluator`.

    Raises:
        TypeError: if the network is none that :func:`evaluate` knows.
        ValueError: if the data set has other classes than the network.
    """
    options["device"] = next(network.parameters()).device
    match network:
        case ImageClassifier():
            known = images.with_classes(network.class_names)
            return network, ClassificationEvaluator(known, len(network.class_names), list, **options)
        case SemanticSegmenter() | TinyViTDetector():
            task: Task = SEMANTIC if isinstance(network, SemanticSegmenter) else DETECTION
            task.check(images, network.config, network.class_names)
            return network, task.evaluator(images, network.config, None, **options)
        case MobileSAM():
            prompted = PromptedSAM(network)
            return prompted, PromptEvaluator(images, prompted.config, **options)
    raise TypeError(
        f"Expected an ImageClassifier, SemanticSegmenter, TinyViTDetector or MobileSAM; got {type(network)}."
    )
