"""Between :class:`~kornia_tinyvit.sam.MobileSAM` and transformers' SAM."""

from __future__ import annotations

import re
from typing import cast

from kornia_tinyvit.huggingface.sam import TinyVitSamModel
from kornia_tinyvit.huggingface.sam_configuration import TinyVitSamConfig, TinyVitSamVisionConfig
from kornia_tinyvit.sam import MobileSAM

__all__ = ["from_mobile_sam", "to_mobile_sam"]

#: Names of segment-anything, which are kornia's, and what transformers calls the same.
_NAMES = (
    ("image_encoder.", "vision_encoder.network."),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    ("mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
)
_NORM = re.compile(r"^(mask_decoder\.transformer\.layers\.\d+\.)norm(\d)\.")
_LAYER_NORM = re.compile(r"^(mask_decoder\.transformer\.layers\.\d+\.)layer_norm(\d)\.")
_MLP = re.compile(
    r"^mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.(layers\.\d|proj_in|proj_out)\."
)
_MLP_NAMES = (("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out"))
_TIED = "prompt_encoder.shared_embedding.positional_embedding"


def from_mobile_sam(sam: MobileSAM) -> TinyVitSamModel:
    """Return transformers' model of a MobileSAM, with a copy of its weights, in its mode, precision and place.

    Args:
        sam: the model, whose input is square; ``MobileSAM.from_config(pretrained="mobile_sam.pt")`` reads the
            published file.

    Raises:
        ValueError: if the input is not square, which transformers' always is.
    """
    height, width = sam.img_size
    if height != width:
        raise ValueError(f"transformers' SAM has square inputs; this one's are {height}x{width}.")
    network = sam.config.replace(mobile_sam=False, img_size=height, num_classes=0)
    vision = TinyVitSamVisionConfig.from_network(network, head_classes=sam.config.num_classes)
    model = TinyVitSamModel(TinyVitSamConfig(vision_config=vision))
    weights = {_to_transformers(name): tensor for name, tensor in sam.state_dict().items()}
    weights[_TIED] = weights["shared_image_embedding.positional_embedding"]
    model.load_state_dict(weights)
    first = next(sam.parameters())
    model.to(device=first.device, dtype=first.dtype)  # type: ignore[call-arg]
    return model.train(sam.training)


def to_mobile_sam(model: TinyVitSamModel) -> MobileSAM:
    """Return the MobileSAM of a transformers' model, with a copy of its weights, in its mode, precision and place.

    ``torch.save(to_mobile_sam(model).state_dict(), "mobile_sam.pt")`` writes the layout of the published file.

    Args:
        model: the model.
    """
    vision = cast("TinyVitSamVisionConfig", model.config.vision_config)
    sam = MobileSAM.from_config(vision.to_network(), img_size=vision.image_size)
    sam.load_state_dict({_to_original(name): each for name, each in model.state_dict().items() if name != _TIED})
    first = next(model.parameters())
    return sam.to(first.device, first.dtype).train(model.training)


def _to_transformers(name: str) -> str:
    name = _NORM.sub(r"\1layer_norm\2.", name)
    if match := _MLP.match(name):
        return name.replace(match[1], dict(_MLP_NAMES)[match[1]], 1)
    return next((theirs + name.removeprefix(ours) for ours, theirs in _NAMES if name.startswith(ours)), name)


def _to_original(name: str) -> str:
    name = _LAYER_NORM.sub(r"\1norm\2.", name)
    if match := _MLP.match(name):
        return name.replace(match[1], {theirs: ours for ours, theirs in _MLP_NAMES}[match[1]], 1)
    return next((ours + name.removeprefix(theirs) for ours, theirs in _NAMES if name.startswith(theirs)), name)
