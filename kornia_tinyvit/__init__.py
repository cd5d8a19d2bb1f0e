"""TinyViT for kornia and PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from kornia_tinyvit.version import __version__

if TYPE_CHECKING:
    from kornia_tinyvit.detection import TinyViTDetector
    from kornia_tinyvit.sam import MobileSAM
    from kornia_tinyvit.semantic import SemanticSegmenter

__all__ = [
    "CheckpointError",
    "ImageClassifier",
    "LoadReport",
    "MobileSAM",
    "Prediction",
    "PretrainedWeights",
    "SemanticSegmenter",
    "TinyViT",
    "TinyViTConfig",
    "TinyViTDetector",
    "__version__",
    "list_pretrained",
    "load_checkpoint",
    "save_checkpoint",
]

# Imported on first use: their imports from kornia take longer than all of the above.
_LAZY = {"MobileSAM": "sam", "SemanticSegmenter": "semantic", "TinyViTDetector": "detection"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
