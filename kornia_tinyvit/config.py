"""The architecture of a network: :class:`TinyViTConfig` and the named variants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["VARIANTS", "TinyViTConfig", "WindowSizes", "resolve_window_sizes"]

#: A window-size policy, ``"scale"`` or ``"fit"``, or four explicit sizes; see :func:`resolve_window_sizes`.
WindowSizes = Literal["scale", "fit"] | Sequence[int]

NUM_STAGES = 4
MIN_IMAGE_SIZE = 32  # one token at stride 32


@dataclass(frozen=True)
class TinyViTConfig:
    """Validated, immutable arguments of a :class:`~kornia_tinyvit.TinyViT`.

    Checkpoints store a configuration as the values of :meth:`to_dict`; :meth:`from_dict` restores it.

    Args:
        img_size: side in pixels of the square training images. The network accepts any size; preprocessing and
            window-size policies use this one.
        in_chans: channels of the input image.
        num_classes: number of classes; 0 builds no head.
        embed_dims: channels of the four stages.
        depths: blocks of the four stages.
        num_heads: attention heads of the four stages; the first stage is convolutional and ignores its entry.
        window_sizes: side in tokens of the attention windows of the four stages; the first entry is ignored.
        mlp_ratio: ratio of hidden to input channels of the MLPs.
        drop_rate: dropout probability of the MLPs.
        drop_path_rate: stochastic depth probability of the last block; it grows linearly from 0 at the first.
        use_checkpoint: use gradient checkpointing: recompute the blocks in the backward pass.
        mbconv_expand_ratio: ratio of hidden to input channels of the MBConv blocks in the first stage.
        local_conv_size: odd kernel size of the depthwise convolution between attention and MLP.
        activation: activation class, from :mod:`torch.nn`.
        mobile_sam: build MobileSAM's image encoder: stride 16 instead of 32 and a 256-channel neck.

    Raises:
        ValueError: if a field is out of range, or ``num_heads`` does not divide ``embed_dims``.

    Example:
        >>> TinyViTConfig.from_variant("5m").embed_dims
        (64, 128, 160, 320)
    """

    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    use_checkpoint: bool = False
    mbconv_expand_ratio: float = 4.0
    local_conv_size: int = 3
    activation: type[nn.Module] = nn.GELU
    mobile_sam: bool = False

    def __post_init__(self) -> None:
        for name in ("embed_dims", "depths", "num_heads", "window_sizes"):
            values = getattr(self, name)
            sequence = isinstance(values, Sequence) and len(values) == NUM_STAGES
            if not (sequence and all(is_integer(value, 1) for value in values)):
                raise ValueError(f"{name} must be {NUM_STAGES} positive integers, one per stage; got {values!r}.")
            object.__setattr__(self, name, tuple(values))
        self._check_numbers()
        for stage in range(1, NUM_STAGES):
            dim, heads = self.embed_dims[stage], self.num_heads[stage]
            if dim % heads:
                raise ValueError(f"embed_dims[{stage}]={dim} must be a multiple of num_heads[{stage}]={heads}.")
        if self.embed_dims[0] < 2:
            raise ValueError("embed_dims[0] must be at least 2; the stem's first convolution has half of it.")
        if not (isinstance(self.activation, type) and issubclass(self.activation, nn.Module)):
            raise ValueError(f"activation must be a class such as torch.nn.GELU; got {self.activation!r}.")

    def _check_numbers(self) -> None:
        for name, low in (("img_size", MIN_IMAGE_SIZE), ("in_chans", 1), ("num_classes", 0), ("local_conv_size", 1)):
            value = getattr(self, name)
            if not is_integer(value, low):
                raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}.")
        if self.local_conv_size % 2 == 0:
            raise ValueError(f"local_conv_size must be odd to preserve the spatial size; got {self.local_conv_size}.")
        narrowest = {"mlp_ratio": min(self.embed_dims[1:]), "mbconv_expand_ratio": self.embed_dims[0]}
        for name, dim in narrowest.items():
            value = getattr(self, name)
            if not (is_number(value) and value * dim >= 1):
                raise ValueError(f"{name} must be positive and expand {dim} channels to at least one; got {value!r}.")
        for name in ("drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < 1):
                raise ValueError(f"{name} must be a probability in [0, 1); got {value!r}.")
        for name in ("use_checkpoint", "mobile_sam"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}.")

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> TinyViTConfig:
        """Return the configuration of a named variant, with some fields replaced.

        Args:
            variant: one of :data:`~kornia_tinyvit.config.VARIANTS`.
            **overrides: fields to replace.

        Raises:
            ValueError: if the variant is unknown.
        """
        if variant not in VARIANTS:
            raise ValueError(f"There is no TinyViT variant {variant!r}; choose one of {', '.join(VARIANTS)}.")
        return VARIANTS[variant].replace(**overrides)

    def replace(self, **changes: Any) -> TinyViTConfig:
        """Return a validated copy with some fields replaced.

        Args:
            **changes: new values by field name.

        Raises:
            ValueError: if a field is unknown or out of range.
        """
        check_fields(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values.

        Raises:
            ValueError: if the activation is not a class of :mod:`torch.nn`; others cannot be stored by name.
        """
        name = self.activation.__name__
        if getattr(nn, name, None) is not self.activation:
            raise ValueError(f"Only activations of torch.nn can be written to a file; got {self.activation!r}.")
        return dataclasses.asdict(self) | {"activation": name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyViTConfig:
        """Build a configuration from the values of :meth:`to_dict`.

        Args:
            values: values by field name; missing fields get their defaults.

        Raises:
            ValueError: if ``values`` is not a dictionary, or a field is unknown or out of range.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"A configuration must be a dictionary with field names as keys; got {str(values)[:60]}.")
        changes = dict(values)
        if "activation" in changes:
            changes["activation"] = _find_activation(changes["activation"])
        return cls().replace(**changes)

    def as_backbone(self, num_classes: int = 0) -> TinyViTConfig:
        """Return the configuration of a TinyViT that takes the weights of MobileSAM's encoder, without its neck.

        The last stage has stride 32, and the image size is that of :func:`usual_image_size` instead of 1024.

        Args:
            num_classes: number of classes.
        """
        size = usual_image_size(self.window_sizes[-1])
        return self.replace(mobile_sam=False, img_size=size, num_classes=num_classes)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Strides of the stages in pixels: (4, 8, 16, 32), or (4, 8, 16, 16) for MobileSAM."""
        return (4, 8, 16, 16) if self.mobile_sam else (4, 8, 16, 32)


def usual_image_size(window_size: int) -> int:
    """Return the image size in pixels whose last feature map is one window, as in all published networks.

    Args:
        window_size: side in tokens of the windows of the last stage.
    """
    return max(MIN_IMAGE_SIZE, 32 * window_size)


def check_class_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """Return class names as a tuple, or ``None`` without names.

    Raises:
        ValueError: if the number of names is not ``num_classes``.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"Got {len(class_names)} class names for {num_classes} classes.")
    return None if class_names is None else tuple(class_names)


def name_classes(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return class names as :func:`check_class_names` does; without names, ``"class 0"``, ``"class 1"`` and so on."""
    return check_class_names(class_names, num_classes) or tuple(f"class {index}" for index in range(num_classes))


def check_fields(kind: type, names: Iterable[str]) -> None:
    """Raise an error for names that are not fields of a dataclass.

    Raises:
        ValueError: if a field is unknown.
    """
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [str(name) for name in names if name not in known]
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(known)}.")


def is_integer(value: Any, minimum: int) -> bool:
    """Return whether a value is an integer of at least ``minimum``; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _find_activation(name: Any) -> type[nn.Module]:
    """Return a class of torch.nn by its name if it maps a tensor to one of the same shape."""
    activation = getattr(nn, name, None) if isinstance(name, str) else None
    known = getattr(activation, "__module__", "") == nn.GELU.__module__ or activation is nn.Identity
    try:
        shape = activation()(torch.zeros(1, 4, 1, 1)).shape if known else None  # type: ignore[misc]
    except Exception:  # MultiheadAttention, in the same module, raises several kinds
        shape = None
    if shape != (1, 4, 1, 1):
        raise ValueError(f"torch.nn has no activation {name!r}.")
    return activation  # type: ignore[return-value]


def resolve_window_sizes(base: TinyViTConfig, img_size: int, window_sizes: WindowSizes | None) -> tuple[int, ...]:
    """Return the four window sizes in tokens that a window-size policy gives at an image size.

    Args:
        base: the configuration whose ``window_sizes`` correspond to its ``img_size``.
        img_size: side of the images in pixels.
        window_sizes: ``None`` keeps the windows of ``base``, as the original implementations do at every size.
            ``"scale"`` multiplies them by ``img_size / base.img_size``: a window covers the same fraction of the
            image, as in the published 384 and 512 networks. MobileSAM's windows are those of 224 pixels at 1024 and
            are not scaled. ``"fit"`` limits each window to its stage's feature map, which the originals would pad.
            Four explicit sizes are returned as they are.

    Raises:
        ValueError: if ``window_sizes`` is none of these, or ``img_size`` is not a positive integer.

    Example:
        >>> resolve_window_sizes(VARIANTS["21m"], 384, "scale")
        (12, 12, 24, 12)
        >>> resolve_window_sizes(VARIANTS["5m"], 64, "fit")
        (7, 7, 4, 2)
    """
    if not is_integer(img_size, 1):
        raise ValueError(f"img_size must be a positive integer; got {img_size!r}.")
    if window_sizes is None or (window_sizes == "scale" and base.mobile_sam):
        return base.window_sizes
    if window_sizes == "scale":
        return tuple(max(1, round(size * img_size / base.img_size)) for size in base.window_sizes)
    if window_sizes == "fit":
        # Every strided convolution rounds up, and so does their composition: ceil(ceil(n / a) / b) = ceil(n / (a * b)).
        sides = (-(-img_size // stride) for stride in base.stage_strides)
        return tuple(min(size, side) for size, side in zip(base.window_sizes, sides, strict=True))
    if isinstance(window_sizes, str):
        raise ValueError(f'window_sizes must be "scale", "fit" or {NUM_STAGES} integers; got {window_sizes!r}.')
    return base.replace(window_sizes=window_sizes).window_sizes


#: The named variants. 5m, 11m and 21m are the published ones at 224 pixels (arXiv:2207.10666, table 2 and the official
#: configuration files); 1m is this project's variant for small images.
VARIANTS: dict[str, TinyViTConfig] = {
    "1m": TinyViTConfig(
        img_size=64,
        embed_dims=(32, 64, 96, 160),
        depths=(2, 2, 4, 2),
        num_heads=(1, 2, 3, 5),
        window_sizes=(8, 8, 4, 2),
    ),
    "5m": TinyViTConfig(embed_dims=(64, 128, 160, 320), num_heads=(2, 4, 5, 10)),
    "11m": TinyViTConfig(embed_dims=(64, 128, 256, 448), num_heads=(2, 4, 8, 14), drop_path_rate=0.1),
    "21m": TinyViTConfig(embed_dims=(96, 192, 384, 576), num_heads=(3, 6, 12, 18), drop_path_rate=0.2),
}
