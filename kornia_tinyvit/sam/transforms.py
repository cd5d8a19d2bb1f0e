"""Images to model inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from PIL import Image
from torch import Tensor

from kornia_tinyvit.images import read_pixels, to_pil
from kornia_tinyvit.sam.embedding import Geometry

__all__ = ["PIXEL_MEAN", "PIXEL_STD", "preprocess_image", "resize_image"]

#: Channel means of segment-anything's preprocessing, for values in [0, 1].
PIXEL_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
#: Channel standard deviations of segment-anything's preprocessing, for values in [0, 1].
PIXEL_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


def preprocess_image(
    pixels: Tensor, img_size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Geometry]:
    """Resize, normalize and pad an image; see :meth:`MobileSAM.preprocess`.

    Args:
        pixels: image :math:`(3, H, W)`, uint8 or floating point in [0, 1].
        img_size: height and width of the model input.
        device: device of the result.
        dtype: dtype of the result.

    Returns:
        A model input :math:`(3, h, w)` and the placement of the image in it.
    """
    geometry = Geometry.fit((pixels.shape[1], pixels.shape[2]), img_size)
    if pixels.dtype == torch.uint8:
        pixels = resize_image(pixels, geometry.input_size).to(device).float() / 255
    else:
        pixels = pixels.to(device, torch.promote_types(pixels.dtype, torch.float32))
        pixels = resize_image(pixels, geometry.input_size)
    mean, std = pixels.new_tensor(PIXEL_MEAN), pixels.new_tensor(PIXEL_STD)
    below, right = (side - used for side, used in zip(img_size, geometry.input_size, strict=True))
    return F.pad(normalize(pixels[None], mean, std)[0], (0, right, 0, below)).to(dtype), geometry


def resize_image(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image :math:`(3, H, W)`, bilinear with antialiasing: uint8 by Pillow, floating point by torch.

    Args:
        pixels: image :math:`(3, H, W)`.
        size: height and width of the result in pixels.

    Returns:
        The image :math:`(3, height, width)` in the same dtype.
    """
    if tuple(pixels.shape[1:]) == size:
        return pixels
    if pixels.dtype == torch.uint8:
        return read_pixels(to_pil(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
