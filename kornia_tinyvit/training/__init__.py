"""Training: recipes, the loop, what each task adds to it, and evaluation."""

from kornia_tinyvit.training.batch_norm import freeze_statistics
from kornia_tinyvit.training.evaluation import evaluate
from kornia_tinyvit.training.figures import save_predictions
from kornia_tinyvit.training.freezing import freeze_parts
from kornia_tinyvit.training.loop import TrainingResult, train
from kornia_tinyvit.training.metrics.average_precision import DetectionMetrics, DetectionScores
from kornia_tinyvit.training.metrics.promptable import PromptMetrics
from kornia_tinyvit.training.metrics.semantic import SegmentationMetrics
from kornia_tinyvit.training.recipes import RECIPES, Recipe, choose_recipe, find_recipe
from kornia_tinyvit.training.tasks.base import Loss
from kornia_tinyvit.training.tasks.classification import ClassificationLoss
from kornia_tinyvit.training.tasks.detection import (
    DETECTION,
    BoxAugmentation,
    DetectionLoss,
    DetectionSamples,
    DetectorTraining,
)
from kornia_tinyvit.training.tasks.promptable import PROMPTABLE, MaskLoss, PromptedSAM, build_sam
from kornia_tinyvit.training.tasks.prompts import PromptAugmentation, PromptedSamples, Prompting
from kornia_tinyvit.training.tasks.semantic import (
    SEMANTIC,
    MaskAugmentation,
    SegmentationLoss,
    SegmentationSamples,
    balanced_weights,
)

__all__ = [
    "DETECTION",
    "PROMPTABLE",
    "RECIPES",
    "SEMANTIC",
    "BoxAugmentation",
    "ClassificationLoss",
    "DetectionLoss",
    "DetectionMetrics",
    "DetectionSamples",
    "DetectionScores",
    "DetectorTraining",
    "Loss",
    "MaskAugmentation",
    "MaskLoss",
    "PromptAugmentation",
    "PromptMetrics",
    "PromptedSAM",
    "PromptedSamples",
    "Prompting",
    "Recipe",
    "SegmentationLoss",
    "SegmentationMetrics",
    "SegmentationSamples",
    "TrainingResult",
    "balanced_weights",
    "build_sam",
    "choose_recipe",
    "evaluate",
    "find_recipe",
    "freeze_parts",
    "freeze_statistics",
    "save_predictions",
    "train",
]
