"""From photos to the inputs of the encoder."""

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

#: What is taken as a photo: a path, a PIL image, a uint8 array :math:`(H, W, 3)`, or a tensor :math:`(3, H, W)` in
#: [0, 1].
ImageLike = Tensor | str | Path | Image.Image | NDArray[np.uint8]

#: Channel means that every SAM is normalized with, for values in [0, 1].
PIXEL_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
#: Channel standard deviations that every SAM is normalized with, for values in [0, 1].
PIXEL_STD = (58.395 / 255, 57.12 / 255, 57.375 / 255)


def list_images(images: ImageLike | Sequence[ImageLike]) -> list[ImageLike]:
    """Return one photo, several, a batch tensor :math:`(B, 3, H, W)` or array :math:`(B, H, W, 3)` as a list."""
    batch = isinstance(images, (Tensor, np.ndarray)) and images.ndim == 4
    several = isinstance(images, Sequence) and not isinstance(images, str)
    return list(cast("Sequence[ImageLike]", images)) if batch or several else [cast("ImageLike", images)]


def open_image(image: ImageLike) -> Tensor:
    """Return a photo :math:`(3, H, W)`: uint8 if it is a file, a PIL image or an array; a tensor as it is.

    Args:
        image: the image.

    Raises:
        TypeError: if it is no photo, or a tensor that is not floating point.
        ValueError: if a file cannot be read, the shape is another, or a tensor holds NaN or infinity.
        FileNotFoundError: if there is no such file.
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
        raise TypeError(f"A photo is a tensor, an array, a path or a PIL image; got {type(image).__name__}.")
    if not image.is_floating_point():
        raise TypeError(f"Photos must be floating point in [0, 1]; got {image.dtype}. Use x.float() / 255.")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"A photo must be (3, H, W); got {tuple(image.shape)}. A gray one needs .expand(3, -1, -1).")
    if not image.isfinite().all():
        raise ValueError("The photo holds NaN or infinity.")
    return image


def preprocess_image(
    pixels: Tensor, img_size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Geometry]:
    """Resize a photo as a whole, normalize it and pad it; see :meth:`MobileSAM.preprocess`.

    Args:
        pixels: photo :math:`(3, H, W)`, uint8 or floating point in [0, 1].
        img_size: height and width of the input.
        device: where the input shall be.
        dtype: its precision.

    Returns:
        An input :math:`(3, h, w)` and how the photo lies in it.
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
    """Resize a photo :math:`(3, H, W)`, bilinear with antialiasing: uint8 as Pillow does, floating point by torch.

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
