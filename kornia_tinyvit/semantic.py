"""From pictures to a class for each pixel: :class:`SemanticSegmenter`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import Checkpoint
from kornia_tinyvit.checkpoints.composite import (
    CompositeConfig,
    name_classes,
    part_groups,
    read_composite,
    write_composite,
)
from kornia_tinyvit.checkpoints.loading import read_metadata
from kornia_tinyvit.config import MIN_IMAGE_SIZE, TinyViTConfig
from kornia_tinyvit.layers import ConvBN, evaluating
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import ImageInput, as_images, check_images, default_evaluation, resize_images

__all__ = ["MlpDecoder", "SegmenterConfig", "SemanticSegmenter", "class_maps", "fitted_size"]

_CONFIG_KEY = "kornia_tinyvit.segmenter"
_DECODER = "decoder."
_CLASSES_AT_A_TIME = 8  # whose logits are enlarged together: at 132 classes, all of a 4K photo's would take 4 GB


@dataclass(frozen=True)
class SegmenterConfig(CompositeConfig):
    """Everything that decides the architecture of a :class:`SemanticSegmenter`.

    Args:
        backbone: the network whose stages are read; its ``img_size`` is what :meth:`SemanticSegmenter.predict` looks
            at pictures with.
        num_classes: classes a pixel may have.
        width: channels of the decoder.
        dropout: share of the decoder's channels that training drops.

    Raises:
        ValueError: if a number is out of its range.
    """

    width: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        self._check_positive("num_classes", "width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1); got {self.dropout!r}.")


class MlpDecoder(nn.Module):
    """The all-MLP decoder of SegFormer (arXiv:2105.15203): a linear layer a stage, one over all, and a classifier.

    Args:
        in_channels: channels of the maps, the finest first.
        num_classes: classes of the logits.
        width: channels in between.
        dropout: share of channels that training drops before the classifier.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.fuse = ConvBN(len(in_channels) * width, width, 1)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn maps :math:`(B, C_i, H_i, W_i)` into logits :math:`(B, K, H_1, W_1)` at the size of the finest."""
        finest = maps[0].shape[-2:]
        levels = [
            F.interpolate(project(x), finest, mode="bilinear", align_corners=False)
            for project, x in zip(self.project, maps, strict=True)
        ]
        return self.classifier(self.dropout(self.activation(self.fuse(torch.cat(levels, 1)))))


class SemanticSegmenter(nn.Module):
    """A :class:`~kornia_tinyvit.TinyViT` whose four stages say of each pixel which class it belongs to.

    Like :class:`~kornia_tinyvit.ImageClassifier` it takes pictures in [0, 1] and normalises them itself, so it stands
    behind kornia's augmentations, and gradients reach the pixels. :meth:`forward` takes pictures at the size they have;
    :meth:`predict` looks at them at the size the network is meant for and answers at theirs. The backbone's norm, head
    and neck, which its stages do without, are frozen.

    Args:
        backbone: the network; :meth:`from_config` builds it, too.
        num_classes: classes a pixel may have.
        class_names: names of the classes in the order of the logits; numbers if left out.
        width: channels of the decoder.
        dropout: share of the decoder's channels that training drops.

    Attributes:
        config: the :class:`SegmenterConfig` that tells all of it but the names.

    Raises:
        ValueError: if a number is out of its range, or there are not as many names as classes.

    Example:
        >>> segmenter = SemanticSegmenter.from_config("1m", num_classes=5, width=32).eval()
        >>> segmenter(torch.rand(2, 3, 45, 70)).shape
        torch.Size([2, 5, 45, 70])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: TinyViT,
        *,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        width: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self._shape = SegmenterConfig(backbone.config, num_classes, width, dropout)
        self.class_names = name_classes(class_names, num_classes)
        self.backbone = backbone
        self.decoder = MlpDecoder(backbone.feature_channels, num_classes, width, dropout)
        for unused in (backbone.norm_head, backbone.head, backbone.neck):
            if unused is not None:
                unused.requires_grad_(False)
        statistics = default_evaluation(backbone.config)
        self.register_buffer("mean", statistics.mean, persistent=False)
        self.register_buffer("std", statistics.std, persistent=False)

    @classmethod
    def from_config(
        cls,
        config: str | TinyViTConfig | SegmenterConfig | None = None,
        *,
        pretrained: bool | str | Path | Checkpoint = False,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        width: int = 256,
        dropout: float = 0.1,
        **kwargs: Any,
    ) -> SemanticSegmenter:
        """Build a segmenter from a variant, a configuration, a backbone's weights or what :meth:`save` wrote.

        Args:
            config: variant or configuration of the backbone, or that of a whole segmenter; may be left out where
                ``pretrained`` is a file that carries one.
            pretrained: a file that :meth:`save` wrote, or what :meth:`TinyViT.from_config` takes, whose head is left
                out: the decoder then begins with random weights.
            num_classes: classes a pixel may have; may be left out for a whole segmenter or where names are given. A
                segmenter's file for other classes gives all but its classifier.
            class_names: names of the classes; those of a segmenter's file come along.
            width: channels of the decoder; a segmenter's file and a :class:`SegmenterConfig` have their own.
            dropout: share of the decoder's channels that training drops; as ``width``.
            **kwargs: for :meth:`TinyViT.from_config`, such as ``img_size`` and ``window_sizes``.

        Returns:
            The segmenter, in evaluation mode if all its weights were loaded.

        Raises:
            ValueError: if it cannot be built, or the number of classes is not told.
            CheckpointError: if the weights cannot be read or belong to another architecture.
        """
        if num_classes is None and class_names is not None:
            num_classes = len(class_names)
        if isinstance(pretrained, (str, Path)) and _CONFIG_KEY in read_metadata(pretrained):
            return cls._from_file(Path(pretrained), config, num_classes, class_names, kwargs)
        if isinstance(config, SegmenterConfig):
            num_classes, width, dropout = num_classes or config.num_classes, config.width, config.dropout
            config = config.backbone
        if num_classes is None:
            raise ValueError("Say how many classes a pixel may have: num_classes or class_names.")
        backbone = TinyViT.from_config(config, pretrained=pretrained, num_classes=0, **kwargs)
        return cls(backbone, num_classes=num_classes, class_names=class_names, width=width, dropout=dropout).train()

    @classmethod
    def _from_file(
        cls,
        path: Path,
        config: str | TinyViTConfig | SegmenterConfig | None,
        num_classes: int | None,
        class_names: Sequence[str] | None,
        kwargs: dict[str, Any],
    ) -> SemanticSegmenter:
        file = read_composite(path, _CONFIG_KEY, SegmenterConfig)
        stored, decoder = file.config, file.part(_DECODER)
        file.check(decoder, _decoder_shapes(stored))
        base, found = file.backbone(config)
        backbone = TinyViT.from_config(base, pretrained=found, num_classes=0, **kwargs)
        same = num_classes in (None, stored.num_classes)
        if class_names is None and same:
            class_names = file.class_names
        count = stored.num_classes if num_classes is None else num_classes
        segmenter = cls(
            backbone, num_classes=count, class_names=class_names, width=stored.width, dropout=stored.dropout
        )
        if not same:
            decoder |= {f"classifier.{name}": x for name, x in segmenter.decoder.classifier.state_dict().items()}
        segmenter.decoder.load_state_dict(decoder)
        return segmenter.train(not same)

    @property
    def config(self) -> SegmenterConfig:
        """What :meth:`from_config` builds the same architecture from."""
        return dataclasses.replace(self._shape, backbone=self.backbone.config)

    def forward(self, images: Tensor) -> Tensor:
        r"""Return logits :math:`(B, K, H, W)`, bilinearly enlarged from a quarter of the size.

        Args:
            images: pictures :math:`(B, C, H, W)` in [0, 1], :math:`H, W \ge 32`.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if its shape is another.
        """
        check_images(images, self.backbone.config.in_chans)
        maps = self.backbone.forward_intermediates(normalize(images, self.mean.to(images), self.std.to(images)))
        return F.interpolate(self.decoder(maps), images.shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, images: ImageInput | Sequence[ImageInput]) -> list[Tensor]:
        """Tell the class of each pixel of pictures of any sizes.

        Each picture is resized to :func:`fitted_size`, the area that the network is meant for, and its logits to the
        picture's own size.

        Args:
            images: one picture or several: tensors :math:`(C, H, W)` in [0, 1], paths, PIL images, or a batch tensor
                :math:`(B, C, H, W)`. They are moved to the network's device.

        Returns:
            For each picture its class map :math:`(H, W)`, int64, on the network's device.

        Raises:
            TypeError: if something is no picture.
            ValueError: if a file cannot be read or a shape is wrong.
            FileNotFoundError: if there is no such file.
        """
        first, config = next(self.parameters()), self.backbone.config
        found = []
        with evaluating(self), torch.inference_mode():
            for picture in as_images(images, config.in_chans):
                batch = picture.to(first.device, first.dtype).unsqueeze(0)
                check_images(batch, config.in_chans)
                found.append(class_maps(self, batch, config)[0])
        return found

    def parameter_groups(self, lr: float, weight_decay: float = 0.01, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Group the parameters for a torch optimizer: :meth:`TinyViT.parameter_groups`, and the decoder's at ``lr``.

        Args:
            lr: learning rate of the decoder and of the backbone's last block.
            weight_decay: weight decay of the matrices; one-dimensional parameters are not decayed.
            layer_decay: factor in (0, 1] from one block of the backbone to the one before.

        Raises:
            ValueError: if ``layer_decay`` is outside of (0, 1].
        """
        groups = self.backbone.parameter_groups(lr, weight_decay, layer_decay)
        return groups + part_groups([self.decoder], lr, weight_decay)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with configuration and class names inside, whole or not at all.

        :meth:`from_config` reads it back: ``SemanticSegmenter.from_config(pretrained=path)``.

        Args:
            path: the file to write; its folder is made.

        Returns:
            The path.

        Raises:
            ValueError: if the backbone's activation cannot be named in a file.
        """
        return write_composite(path, _CONFIG_KEY, self, self.class_names)


def fitted_size(height: int, width: int, config: TinyViTConfig) -> tuple[int, int]:
    """Return the size that a network looks at a picture in: about the area of its ``img_size`` squared.

    The area, rather than a side, so that a panorama takes no more time and memory than a square. The sides are
    multiples of what the attention windows tile without padding if ``img_size`` is one, and of 32 if not: a network
    trained on squares without padding has not learnt what padded windows see.

    Args:
        height: rows of the picture.
        width: its columns.
        config: the network.

    Example:
        >>> config = TinyViTConfig.from_variant("1m", img_size=256)
        >>> fitted_size(480, 640, config)
        (192, 320)
    """
    sides = (window * stride for window, stride in zip(config.window_sizes[1:], config.stage_strides[1:], strict=True))
    tile = math.lcm(*sides)
    tile = MIN_IMAGE_SIZE if config.img_size % tile else tile
    scale = config.img_size / math.sqrt(height * width) / tile
    return max(1, round(height * scale)) * tile, max(1, round(width * scale)) * tile


def class_maps(network: Callable[[Tensor], Tensor], images: Tensor, config: TinyViTConfig) -> Tensor:
    """Return the classes :math:`(B, H, W)` of the pixels of pictures that a network looks at in :func:`fitted_size`.

    Args:
        network: maps pictures in [0, 1] to logits of their size, such as a :class:`SemanticSegmenter`.
        images: pictures :math:`(B, C, H, W)` in [0, 1].
        config: the network whose stages it reads.
    """
    height, width = images.shape[-2:]
    logits = network(resize_images(images, *fitted_size(height, width, config)))
    best = torch.full((len(images), height, width), -math.inf, device=images.device)
    classes = torch.zeros_like(best, dtype=torch.int64)
    for number, some in enumerate(logits.float().split(_CLASSES_AT_A_TIME, 1)):
        value, index = F.interpolate(some, (height, width), mode="bilinear", align_corners=False).max(1)
        classes = torch.where(value > best, index + number * _CLASSES_AT_A_TIME, classes)
        best = torch.maximum(best, value)
    return classes


def _decoder_shapes(config: SegmenterConfig) -> dict[str, Tensor]:
    """Return the decoder's tensors without memory; none if not even the shapes can be made."""
    if config.width >= 2**16 or config.num_classes >= 2**20:
        return {}
    with torch.device("meta"):
        return MlpDecoder(config.backbone.embed_dims, config.num_classes, config.width).state_dict()
