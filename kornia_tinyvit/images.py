"""Conversion of image files, PIL images and tensors to image tensors."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from kornia.image import image_to_tensor, tensor_to_image
from PIL import Image, ImageOps
from torch import Tensor, nn

#: An image: a tensor :math:`(C, H, W)` in [0, 1], a path, or a PIL image.
ImageInput = Tensor | str | Path | Image.Image

__all__ = [
    "UNREADABLE",
    "ImageInput",
    "as_images",
    "check_images",
    "read_batches",
    "read_image",
    "read_pixels",
    "to_image",
    "to_pil",
    "to_pixels",
    "to_uint8",
]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: Exceptions that Pillow raises for corrupt files and files that are not images.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, struct.error, Image.DecompressionBombError)


def check_images(images: Tensor, channels: int = 3, min_size: int = 1) -> None:
    """Raise an error for anything but a batch of floating point images.

    Args:
        images: the value to check, expected to be :math:`(B, C, H, W)`.
        channels: the expected :math:`C`.
        min_size: the least :math:`H` and :math:`W`.

    Raises:
        TypeError: if ``images`` is not a floating point tensor.
        ValueError: if it has another shape or fewer pixels.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"Images must be a floating point tensor (B, {channels}, H, W); got {type(images).__name__}.")
    _check_dtype(images)
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"Images must have the shape (B, {channels}, H, W); got {tuple(images.shape)}. A single image needs "
            "unsqueeze(0); a network for other channels needs from_config(..., in_chans=...)."
        )
    height, width = images.shape[2:]
    if height < min_size or width < min_size:
        raise ValueError(f"Images must have at least {min_size}x{min_size} pixels; got {height}x{width}.")


def _check_dtype(images: Tensor) -> None:
    if not images.is_floating_point():
        hint = "Use x.float() / 255, and normalize them for a TinyViT without preprocessing."
        raise TypeError(f"Images must be floating point; got {images.dtype}. {hint}")


def read_image(path: str | Path | BinaryIO, channels: int = 3) -> Tensor:
    """Read an image file in any format of Pillow and apply its EXIF orientation.

    kornia.io.load_image ignores the orientation and cannot read CMYK JPEG files.

    Args:
        path: a path or an open file.
        channels: 1 for gray, 3 for RGB, 4 for RGBA.

    Returns:
        The image :math:`(C, H, W)`, float32 in [0, 1].

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is corrupt or not an image.
    """
    return _read(path, channels, to_image)


def read_pixels(path: str | Path | BinaryIO, channels: int = 3, max_pixels: int | None = None) -> Tensor:
    """Read an image file as :func:`read_image` does, as uint8.

    Args:
        path: a path or an open file.
        channels: 1 for gray, 3 for RGB, 4 for RGBA.
        max_pixels: raise an error for larger images before decoding them; ``None`` for no limit.

    Returns:
        The image :math:`(C, H, W)`, uint8 in [0, 255].

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is corrupt, not an image, or has too many pixels.
    """
    return _read(path, channels, to_pixels, max_pixels)


def _read(
    path: str | Path | BinaryIO,
    channels: int,
    convert: Callable[[Image.Image, int], Tensor],
    max_pixels: int | None = None,
) -> Tensor:
    try:
        with Image.open(path) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {max_pixels} in total")
            ImageOps.exif_transpose(image, in_place=True)  # a copy is made only where needed
            return convert(image, channels)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {path}.") from None
    except UNREADABLE as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def to_image(image: Image.Image, channels: int = 3) -> Tensor:
    """Convert a PIL image to a tensor :math:`(C, H, W)`, float32 in [0, 1].

    Args:
        image: the image, in any mode.
        channels: 1 for gray, 3 for RGB, 4 for RGBA.

    Returns:
        The tensor.

    Raises:
        ValueError: if ``channels`` is another number.
    """
    return _scale_deep(image, channels) if _is_deep(image) else to_pixels(image, channels).float() / 255


def to_pixels(image: Image.Image, channels: int = 3) -> Tensor:
    """Convert a PIL image to a tensor :math:`(C, H, W)`, uint8 in [0, 255], rounding 16-bit images.

    Args:
        image: the image, in any mode.
        channels: 1 for gray, 3 for RGB, 4 for RGBA.

    Returns:
        The tensor.

    Raises:
        ValueError: if ``channels`` is another number.
    """
    if _is_deep(image):
        return to_uint8(_scale_deep(image, channels))
    mode = _mode(channels)
    return image_to_tensor(np.array(image if image.mode == mode else image.convert(mode)))


def to_uint8(images: Tensor) -> Tensor:
    """Return floating point images in [0, 1] rounded and clamped to uint8 in [0, 255].

    Args:
        images: tensor of any shape :math:`(*)`.
    """
    return (images.detach() * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Return a tensor as a PIL image.

    Args:
        image: image :math:`(C, H, W)` of 1, 3 or 4 channels, uint8 or floating point in [0, 1].
    """
    return Image.fromarray(tensor_to_image(image if image.dtype == torch.uint8 else to_uint8(image)))


def _mode(channels: int) -> str:
    if channels not in _MODES:
        raise ValueError(f"Image files have 1, 3 or 4 channels, not {channels}; pass tensors instead.")
    return _MODES[channels]


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I")  # 16 bits per pixel; convert() would clip at 255


def _scale_deep(image: Image.Image, channels: int) -> Tensor:
    _mode(channels)
    gray = torch.from_numpy(np.asarray(image, dtype=np.float32) / 65535).clamp(0, 1)
    pixels = gray.expand(channels, *gray.shape).clone()
    pixels[3:] = 1  # opaque
    return pixels


def as_images(images: ImageInput | Iterable[ImageInput], channels: int = 3) -> Iterator[Tensor]:
    """Convert images to tensors lazily.

    Args:
        images: one or several images: tensors :math:`(C, H, W)`, paths, PIL images, or a tensor :math:`(B, C, H, W)`.
        channels: channels of files and PIL images: 1, 3 or 4.

    Returns:
        An iterator over tensors :math:`(C, H, W)` in [0, 1], which raises TypeError for what is not an image,
        ValueError for a file that cannot be read and FileNotFoundError for a missing file.
    """
    if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, Tensor) and images.ndim != 4):
        images = [images]
    return (_as_image(image, channels) for image in images)


def read_batches(
    images: ImageInput | Iterable[ImageInput], network: nn.Module, channels: int, batch_size: int = 1
) -> Iterator[list[Tensor]]:
    """Read images with :func:`as_images` and move them to the device and dtype of a network.

    Args:
        images: one or several images.
        network: the network.
        channels: channels of files and PIL images: 1, 3 or 4.
        batch_size: number of images per batch.

    Yields:
        Lists of up to ``batch_size`` tensors :math:`(C, H, W)`.
    """
    first = next(network.parameters())
    read = (image.to(first.device, first.dtype) for image in as_images(images, channels))
    while batch := list(islice(read, batch_size)):
        yield batch


def map_images(function: Callable[[Tensor], Tensor], images: Tensor | Sequence[Tensor]) -> Tensor:
    """Apply a function of image batches to a batch, or to each image of a list, and concatenate the results.

    Args:
        function: function of images :math:`(B, C, H, W)`.
        images: images :math:`(B, C, H, W)`, or a list of images :math:`(C, H, W)` of any sizes.

    Returns:
        The results, :math:`(B, ...)`.

    Raises:
        ValueError: if the list is empty.
    """
    if isinstance(images, Tensor):
        return function(images)
    if not images:
        raise ValueError("Got an empty list of images; an empty batch is a tensor (0, C, H, W).")
    return torch.cat([function(image.unsqueeze(0)) for image in images])


def _as_image(image: ImageInput, channels: int) -> Tensor:
    if isinstance(image, (str, Path)):
        return read_image(image, channels)
    if isinstance(image, Image.Image):
        return to_image(image, channels)
    if isinstance(image, Tensor):
        _check_dtype(image)
        return image
    raise TypeError(f"An image must be a tensor, a path or a PIL image; got {type(image).__name__}.")
