"""Training: recipes, the loop, what each task adds to it, and evaluation."""

from kornia_tinyvit.training.evaluation import evaluate
from kornia_tinyvit.training.loop import TrainingResult, train
from kornia_tinyvit.training.metrics.average_precision import BoxMetrics, DetectionScores
from kornia_tinyvit.training.metrics.promptable import PromptMetrics
from kornia_tinyvit.training.metrics.semantic import PixelMetrics
from kornia_tinyvit.training.recipes import RECIPES, Recipe, find_recipe
from kornia_tinyvit.training.tasks.base import Objective
from kornia_tinyvit.training.tasks.classification import Labels
from kornia_tinyvit.training.tasks.detection import (
    DETECTION,
    BoxAugmentation,
    BoxedSamples,
    DetectionLoss,
    DetectorTraining,
)
from kornia_tinyvit.training.tasks.promptable import PROMPTABLE, MaskLoss, PromptedSAM, build_sam
from kornia_tinyvit.training.tasks.prompts import PromptAugmentation, PromptedSamples, Prompting
from kornia_tinyvit.training.tasks.semantic import (
    SEMANTIC,
    MaskAugmentation,
    MaskedSamples,
    PixelLabels,
    balanced_weights,
)

__all__ = [
    "DETECTION",
    "PROMPTABLE",
    "RECIPES",
    "SEMANTIC",
    "BoxAugmentation",
    "BoxMetrics",
    "BoxedSamples",
    "DetectionLoss",
    "DetectionScores",
    "DetectorTraining",
    "Labels",
    "MaskAugmentation",
    "MaskLoss",
    "MaskedSamples",
    "Objective",
    "PixelLabels",
    "PixelMetrics",
    "PromptAugmentation",
    "PromptMetrics",
    "PromptedSAM",
    "PromptedSamples",
    "Prompting",
    "Recipe",
    "TrainingResult",
    "balanced_weights",
    "build_sam",
    "evaluate",
    "find_recipe",
    "train",
]
