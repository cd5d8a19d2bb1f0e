"""transformers' models over a :class:`~kornia_tinyvit.TinyViT`: features, a classifier and a backbone."""

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
from kornia_tinyvit.layers import Attention, ConvBN
from kornia_tinyvit.model import Blocks, TinyViT

__all__ = [
    "TAGS",
    "TinyVitBackbone",
    "TinyVitForImageClassification",
    "TinyVitModel",
    "TinyVitPreTrainedModel",
    "build_network",
]

#: What the hub finds a model by.
TAGS = ("tinyvit", "kornia-tinyvit", "kornia")


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attend as transformers' eager implementations do, which return their weights.

    Args:
        module: the module that attends.
        query: :math:`(B, heads, N, d)`.
        key: the same shape.
        value: the same shape.
        attention_mask: what is added to the scores, :math:`(1, heads, N, N)`.
        **kwargs: what other implementations take.

    Returns:
        Values :math:`(B, N, heads, d)` and weights :math:`(B, heads, N, N)`.
    """
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class AttentionWeights(nn.Identity):
    """Where the weights of an attention pass through, so that transformers can record them."""


class TinyVitAttention(nn.Module):
    """The attention of a window by the implementation that the configuration names, ``sdpa`` or ``eager``.

    Args:
        config: the configuration of the model, whose implementation may change at any time.
    """

    is_causal = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weights = AttentionWeights()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Map queries, keys and values :math:`(B, heads, N, d)` and a bias to the shape of the queries."""
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(self, query, key, value, bias)
        if weights is not None:
            self.weights(weights)
        return output.transpose(1, 2)


def build_network(network: TinyViTConfig, config: Any) -> TinyViT:
    """Build the network of a model of transformers.

    Args:
        network: what to build.
        config: the configuration of the model, which names the implementation of the attention.
    """
    model = TinyViT.from_config(network)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = TinyVitAttention(config)
    return model


class TinyVitPreTrainedModel(PreTrainedModel):
    """What the models have in common: loading, saving, initialization and what they support."""

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

    network: TinyViT  # of the models that have one themselves

    def get_input_embeddings(self) -> nn.Module:
        """Return the stem."""
        return cast("Any", self.base_model).network.patch_embed

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what no file held, as :class:`~kornia_tinyvit.TinyViT` does, and leave loaded tensors be."""
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
        """Give images :math:`(B, C, H, W)` the precision of the network; integers are left for it to refuse.

        Raises:
            ValueError: if attentions are asked for and the implementation computes none.
        """
        attention = self.config._attn_implementation
        if kwargs.get("output_attentions", self.config.output_attentions) and attention != "eager":
            raise ValueError(
                f"The attention implementation {attention!r} has no weights to return; load the model with "
                'attn_implementation="eager" or call model.set_attn_implementation("eager").'
            )
        stem = cast("ConvBN", self.network.patch_embed.seq[0]).c.weight
        floating = isinstance(pixel_values, Tensor) and pixel_values.is_floating_point()
        return pixel_values.to(stem.dtype) if floating else pixel_values


class TinyVitModel(TinyVitPreTrainedModel):
    """The features of a TinyViT.

    Attributes:
        network: the :class:`~kornia_tinyvit.TinyViT`, without a head.

    Args:
        config: the configuration.
        add_pooling_layer: whether to pool the last map.

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
            ``last_hidden_state``, the last map :math:`(B, C, \lceil H/32 \rceil, \lceil W/32 \rceil)`;
            ``pooler_output``, its normalized mean :math:`(B, C)`; ``hidden_states``, the map of the stem and those of
            the four stages; ``attentions``, the weights :math:`(B \cdot windows, heads, N, N)` of each attention.

        Raises:
            TypeError: if the images are not a floating point tensor.
            ValueError: if their shape is another, or attentions are asked for and the implementation has none.
        """
        features = self.network.forward_features(self._prepare(pixel_values, kwargs))
        pooled = self.network.forward_head(features, pre_logits=True) if self.add_pooling_layer else None
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)


class TinyVitForImageClassification(TinyVitPreTrainedModel):
    """A TinyViT with a classifier on its pooled features.

    Attributes:
        tinyvit: the :class:`TinyVitModel`.
        classifier: the linear layer.

    Args:
        config: the configuration, whose ``num_labels`` are the classes.
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
            labels: classes :math:`(B,)` for a cross-entropy; :math:`(B, classes)` in {0, 1}, floating point, for the
                loss of several labels, or any numbers for a regression. The configuration's ``problem_type`` says
                which it is; without one, transformers tells it from the labels at the first call.
            **kwargs: as :meth:`TinyVitModel.forward` takes them.

        Returns:
            ``logits`` :math:`(B, classes)`, ``loss`` if there are labels, and what was asked for.
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
    """The maps of a TinyViT for detectors and segmenters of transformers.

    Args:
        config: the configuration; ``out_features`` or ``out_indices`` choose the maps.

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
        r"""Return the maps that the configuration chooses.

        Args:
            pixel_values: images as :meth:`TinyVitModel.forward` takes them.
            **kwargs: as :meth:`TinyVitModel.forward` takes them.

        Returns:
            ``feature_maps`` :math:`(B, C_i, \lceil H/s_i \rceil, \lceil W/s_i \rceil)`, :math:`s` = 4 for the stem, and
            4, 8, 16, 32 for the stages; and what was asked for.
        """
        outputs = self.tinyvit(pixel_values, **(kwargs | {"return_dict": True}))
        maps = dict(zip(self.stage_names, outputs.hidden_states, strict=True))
        return BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
