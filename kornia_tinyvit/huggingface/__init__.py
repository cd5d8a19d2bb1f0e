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
from kornia_tinyvit.huggingface.modeling import (
    TinyVitBackbone,
    TinyVitForImageClassification,
    TinyVitModel,
    TinyVitPreTrainedModel,
)
from kornia_tinyvit.huggingface.processing import TinyVitImageProcessor
from kornia_tinyvit.huggingface.registration import register

__all__ = [
    "TinyVitBackbone",
    "TinyVitConfig",
    "TinyVitForImageClassification",
    "TinyVitImageProcessor",
    "TinyVitModel",
    "TinyVitPreTrainedModel",
]

register()
