"""TinyViT, assembled from the blocks of :mod:`kornia_tinyvit.layers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kornia.models.common import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kornia_tinyvit.checkpoints import Checkpoint, LoadReport, load_checkpoint, open_pretrained
from kornia_tinyvit.config import MIN_IMAGE_SIZE, TinyViTConfig, WindowSizes, check_class_names, resolve_window_sizes
from kornia_tinyvit.images import check_images
from kornia_tinyvit.layers import MBConv, PatchEmbed, PatchMerging, TinyViTBlock
from kornia_tinyvit.preprocessing import default_preprocessing

__all__ = ["TinyViT"]

NECK_CHANNELS = 256  # of the embeddings that SAM's mask decoder takes


class Blocks(nn.Sequential):
    """The blocks of one stage.

    Args:
        blocks: the blocks, which preserve the shape :math:`(B, C, H, W)`.
        use_checkpoint: use gradient checkpointing.

    Attributes:
        gradient_checkpointing: use gradient checkpointing. transformers sets this attribute and
            ``_gradient_checkpointing_func`` by name.
    """

    def __init__(self, blocks: Iterable[nn.Module], use_checkpoint: bool = False) -> None:
        super().__init__(*blocks)
        self.gradient_checkpointing = use_checkpoint
        self._gradient_checkpointing_func: Callable[..., Tensor] = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map :math:`(B, C, H, W)` to the same shape."""
        if not torch.jit.is_scripting() and self.gradient_checkpointing and torch.is_grad_enabled():
            for block in self:
                x = self._gradient_checkpointing_func(block, x)
        else:
            for block in self:
                x = block(x)
        return x


class Stage(nn.Module):
    """Blocks of one resolution and the downsampling to the next stage.

    Args:
        blocks: the blocks.
        downsample: the downsampling; ``None`` in the last stage.
        use_checkpoint: use gradient checkpointing for the blocks.
    """

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = Blocks(blocks, use_checkpoint)
        self.downsample = downsample

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Tensor:
        """Apply the blocks and the downsampling to a feature map.

        Args:
            x: feature map :math:`(B, C, H, W)`.
            features: list to which the feature map of the blocks is appended.
        """
        x = self.blocks(x)
        if features is not None:
            features.append(x)
        return x if self.downsample is None else self.downsample(x)


class TinyViT(nn.Module):
    """TinyViT (arXiv:2207.10666): a convolutional stage, then three stages of window attention.

    The network takes normalized images of any height and width from 32 pixels up and is differentiable with respect to
    the pixels. Its ``state_dict`` has the names and shapes of the official release and of
    ``kornia.models.tiny_vit.TinyViT``. :meth:`from_config` builds the published variants; the arguments of the
    constructor are those of :class:`TinyViTConfig`, in the order of kornia's.

    Attributes:
        config: the :class:`TinyViTConfig` of the network.
        preprocessing: the :class:`~kornia_tinyvit.preprocessing.Preprocessing` of its training images, which its
            checkpoints store; by default that of its resolution with ImageNet's statistics.
        class_names: names of the classes in the order of the logits, or ``None`` if unknown.
        load_report: the :class:`~kornia_tinyvit.checkpoints.LoadReport` of the weights with which :meth:`from_config`
            built the network, or ``None``.

    Raises:
        ValueError: if an argument is out of range; see :class:`TinyViTConfig`.

    Example:
        >>> model = TinyViT.from_config("1m", num_classes=10).eval()
        >>> model(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    __jit_unused_properties__ = ("feature_channels", "feature_strides")

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (7, 7, 14, 7),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_checkpoint: bool = False,
        mbconv_expand_ratio: float = 4.0,
        local_conv_size: int = 3,
        activation: type[nn.Module] = nn.GELU,
        mobile_sam: bool = False,
    ) -> None:
        super().__init__()
        self.config = config = TinyViTConfig(
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dims=tuple(embed_dims),
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_sizes=tuple(window_sizes),
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            use_checkpoint=use_checkpoint,
            mbconv_expand_ratio=mbconv_expand_ratio,
            local_conv_size=local_conv_size,
            activation=activation,
            mobile_sam=mobile_sam,
        )
        self.preprocessing = default_preprocessing(config)
        self.class_names: tuple[str, ...] | None = None
        self.load_report: LoadReport | None = None
        self.patch_embed = PatchEmbed(config.in_chans, config.embed_dims[0], activation)
        # Stochastic depth grows linearly from 0 at the first block to drop_path_rate at the last.
        last = max(sum(config.depths) - 1, 1)
        drop_paths = iter([drop_path_rate * block / last for block in range(sum(config.depths))])
        self.layers = nn.Sequential(*(_build_stage(config, stage, drop_paths) for stage in range(len(config.depths))))
        # MobileSAM's checkpoint includes a norm and a head that its forward pass does not use.
        self.norm_head = nn.LayerNorm(config.embed_dims[-1])
        self.head = _build_head(config)
        self.neck = _build_neck(config.embed_dims[-1]) if mobile_sam else None
        self.apply(_init_weights)

    @classmethod
    def from_config(
        cls,
        config: str | TinyViTConfig | None = None,
        *,
        pretrained: bool | str | Path | Checkpoint = False,
        num_classes: int | None = None,
        window_sizes: WindowSizes | None = None,
        class_names: Sequence[str] | None = None,
        **overrides: Any,
    ) -> TinyViT:
        """Build a network from a variant or a configuration, with or without pretrained weights.

        Args:
            config: ``"1m"``, ``"5m"``, ``"11m"``, ``"21m"`` or a :class:`TinyViTConfig`; optional when
                ``pretrained`` is a checkpoint that stores its configuration (see :func:`save_checkpoint`).
            pretrained: ``False`` for random weights; ``True`` for the variant's best ImageNet-1k weights (5m, 11m,
                21m; for 21m those of 384 or 512 pixels from that ``img_size`` on) or the packaged weights (1m); a name
                of :func:`list_pretrained`; the path or URL of a checkpoint in any layout that
                :func:`load_checkpoint` reads; or a :class:`~kornia_tinyvit.checkpoints.Checkpoint`.
            num_classes: number of classes, 0 for none; by default that of the weights or the configuration. With
                weights of a MobileSAM the default is its image encoder, and any number (or ``class_names``) builds a
                TinyViT of strides 4, 8, 16 and 32 from it: without the neck, and at the variant's image size.
                ``mobile_sam=True`` or ``False``, or a :class:`TinyViTConfig`, chooses explicitly.
            window_sizes: a window-size policy or four sizes; see
                :func:`~kornia_tinyvit.config.resolve_window_sizes`. ``"scale"`` interpolates the attention biases of
                the checkpoint, ``"fit"`` crops them.
            class_names: names of the classes, one per class; by default those of the checkpoint. For pretrained weights
                see :func:`load_checkpoint`, which matches the rows of the head by name.
            **overrides: fields of :class:`TinyViTConfig` to replace. The default is the checkpoint's resolution and
                input channels.

        Returns:
            The network, in evaluation mode if all its weights were loaded, otherwise in training mode, as in kornia.

        Raises:
            ValueError: if the variant, the name or a field is unknown or out of range, the number of names is not that
                of the classes, or MobileSAM's image encoder is given classes.
            CheckpointError: if the checkpoint cannot be read or has another architecture.

        Example:
            >>> TinyViT.from_config("5m", img_size=256, window_sizes="scale").config.window_sizes
            (8, 8, 16, 8)
        """
        base = TinyViTConfig.from_variant(config) if isinstance(config, str) else config
        found: Checkpoint | None = None
        if pretrained:
            found = open_pretrained(pretrained, config, img_size=overrides.get("img_size"))
            base = found.config
        if base is None:
            raise ValueError("Pass a variant such as '5m', a TinyViTConfig, or a checkpoint as pretrained=.")
        if num_classes is not None:
            overrides["num_classes"] = num_classes
        if found is not None and base.mobile_sam and not isinstance(config, TinyViTConfig):
            classes = len(class_names) if num_classes is None and class_names is not None else num_classes
            if not overrides.get("mobile_sam", classes is None):
                base = base.as_backbone(classes or 0)
        windows = resolve_window_sizes(base, overrides.get("img_size", base.img_size), window_sizes)
        final = base.replace(**overrides, window_sizes=windows)
        if final.mobile_sam and (num_classes or class_names is not None):
            raise ValueError(
                "mobile_sam=True builds MobileSAM's image encoder, whose output is an embedding without classes. Omit "
                "num_classes and class_names, or pass mobile_sam=False."
            )
        model = cls(**{name: getattr(final, name) for name in final.__dataclass_fields__})
        model.class_names = check_class_names(class_names, final.num_classes)
        if found is not None:
            report = load_checkpoint(model, found, window_adaptation="crop" if window_sizes == "fit" else "interpolate")
            model.load_report = report
            model.train(not report.complete)
            model.preprocessing = found.preprocessing_for(final)
            if "img_size" in overrides:
                model.preprocessing = model.preprocessing.resize(final.img_size)
            model.class_names = model.class_names or report.class_names
        return model

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels :math:`C_i` of the four feature maps of :meth:`forward_intermediates`."""
        return self.config.embed_dims

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Strides :math:`s_i` of those feature maps in pixels: (4, 8, 16, 32), or (4, 8, 16, 16) for MobileSAM."""
        return self.config.stage_strides

    def forward(self, x: Tensor) -> Tensor:
        r"""Compute the logits, or MobileSAM's image embeddings.

        Args:
            x: normalized images :math:`(B, C_{in}, H, W)`, floating point, :math:`H, W \ge 32`; for the published
                weights, values in [0, 1] normalized with ImageNet's mean and standard deviation.

        Returns:
            Logits :math:`(B, classes)`; without a head (``num_classes=0``) the normalized pooled features
            :math:`(B, C)`; with ``mobile_sam=True`` the embeddings :math:`(B, 256, \lceil H/16 \rceil, \lceil W/16
            \rceil)`.

        Raises:
            TypeError: if ``x`` is not a floating point tensor.
            ValueError: if it has another shape.
        """
        x = self.forward_features(x)
        return self.forward_head(x) if self.neck is None else self.neck(x)

    def forward_features(self, x: Tensor) -> Tensor:
        r"""Return the feature map of the last stage, :math:`(B, C, \lceil H/32 \rceil, \lceil W/32 \rceil)`.

        Args:
            x: images :math:`(B, C_{in}, H, W)` as for :meth:`forward`.
        """
        return self.layers(self._embed(x))

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        r"""Return the feature maps of the four stages, before the downsampling to the next.

        Args:
            x: images :math:`(B, C_{in}, H, W)` as for :meth:`forward`.

        Returns:
            Four feature maps :math:`(B, C_i, \lceil H/s_i \rceil, \lceil W/s_i \rceil)` with :math:`C_i` of
            :attr:`feature_channels` and :math:`s_i` of :attr:`feature_strides`.
        """
        x = self._embed(x)
        features: list[Tensor] = []
        for stage in self.layers:
            x = stage(x, features)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the feature map of :meth:`forward_features` and classify it.

        Args:
            features: feature map :math:`(B, C, H, W)`.
            pre_logits: return the pooled features instead of the logits.

        Returns:
            Logits :math:`(B, classes)`, or normalized pooled features :math:`(B, C)`.
        """
        pooled = self.norm_head(features.mean((2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by one with random weights, and remove the class names.

        Args:
            num_classes: number of classes; 0 removes the head.

        Raises:
            ValueError: if ``num_classes`` is negative.
        """
        config = self.config.replace(num_classes=num_classes)
        old = self.norm_head.weight
        self.head = _build_head(config).to(device=old.device, dtype=old.dtype)
        self.head.apply(_init_weights)
        self.class_names = None
        self.config = config  # last: an error above leaves the network unchanged

    def parameter_groups(self, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the parameters for an optimizer as the official recipes do.

        One-dimensional parameters and attention biases get no weight decay. The last block, the norm and the head get
        the learning rate ``lr``, the first block and the stem ``lr * layer_decay ** (blocks - 1)``. A downsampling
        layer has the learning rate of the block before it.

        Args:
            lr: learning rate of the head.
            weight_decay: weight decay of the other parameters.
            layer_decay: factor in (0, 1] from each block to the one before it; 1 disables the decay.

        Returns:
            Dictionaries with ``params``, ``lr`` and ``weight_decay``, which together contain every parameter that
            requires a gradient once.

        Raises:
            ValueError: if ``layer_decay`` is outside of (0, 1].

        Example:
            >>> model = TinyViT.from_config("1m")
            >>> optimizer = torch.optim.AdamW(model.parameter_groups(1e-3, layer_decay=0.8))
        """
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1]; got {layer_decay!r}.")
        blocks = sum(self.config.depths)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = lr * layer_decay ** (blocks - 1 - self._block_index(name))
                decay = 0.0 if parameter.ndim <= 1 or name.endswith("attention_biases") else weight_decay
                groups.setdefault((rate, decay), []).append(parameter)
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]

    def _block_index(self, parameter_name: str) -> int:
        """Return the index, counted from the stem, of the block whose learning rate a parameter has."""
        parts = parameter_name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "layers":
            return sum(self.config.depths) - 1
        stage = int(parts[1])
        if parts[2] == "blocks":
            return sum(self.config.depths[:stage]) + int(parts[3])
        return sum(self.config.depths[: stage + 1]) - 1

    def _embed(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_images(x, self.config.in_chans, MIN_IMAGE_SIZE)
        # Channels last; vmap knows no other memory format than the contiguous one.
        return self.patch_embed(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))


def _build_stage(config: TinyViTConfig, stage: int, drop_paths: Iterator[float]) -> Stage:
    dim, depth = config.embed_dims[stage], config.depths[stage]
    if stage == 0:
        blocks: list[nn.Module] = [
            MBConv(dim, config.mbconv_expand_ratio, config.activation, next(drop_paths)) for _ in range(depth)
        ]
    else:
        blocks = [
            TinyViTBlock(
                dim,
                config.num_heads[stage],
                config.window_sizes[stage],
                config.mlp_ratio,
                config.drop_rate,
                next(drop_paths),
                config.local_conv_size,
                config.activation,
            )
            for _ in range(depth)
        ]
    downsample = None
    if stage + 1 < len(config.depths):
        stride = config.stage_strides[stage + 1] // config.stage_strides[stage]
        downsample = PatchMerging(dim, config.embed_dims[stage + 1], stride, config.activation)
    return Stage(blocks, downsample, config.use_checkpoint)


def _build_head(config: TinyViTConfig) -> nn.Module:
    return nn.Linear(config.embed_dims[-1], config.num_classes) if config.num_classes else nn.Identity()


def _build_neck(dim: int) -> nn.Sequential:
    """Return MobileSAM's neck (arXiv:2306.14289), a projection to the channels of SAM's mask decoder."""
    return nn.Sequential(
        nn.Conv2d(dim, NECK_CHANNELS, 1, bias=False),
        LayerNorm2d(NECK_CHANNELS),
        nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, 3, padding=1, bias=False),
        LayerNorm2d(NECK_CHANNELS),
    )


def _init_weights(module: nn.Module) -> None:
    """Initialize linear layers as the official code does, which keeps torch's defaults for the others."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
