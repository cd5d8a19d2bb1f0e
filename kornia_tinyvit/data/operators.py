"""Operators on uint8 images whose results are the same bit for bit for any batch, and nearly so on any device.

Between them images are rounded to 8 bits, as Pillow's are, so that the last bits of floating point arithmetic, which
differ between processors, are lost before they add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import kornia.enhance as KE
import numpy as np
import torch
from kornia.color import rgb_to_grayscale
from kornia.geometry.transform import remap
from numpy.typing import NDArray
from torch import Tensor

from kornia_tinyvit.images import to_uint8
from kornia_tinyvit.preprocessing import IMAGENET_MEAN

__all__ = ["OPERATIONS"]

#: Changes images :math:`(b, 3, H, W)` by magnitudes :math:`(b,)`.
Operator = Callable[[Tensor, Tensor], Tensor]


def to_floats(images: Tensor) -> Tensor:
    return images.float().div_(255)


def apply_to(
    images: Tensor,
    chosen: NDArray[np.bool_],
    operator: Callable[..., Tensor],
    strengths: NDArray[np.float32] | None = None,
) -> None:
    """Replace the chosen ones among 8-bit images, in place."""
    if not chosen.any():
        return
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
    if strengths is None:
        images[rows] = operator(images[rows])
    else:
        images[rows] = operator(images[rows], torch.from_numpy(strengths[chosen]).to(images.device))


def _on_floats(operator: Operator) -> Operator:
    return lambda images, magnitudes: to_uint8(operator(to_floats(images), magnitudes))


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    # kornia takes the level as trunc(255 x): half a level more keeps rounding from taking the one below.
    equalized = KE.equalize((images.float() + 0.5) / 255) * 255
    return (equalized - 0.25).round_().clamp_(0, 255).to(torch.uint8)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Lighten dark pixels; kornia's additions would go to all of them."""
    lighter = (images.int() + amount.int()[:, None, None, None]).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, lighter, images)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean gray, as Pillow does; the mean of 8-bit grays is exact in any order of summation."""
    gray = rgb_to_grayscale(images).sum((1, 2, 3), dtype=torch.int64)
    mean = (gray.float() / images[0, 0].numel()).round()[:, None, None, None] / 255
    factor = factor[:, None, None, None]
    return to_uint8(to_floats(images) * factor + mean * (1 - factor))


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with Pillow's smoothing, but for the border; a convolution would be rounded otherwise on each device."""
    levels = images.int()
    rows = levels[..., :-2, :] + levels[..., 1:-1, :] + levels[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels[..., 1:-1, 1:-1]
    smooth = levels.float()
    smooth[..., 1:-1, 1:-1] = ((total + 6) // 13).float()  # the nearest whole number
    blend = smooth + (levels - smooth) * factor[:, None, None, None]
    return blend.round_().clamp_(0, 255).to(torch.uint8)


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to all levels, but leave one of a single level as it is, as Pillow does."""
    lowest, highest = images.flatten(2).aminmax(dim=2)
    flat = (lowest == highest)[..., None, None]
    return torch.where(flat, images, to_uint8(KE.normalize_min_max(to_floats(images))))


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    # On the CPU in double precision, so that the sine is the same for every device.
    angle = degrees.cpu().double().deg2rad()
    cosine, sine = angle.cos().to(degrees), angle.sin().to(degrees)
    zero = torch.zeros_like(degrees)
    return _warp(images, torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).unflatten(1, (2, 3)))


def _shift(images: Tensor, magnitudes: Tensor, row: int, column: int) -> Tensor:
    """Shear or translate: replace one number of the identity."""
    matrix = torch.eye(2, 3, device=magnitudes.device).repeat(len(magnitudes), 1, 1)
    matrix[:, row, column] = magnitudes
    return _warp(images, matrix)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample uint8 images bilinearly where an affine map points; what lies outside is ImageNet's mean color.

    Args:
        images: images :math:`(b, 3, H, W)`.
        matrix: maps where a pixel goes to where it is from, :math:`(b, 2, 3)`. Coordinates go from -1 to 1 over the
            image, about its center.
    """
    height, width = images.shape[-2:]
    x = ((2 * torch.arange(width, device=images.device) + 1) / width - 1)[None, None, :]
    y = ((2 * torch.arange(height, device=images.device) + 1) / height - 1)[None, :, None]
    map_x, map_y = (
        matrix[:, axis, 0, None, None] * x + matrix[:, axis, 1, None, None] * y + matrix[:, axis, 2, None, None]
        for axis in (0, 1)
    )
    fill = torch.tensor(IMAGENET_MEAN, device=images.device)[:, None, None]
    warped = remap(to_floats(images) - fill, map_x, map_y, normalized_coordinates=True, align_corners=False)
    return to_uint8(warped + fill)


#: The operators that a policy chooses from.
OPERATORS: dict[str, Operator] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _on_floats(lambda images, _: KE.invert(images)),
    "rotate": _rotate,
    "posterize": _on_floats(lambda images, bits: KE.posterize(images, bits.int())),
    "solarize": _on_floats(lambda images, threshold: KE.solarize(images, threshold / 255)),
    "solarize_add": _solarize_add,
    "color": _on_floats(KE.adjust_saturation_with_gray_subtraction),
    "contrast": _contrast,
    "brightness": _on_floats(KE.adjust_brightness_accumulative),
    "sharpness": _sharpness,
    "shear_x": partial(_shift, row=0, column=1),
    "shear_y": partial(_shift, row=1, column=0),
    "translate_x": lambda images, shares: _shift(images, 2 * shares, 0, 2),
    "translate_y": lambda images, shares: _shift(images, 2 * shares, 1, 2),
}

#: Their names, in the order of their numbers in :class:`~kornia_tinyvit.data.Draws`.
OPERATIONS = tuple(OPERATORS)


def box_mask(boxes: NDArray[np.int64], images: Tensor) -> Tensor:
    """Return where boxes of top, left, height and width lie, :math:`(B, 1, H, W)`."""
    top, left, rows, columns = torch.from_numpy(boxes).to(images.device).T[..., None, None, None]
    y = torch.arange(images.shape[-2], device=images.device)[:, None]
    x = torch.arange(images.shape[-1], device=images.device)
    return (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)


def erase(images: Tensor, boxes: NDArray[np.int64], keys: NDArray[np.int64]) -> Tensor:
    """Fill boxes of normalized images with noise of mean 0 and deviation 1."""
    erases = np.flatnonzero(boxes[:, 2])
    if len(erases) == 0:
        return images
    rows = torch.from_numpy(erases).to(images.device)
    chosen = images[rows]
    noise = make_noise(torch.from_numpy(keys[erases]).to(images.device), chosen)
    images[rows] = torch.where(box_mask(boxes[erases], chosen), noise, chosen)
    return images


def make_noise(keys: Tensor, images: Tensor) -> Tensor:
    """Return nearly normal noise that is a pure function of key and pixel, of the shape of ``images``.

    Integers only, so that all devices agree: a hash of 32 bits for each pixel, and the sum of its four bytes, which has
    the distribution of four dice of 256 sides: mean 510 and variance :math:`4 (256^2 - 1) / 12`.
    """
    pixels = torch.arange(images[0].numel(), device=images.device).view(images.shape[1:])
    words = keys[:, None, None, None] ^ pixels * 0x9E3779B1 & 0xFFFFFFFF
    for _ in range(2):  # a mixing step of multiplications and shifts, whose products stay below 2**63
        words = (words ^ words >> 16) * 0x45D9F3B & 0xFFFFFFFF
    words = words ^ words >> 16
    total = (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24)
    return (total - 510).to(images.dtype) / math.sqrt((256**2 - 1) / 3)
