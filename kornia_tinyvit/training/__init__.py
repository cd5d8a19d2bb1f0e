"""Labelled pictures and masks, evaluation, recipes and the training loop."""

from importlib import import_module
from typing import TYPE_CHECKING

from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.training.boxes import BoxedImages, Objects
from kornia_tinyvit.training.data import BrokenPictureError, LabelledImages
from kornia_tinyvit.training.instances import InstanceImages
from kornia_tinyvit.training.masks import IGNORED, MaskedImages
from kornia_tinyvit.training.recipes import RECIPES, Recipe, find_recipe

if TYPE_CHECKING:
    from kornia_tinyvit.training.average_precision import BoxMetrics, DetectionScores
    from kornia_tinyvit.training.detection import (
        DETECTION,
        BoxAugmentation,
        BoxedSamples,
        DetectionLoss,
        DetectorTraining,
        evaluate_detector,
    )
    from kornia_tinyvit.training.loop import TrainingResult, train
    from kornia_tinyvit.training.objectives import FeatureRegression, Labels, OnlineTeacher, StoredLabels
    from kornia_tinyvit.training.promptable import (
        PROMPTABLE,
        MaskLoss,
        PromptAugmentation,
        PromptedSAM,
        PromptedSamples,
        Prompting,
        PromptMetrics,
        build_sam,
        central_points,
        evaluate_prompts,
        mask_boxes,
    )
    from kornia_tinyvit.training.semantic import (
        SEMANTIC,
        MaskAugmentation,
        MaskedSamples,
        PixelLabels,
        PixelMetrics,
        balanced_weights,
        evaluate_segmenter,
    )

# Loaded on first use: these rest on kornia_tinyvit.distillation, which rests on the data above.
_LAZY = {
    "BoxMetrics": "average_precision",
    "DetectionScores": "average_precision",
    "DETECTION": "detection",
    "BoxAugmentation": "detection",
    "BoxedSamples": "detection",
    "DetectionLoss": "detection",
    "DetectorTraining": "detection",
    "evaluate_detector": "detection",
    "train": "loop",
    "TrainingResult": "loop",
    "FeatureRegression": "objectives",
    "Labels": "objectives",
    "OnlineTeacher": "objectives",
    "StoredLabels": "objectives",
    "PROMPTABLE": "promptable",
    "MaskLoss": "promptable",
    "PromptAugmentation": "promptable",
    "PromptMetrics": "promptable",
    "PromptedSAM": "promptable",
    "PromptedSamples": "promptable",
    "Prompting": "promptable",
    "build_sam": "promptable",
    "central_points": "promptable",
    "evaluate_prompts": "promptable",
    "mask_boxes": "promptable",
    "SEMANTIC": "semantic",
    "MaskAugmentation": "semantic",
    "MaskedSamples": "semantic",
    "PixelLabels": "semantic",
    "PixelMetrics": "semantic",
    "balanced_weights": "semantic",
    "evaluate_segmenter": "semantic",
}

__all__ = [
    "DETECTION",
    "IGNORED",
    "PROMPTABLE",
    "RECIPES",
    "SEMANTIC",
    "BoxAugmentation",
    "BoxMetrics",
    "BoxedImages",
    "BoxedSamples",
    "BrokenPictureError",
    "DetectionLoss",
    "DetectionScores",
    "DetectorTraining",
    "FeatureRegression",
    "InstanceImages",
    "LabelledImages",
    "Labels",
    "MaskAugmentation",
    "MaskLoss",
    "MaskedImages",
    "MaskedSamples",
    "MissingExtraError",
    "Objects",
    "OnlineTeacher",
    "PixelLabels",
    "PixelMetrics",
    "PromptAugmentation",
    "PromptMetrics",
    "PromptedSAM",
    "PromptedSamples",
    "Prompting",
    "Recipe",
    "StoredLabels",
    "TrainingResult",
    "balanced_weights",
    "build_sam",
    "central_points",
    "evaluate_detector",
    "evaluate_prompts",
    "evaluate_segmenter",
    "find_recipe",
    "mask_boxes",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
