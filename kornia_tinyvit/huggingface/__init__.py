"""Models, configurations and image processors for transformers.

Importing this package registers ``"tinyvit"`` with ``AutoConfig``, ``AutoModel``, ``AutoModelForImageClassification``,
``AutoBackbone`` and ``AutoImageProcessor``.
"""

from kornia_tinyvit.extras import optional_imports

with optional_imports("kornia_tinyvit.huggingface needs transformers", "'kornia-tinyvit[hf]'"):
    import transformers

from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.huggingface.conversion import from_checkpoint, from_tinyvit, to_tinyvit
from kornia_tinyvit.huggingface.folders import save_hub_folder
from kornia_tinyvit.huggingface.modeling import (
    TinyVitBackbone,
    TinyVitForImageClassification,
    TinyVitModel,
    TinyVitPreTrainedModel,
)
from kornia_tinyvit.huggingface.processing import TinyVitImageProcessor
from kornia_tinyvit.huggingface.sam import (
    TinyVitSamConfig,
    TinyVitSamImageProcessor,
    TinyVitSamModel,
    TinyVitSamVisionConfig,
    TinyVitSamVisionEncoder,
    from_mobile_sam,
    to_mobile_sam,
)

__all__ = [
    "TinyVitBackbone",
    "TinyVitConfig",
    "TinyVitForImageClassification",
    "TinyVitImageProcessor",
    "TinyVitModel",
    "TinyVitPreTrainedModel",
    "TinyVitSamConfig",
    "TinyVitSamImageProcessor",
    "TinyVitSamModel",
    "TinyVitSamVisionConfig",
    "TinyVitSamVisionEncoder",
    "from_checkpoint",
    "from_mobile_sam",
    "from_tinyvit",
    "save_hub_folder",
    "to_mobile_sam",
    "to_tinyvit",
]

for _config in (TinyVitConfig, TinyVitSamConfig, TinyVitSamVisionConfig):
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _auto, _config, _class in (
    (transformers.AutoModel, TinyVitConfig, TinyVitModel),
    (transformers.AutoModelForImageClassification, TinyVitConfig, TinyVitForImageClassification),
    (transformers.AutoBackbone, TinyVitConfig, TinyVitBackbone),
    (transformers.AutoModel, TinyVitSamConfig, TinyVitSamModel),
    (transformers.AutoModelForMaskGeneration, TinyVitSamConfig, TinyVitSamModel),
    (transformers.AutoProcessor, TinyVitSamConfig, transformers.SamProcessor),
):
    _auto.register(_config, _class, exist_ok=True)
for _config, _processor in ((TinyVitConfig, TinyVitImageProcessor), (TinyVitSamConfig, TinyVitSamImageProcessor)):
    # The same class for every backend: it requires neither.
    _backends: dict[str, type] = dict.fromkeys(("torchvision", "pil"), _processor)
    transformers.AutoImageProcessor.register(_config, image_processor_classes=_backends, exist_ok=True)
