"""Training: recipes, the loop, and what each task adds to it."""

from kornia_tinyvit.training.loop import TrainingResult, train
from kornia_tinyvit.training.metrics.average_precision import BoxMetrics, DetectionScores
from kornia_tinyvit.training.recipes import RECIPES, Recipe, find_recipe
from kornia_tinyvit.training.tasks.classification import Labels
from kornia_tinyvit.training.tasks.detection import (
    DETECTION,
    BoxAugmentation,
    BoxedSamples,
    DetectionLoss,
    DetectorTraining,
    evaluate_detector,
)
from kornia_tinyvit.training.tasks.promptable import (
    PROMPTABLE,
    MaskLoss,
    PromptAugmentation,
    PromptedSAM,
    PromptedSamples,
    Prompting,
    PromptMetrics,
    build_sam,
    evaluate_prompts,
)
from kornia_tinyvit.training.tasks.semantic import (
    SEMANTIC,
    MaskAugmentation,
    MaskedSamples,
    PixelLabels,
    PixelMetrics,
    balanced_weights,
    evaluate_segmenter,
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
    "evaluate_detector",
    "evaluate_prompts",
    "evaluate_segmenter",
    "find_recipe",
    "train",
]
