"""Semantic segmentation: :class:`SemanticSegmenter`."""

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
from kornia_tinyvit.images import Images, check_images, read_batches
from kornia_tinyvit.layers import ConvBN
from kornia_tinyvit.modules import evaluation_copy
from kornia_tinyvit.preprocessing import resize_images

__all__ = ["MlpDecoder", "SegmenterConfig", "SemanticSegmenter", "class_maps", "fitted_size"]

_CLASSES_PER_CHUNK = 8  # whose logits are upsampled together: 132 classes of a 4K photo would take 4 GB


@dataclass(frozen=True)
class SegmenterConfig(BackboneConfig):
    """Configuration of a :class:`SemanticSegmenter`.

    Args:
        backbone: configuration of the backbone; :meth:`SemanticSegmenter.predict` resizes images to the area of its
            ``img_size``.
        num_classes: number of classes.
        width: channels of the decoder.
        dropout: dropout probability of the decoder's channels.

    Raises:
        ValueError: if a number is out of range.
    """

    limits: ClassVar[dict[str, int]] = BackboneConfig.limits | {"width": 2**16}

    width: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be a probability in [0, 1); got {self.dropout!r}.")

    def build_parts(self) -> dict[str, nn.Module]:
        """Return the decoder, with random weights."""
        return {"decoder": MlpDecoder(self.backbone.embed_dims, self.num_classes, self.width, self.dropout)}


class MlpDecoder(nn.Module):
    """The all-MLP decoder of SegFormer (arXiv:2105.15203): a linear layer per stage, one over all, and a classifier.

    Args:
        in_channels: channels of the feature maps, the finest first.
        num_classes: number of classes.
        width: channels of the hidden layers.
        dropout: dropout probability of the channels before the classifier.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.fuse = ConvBN(len(in_channels) * width, width, 1)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the logits :math:`(B, K, H_1, W_1)` at the size of the finest feature map.

        Args:
            features: feature maps :math:`(B, C_i, H_i, W_i)`.
        """
        projected = [
            F.interpolate(project(x), features[0].shape[-2:], mode="bilinear", align_corners=False)
            for project, x in zip(self.project, features, strict=True)
        ]
        return self.classifier(self.dropout(self.activation(self.fuse(torch.cat(projected, 1)))))


class SemanticSegmenter(BackboneNetwork):
    """A :class:`~kornia_tinyvit.TinyViT` with SegFormer's decoder on its four feature maps.

    It normalizes images in [0, 1] itself and is differentiable with respect to the pixels. :meth:`forward` processes
    images at their size, :meth:`predict` at about the network's. The norm, head and neck of the backbone are not used
    and are frozen.

    Args:
        backbone: the backbone.
        num_classes: number of classes.
        class_names: names of the classes in the order of the logits; ``"class 0"`` and so on by default.
        **options: ``width`` and ``dropout`` of :class:`SegmenterConfig`.

    Raises:
        ValueError: if a number is out of range, or the number of names is not ``num_classes``.

    Example:
        >>> segmenter = SemanticSegmenter.from_config("1m", num_classes=5, width=32).eval()
        >>> segmenter(torch.rand(2, 3, 45, 70)).shape
        torch.Size([2, 5, 45, 70])
    """

    config_class = SegmenterConfig
    kind = "segmenter"
    keeps_stride_16 = True  # the features are finer, and those that MobileSAM was trained with
    class_weights = ("classifier.",)

    decoder: MlpDecoder

    def forward(self, images: Tensor) -> Tensor:
        r"""Compute logits :math:`(B, K, H, W)`, bilinearly upsampled from stride 4.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1], :math:`H, W \ge 32`.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if it has another shape.
        """
        check_images(images, self.backbone.config.in_chans)
        features = self.backbone.forward_intermediates(self.normalize(images))
        return F.interpolate(self.decoder(features), images.shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, images: Images) -> list[Tensor]:
        """Predict the class of each pixel of images of any size.

        Each image is resized to :func:`fitted_size`, and its logits back to the size of the image.

        Args:
            images: one or several images, as for :meth:`ImageClassifier.predict`.

        Returns:
            The class indices of each image, :math:`(H, W)`, int64, on the network's device.

        Raises:
            TypeError: if an element is not an image.
            ValueError: if a file cannot be read, a shape is wrong, or values are outside of [0, 1].
            FileNotFoundError: if a file does not exist.
        """
        config = self.backbone.config
        network, predictions = evaluation_copy(self), []
        with torch.inference_mode():
            for (image,) in read_batches(images, self, config.in_chans):
                predictions.append(class_maps(network, image[None], config)[0])
        return predictions


def fitted_size(height: int, width: int, config: TinyViTConfig) -> tuple[int, int]:
    """Return the size to which :meth:`SemanticSegmenter.predict` resizes an image: about ``img_size`` squared in area.

    The limit on the area bounds time and memory for every aspect ratio. The sides are multiples of the size that the
    attention windows of all stages tile without padding, if ``img_size`` is one (the network was not trained on padded
    windows then), otherwise of 32.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        config: configuration of the backbone.

    Returns:
        Height and width in pixels.

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
    """Return the class indices :math:`(B, H, W)` of the pixels of images, evaluated at :func:`fitted_size`.

    Args:
        network: function from images in [0, 1] to logits of the same size, such as a :class:`SemanticSegmenter`.
        images: images :math:`(B, C, H, W)` in [0, 1].
        config: configuration of the backbone.
    """
    height, width = images.shape[-2:]
    logits = network(resize_images(images, *fitted_size(height, width, config)))
    best = torch.full((len(images), height, width), -math.inf, device=images.device)
    classes = torch.zeros_like(best, dtype=torch.int64)
    for number, chunk in enumerate(logits.float().split(_CLASSES_PER_CHUNK, 1)):
        value, index = F.interpolate(chunk, (height, width), mode="bilinear", align_corners=False).max(1)
        classes = torch.where(value > best, index + number * _CLASSES_PER_CHUNK, classes)
        best = torch.maximum(best, value)
    return classes
