"""Images in any form to model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kornia_tinyvit.images import read_pixels, to_pil, to_pixels
from kornia_tinyvit.sam.embedding import Geometry

__all__ = ["PIXEL_MEAN", "PIXEL_STD", "ImageLike", "list_images", "open_image", "preprocess_image", "resize_image"]

#: An image: a path, a PIL image, a uint8 array :math:`(H, W, 3)`, or a tensor :math:`(3, H, W)` in [0, 1].
ImageLike = Tensor | str | Path | Image.Image | NDArray[np.uint8]
#: One image, a sequence, a batch tensor :math:`(B, 3, H, W)` in [0, 1] or a batch array :math:`(B, H, W, 3)`.
Images = ImageLike | Sequence[ImageLike]

#: Channel means of segment-anything's preprocessing, for values in [0, 1].
PIXEL_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
#: Channel standard deviations of segment-anything's preprocessing, for values in [0, 1].
PIXEL_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


def list_images(images: Images) -> list[ImageLike]:
    """Return images as a list; batches :math:`(B, ...)` are split."""
    batch = isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4
    several = isinstance(images, Sequence) and not isinstance(images, str)
    return list(cast("Sequence[ImageLike]", images)) if batch or several else [cast("ImageLike", images)]


def open_image(image: ImageLike) -> Tensor:
    """Return an image :math:`(3, H, W)`: uint8 for files, PIL images and arrays; tensors unchanged.

    Args:
        image: the image.

    Raises:
        TypeError: if it is not an image, or a tensor that is not floating point.
        ValueError: if a file cannot be read, the shape is wrong, or a tensor contains NaN or infinity.
        FileNotFoundError: if the file does not exist.
    """
    if isinstance(image, (str, Path)):
        return read_pixels(image)
    if isinstance(image, Image.Image):
        return to_pixels(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"An array must be uint8 (H, W, 3) with pixels; got {image.dtype} {image.shape}.")
        return torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, 0)
    if not isinstance(image, Tensor):
        raise TypeError(f"An image is a tensor, an array, a path or a PIL image; got {type(image).__name__}.")
    if not image.is_floating_point():
        raise TypeError(f"Images must be floating point in [0, 1]; got {image.dtype}. Use x.float() / 255.")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"An image must be (3, H, W); got {tuple(image.shape)}. Use .expand(3, -1, -1) for gray.")
    if not image.isfinite().all():
        raise ValueError("The image contains NaN or infinity.")
    return image


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
        return to_pixels(to_pil(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
