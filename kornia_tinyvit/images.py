"""The conversion of images in any form to tensors: files, PIL images, arrays and tensors."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, BinaryIO, cast

import numpy as np
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from kornia.image import image_to_tensor, tensor_to_image
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

#: An image: a path, an encoded file as bytes or as an open binary file, a PIL image, an array :math:`(H, W, C)` or
#: :math:`(H, W)`, or a tensor :math:`(C, H, W)`; see :func:`open_image`.
ImageInput = Tensor | NDArray[Any] | str | os.PathLike[str] | bytes | BinaryIO | Image.Image
#: One image; or several, as a list or another iterable, as a tensor :math:`(B, C, H, W)` or an array
#: :math:`(B, H, W, C)`.
Images = ImageInput | Iterable[ImageInput]

__all__ = [
    "UNREADABLE",
    "ImageInput",
    "Images",
    "as_images",
    "check_images",
    "is_single",
    "list_images",
    "open_image",
    "read_batches",
    "read_image",
    "read_pixels",
    "to_floats",
    "to_pil",
    "to_uint8",
]

#: Floating point images may exceed [0, 1] by this much, as after resizing or augmentation.
TOLERANCE = 1e-3
#: Exceptions that Pillow raises for corrupt files and files that are not images.
UNREADABLE = (
    OSError, ValueError, TypeError, SyntaxError, RuntimeError, LookupError, ArithmeticError, AssertionError, EOFError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: Modes that Pillow converts to some of these only by way of another one.
_VIA = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}
#: Pillow's weights of red, green and blue in "L", in units of 2**-16 (``L24`` in ``Convert.c``).
_LUMA = (19595, 38470, 7471)
_SAMPLE_RANGE = (340, 341)  # the tags SMinSampleValue and SMaxSampleValue of a TIFF file
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


def open_image(image: ImageInput, channels: int = 3, max_pixels: int | None = None) -> Tensor:
    r"""Convert an image in any form to a tensor; the inputs of every function for images go through it.

    - Paths, encoded files (bytes, or a binary file) and PIL images in any mode. The EXIF orientation is applied. 16-bit
      images are divided by 65,535. 32-bit images must be in [0, 1] or state their range in the TIFF tags
      SMinSampleValue and SMaxSampleValue. HEIF files need the package pillow-heif.
    - Arrays :math:`(H, W, C)` or :math:`(H, W)`, and tensors :math:`(C, H, W)`, :math:`(H, W)` or, if the first
      dimension is no number of channels, :math:`(H, W, C)`. uint8 is in [0, 255], uint16 is divided by 65,535, bool is
      0 or 1, and floating point is in [0, 1]; arrays become float32.

    Gray, RGB and RGBA are converted to each other as by Pillow's ``convert``: gray is repeated, alpha is dropped.

    Args:
        image: the image.
        channels: number of channels of the result. For other numbers than 1 (gray), 3 (RGB) and 4 (RGBA), the image
            must be a tensor or an array of as many channels.
        max_pixels: raise an error for larger files before decoding them; ``None`` for no limit.

    Returns:
        The image :math:`(C, H, W)`: uint8 in [0, 255], or floating point in [0, 1] up to a tolerance of 1e-3. It may
        share memory with a tensor, whose gradients are kept.

    Raises:
        TypeError: if it is not an image, or has another data type.
        ValueError: if a file is corrupt, not an image or too large, or the shape or a value is wrong.
        FileNotFoundError: if the file does not exist.

    Example:
        >>> open_image(np.zeros((48, 64), np.uint8)).shape
        torch.Size([3, 48, 64])
    """
    if isinstance(image, Tensor):
        return _convert_tensor(_channels_first(image, channels), channels)
    if isinstance(image, np.ndarray):
        return _convert_tensor(_array_to_tensor(image), channels)
    if isinstance(image, Image.Image):
        try:
            return _convert_pil(image, channels)
        except UNREADABLE as error:  # AssertionError if it is closed
            raise ValueError(f"The PIL image cannot be read: {str(error) or 'it is closed'}") from error
    if isinstance(image, (str, os.PathLike)):
        return _read(image, str(image), channels, max_pixels)
    if isinstance(image, (bytes, bytearray)):
        return _read(io.BytesIO(image), f"The content of {len(image)} bytes", channels, max_pixels)
    if hasattr(image, "read") and not isinstance(image, io.TextIOBase):
        return _read(image, str(getattr(image, "name", "The open file")), channels, max_pixels)
    raise TypeError(
        "An image must be a path, an encoded file as bytes or binary file, a PIL image, an array or a tensor; got "
        f"{type(image).__name__}."
    )


def read_image(image: ImageInput, channels: int = 3) -> Tensor:
    """Convert an image as :func:`open_image` does, with uint8 images divided by 255.

    kornia.io.load_image ignores the EXIF orientation and cannot read CMYK JPEG files.

    Args:
        image: the image.
        channels: 1 for gray, 3 for RGB, 4 for RGBA; others only for tensors and arrays.

    Returns:
        The image :math:`(C, H, W)`, floating point in [0, 1]; float32 for files and PIL images.

    Raises:
        TypeError, ValueError, FileNotFoundError: as :func:`open_image`.
    """
    return to_floats(open_image(image, channels))


def read_pixels(image: ImageInput, channels: int = 3, max_pixels: int | None = None) -> Tensor:
    """Convert an image as :func:`open_image` does, with floating point and 16-bit images rounded to uint8.

    Args:
        image: the image.
        channels: 1 for gray, 3 for RGB, 4 for RGBA; others only for tensors and arrays.
        max_pixels: raise an error for larger files before decoding them; ``None`` for no limit.

    Returns:
        The image :math:`(C, H, W)`, uint8 in [0, 255].

    Raises:
        TypeError, ValueError, FileNotFoundError: as :func:`open_image`.
    """
    pixels = open_image(image, channels, max_pixels)
    return pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)


def as_images(images: Images, channels: int = 3) -> Iterator[Tensor]:
    """Convert images with :func:`read_image` lazily.

    Args:
        images: one or several images.
        channels: number of channels of the results.

    Returns:
        An iterator over tensors :math:`(C, H, W)` in [0, 1], which raises the errors of :func:`open_image`.
    """
    each: Iterable[ImageInput] = [cast("ImageInput", images)] if is_single(images) else cast("Any", images)
    return (read_image(image, channels) for image in each)


def list_images(images: Images) -> list[ImageInput]:
    """Return one or several images as a list.

    Args:
        images: one or several images; batches :math:`(B, ...)` are split.
    """
    return [cast("ImageInput", images)] if is_single(images) else list(cast("Iterable[ImageInput]", images))


def is_single(images: Images) -> bool:
    """Return whether the argument is one image, not a batch or an iterable of images.

    Args:
        images: one or several images.
    """
    if isinstance(images, (Tensor, np.ndarray)):
        return images.ndim != 4
    single = (str, os.PathLike, bytes, bytearray, Image.Image, Mapping)  # a mapping is an error, not its keys
    return isinstance(images, single) or hasattr(images, "read") or not isinstance(images, Iterable)


def read_batches(images: Images, network: nn.Module, channels: int, batch_size: int = 1) -> Iterator[list[Tensor]]:
    """Read images with :func:`as_images` and move them to the device and dtype of a network.

    Args:
        images: one or several images.
        network: the network.
        channels: number of channels of the network's images.
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


def check_images(images: Tensor, channels: int = 3, min_size: int = 1) -> None:
    """Raise an error for anything but a batch of floating point images. It does not read their values.

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
    if not images.is_floating_point():
        hint = "Use x.float() / 255, and normalize them for a TinyViT without preprocessing."
        raise TypeError(f"Images must be floating point; got {images.dtype}. {hint}")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"Images must have the shape (B, {channels}, H, W); got {tuple(images.shape)}. A single image needs "
            "unsqueeze(0); a network for other channels needs from_config(..., in_chans=...)."
        )
    height, width = images.shape[2:]
    if height < min_size or width < min_size:
        raise ValueError(f"Images must have at least {min_size}x{min_size} pixels; got {height}x{width}.")


def to_floats(images: Tensor) -> Tensor:
    """Divide uint8 images by 255.

    Args:
        images: tensor of any shape :math:`(*)`, uint8 or floating point.

    Returns:
        The images in [0, 1], float32; floating point images unchanged.
    """
    return images.float().div_(255) if images.dtype == torch.uint8 else images


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


def _read(source: Any, name: str, channels: int, max_pixels: int | None) -> Tensor:
    # Not by name: Pillow maps some files of a name into memory, and TIFF files with an orientation wrongly.
    named = isinstance(source, (str, os.PathLike))
    try:
        with open(source, "rb") if named else nullcontext(source) as file, _open_file(file) as image:
            if named and image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                vars(image)["filename"] = os.fspath(source)  # mapped, a wrong size in the header is rejected at once
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"it has {image.width}x{image.height} pixels, more than {max_pixels} in total")
            return _convert_pil(image, channels)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {name}.") from None
    except UNREADABLE as error:
        raise ValueError(f"{name} is not an image that can be read: {error}") from error


def _open_file(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(12)
        if head[4:8] != b"ftyp" or head[8:] not in _HEIF_BRANDS:
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError("HEIF files need a package: pip install pillow-heif") from None
    register_heif_opener()  # from now on Image.open reads them
    return Image.open(file)


def _convert_pil(image: Image.Image, channels: int) -> Tensor:
    if channels not in _MODES:
        raise ValueError(f"Image files have 1, 3 or 4 channels, not {channels}; pass tensors instead.")
    image.load()  # some formats store the orientation after the pixels
    low, high = _sample_range(image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits, which convert() would clip at 255
        gray = (np.asarray(image, np.float64) - low) / (high - low)
        return _convert_tensor(torch.from_numpy(gray).float()[None], channels)
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns if it is converted to RGB directly
        image = image.convert("RGBA")
    image = image.convert(_VIA[image.mode]) if image.mode in _VIA else image
    mode = _MODES[channels]
    return image_to_tensor(np.array(image if image.mode == mode else image.convert(mode)))


def _sample_range(image: Image.Image) -> tuple[float, float]:
    """Return the values of black and white of an image of more than 8 bits; [0, 1] if the file states none."""
    # Pillow scales gray images of PGM files to 16 bits, and older versions open 16-bit PNG files in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0, 65535
    tags = getattr(image, "tag_v2", {})
    low, high = (np.ravel(tags.get(tag, math.nan)).astype(float) for tag in _SAMPLE_RANGE)
    return (low.min(), high.max()) if -math.inf < low.min() < high.max() < math.inf else (0, 1)


def _array_to_tensor(image: NDArray[Any]) -> Tensor:
    """Return an array :math:`(H, W, C)` or :math:`(H, W)` as a tensor :math:`(C, H, W)`."""
    if image.dtype.kind not in "bf" and image.dtype.type not in (np.uint8, np.uint16):
        raise TypeError(_dtype_error(image.dtype))
    native = np.float32 if image.dtype.kind == "f" else image.dtype.newbyteorder("=")
    tensor = torch.from_numpy(np.array(image, native, order="C"))  # torch takes no negative strides
    if tensor.ndim == 2:
        return tensor[None]
    if tensor.ndim != 3:
        raise ValueError(f"An array must be (H, W, C) or (H, W); got {tuple(image.shape)}.")
    return tensor.movedim(-1, 0)


def _channels_first(image: Tensor, channels: int) -> Tensor:
    """Return a tensor :math:`(C, H, W)`, :math:`(H, W)` or :math:`(H, W, C)` as :math:`(C, H, W)`."""
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"An image must be a tensor (C, H, W), (H, W, C) or (H, W); got {tuple(image.shape)}.")
    counts = (*_MODES, channels)
    return image.movedim(-1, 0) if image.shape[0] not in counts and image.shape[2] in counts else image


def _convert_tensor(image: Tensor, channels: int) -> Tensor:
    """Check an image :math:`(C, H, W)` and convert its values and channels."""
    if not image.numel():
        raise ValueError(f"An image must have pixels; got the shape (C, H, W) = {tuple(image.shape)}.")
    if image.dtype == torch.bool:
        image = image.to(torch.uint8) * 255
    elif image.dtype == torch.uint16:
        image = image.float() / 65535
    elif image.is_floating_point():
        _check_values(image)
    elif image.dtype != torch.uint8:
        raise TypeError(_dtype_error(image.dtype))
    return _match_channels(image, channels)


def _dtype_error(dtype: Any) -> str:
    return (
        f"Images must be uint8, uint16, bool or floating point; got {dtype}. Convert integers in [0, 255] to uint8, "
        "others to floating point in [0, 1]."
    )


def _check_values(image: Tensor) -> None:
    if image.is_meta:
        return
    low, high = torch.stack(torch.aminmax(image.detach())).tolist()  # one pass, one transfer; NaN is kept
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("The image contains NaN or infinity. Replace them, as by torch.nan_to_num(x).clamp(0, 1).")
    fix = "Pass the image before its normalization, or clamp it to [0, 1]."
    if low >= -TOLERANCE and high > 2:
        fix = "Divide them by 255." if high <= 256 else "Divide them by their full scale, 65535 for 16 bits."
    raise ValueError(
        f"Floating point and 32-bit images must be in [0, 1]; got values from {low:.4g} to {high:.4g}. {fix}"
    )


def _match_channels(image: Tensor, channels: int) -> Tensor:
    """Convert gray, RGB and RGBA :math:`(C, H, W)` to each other."""
    count, integers = image.shape[0], image.dtype == torch.uint8
    if count == channels:
        return image
    if count not in _MODES or (channels not in _MODES and count > 1):
        counts = "1 (gray), 3 (RGB) or 4 (RGBA)" if channels in _MODES else f"{channels} or 1"
        raise ValueError(f"An image must have {counts} channels; got the shape (C, H, W) = {tuple(image.shape)}.")
    if channels == 1:
        if not integers:
            return rgb_to_grayscale(image[:3])
        weighted = image[:3].int() * image.new_tensor(_LUMA, dtype=torch.int32)[:, None, None]
        return ((weighted.sum(0, keepdim=True) + 0x8000) >> 16).to(torch.uint8)
    color = image[:3] if count > 1 else image.expand(3 if channels == 4 else channels, -1, -1)
    return F.pad(color, (0, 0, 0, 0, 0, 1), value=255 if integers else 1) if channels == 4 else color
