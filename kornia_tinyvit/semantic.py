"""From images to a class for each pixel: :class:`SemanticSegmenter`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kornia_tinyvit.backbone import BackboneConfig, BackboneNetwork
from kornia_tinyvit.config import MIN_IMAGE_SIZE, TinyViTConfig
from kornia_tinyvit.images import ImageInput, check_images, read_batches
from kornia_tinyvit.layers import ConvBN, evaluating
from kornia_tinyvit.preprocessing import resize_images

__all__ = ["MlpDecoder", "SegmenterConfig", "SemanticSegmenter", "class_maps", "fitted_size"]

_CLASSES_AT_A_TIME = 8  # whose logits are enlarged together: at 132 classes, all of a 4K photo's would take 4 GB


@dataclass(frozen=True)
class SegmenterConfig(BackboneConfig):
    """Everything that decides the architecture of a :class:`SemanticSegmenter`.

    Args:
        backbone: the network whose stages are read; its ``img_size`` is what :meth:`SemanticSegmenter.predict` looks
            at images with.
        num_classes: classes a pixel may have.
        width: channels of the decoder.
        dropout: share of the decoder's channels that training drops.

    Raises:
        ValueError: if a number is out of its range.
    """

    limits: ClassVar[dict[str, int]] = BackboneConfig.limits | {"width": 2**16}

    width: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1); got {self.dropout!r}.")

    def build_parts(self) -> dict[str, nn.Module]:
        """Build the decoder, with random weights."""
        return {"decoder": MlpDecoder(self.backbone.embed_dims, self.num_classes, self.width, self.dropout)}


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


class SemanticSegmenter(BackboneNetwork):
    """A :class:`~kornia_tinyvit.TinyViT` whose four stages say of each pixel which class it belongs to.

    Like :class:`~kornia_tinyvit.ImageClassifier` it takes images in [0, 1] and normalizes them itself, so it stands
    behind kornia's augmentations, and gradients reach the pixels. :meth:`forward` takes images at the size they have;
    :meth:`predict` looks at them at the size the network is meant for and answers at theirs. The backbone's norm, head
    and neck, which its stages do without, are frozen.

    Args:
        backbone: the network; :meth:`from_config` builds it, too.
        num_classes: classes a pixel may have.
        class_names: names of the classes in the order of the logits; numbers if left out.
        **options: ``width`` and ``dropout`` of :class:`SegmenterConfig`.

    Attributes:
        config: the :class:`SegmenterConfig` that tells all of it but the names.

    Raises:
        ValueError: if a number is out of its range, or there are not as many names as classes.

    Example:
        >>> segmenter = SemanticSegmenter.from_config("1m", num_classes=5, width=32).eval()
        >>> segmenter(torch.rand(2, 3, 45, 70)).shape
        torch.Size([2, 5, 45, 70])
    """

    config_class = SegmenterConfig
    kind = "segmenter"
    class_weights = ("classifier.",)

    decoder: MlpDecoder

    def forward(self, images: Tensor) -> Tensor:
        r"""Return logits :math:`(B, K, H, W)`, bilinearly enlarged from a quarter of the size.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], :math:`H, W \ge 32`.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if its shape is another.
        """
        check_images(images, self.backbone.config.in_chans)
        maps = self.backbone.forward_intermediates(self.normalize(images))
        return F.interpolate(self.decoder(maps), images.shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, images: ImageInput | Sequence[ImageInput]) -> list[Tensor]:
        """Tell the class of each pixel of images of any sizes.

        Each image is resized to :func:`fitted_size`, the area that the network is meant for, and its logits to the
        image's own size.

        Args:
            images: one image or several: tensors :math:`(C, H, W)` in [0, 1], paths, PIL images, or a batch tensor
                :math:`(B, C, H, W)`. They are moved to the network's device.

        Returns:
            For each image its class map :math:`(H, W)`, int64, on the network's device.

        Raises:
            TypeError: if something is no image.
            ValueError: if a file cannot be read or a shape is wrong.
            FileNotFoundError: if there is no such file.
        """
        config = self.backbone.config
        with evaluating(self), torch.inference_mode():
            found = []
            for (image,) in read_batches(images, self, config.in_chans):
                check_images(image[None], config.in_chans)
                found.append(class_maps(self, image[None], config)[0])
        return found


def fitted_size(height: int, width: int, config: TinyViTConfig) -> tuple[int, int]:
    """Return the size that a network looks at an image in: about the area of its ``img_size`` squared.

    The area, rather than a side, so that a panorama takes no more time and memory than a square. The sides are
    multiples of what the attention windows tile without padding if ``img_size`` is one, and of 32 if not: a network
    trained on squares without padding has not learnt what padded windows see.

    Args:
        height: rows of the image.
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
    """Return the classes :math:`(B, H, W)` of the pixels of images that a network looks at in :func:`fitted_size`.

    Args:
        network: maps images in [0, 1] to logits of their size, such as a :class:`SemanticSegmenter`.
        images: images :math:`(B, C, H, W)` in [0, 1].
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
