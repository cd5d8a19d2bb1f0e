"""TinyViT as one differentiable component for kornia and PyTorch."""

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

if TYPE_CHECKING:
    from kornia_tinyvit.segmentation import MobileSAM

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ImageClassifier",
    "LoadReport",
    "MobileSAM",
    "Prediction",
    "PretrainedWeights",
    "TinyViT",
    "TinyViTConfig",
    "list_pretrained",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Import what is heavier than torch and kornia's core when it is first asked for."""
    if name == "MobileSAM":
        from kornia_tinyvit.segmentation import MobileSAM

        return MobileSAM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
