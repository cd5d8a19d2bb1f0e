"""Images in any form, as files, PIL images or tensors, to tensors."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from kornia.image import image_to_tensor, tensor_to_image
from PIL import Image, ImageOps
from torch import Tensor, nn

#: What is taken as an image: a tensor :math:`(C, H, W)` in [0, 1], a path, or a PIL image.
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
#: What Pillow's readers raise for files that are damaged or no images.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, struct.error, Image.DecompressionBombError)


def check_images(images: Tensor, channels: int = 3) -> None:
    """Refuse what is not a batch of floating point images.

    Args:
        images: what should be :math:`(B, C, H, W)`.
        channels: the :math:`C` that is expected.

    Raises:
        TypeError: if it is not a floating point tensor.
        ValueError: if its shape is another, or it has no pixels.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"Images must be a tensor (B, {channels}, H, W) with values in [0, 1]; got {type(images)}.")
    if not images.is_floating_point():
        raise TypeError(f"Images must be floating point in [0, 1]; got {images.dtype}. Use x.float() / 255.")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"Images must have the shape (B, {channels}, H, W); got {tuple(images.shape)}.")
    if images.shape[2] == 0 or images.shape[3] == 0:
        raise ValueError(f"Images must have pixels; got {images.shape[2]}x{images.shape[3]}.")


def read_image(path: str | Path | BinaryIO, channels: int = 3) -> Tensor:
    """Read an image file of any kind that Pillow knows, upright as its camera was held.

    Pillow is used rather than kornia.io.load_image, which ignores the orientation that phones store and cannot read
    CMYK JPEG files.

    Args:
        path: the file, or an open one.
        channels: 1 for gray, 3 for color, 4 for color and opacity.

    Returns:
        The image :math:`(C, H, W)`, float32 in [0, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, or is damaged.
    """
    return _read(path, channels, to_image)


def read_pixels(path: str | Path | BinaryIO, channels: int = 3, max_pixels: int | None = None) -> Tensor:
    """Read an image file as :func:`read_image` does, into a quarter of the memory.

    Args:
        path: the file, or an open one.
        channels: 1 for gray, 3 for color, 4 for color and opacity.
        max_pixels: refuse an image of more pixels before it is decoded; a small file may hold a very large one.

    Returns:
        The image :math:`(C, H, W)`, uint8 in [0, 255].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, is damaged, or has too many pixels.
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
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {max_pixels} in all")
            ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies images that are upright already
            return convert(image, channels)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {path}.") from None
    except UNREADABLE as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def to_image(image: Image.Image, channels: int = 3) -> Tensor:
    """Turn a PIL image into a tensor :math:`(C, H, W)`, float32 in [0, 1].

    Args:
        image: the image, in any mode.
        channels: 1 for gray, 3 for color, 4 for color and opacity.

    Raises:
        ValueError: if there is no mode of that many channels.
    """
    return _deep_levels(image, channels) if _is_deep(image) else to_pixels(image, channels).float() / 255


def to_pixels(image: Image.Image, channels: int = 3) -> Tensor:
    """Turn a PIL image into a tensor :math:`(C, H, W)`, uint8 in [0, 255]; 16 bits a pixel are rounded to 8.

    Args:
        image: the image, in any mode.
        channels: 1 for gray, 3 for color, 4 for color and opacity.

    Raises:
        ValueError: if there is no mode of that many channels.
    """
    if _is_deep(image):
        return to_uint8(_deep_levels(image, channels))
    mode = _mode(channels)
    return image_to_tensor(np.array(image if image.mode == mode else image.convert(mode)))


def to_uint8(images: Tensor) -> Tensor:
    """Round floating point images :math:`(*)` in [0, 1] to uint8 in [0, 255]; values beyond are clamped."""
    return (images.detach() * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image :math:`(C, H, W)`, uint8 or floating point in [0, 1], into a PIL image: 1, 3 or 4 channels."""
    return Image.fromarray(tensor_to_image(image if image.dtype == torch.uint8 else to_uint8(image)))


def _mode(channels: int) -> str:
    if channels not in _MODES:
        raise ValueError(f"An image file has 1, 3 or 4 channels, not {channels}; pass tensors instead.")
    return _MODES[channels]


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I")  # 16 bits a pixel; converting it would clip everything above 255


def _deep_levels(image: Image.Image, channels: int) -> Tensor:
    _mode(channels)
    levels = np.asarray(image, dtype=np.float32) / 65535
    pixels = torch.from_numpy(levels).clamp(0, 1).expand(channels, *levels.shape).clone()
    pixels[3:] = 1  # opaque
    return pixels


def as_images(images: ImageInput | Iterable[ImageInput], channels: int = 3) -> Iterator[Tensor]:
    """Turn what ``predict`` takes into tensors :math:`(C, H, W)` in [0, 1], one at a time.

    Args:
        images: one image or several: tensors, paths, PIL images, or a batch tensor :math:`(B, C, H, W)`.
        channels: channels that files and PIL images are read with: 1, 3 or 4.

    Raises:
        TypeError: if something is no image.
        ValueError: if a file cannot be read.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, Tensor) and images.ndim != 4):
        images = [images]
    return (_as_image(image, channels) for image in images)


def read_batches(
    images: ImageInput | Iterable[ImageInput], network: nn.Module, channels: int, batch_size: int = 1
) -> Iterator[list[Tensor]]:
    """Read images as :func:`as_images` does, batch by batch, onto the device and in the precision of a network.

    Args:
        images: one image or several.
        network: the network.
        channels: channels that files and PIL images are read with: 1, 3 or 4.
        batch_size: images per batch.
    """
    first = next(network.parameters())
    read = (image.to(first.device, first.dtype) for image in as_images(images, channels))
    while batch := list(islice(read, batch_size)):
        yield batch


def _as_image(image: ImageInput, channels: int) -> Tensor:
    if isinstance(image, (str, Path)):
        return read_image(image, channels)
    if isinstance(image, Image.Image):
        return to_image(image, channels)
    if isinstance(image, Tensor):
        if not image.is_floating_point():
            raise TypeError(f"Images must be floating point in [0, 1]; got {image.dtype}. Use x.float() / 255.")
        return image
    raise TypeError(f"An image is a tensor, a path or a PIL image; got {type(image).__name__}.")
