"""transformers' classes over the same network, for people whose code is transformers already.

Importing this package registers them with transformers: ``AutoConfig``, ``AutoModel``,
``AutoModelForImageClassification``, ``AutoBackbone`` and ``AutoImageProcessor`` then know ``"tinyvit"``.
"""

from kornia_tinyvit.extras import MissingExtraError

try:
    import transformers
except ImportError as error:
    raise MissingExtraError(
        "kornia_tinyvit.huggingface needs transformers: pip install 'kornia-tinyvit[hf]'."
    ) from error

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
    # For every backend that can be asked for: they need none of them.
    _backends: dict[str, type] = {"torchvision": _processor, "pil": _processor}
    transformers.AutoImageProcessor.register(_config, image_processor_classes=_backends, exist_ok=True)
