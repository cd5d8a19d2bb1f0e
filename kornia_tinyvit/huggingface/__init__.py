"""transformers' classes over the same network, for people whose code is transformers already.

Importing this package registers them with transformers: ``AutoConfig``, ``AutoModel``,
``AutoModelForImageClassification``, ``AutoBackbone`` and ``AutoImageProcessor`` then know ``"tinyvit"``.
"""

from kornia_tinyvit.extras import MissingExtraError

try:
    import transformers  # noqa: F401
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
from kornia_tinyvit.huggingface.registration import register
from kornia_tinyvit.huggingface.sam import TinyVitSamModel, TinyVitSamVisionEncoder
from kornia_tinyvit.huggingface.sam_configuration import TinyVitSamConfig, TinyVitSamVisionConfig
from kornia_tinyvit.huggingface.sam_conversion import from_mobile_sam, to_mobile_sam
from kornia_tinyvit.huggingface.sam_processing import TinyVitSamImageProcessor

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

register()
