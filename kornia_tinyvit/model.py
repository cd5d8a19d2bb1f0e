"""TinyViT: the blocks of :mod:`kornia_tinyvit.layers` assembled from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from kornia.models.common import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kornia_tinyvit.checkpoints import Checkpoint, load_checkpoint, open_pretrained
from kornia_tinyvit.config import MIN_IMAGE_SIZE, TinyViTConfig, WindowSizes, resolve_window_sizes
from kornia_tinyvit.layers import MBConv, PatchEmbed, PatchMerging, TinyViTBlock
from kornia_tinyvit.preprocessing import default_preprocessing

__all__ = ["TinyViT"]

NECK_CHANNELS = 256  # what SAM's mask decoder takes


class Blocks(nn.Sequential):
    """The blocks of one resolution in their order.

    Attributes:
        gradient_checkpointing: recompute the blocks in the backward pass. This and the function beside it have the
            names by which transformers switches the parts of a network.

    Args:
        blocks: the blocks, each of which keeps the shape of its map.
        use_checkpoint: the first value of ``gradient_checkpointing``.
    """

    def __init__(self, blocks: Iterable[nn.Module], use_checkpoint: bool = False) -> None:
        super().__init__(*blocks)
        self.gradient_checkpointing = use_checkpoint
        self._gradient_checkpointing_func: Callable[..., Tensor] = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map :math:`(B, C, H, W)` to the same shape."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return super().forward(x)
        for block in self:
            x = self._gradient_checkpointing_func(block, x)
        return x


class Stage(nn.Module):
    """Blocks of one resolution, and the merging that leads to the next stage.

    Args:
        blocks: the blocks.
        downsample: the merging, absent in the last stage.
        use_checkpoint: recompute the blocks in the backward pass.
    """

    def __init__(self, blocks: list[nn.Module], downsample: PatchMerging | None, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.blocks = Blocks(blocks, use_checkpoint)
        self.downsample = downsample

    def forward_downsample(self, x: Tensor) -> Tensor:
        """Merge a map into that of the next stage; the last stage has no next one and returns the map."""
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks and the merging on a map :math:`(B, C, H, W)`."""
        return self.forward_downsample(self.blocks(x))


class TinyViT(nn.Module):
    """TinyViT (arXiv:2207.10666): a convolutional stage, then three stages of window attention.

    The network takes normalized images of any height and width from 32 pixels up and is differentiable from the
    pixels to the logits. Its ``state_dict`` has the names and shapes of the official release, which are also those of
    ``kornia.models.tiny_vit.TinyViT``. :meth:`from_config` builds the published variants; the arguments here are those
    of :class:`TinyViTConfig`, in kornia's order.

    Attributes:
        config: the :class:`TinyViTConfig` the network was built from.
        preprocessing: the :class:`~kornia_tinyvit.preprocessing.Preprocessing` of the images it was trained on, which
            its files carry; by default that of its resolution with ImageNet's statistics.
        class_names: the names of the classes in the order of the logits, where known.
        feature_channels: channels of the maps of :meth:`forward_intermediates`.
        feature_strides: pixels a cell of those maps stands for.

    Raises:
        ValueError: if the configuration is not a valid one.

    Example:
        >>> model = TinyViT.from_config("1m", num_classes=10).eval()
        >>> model(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

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
        self.patch_embed = PatchEmbed(config.in_chans, config.embed_dims[0], activation)
        # Stochastic depth grows linearly from 0 at the first block to drop_path_rate at the last.
        last = max(sum(config.depths) - 1, 1)
        drop_paths = iter([drop_path_rate * block / last for block in range(sum(config.depths))])
        self.layers = nn.Sequential(*(_build_stage(config, stage, drop_paths) for stage in range(len(config.depths))))
        # MobileSAM's file holds a norm and a head that its forward pass does not use.
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
        window_sizes: WindowSizes | None = None,
        **overrides: Any,
    ) -> TinyViT:
        """Build a named variant or a configuration, with or without weights.

        Args:
            config: ``"1m"``, ``"5m"``, ``"11m"``, ``"21m"`` or a :class:`TinyViTConfig`. It may be left out when
                ``pretrained`` is a file that :func:`save_checkpoint` wrote, which carries its own.
            pretrained: ``False`` for random weights; ``True`` for the variant's best ImageNet-1k weights (5m, 11m,
                21m; for 21m those of 384 or 512 pixels when ``img_size`` is at least that) or its embedded ones
                (1m); a name of :func:`list_pretrained`; the path or URL of a checkpoint in any layout that
                :func:`load_checkpoint` reads; or a :class:`~kornia_tinyvit.checkpoints.Checkpoint`.
            window_sizes: ``None`` keeps the windows of the variant or checkpoint at every size, as the originals do.
                ``"scale"`` scales them with ``img_size``, the bias tables interpolated; ``"fit"`` cuts those that are
                larger than their map; four integers are taken as they are.
            **overrides: fields of :class:`TinyViTConfig` to replace. What is not given here follows the checkpoint:
                resolution, classes and input channels.

        Returns:
            The network, in evaluation mode if complete weights were loaded, in training mode if there are none or the
            head was reset, as in kornia.

        Raises:
            ValueError: if the variant, the name or a field is unknown or out of its range.
            CheckpointError: if the checkpoint cannot be read or does not belong to the architecture.

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
            raise ValueError("Say which network to build: a variant such as '5m', a TinyViTConfig, or a file's path.")
        windows = resolve_window_sizes(base, overrides.get("img_size", base.img_size), window_sizes)
        final = base.replace(**overrides, window_sizes=windows)
        model = cls(**{name: getattr(final, name) for name in final.__dataclass_fields__})
        if found is not None:
            report = load_checkpoint(model, found, window_adaptation="cut" if window_sizes == "fit" else "interpolate")
            model.train(not report.complete)
            model.preprocessing = found.preprocessing_for(final)
            if "img_size" in overrides:
                model.preprocessing = model.preprocessing.resize(final.img_size)
            model.class_names = found.class_names if report.complete and final.num_classes else None
        return model

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels :math:`C_i` of the four maps of :meth:`forward_intermediates`."""
        return self.config.embed_dims

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Pixels a cell of each of those maps stands for: (4, 8, 16, 32), or (4, 8, 16, 16) for MobileSAM."""
        return self.config.stage_strides

    def forward(self, x: Tensor) -> Tensor:
        r"""Classify images, or embed them for MobileSAM.

        Args:
            x: normalized images :math:`(B, C_{in}, H, W)`, floating point, :math:`H, W \ge 32`; for the published
                weights, values in [0, 1] normalized with ImageNet's mean and standard deviation.

        Returns:
            Logits :math:`(B, classes)`; without a head (``num_classes=0``) the normalized pooled features
            :math:`(B, C)`; with ``mobile_sam=True`` the embedding :math:`(B, 256, H/16, W/16)`.

        Raises:
            TypeError: if ``x`` is not a floating point tensor.
            ValueError: if its shape is not the one above.
        """
        x = self.forward_features(x)
        return self.forward_head(x) if self.neck is None else self.neck(x)

    def forward_features(self, x: Tensor) -> Tensor:
        r"""Return the last map before pooling, :math:`(B, C, \lceil H/32 \rceil, \lceil W/32 \rceil)`.

        Args:
            x: images as :meth:`forward` takes them.
        """
        return self.layers(self._embed(x))

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        r"""Return the maps of the four stages, each before it is merged into the next.

        Args:
            x: images as :meth:`forward` takes them.

        Returns:
            Four maps :math:`(B, C_i, \lceil H/s_i \rceil, \lceil W/s_i \rceil)` with :math:`C_i` of
            ``feature_channels`` and :math:`s_i` of ``feature_strides``.
        """
        x = self._embed(x)
        maps = []
        for stage in cast("Iterable[Stage]", self.layers):
            maps.append(stage.blocks(x))
            x = stage.forward_downsample(maps[-1])
        return maps

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map of :meth:`forward_features` and classify it.

        Args:
            features: map :math:`(B, C, H, W)`.
            pre_logits: return the normalized pooled features :math:`(B, C)` instead of the logits.
        """
        pooled = self.norm_head(features.mean((2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one with random weights.

        Args:
            num_classes: classes of the new head; 0 removes it, and the network returns pooled features.

        Raises:
            ValueError: if ``num_classes`` is negative.
        """
        config = self.config.replace(num_classes=num_classes)
        old = self.norm_head.weight
        self.head = _build_head(config).to(device=old.device, dtype=old.dtype)
        self.head.apply(_init_weights)
        self.class_names = None
        self.config = config  # last: a head that cannot be built leaves the network as it was

    def parameter_groups(self, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the parameters for a torch optimizer as the official recipes do.

        One-dimensional parameters, biases and attention biases are not decayed. The learning rate falls by
        ``layer_decay`` from block to block towards the image: the last block, the norm and the head have ``lr``, the
        first block and the stem ``lr * layer_decay ** (blocks - 1)``; a merging goes with the block before it.

        Args:
            lr: learning rate of the head.
            weight_decay: weight decay of the matrices.
            layer_decay: factor in (0, 1] from one block to the one before; 1 gives all the same learning rate.

        Returns:
            Dictionaries with ``params``, ``lr`` and ``weight_decay``, holding every parameter that requires a gradient
            exactly once.

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
        """Return the position, counted from the image, of the block that a parameter trains with."""
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
        self._check_images(x)
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))

    def _check_images(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"TinyViT takes a tensor (B, {self.config.in_chans}, H, W); got {type(x).__name__}.")
        if not x.is_floating_point():
            raise TypeError(
                f"TinyViT takes floating point images; got {x.dtype}. Convert them with x.float() / 255 and "
                "normalize them, or use ImageClassifier, which does both."
            )
        if x.ndim != 4 or x.shape[1] != self.config.in_chans:
            raise ValueError(
                f"TinyViT takes images of shape (B, {self.config.in_chans}, H, W); got {tuple(x.shape)}. "
                "A single image needs .unsqueeze(0); other channels need from_config(..., in_chans=...)."
            )
        if x.shape[2] < MIN_IMAGE_SIZE or x.shape[3] < MIN_IMAGE_SIZE:
            raise ValueError(
                f"TinyViT takes images of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE} pixels; got "
                f"{x.shape[2]}x{x.shape[3]}. Resize them, for example with kornia.geometry.resize."
            )


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
    """Return MobileSAM's neck (arXiv:2306.14289), which brings the map to the channels of SAM's mask decoder."""
    return nn.Sequential(
        nn.Conv2d(dim, NECK_CHANNELS, 1, bias=False),
        LayerNorm2d(NECK_CHANNELS),
        nn.Conv2d(NECK_CHANNELS, NECK_CHANNELS, 3, padding=1, bias=False),
        LayerNorm2d(NECK_CHANNELS),
    )


def _init_weights(module: nn.Module) -> None:
    """Initialize linear layers as the official code does; torch's defaults already serve the others."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
