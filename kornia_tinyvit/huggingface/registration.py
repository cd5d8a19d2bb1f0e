"""Make transformers' Auto classes know the classes of this package."""

from __future__ import annotations

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.huggingface.modeling import TinyVitBackbone, TinyVitForImageClassification, TinyVitModel
from kornia_tinyvit.huggingface.processing import TinyVitImageProcessor

__all__ = ["register"]


def register() -> None:
    """Register everything; doing it again changes nothing."""
    AutoConfig.register(TinyVitConfig.model_type, TinyVitConfig, exist_ok=True)
    AutoModel.register(TinyVitConfig, TinyVitModel, exist_ok=True)
    AutoModelForImageClassification.register(TinyVitConfig, TinyVitForImageClassification, exist_ok=True)
    AutoBackbone.register(TinyVitConfig, TinyVitBackbone, exist_ok=True)
    # Whichever backend is asked for, torchvision's or PIL's, it is this one, which needs neither.
    processors: dict[str, type] = {"torchvision": TinyVitImageProcessor, "pil": TinyVitImageProcessor}
    AutoImageProcessor.register(TinyVitConfig, image_processor_classes=processors, exist_ok=True)
