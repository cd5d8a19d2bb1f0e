"""Configuration of the transformers models: :class:`TinyVitConfig`."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from kornia_tinyvit.checkpoints.hub import CONFIG_FILE, TRANSFORMERS_NAMES
from kornia_tinyvit.checkpoints.loading import read_preprocessing
from kornia_tinyvit.config import NUM_STAGES, TinyViTConfig
from kornia_tinyvit.preprocessing import Preprocessing

__all__ = ["TinyVitConfig"]

_TUPLES = ("embed_dims", "depths", "num_heads", "window_sizes")


@strict
class TinyVitConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a :class:`~kornia_tinyvit.TinyViT` in transformers; the default is the 5m variant.

    The fields are those of :class:`~kornia_tinyvit.TinyViTConfig` with transformers' common names. Classes are given by
    ``num_labels``, ``id2label`` and ``label2id``.

    Args:
        image_size: side in pixels of the square input; the network runs at any size.
        num_channels: number of input channels.
        embed_dims: number of channels per stage.
        depths: number of blocks per stage.
        num_heads: number of attention heads per stage; the first entry is ignored.
        window_sizes: side in tokens of the attention windows per stage; the first entry is ignored.
        mlp_ratio: ratio of hidden to input width of the MLPs.
        drop_rate: dropout probability in the MLPs.
        drop_path_rate: stochastic depth probability of the last block.
        mbconv_expand_ratio: ratio of hidden to input width of the MBConv blocks in the first stage.
        local_conv_size: odd kernel size of the convolution between attention and MLP.
        activation: name of an activation class of :mod:`torch.nn`.
        preprocessing: fields of the network's :class:`~kornia_tinyvit.preprocessing.Preprocessing`, which keep it in
            files that are saved without an image processor; ``None`` for the default of the size.
        out_features: feature maps of :class:`TinyVitBackbone`, among ``"stem"``, ``"stage1"``, ..., ``"stage4"``.
        out_indices: their indices, 0 to 4.
        **kwargs: fields of transformers' ``PreTrainedConfig``.

    Raises:
        ValueError: if a field is out of range or has not four entries.

    Example:
        >>> config = TinyVitConfig.from_network(TinyViTConfig.from_variant("1m"), num_labels=10)
        >>> config.hidden_size, config.stage_names
        (160, ['stem', 'stage1', 'stage2', 'stage3', 'stage4'])
    """

    model_type = "tinyvit"
    attribute_map = {  # noqa: RUF012 - transformers reads it from the class
        "img_size": "image_size",
        "in_chans": "num_channels",
        "hidden_sizes": "embed_dims",
        "num_attention_heads": "num_heads",
    }

    image_size: int = 224
    num_channels: int = 3
    embed_dims: list[int] | tuple[int, ...] = (64, 128, 160, 320)
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: list[int] | tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float | int = 4.0
    drop_rate: float | int = 0.0
    drop_path_rate: float | int = 0.0
    mbconv_expand_ratio: float | int = 4.0
    local_conv_size: int = 3
    activation: str = "GELU"
    preprocessing: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in _TUPLES:  # JSON turns them into lists
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        self.to_network()
        self.to_preprocessing()
        self.hidden_size = self.embed_dims[-1]
        self.num_hidden_layers = NUM_STAGES
        self.stage_names = ["stem", *(f"stage{stage + 1}" for stage in range(NUM_STAGES))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration from the content of a ``config.json``.

        Args:
            config_dict: the content.
            **kwargs: as in transformers.

        Returns:
            The configuration.

        Raises:
            ValueError: if it is a file of timm, all fields of which transformers would ignore.
        """
        if "architecture" in config_dict and config_dict.get("model_type") != cls.model_type:
            raise ValueError(
                "Expected a config.json of transformers; got one of timm. Load its folder with "
                "kornia_tinyvit.huggingface.from_checkpoint or convert it with kornia-tinyvit convert."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_network(cls, network: TinyViTConfig, **kwargs: Any) -> TinyVitConfig:
        """Convert the configuration of a network; its classes become numbered labels.

        Args:
            network: configuration of the network, such as ``model.config``.
            **kwargs: other fields, such as ``id2label``.

        Returns:
            The configuration for transformers.

        Raises:
            ValueError: if the activation is not one of :mod:`torch.nn`, or the network is MobileSAM's encoder.
        """
        if network.mobile_sam:
            raise ValueError("TinyVitConfig does not support MobileSAM's encoder; use TinyVitSamConfig.")
        values = network.to_dict()
        fields = {theirs: values[ours] for ours, theirs in TRANSFORMERS_NAMES.items()}
        if network.num_classes and "id2label" not in kwargs:
            kwargs = {"num_labels": network.num_classes} | kwargs
        return cls(**fields, **kwargs)

    def to_network(self, num_classes: int = 0) -> TinyViTConfig:
        """Convert to the configuration of the network.

        Args:
            num_classes: number of classes of its head.

        Returns:
            The configuration of the network.

        Raises:
            ValueError: if a field is out of range.
        """
        values = {ours: getattr(self, theirs) for ours, theirs in TRANSFORMERS_NAMES.items()}
        return TinyViTConfig.from_dict(values | {"num_classes": num_classes})

    def to_preprocessing(self) -> Preprocessing:
        """Return the preprocessing of the network.

        Raises:
            CheckpointError: if a field is unknown or out of range.
        """
        return read_preprocessing(self.preprocessing or {}, self.to_network(), CONFIG_FILE)
