"""Convert a :class:`~kornia_tinyvit.detection.TinyViTDetector` to transformers' RT-DETR and back.

kornia's RT-DETR supports inference only; transformers' has the loss, the matcher and the denoising queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kornia_tinyvit.detection import DetectorConfig, TinyViTDetector
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.files import describe_differences
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.modules import without_wrappers

with optional_imports("Training detectors requires transformers and scipy", "'kornia-tinyvit[train,hf]'"):
    import scipy  # noqa: F401 - used by the matcher
    from transformers import RTDetrConfig, RTDetrForObjectDetection

    from kornia_tinyvit.huggingface.configuration import TinyVitConfig
    from kornia_tinyvit.huggingface.conversion import label_fields, match_original, rename

__all__ = ["from_rt_detr", "to_rt_detr"]

#: Fields of transformers' configuration that are constant in kornia.
_FIXED: dict[str, Any] = {
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_layers": 1,
    "encode_proj_layers": [2],
    "num_feature_levels": 3,
    "decoder_n_points": 4,
    "positional_encoding_temperature": 10_000,
    "encoder_activation_function": "gelu",
    "activation_function": "silu",
    "decoder_activation_function": "relu",
    "normalize_before": False,
    "learn_initial_query": False,
    "eval_size": None,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    "freeze_backbone_batch_norms": False,
}

_BACKBONE = "model.backbone.model.tinyvit.network."
_PREFIXES = (
    (r"backbone\.", _BACKBONE),
    (r"encoder\.input_proj\.", "model.encoder_input_proj."),
    (r"encoder\.encoder\.0\.", "model.encoder.aifi.0."),
    (r"encoder\.ccfm\.", "model.encoder."),
    (r"decoder\.input_proj\.(\d+)\.conv\.", r"model.decoder_input_proj.\1.0."),
    (r"decoder\.input_proj\.(\d+)\.norm\.", r"model.decoder_input_proj.\1.1."),
    (r"decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
    (r"decoder\.query_pos_head\.", "model.decoder.query_pos_head."),
    (r"decoder\.decoder\.", "model.decoder."),
    (r"decoder\.", "model."),
)
_LAYERS = {
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
    "cross_attn": "encoder_attn",
    "self_attn.out_proj": "self_attn.o_proj",
}
_NORMS = {
    "encoder.encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
    "decoder.decoder": {
        "norm1": "self_attn_layer_norm",
        "norm2": "encoder_attn_layer_norm",
        "norm3": "final_layer_norm",
    },
}
_DENOISING = "model.denoising_class_embed.weight"  # missing in models without denoising queries
_JOINED = re.compile(r"self_attn\.in_proj_(weight|bias)$")  # queries, keys and values in one tensor


def to_rt_detr(detector: TinyViTDetector, **changes: Any) -> RTDetrForObjectDetection:
    """Convert a detector to transformers' RT-DETR on a :class:`~kornia_tinyvit.huggingface.TinyVitBackbone`.

    The input of the model are normalized square images ``pixel_values`` :math:`(B, 3, S, S)`, S a multiple of 32.

    Args:
        detector: the detector.
        **changes: fields of transformers' ``RTDetrConfig``, such as ``num_denoising`` or loss weights.

    Returns:
        The model with a copy of the weights, in the mode, data type and device of the detector.

    Example:
        >>> detector = TinyViTDetector.from_config("1m", num_classes=5, img_size=64, num_queries=9, hidden_dim=32)
        >>> found = to_rt_detr(detector.eval())(torch.rand(1, 3, 64, 64))
        >>> found.logits.shape, found.pred_boxes.shape
        (torch.Size([1, 9, 5]), torch.Size([1, 9, 4]))
    """
    detector = without_wrappers(detector)
    preprocessing = detector.backbone.preprocessing.to_dict()
    fields = _describe(detector.config, preprocessing) | label_fields(detector.class_names) | changes
    model = RTDetrForObjectDetection(RTDetrConfig(**fields))
    weights: dict[str, Tensor] = {}
    for name, tensor in detector.state_dict().items():
        names = _names(name)
        parts = tensor.chunk(len(names)) if len(names) > 1 else [tensor] * len(names)
        weights.update(zip(names, parts, strict=True))
    if not model.config.num_denoising:
        del weights[_DENOISING]
    model.load_state_dict(weights)
    return match_original(model, detector)


def from_rt_detr(model: RTDetrForObjectDetection) -> TinyViTDetector:
    """Convert transformers' RT-DETR, as built by :func:`to_rt_detr`, to a detector.

    Args:
        model: RT-DETR on a :class:`~kornia_tinyvit.huggingface.TinyVitBackbone`.

    Returns:
        The detector with a copy of the weights, in the mode, data type and device of the model.

    Raises:
        ValueError: if the backbone or another part of the model is not supported by kornia's RT-DETR.
    """
    config: Any = model.config
    if not isinstance(config.backbone_config, TinyVitConfig):
        raise ValueError(f"Expected a model on a TinyVitBackbone; got one on {type(config.backbone_config).__name__}.")
    supported = DetectorConfig(
        config.backbone_config.to_network(), config.num_labels, config.d_model, config.num_queries,
        config.decoder_layers, config.hidden_expansion,
    )  # fmt: skip
    expected = _describe(supported)
    del expected["backbone_config"], expected["freeze_backbone_batch_norms"]
    fields = {name: getattr(config, name) for name in expected}
    if differences := describe_differences(expected, fields, words=("kornia has", "the model")):
        raise ValueError(f"kornia's RT-DETR does not support the model: {'; '.join(differences)}.")
    names = [config.id2label[index] for index in range(config.num_labels)]
    backbone = TinyViT.from_config(supported.backbone)
    backbone.preprocessing = config.backbone_config.to_preprocessing()
    detector = TinyViTDetector(backbone, num_classes=supported.num_classes, class_names=names, **supported.options())
    load_weights(detector, model.state_dict())
    return match_original(detector, model)


def load_weights(detector: TinyViTDetector, state: Mapping[str, Tensor]) -> None:
    """Load the weights of transformers' RT-DETR into a detector.

    Args:
        detector: the detector.
        state: state dict of the model.

    Raises:
        KeyError: if a weight is missing.
        RuntimeError: if a weight has another shape.
    """
    own = detector.state_dict()
    for name in own:
        names = _names(name)
        if names and (names != [_DENOISING] or _DENOISING in state):
            parts = [state[each] for each in names]
            own[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    detector.load_state_dict(own)


def network_of(model: RTDetrForObjectDetection) -> TinyViT:
    """Return the network in the backbone of a model.

    Args:
        model: RT-DETR on a :class:`~kornia_tinyvit.huggingface.TinyVitBackbone`.
    """
    return model.model.backbone.model.tinyvit.network


def _describe(config: DetectorConfig, preprocessing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields of transformers' configuration for an architecture."""
    hidden = config.hidden_dim
    return _FIXED | {
        "backbone_config": TinyVitConfig.from_network(
            config.backbone, out_indices=[2, 3, 4], preprocessing=preprocessing
        ),
        "encoder_hidden_dim": hidden,
        "encoder_in_channels": list(config.backbone.embed_dims[1:]),
        "encoder_ffn_dim": 4 * hidden,
        "hidden_expansion": config.expansion,
        "d_model": hidden,
        "decoder_in_channels": [hidden] * 3,
        "decoder_ffn_dim": 4 * hidden,
        "decoder_layers": config.decoder_layers,
        "num_queries": config.num_queries,
    }


def _names(name: str) -> list[str]:
    """Convert a name to transformers': three names for a tensor that is split there, none for one that is missing."""
    if name.startswith(("backbone.norm_head.", "backbone.head.")):  # not used for feature maps
        return []
    theirs = rename(name, _PREFIXES)
    for place, norms in _NORMS.items():
        if name.startswith(place):
            for ours, other in {**_LAYERS, **norms}.items():
                theirs = theirs.replace(f".{ours}.", f".{other}.")
    if found := _JOINED.search(theirs):
        stem = theirs[: found.start()]
        return [f"{stem}self_attn.{part}_proj.{found[1]}" for part in "qkv"]
    return [theirs]
