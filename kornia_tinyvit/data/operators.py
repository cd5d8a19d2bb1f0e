"""Operators on uint8 images, bit-identical for any batch size and nearly identical on all devices.

Results are rounded to uint8 after each operator, as Pillow's are. This removes the differences of floating-point
arithmetic between processors before they accumulate.
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

from kornia_tinyvit.images import to_floats, to_uint8
from kornia_tinyvit.preprocessing import IMAGENET_MEAN

__all__ = ["OPERATIONS"]

#: Takes uint8 images :math:`(b, 3, H, W)` and magnitudes :math:`(b,)`; returns new images.
Operator = Callable[[Tensor, Tensor], Tensor]


def apply_to(images: Tensor, chosen: NDArray[np.bool_], operator: Operator, magnitudes: NDArray[np.float32]) -> None:
    """Apply an operator to some of the images :math:`(B, 3, H, W)`, in place.

    Args:
        images: uint8 images.
        chosen: which of them, :math:`(B,)`.
        operator: the operator.
        magnitudes: its magnitude for each image, :math:`(B,)`.
    """
    rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
    images[rows] = operator(images[rows], torch.from_numpy(magnitudes[chosen]).to(images.device))


def _on_floats(operator: Operator) -> Operator:
    return lambda images, magnitudes: to_uint8(operator(to_floats(images), magnitudes))


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    # kornia truncates 255 x to the histogram bin; adding 0.5 protects against rounding to the bin below.
    equalized = KE.equalize((images.float() + 0.5) / 255) * 255
    return (equalized - 0.25).round_().clamp_(0, 255).to(torch.uint8)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    """Brighten pixels below 128; kornia's ``solarize`` adds to all pixels."""
    lighter = (images.int() + amount.int()[:, None, None, None]).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, lighter, images)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean gray, as Pillow does; the integer sum is exact in any order."""
    gray = rgb_to_grayscale(images).sum((1, 2, 3), dtype=torch.int64)
    mean = (gray.float() / images[0, 0].numel()).round()[:, None, None, None] / 255
    factor = factor[:, None, None, None]
    return to_uint8(to_floats(images) * factor + mean * (1 - factor))


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with Pillow's smoothing filter, in integers; a convolution is rounded differently on each device."""
    pixels = images.int()
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[..., 1:-1, 1:-1]
    smooth = pixels.float()
    smooth[..., 1:-1, 1:-1] = ((total + 6) // 13).float()  # the nearest whole number
    blend = smooth + (pixels - smooth) * factor[:, None, None, None]
    return blend.round_().clamp_(0, 255).to(torch.uint8)


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to [0, 255]; constant channels are unchanged, as in Pillow."""
    lowest, highest = images.flatten(2).aminmax(dim=2)
    flat = (lowest == highest)[..., None, None]
    return torch.where(flat, images, to_uint8(KE.normalize_min_max(to_floats(images))))


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    # The CPU's double precision gives the same sine for all devices.
    angle = degrees.cpu().double().deg2rad()
    cosine, sine = angle.cos().to(degrees), angle.sin().to(degrees)
    zero = torch.zeros_like(degrees)
    return _warp(images, torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).unflatten(1, (2, 3)))


def _shift(images: Tensor, magnitudes: Tensor, row: int, column: int) -> Tensor:
    """Shear or translate by an affine matrix that differs from the identity at one position."""
    matrix = torch.eye(2, 3, device=magnitudes.device).repeat(len(magnitudes), 1, 1)
    matrix[:, row, column] = magnitudes
    return _warp(images, matrix)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Apply an affine transform with bilinear interpolation; the padding is ImageNet's mean color.

    Args:
        images: uint8 images :math:`(b, 3, H, W)`.
        matrix: maps output to input coordinates, :math:`(b, 2, 3)`; both are in [-1, 1] with the center at 0.
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


#: The operators of the policies.
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
    "translate_x": lambda images, fractions: _shift(images, 2 * fractions, 0, 2),
    "translate_y": lambda images, fractions: _shift(images, 2 * fractions, 1, 2),
}

#: Their names; :class:`~kornia_tinyvit.data.ReplayParams` stores positions in this tuple.
OPERATIONS = tuple(OPERATORS)


def box_mask(boxes: NDArray[np.int64], images: Tensor) -> Tensor:
    """Return masks :math:`(B, 1, H, W)` of boxes (top, left, height, width), :math:`(B, 4)`."""
    top, left, rows, columns = torch.from_numpy(boxes).to(images.device).T[..., None, None, None]
    y = torch.arange(images.shape[-2], device=images.device)[:, None]
    x = torch.arange(images.shape[-1], device=images.device)
    return (y >= top) & (y < top + rows) & (x >= left) & (x < left + columns)


def erase(images: Tensor, boxes: NDArray[np.int64], keys: NDArray[np.int64]) -> Tensor:
    """Fill boxes of normalized images with noise of mean 0 and standard deviation 1, in place."""
    erases = np.flatnonzero(boxes[:, 2])
    if len(erases) == 0:
        return images
    rows = torch.from_numpy(erases).to(images.device)
    chosen = images[rows]
    noise = make_noise(torch.from_numpy(keys[erases]).to(images.device), chosen)
    images[rows] = torch.where(box_mask(boxes[erases], chosen), noise, chosen)
    return images


def make_noise(keys: Tensor, images: Tensor) -> Tensor:
    """Return approximately normal noise of the shape of ``images``, a pure function of key and pixel.

    Integer arithmetic makes it identical on all devices: the sum of the four bytes of a 32-bit hash per pixel, which
    has mean 510 and variance :math:`4 (256^2 - 1) / 12`.
    """
    pixels = torch.arange(images[0].numel(), device=images.device).view(images.shape[1:])
    words = keys[:, None, None, None] ^ pixels * 0x9E3779B1 & 0xFFFFFFFF
    for _ in range(2):  # a xorshift-multiply hash, whose products stay below 2**63
        words = (words ^ words >> 16) * 0x45D9F3B & 0xFFFFFFFF
    words = words ^ words >> 16
    total = (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24)
    return (total - 510).to(images.dtype) / math.sqrt((256**2 - 1) / 3)
