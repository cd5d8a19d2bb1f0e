"""Make transformers' Auto classes know the classes of this package."""

from __future__ import annotations

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskGeneration,
    AutoProcessor,
    PreTrainedConfig,
    SamProcessor,
)

from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.huggingface.modeling import TinyVitBackbone, TinyVitForImageClassification, TinyVitModel
from kornia_tinyvit.huggingface.processing import TinyVitImageProcessor
from kornia_tinyvit.huggingface.sam import TinyVitSamModel
from kornia_tinyvit.huggingface.sam_configuration import TinyVitSamConfig, TinyVitSamVisionConfig
from kornia_tinyvit.huggingface.sam_processing import TinyVitSamImageProcessor

__all__ = ["register"]


def register() -> None:
    """Register everything; doing it again changes nothing."""
    AutoConfig.register(TinyVitConfig.model_type, TinyVitConfig, exist_ok=True)
    AutoModel.register(TinyVitConfig, TinyVitModel, exist_ok=True)
    AutoModelForImageClassification.register(TinyVitConfig, TinyVitForImageClassification, exist_ok=True)
    AutoBackbone.register(TinyVitConfig, TinyVitBackbone, exist_ok=True)
    _register_processor(TinyVitConfig, TinyVitImageProcessor)
    for config in (TinyVitSamConfig, TinyVitSamVisionConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(TinyVitSamConfig, TinyVitSamModel, exist_ok=True)
    AutoModelForMaskGeneration.register(TinyVitSamConfig, TinyVitSamModel, exist_ok=True)
    _register_processor(TinyVitSamConfig, TinyVitSamImageProcessor)
    AutoProcessor.register(TinyVitSamConfig, SamProcessor, exist_ok=True)


def _register_processor(config: type[PreTrainedConfig], processor: type) -> None:
    """Register an image processor for every backend that can be asked for: it needs none of them."""
    classes: dict[str, type] = {"torchvision": processor, "pil": processor}
    AutoImageProcessor.register(config, image_processor_classes=classes, exist_ok=True)
