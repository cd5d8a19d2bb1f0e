"""MobileSAM in transformers' SAM: a TinyViT as its vision encoder."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamModel,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionEncoderOutput,
)
from transformers.utils.output_capturing import capture_outputs

from kornia_tinyvit.huggingface.card import TAGS
from kornia_tinyvit.huggingface.modeling import (
    AttentionWeights,
    build_network,
    init_weights,
    match_precision,
    refuse_silent_attentions,
)
from kornia_tinyvit.huggingface.sam_configuration import TinyVitSamConfig, TinyVitSamVisionConfig
from kornia_tinyvit.model import Blocks

__all__ = ["TinyVitSamModel", "TinyVitSamVisionEncoder"]


class TinyVitSamVisionEncoder(SamPreTrainedModel):
    """MobileSAM's encoder.

    Attributes:
        network: the :class:`~kornia_tinyvit.TinyViT`.

    Args:
        config: the configuration.
    """

    config: TinyVitSamVisionConfig  # type: ignore[assignment]
    config_class = TinyVitSamVisionConfig
    _no_split_modules = ["TinyViT"]  # noqa: RUF012 - transformers reads it from the class
    _can_record_outputs = {"hidden_states": Blocks, "attentions": AttentionWeights}  # noqa: RUF012

    def __init__(self, config: TinyVitSamVisionConfig) -> None:
        super().__init__(config)
        self.network = build_network(config.to_network(), config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the stem."""
        return self.network.patch_embed

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SamVisionEncoderOutput | tuple[Tensor, ...]:
        """Embed pictures.

        Args:
            pixel_values: pictures :math:`(B, 3, S, S)` as the image processor makes them.
            **kwargs: ``output_hidden_states``, ``output_attentions`` and ``return_dict``.

        Returns:
            ``last_hidden_state``, the embedding :math:`(B, 256, S/16, S/16)`, and what was asked for.

        Raises:
            TypeError: if the pictures are not a floating point tensor.
            ValueError: if their shape is another, or attentions are asked for and the implementation has none.
        """
        refuse_silent_attentions(self.config, kwargs)
        return SamVisionEncoderOutput(last_hidden_state=self.network(match_precision(pixel_values, self.network)))


class TinyVitSamModel(SamModel):
    """transformers' ``SamModel`` with a TinyViT as its encoder: MobileSAM (arXiv:2306.14289).

    Prompts, masks and scores are those of transformers' ``SamModel``; the masks equal those of
    :class:`~kornia_tinyvit.sam.MobileSAM`.

    Args:
        config: the configuration.
    """

    config: TinyVitSamConfig
    config_class = TinyVitSamConfig
    model_tags = [*TAGS, "mobile-sam"]  # noqa: RUF012
    _no_split_modules = ["TinyViT", "SamTwoWayTransformer"]  # noqa: RUF012

    def __init__(self, config: TinyVitSamConfig) -> None:
        # SamModel's own constructor would build the encoder that this one replaces.
        SamPreTrainedModel.__init__(self, config)
        vision, decoder = cast("Any", config.vision_config), cast("Any", config.mask_decoder_config)
        self.shared_image_embedding = SamPositionalEmbedding(vision)
        self.vision_encoder: Any = TinyVitSamVisionEncoder(vision)
        self.prompt_encoder = SamPromptEncoder(config)
        decoder._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(decoder)
        self.post_init()
