"""What a network is: :class:`TinyViTConfig` and the named variants."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["VARIANTS", "TinyViTConfig", "WindowSizes", "resolve_window_sizes"]

#: How windows are asked for: ``"scale"``, ``"fit"`` or four sizes said outright.
WindowSizes = Literal["scale", "fit"] | Sequence[int]

NUM_STAGES = 4
MIN_IMAGE_SIZE = 32  # one token at stride 32


@dataclass(frozen=True)
class TinyViTConfig:
    """Everything that decides the architecture of a :class:`~kornia_tinyvit.TinyViT`.

    The fields are the arguments of :class:`~kornia_tinyvit.TinyViT`, checked and frozen. A configuration survives
    :meth:`to_dict` and :meth:`from_dict` unchanged, which is how it travels inside a checkpoint.

    Args:
        img_size: side in pixels of the square image the network is meant for. The network runs at any size; this one
            is what preprocessing and the window policies refer to.
        in_chans: channels of the input image.
        num_classes: classes of the head; 0 leaves the head out.
        embed_dims: channels of the four stages.
        depths: blocks of the four stages.
        num_heads: attention heads of the four stages; the first stage is convolutional and ignores its entry.
        window_sizes: side in tokens of the attention windows of the four stages; the first entry is ignored.
        mlp_ratio: hidden over input width of the MLPs.
        drop_rate: dropout probability inside the MLPs.
        drop_path_rate: stochastic depth probability of the last block; it grows linearly from 0 at the first.
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
        mbconv_expand_ratio: hidden over input width of the first stage's MBConv blocks.
        local_conv_size: odd kernel size of the depthwise convolution between attention and MLP.
        activation: activation class, from :mod:`torch.nn`.
        mobile_sam: build MobileSAM's image encoder: stride 16 instead of 32 and a 256-channel neck.

    Raises:
        ValueError: if a field is out of its range, or the four stages do not agree.

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
            values = _int_tuple(name, getattr(self, name))
            if len(values) != NUM_STAGES or min(values) < 1:
                raise ValueError(f"{name} must be {NUM_STAGES} positive integers, one a stage; got {values}.")
            object.__setattr__(self, name, values)
        self._check_numbers()
        for stage in range(1, NUM_STAGES):
            dim, heads = self.embed_dims[stage], self.num_heads[stage]
            if dim % heads:
                raise ValueError(
                    f"embed_dims[{stage}]={dim} is not a multiple of num_heads[{stage}]={heads}: every head takes "
                    "an equal share of the channels."
                )
        if self.embed_dims[0] < 2:
            raise ValueError("embed_dims[0] must be at least 2: the first convolution of the stem makes half as many.")
        if not (isinstance(self.activation, type) and issubclass(self.activation, nn.Module)):
            raise ValueError(f"activation must be a class such as torch.nn.GELU; got {self.activation!r}.")

    def _check_numbers(self) -> None:
        for name, low in (("img_size", MIN_IMAGE_SIZE), ("in_chans", 1), ("num_classes", 0), ("local_conv_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}; got {value!r}.")
        if self.local_conv_size % 2 == 0:
            raise ValueError(f"local_conv_size must be odd, so that maps keep their size; got {self.local_conv_size}.")
        narrowest = {"mlp_ratio": min(self.embed_dims[1:]), "mbconv_expand_ratio": self.embed_dims[0]}
        for name, dim in narrowest.items():
            value = getattr(self, name)
            if not (is_number(value) and value * dim >= 1):
                raise ValueError(f"{name} must be positive and make {dim} channels at least one; got {value!r}.")
        for name in ("drop_rate", "drop_path_rate"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < 1):
                raise ValueError(f"{name} is a probability in [0, 1); got {value!r}.")
        for name in ("use_checkpoint", "mobile_sam"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is True or False; got {getattr(self, name)!r}.")

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> TinyViTConfig:
        """Return the configuration of a named variant, with some fields replaced.

        Args:
            variant: one of :data:`~kornia_tinyvit.config.VARIANTS`.
            **overrides: fields to replace.

        Raises:
            ValueError: if there is no such variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"There is no TinyViT variant {variant!r}; choose one of {', '.join(VARIANTS)}.")
        return VARIANTS[variant].replace(**overrides)

    def replace(self, **changes: Any) -> TinyViTConfig:
        """Return a copy with some fields replaced, checked again.

        Raises:
            ValueError: if a name is no field, or a value is out of its range.
        """
        unknown = sorted(changes.keys() - {field.name for field in dataclasses.fields(self)})
        if unknown:
            known = ", ".join(field.name for field in dataclasses.fields(self))
            raise ValueError(f"TinyViTConfig has no field {', '.join(unknown)}; its fields are {known}.")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold.

        Raises:
            ValueError: if the activation is not a class of :mod:`torch.nn`, which alone can be named in a file.
        """
        name = self.activation.__name__
        if getattr(nn, name, None) is not self.activation:
            raise ValueError(f"Only activations of torch.nn can be written to a file; got {self.activation!r}.")
        return dataclasses.asdict(self) | {"activation": name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyViTConfig:
        """Rebuild a configuration from :meth:`to_dict`'s values.

        Raises:
            ValueError: if they are no dictionary, or a field is unknown or out of its range.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ValueError(f"A configuration is a dictionary of fields by name; got {str(values)[:60]}.")
        changes = dict(values)
        if "activation" in changes:
            changes["activation"] = _find_activation(changes["activation"])
        return cls().replace(**changes)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Pixels a token of each stage stands for: (4, 8, 16, 32), or (4, 8, 16, 16) for MobileSAM."""
        return (4, 8, 16, 16) if self.mobile_sam else (4, 8, 16, 32)


def check_class_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    """Return names of classes as a tuple, ``None`` if there are none.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"Got {len(class_names)} class names for {num_classes} classes.")
    return None if class_names is None else tuple(class_names)


def name_classes(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return the names of classes, ``"class 0"`` and so on if there are none.

    Raises:
        ValueError: if there are not as many names as classes.
    """
    return check_class_names(class_names, num_classes) or tuple(f"class {index}" for index in range(num_classes))


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _find_activation(name: Any) -> type[nn.Module]:
    """Return a class of torch.nn by its name, which a file tells, if it maps a tensor to one of its shape."""
    activation = getattr(nn, name, None) if isinstance(name, str) else None
    known = getattr(activation, "__module__", "") == nn.GELU.__module__ or activation is nn.Identity
    try:
        shape = activation()(torch.zeros(1, 4, 1, 1)).shape if known else None  # type: ignore[misc]
    except Exception:  # the attention beside them fails in other ways
        shape = None
    if shape != (1, 4, 1, 1):
        raise ValueError(f"torch.nn has no activation {name!r}.")
    return activation  # type: ignore[return-value]


def _int_tuple(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a sequence of integers; got {values!r}.")
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise ValueError(f"{name} must hold integers; got {tuple(values)}.")
    return tuple(values)


def resolve_window_sizes(base: TinyViTConfig, img_size: int, window_sizes: WindowSizes | None) -> tuple[int, ...]:
    """Turn a window policy into four sizes in tokens.

    Args:
        base: the configuration whose ``window_sizes`` belong to its ``img_size``.
        img_size: side in pixels of the images to come.
        window_sizes: ``None`` keeps the base's windows, as the original implementations do at every size. ``"scale"``
            multiplies them by ``img_size / base.img_size``, so a window covers the same share of the image; this is
            how the published 384 and 512 networks follow from the 224 one. MobileSAM's windows, which at 1024 pixels
            are those of 224, stay as they are. ``"fit"`` cuts a window that is larger than its stage's map down to the
            map, where the originals would pad the map up to the window. Four sizes are taken as they are.

    Raises:
        ValueError: if ``window_sizes`` is none of these, or ``img_size`` no positive integer.

    Example:
        >>> resolve_window_sizes(VARIANTS["21m"], 384, "scale")
        (12, 12, 24, 12)
        >>> resolve_window_sizes(VARIANTS["5m"], 64, "fit")
        (7, 7, 4, 2)
    """
    if isinstance(img_size, bool) or not isinstance(img_size, int) or img_size < 1:
        raise ValueError(f"img_size must be a positive whole number; got {img_size!r}.")
    if window_sizes is None:
        return base.window_sizes
    if window_sizes == "scale":
        if base.mobile_sam:
            return base.window_sizes
        return tuple(max(1, round(size * img_size / base.img_size)) for size in base.window_sizes)
    if window_sizes == "fit":
        # Every strided convolution rounds up, and so does their composition: ceil(ceil(n / a) / b) = ceil(n / (a * b)).
        maps = (-(-img_size // stride) for stride in base.stage_strides)
        return tuple(min(size, side) for size, side in zip(base.window_sizes, maps, strict=True))
    if isinstance(window_sizes, str):
        raise ValueError(f'window_sizes must be "scale", "fit" or {NUM_STAGES} integers; got {window_sizes!r}.')
    return base.replace(window_sizes=tuple(window_sizes)).window_sizes


#: The named networks. 5m, 11m and 21m are the published ones at 224 pixels (arXiv:2207.10666, table 2 and the official
#: configuration files); 1m is this project's own, for small images.
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
