"""MobileSAM for transformers: model, vision encoder, configurations and image processor."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
from huggingface_hub.dataclasses import strict
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.sam.configuration_sam import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam.modeling_sam import (
    SamMaskDecoder,
    SamModel,
    SamPositionalEmbedding,
    SamPreTrainedModel,
    SamPromptEncoder,
    SamVisionEncoderOutput,
)
from transformers.utils.output_capturing import capture_outputs

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.huggingface.conversion import match_original, rename
from kornia_tinyvit.huggingface.modeling import TAGS, TinyVitPreTrainedModel, build_network
from kornia_tinyvit.model import NECK_CHANNELS
from kornia_tinyvit.modules import plain_state_dict
from kornia_tinyvit.ops import RLE, decode_rle, nms
from kornia_tinyvit.sam import MobileSAM

__all__ = [
    "TinyVitSamConfig",
    "TinyVitSamImageProcessor",
    "TinyVitSamModel",
    "TinyVitSamVisionConfig",
    "TinyVitSamVisionEncoder",
    "from_mobile_sam",
    "to_mobile_sam",
]

#: Prefixes of tensor names in segment-anything and kornia, and in transformers.
_NAMES = (
    (r"image_encoder\.", "vision_encoder.network."),
    (r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    (r"prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"(mask_decoder\.transformer\.(?:layers\.\d+\.)?)norm", r"\1layer_norm"),
    (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.0\.", r"\1proj_in."),
    (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.1\.", r"\1layers.0."),
    (r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)layers\.2\.", r"\1proj_out."),
)
_TIED = "prompt_encoder.shared_embedding.positional_embedding"


@strict
class TinyVitSamVisionConfig(TinyVitConfig):
    """Configuration of MobileSAM's encoder: a TinyViT of stride 16 with a neck.

    Args:
        image_size: side in pixels of the square input, a multiple of 16.
        head_classes: number of classes of the unused head in the published file.
        **kwargs: other fields of :class:`TinyVitConfig`.
    """

    model_type = "tinyvit_sam_vision"
    base_config_key = "vision_config"

    image_size: int = 1024
    head_classes: int = 1000

    def __post_init__(self, **kwargs: Any) -> None:
        # Read by transformers' SAM.
        self.output_channels = NECK_CHANNELS
        self.num_pos_feats = NECK_CHANNELS // 2
        self.scale = 1.0  # of random positional encodings, as in segment-anything
        super().__post_init__(**kwargs)

    def to_network(self, num_classes: int | None = None) -> TinyViTConfig:
        """Convert to the configuration of the network.

        Args:
            num_classes: number of classes of its head; ``None`` for ``head_classes``.

        Raises:
            ValueError: if a field is out of range.
        """
        classes = self.head_classes if num_classes is None else num_classes
        return super().to_network(classes).replace(mobile_sam=True)


@strict
class TinyVitSamConfig(SamConfig):
    """Configuration of a :class:`TinyVitSamModel`.

    Args:
        vision_config: a :class:`TinyVitSamVisionConfig` or its fields; the default is the published 5m.
        prompt_encoder_config: fields of transformers' ``SamPromptEncoderConfig``; the default has the image size of the
            encoder.
        mask_decoder_config: fields of transformers' ``SamMaskDecoderConfig``.
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
            # segment-anything uses torch's default in the decoder; that of transformers differs.
            self.mask_decoder_config = {"layer_norm_eps": 1e-5}
        super().__post_init__(**kwargs)


class TinyVitSamVisionEncoder(TinyVitPreTrainedModel):
    """Image encoder of MobileSAM.

    Attributes:
        network: the :class:`~kornia_tinyvit.TinyViT`.

    Args:
        config: the configuration.
    """

    config: TinyVitSamVisionConfig
    config_class = TinyVitSamVisionConfig

    def __init__(self, config: TinyVitSamVisionConfig) -> None:
        super().__init__(config)
        self.network = build_network(config.to_network(), config)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SamVisionEncoderOutput | tuple[Tensor, ...]:
        """Embed images.

        Args:
            pixel_values: preprocessed images :math:`(B, 3, S, S)`.
            **kwargs: ``output_hidden_states``, ``output_attentions`` and ``return_dict``.

        Returns:
            ``last_hidden_state``, the embedding :math:`(B, 256, S/16, S/16)`, and the requested hidden states and
            attentions.

        Raises:
            TypeError: if the images are not a floating point tensor.
            ValueError: if their shape is invalid, or attention weights are requested from an implementation that does
                not return them.
        """
        return SamVisionEncoderOutput(last_hidden_state=self.network(self._prepare(pixel_values, kwargs)))


class TinyVitSamModel(SamModel):
    """transformers' ``SamModel`` with a TinyViT as the image encoder: MobileSAM (arXiv:2306.14289).

    Inputs and outputs are those of ``SamModel``; the masks equal those of :class:`~kornia_tinyvit.sam.MobileSAM`.

    Args:
        config: the configuration.
    """

    config: TinyVitSamConfig
    config_class = TinyVitSamConfig
    model_tags = [*TAGS, "mobile-sam"]  # noqa: RUF012
    _no_split_modules = ["TinyViT", "SamTwoWayTransformer"]  # noqa: RUF012

    def __init__(self, config: TinyVitSamConfig) -> None:
        # The constructor of SamModel would build a ViT encoder.
        SamPreTrainedModel.__init__(self, config)
        vision, decoder = cast("Any", config.vision_config), cast("Any", config.mask_decoder_config)
        self.shared_image_embedding = SamPositionalEmbedding(vision)
        self.vision_encoder: Any = TinyVitSamVisionEncoder(vision)
        self.prompt_encoder = SamPromptEncoder(config)
        decoder._attn_implementation = config._attn_implementation
        self.mask_decoder = SamMaskDecoder(decoder)
        self.post_init()


class TinyVitSamImageProcessor(SamImageProcessorPil):
    """Image processor of SAM whose mask generation pipeline does not require torchvision.

    Args:
        **kwargs: arguments of ``SamImageProcessorPil``.
    """

    @classmethod
    def from_size(cls, image_size: int) -> TinyVitSamImageProcessor:
        """Create a processor for an input size.

        Args:
            image_size: side in pixels of the square input, a multiple of 16.
        """
        masks = image_size // 4
        return cls(
            size={"longest_edge": image_size},
            pad_size={"height": image_size, "width": image_size},
            mask_size={"longest_edge": masks},
            mask_pad_size={"height": masks, "width": masks},
        )

    def post_process_for_mask_generation(
        self, all_masks: list[RLE], all_scores: Tensor, all_boxes: Tensor, crops_nms_thresh: float
    ) -> tuple[list[NDArray[np.bool_]], Tensor, list[RLE], Tensor]:
        """Apply non-maximum suppression to masks by their boxes.

        Args:
            all_masks: :math:`N` run-length encoded masks.
            all_scores: scores :math:`(N,)`.
            all_boxes: boxes :math:`(N, 4)`, left, top, right and bottom.
            crops_nms_thresh: IoU above which the box of lower score is removed.

        Returns:
            The kept masks as arrays :math:`(H, W)`, sorted by descending score, their scores, run-length encodings and
            boxes.
        """
        kept = nms(all_boxes.cpu(), all_scores.cpu(), crops_nms_thresh)
        encoded = [all_masks[index] for index in kept.tolist()]
        return [decode_rle(mask) for mask in encoded], all_scores[kept], encoded, all_boxes[kept]


def from_mobile_sam(sam: MobileSAM) -> TinyVitSamModel:
    """Convert a MobileSAM to a transformers model with the same weights, mode, data type and device.

    Args:
        sam: the model, with a square input.

    Returns:
        The model with a copy of the weights.

    Raises:
        ValueError: if the input is not square.
    """
    height, width = sam.img_size
    if height != width:
        raise ValueError(f"transformers' SAM requires a square input; got {height}x{width}.")
    network = sam.config.replace(mobile_sam=False, img_size=height, num_classes=0)
    vision = TinyVitSamVisionConfig.from_network(network, head_classes=sam.config.num_classes)
    model = TinyVitSamModel(TinyVitSamConfig(vision_config=vision))
    weights = {rename(name, _NAMES): tensor for name, tensor in plain_state_dict(sam).items()}
    weights[_TIED] = weights["shared_image_embedding.positional_embedding"]
    model.load_state_dict(weights)
    return match_original(model, sam)


def to_mobile_sam(model: TinyVitSamModel) -> MobileSAM:
    """Convert a transformers model to a MobileSAM with the same weights, mode, data type and device.

    ``torch.save(to_mobile_sam(model).state_dict(), "mobile_sam.pt")`` writes the layout of the published file.

    Args:
        model: the model.

    Returns:
        The MobileSAM with a copy of the weights.
    """
    vision = cast("TinyVitSamVisionConfig", model.config.vision_config)
    sam = MobileSAM.from_config(vision.to_network(), img_size=vision.image_size)
    weights = model.state_dict()
    sam.load_state_dict({name: weights[rename(name, _NAMES)] for name in sam.state_dict()})
    return match_original(sam, model)
