"""What MobileSAM is, as transformers stores it."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.models.sam.configuration_sam import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.model import NECK_CHANNELS

__all__ = ["TinyVitSamConfig", "TinyVitSamVisionConfig"]


@strict
class TinyVitSamVisionConfig(TinyVitConfig):
    """The configuration of MobileSAM's encoder: a TinyViT of stride 16 with a neck.

    Args:
        image_size: side in pixels of the square input, a multiple of 16.
        head_classes: classes of the head that the published file holds and the embedding does not use.
        **kwargs: the other fields of :class:`TinyVitConfig`.
    """

    model_type = "tinyvit_sam_vision"
    base_config_key = "vision_config"

    image_size: int = 1024
    head_classes: int = 1000

    def __post_init__(self, **kwargs: Any) -> None:
        # What transformers' SAM asks its encoder's configuration for.
        self.output_channels = NECK_CHANNELS
        self.num_pos_feats = NECK_CHANNELS // 2
        self.scale = 1.0  # of random position codes, as in segment-anything
        super().__post_init__(**kwargs)

    def to_network(self, num_classes: int | None = None) -> TinyViTConfig:
        """Return the configuration of the network.

        Args:
            num_classes: classes of its head, instead of ``head_classes``.

        Raises:
            ValueError: if a field is out of its range.
        """
        classes = self.head_classes if num_classes is None else num_classes
        return super().to_network(classes).replace(mobile_sam=True)


@strict
class TinyVitSamConfig(SamConfig):
    """The configuration of a :class:`TinyVitSamModel`.

    Args:
        vision_config: a :class:`TinyVitSamVisionConfig` or its values; the published 5m if left out.
        prompt_encoder_config: values of transformers' ``SamPromptEncoderConfig``; its picture size follows the encoder.
        mask_decoder_config: values of transformers' ``SamMaskDecoderConfig``.
        **kwargs: fields of transformers' ``SamConfig``.
    """

    model_type = "tinyvit_sam"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "prompt_encoder_config": SamPromptEncoderConfig,
        "mask_decoder_config": SamMaskDecoderConfig,
        "vision_config": TinyVitSamVisionConfig,
    }

    def __post_init__(self, **kwargs: Any) -> None:
        vision = self.vision_config
        if vision is None or isinstance(vision, dict):
            vision = TinyVitSamVisionConfig(**(vision or {}))
        self.vision_config = vision
        if self.prompt_encoder_config is None:
            self.prompt_encoder_config = {"image_size": vision.image_size}
        if self.mask_decoder_config is None:
            # The originals leave torch's default to the norms of the decoder; transformers' differs.
            self.mask_decoder_config = {"layer_norm_eps": 1e-5}
        super().__post_init__(**kwargs)
