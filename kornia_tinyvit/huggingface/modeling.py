"""transformers models of a :class:`~kornia_tinyvit.TinyViT`: features, a classifier and a backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from kornia.models.common import LayerNorm2d
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from kornia_tinyvit.config import TinyViTConfig
from kornia_tinyvit.huggingface.configuration import TinyVitConfig
from kornia_tinyvit.layers import Attention
from kornia_tinyvit.model import Blocks, TinyViT

__all__ = [
    "TAGS",
    "TinyVitBackbone",
    "TinyVitForImageClassification",
    "TinyVitModel",
    "TinyVitPreTrainedModel",
    "build_network",
]

#: Tags of the models on the hub.
TAGS = ("tinyvit", "kornia-tinyvit", "kornia")


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention and return its weights, with the interface of transformers' eager implementations.

    Args:
        module: the attention module, unused.
        query: queries :math:`(B, heads, N, d)`.
        key: keys :math:`(B, heads, N, d)`.
        value: values :math:`(B, heads, N, d)`.
        attention_mask: bias added to the scores, :math:`(1, heads, N, N)`.
        **kwargs: arguments of other implementations, unused.

    Returns:
        Outputs :math:`(B, N, heads, d)` and attention weights :math:`(B, heads, N, N)`.
    """
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class AttentionWeights(nn.Identity):
    """Identity of the attention weights, from which transformers records them."""


class TinyVitAttention(nn.Module):
    """Window attention with the implementation selected in the configuration, ``sdpa`` or ``eager``.

    Args:
        config: configuration of the model; its implementation is read at every call.
    """

    is_causal = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weights = AttentionWeights()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Compute outputs :math:`(B, heads, N, d)`.

        Args:
            query: queries :math:`(B, heads, N, d)`.
            key: keys :math:`(B, heads, N, d)`.
            value: values :math:`(B, heads, N, d)`.
            bias: attention bias :math:`(1, heads, N, N)`.
        """
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(self, query, key, value, bias)
        if weights is not None:
            self.weights(weights)
        return output.transpose(1, 2)


def build_network(network: TinyViTConfig, config: Any) -> TinyViT:
    """Build the network of a transformers model.

    Args:
        network: configuration of the network.
        config: configuration of the model, which selects the attention implementation.
    """
    model = TinyViT.from_config(network)
    model.preprocessing = config.to_preprocessing()
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = TinyVitAttention(config)
    return model


class TinyVitPreTrainedModel(PreTrainedModel):
    """Base class of the models: loading, saving, initialization and supported features."""

    config: TinyVitConfig
    config_class = TinyVitConfig
    base_model_prefix = "tinyvit"
    main_input_name = "pixel_values"
    input_modalities = "image"
    model_tags = [*TAGS]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["TinyViT"]  # noqa: RUF012 - transformers reads it from the class
    _can_record_outputs = {"hidden_states": Blocks, "attentions": AttentionWeights}  # noqa: RUF012

    network: TinyViT  # not in every subclass

    def get_input_embeddings(self) -> nn.Module:
        """Return the stem."""
        return cast("Any", self.base_model).network.patch_embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize missing tensors like :class:`~kornia_tinyvit.TinyViT` and keep loaded ones."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # torch's default; no convolution here has a bias
        elif isinstance(module, Attention):
            init.zeros_(module.attention_biases)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, LayerNorm2d)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(cast("Tensor", module.num_batches_tracked))

    def _prepare(self, pixel_values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Convert floating point images :math:`(B, C, H, W)` to the data type of the network, which validates them.

        Raises:
            ValueError: if attention weights are requested and the implementation does not return them.
        """
        attention = self.config._attn_implementation
        if kwargs.get("output_attentions", self.config.output_attentions) and attention != "eager":
            raise ValueError(
                f"The attention implementation {attention!r} does not return weights; load the model with "
                'attn_implementation="eager" or call model.set_attn_implementation("eager").'
            )
        floating = isinstance(pixel_values, Tensor) and pixel_values.is_floating_point()
        return pixel_values.to(self.dtype) if floating else pixel_values


class TinyVitModel(TinyVitPreTrainedModel):
    """TinyViT without a head.

    Attributes:
        network: the :class:`~kornia_tinyvit.TinyViT`, without a head.

    Args:
        config: the configuration.
        add_pooling_layer: whether to pool the last feature map.

    Example:
        >>> model = TinyVitModel(TinyVitConfig(image_size=64)).eval()
        >>> model(torch.rand(1, 3, 64, 64)).pooler_output.shape
        torch.Size([1, 320])
    """

    def __init__(self, config: TinyVitConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.network = build_network(config.to_network(), config)
        self.add_pooling_layer = add_pooling_layer
        if not add_pooling_layer:
            self.network.norm_head = nn.Identity()  # type: ignore[assignment]
        self.post_init()

    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        r"""Compute the features of images.

        Args:
            pixel_values: normalized images :math:`(B, C, H, W)`, :math:`H, W \ge 32`, in any floating point type.
            **kwargs: ``output_hidden_states``, ``output_attentions`` and ``return_dict``, by default the
                configuration's.

        Returns:
            ``last_hidden_state``, the last feature map :math:`(B, C, \lceil H/32 \rceil, \lceil W/32 \rceil)`;
            ``pooler_output``, its normalized mean :math:`(B, C)`; ``hidden_states``, the feature maps of the stem and
            the four stages; ``attentions``, the weights :math:`(B \cdot windows, heads, N, N)` of each attention.

        Raises:
            TypeError: if the images are not a floating point tensor.
            ValueError: if their shape is invalid, or attention weights are requested from an implementation that does
                not return them.
        """
        features = self.network.forward_features(self._prepare(pixel_values, kwargs))
        pooled = self.network.forward_head(features, pre_logits=True) if self.add_pooling_layer else None
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)


class TinyVitForImageClassification(TinyVitPreTrainedModel):
    """TinyViT with a linear classifier on the pooled features.

    Attributes:
        tinyvit: the :class:`TinyVitModel`.
        classifier: the linear layer.

    Args:
        config: the configuration; ``num_labels`` is the number of classes.
    """

    accepts_loss_kwargs = False

    def __init__(self, config: TinyVitConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.tinyvit = TinyVitModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Classify images.

        Args:
            pixel_values: images as :meth:`TinyVitModel.forward` takes them.
            labels: class indices :math:`(B,)` for the cross-entropy; :math:`(B, classes)` in {0, 1}, floating point,
                for multi-label classification; or targets of a regression. The configuration's ``problem_type``
                selects the loss; if it is not set, transformers derives it from the labels of the first call.
            **kwargs: as :meth:`TinyVitModel.forward` takes them.

        Returns:
            ``logits`` :math:`(B, classes)`, ``loss`` if labels are given, and the requested hidden states and
            attentions.

        Raises:
            TypeError: as :meth:`TinyVitModel.forward` does.
            ValueError: as :meth:`TinyVitModel.forward` does.
        """
        outputs = self.tinyvit(pixel_values, **(kwargs | {"return_dict": True}))
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class TinyVitBackbone(BackboneMixin, TinyVitPreTrainedModel):
    """Feature maps of a TinyViT for detectors and segmenters of transformers.

    Args:
        config: the configuration; ``out_features`` or ``out_indices`` select the feature maps.

    Example:
        >>> backbone = TinyVitBackbone(TinyVitConfig(image_size=64, out_indices=[2, 3, 4])).eval()
        >>> [tuple(each.shape) for each in backbone(torch.rand(1, 3, 64, 64)).feature_maps]
        [(1, 128, 8, 8), (1, 160, 4, 4), (1, 320, 2, 2)]
    """

    _keys_to_ignore_on_load_unexpected = [r"norm_head\.", r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: TinyVitConfig) -> None:
        super().__init__(config)
        self.tinyvit = TinyVitModel(config, add_pooling_layer=False)
        self.num_features = [config.embed_dims[0], *config.embed_dims]
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput | tuple[Any, ...]:
        r"""Return the feature maps selected in the configuration.

        Args:
            pixel_values: images as :meth:`TinyVitModel.forward` takes them.
            **kwargs: as :meth:`TinyVitModel.forward` takes them.

        Returns:
            ``feature_maps`` :math:`(B, C_i, \lceil H/s_i \rceil, \lceil W/s_i \rceil)`, :math:`s` = 4 for the stem, and
            4, 8, 16, 32 for the stages; and the requested hidden states and attentions.
        """
        outputs = self.tinyvit(pixel_values, **(kwargs | {"return_dict": True}))
        features = dict(zip(self.stage_names, outputs.hidden_states, strict=True))
        return BackboneOutput(
            feature_maps=tuple(features[name] for name in self.out_features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
