"""TinyViT as one differentiable component for kornia and PyTorch."""

from kornia_tinyvit.checkpoints import (
    CheckpointError,
    LoadReport,
    PretrainedWeights,
    list_pretrained,
    load_checkpoint,
    save_checkpoint,
)
from kornia_tinyvit.classification import ImageClassifier, Prediction
from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.model import TinyViT

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ImageClassifier",
    "LoadReport",
    "Prediction",
    "PretrainedWeights",
    "TinyViT",
    "TinyViTConfig",
    "list_pretrained",
    "load_checkpoint",
    "save_checkpoint",
]
