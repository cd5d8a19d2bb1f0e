"""Random parameters of the replayable augmentation, sampled on the CPU with counter-based random numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kornia_tinyvit.data.operators import OPERATIONS
from kornia_tinyvit.preprocessing import TrainingPreset

__all__ = ["ReplayParams"]

ATTEMPTS = 10  # boxes tried before the random crop falls back to the center crop, and random erasing to no box
_LEVELS = 64  # steps between two magnitudes of a policy; rounding makes them equal on all processors

# Magnitudes of timm's "rand-m9-mstd0.5-inc1", the paper's recipe: level 9, standard deviation 0.5, at most 10.
_LEVEL, _LEVEL_STD, _MAX_LEVEL = 9.0, 0.5, 10.0
#: How many operators each policy applies to an image, and the probability of each.
POLICY_LAYERS = {"rand": 2, "trivial": 1, None: 0}
_POLICY_PROBABILITY = {"rand": 0.5, "trivial": 1.0, None: 0.0}
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class ReplayParams:
    """Random parameters of the samples of a batch, one row per sample.

    Attributes:
        epoch: number of the epoch, from 0.
        indices: indices of the samples, :math:`(B,)`.
        crop: uniform numbers in [0, 1) for ten attempts: area, aspect ratio, top and left, :math:`(B, 10, 4)`.
        flip: whether to flip horizontally, :math:`(B,)`.
        operations: positions in :data:`~kornia_tinyvit.data.operators.OPERATIONS` for each layer of the policy, -1 for
            none, :math:`(B, L)`.
        magnitudes: magnitudes in each operation's unit: degrees, bits, values in [0, 256], factors or fractions of the
            width, :math:`(B, L)`.
        jitter: factors of brightness, contrast and saturation, :math:`(B, 3)`.
        erased: box that is filled with noise: top, left, height and width in pixels, all 0 for none, :math:`(B, 4)`.
        noise: random key of that noise, :math:`(B,)`.
        partners: indices of the samples they are mixed with, their own for none, :math:`(B,)`.
        mixup_weight: weight of the partner's image in mixup, 0 for none, :math:`(B,)`.
        pasted: box of the partner's image that cutmix pastes, like ``erased``, :math:`(B, 4)`.
    """

    epoch: int
    indices: NDArray[np.int64]
    crop: NDArray[np.float64]
    flip: NDArray[np.bool_]
    operations: NDArray[np.int64]
    magnitudes: NDArray[np.float32]
    jitter: NDArray[np.float32]
    erased: NDArray[np.int64]
    noise: NDArray[np.int64]
    partners: NDArray[np.int64]
    mixup_weight: NDArray[np.float32]
    pasted: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def checksums(self) -> NDArray[np.uint32]:
        """Return a CRC-32 of each row but the epoch, :math:`(B,)`; a replay compares them with the stored ones."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "epoch"]
        columns = [np.ascontiguousarray(values).reshape(len(self), -1) for values in fields]
        rows = np.concatenate([values.view(np.uint8) for values in columns], axis=1)
        return np.array([zlib.crc32(row) for row in rows], dtype=np.uint32)


def unit(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Map 32-bit words to [0, 1)."""
    return words.astype(np.float64) * 2.0**-32


def sample_policy(policy: str | None, words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the operations and magnitudes :math:`(B, L)` of a policy from random words :math:`(B, L, 4)`."""
    chance, choice, first, second = np.moveaxis(unit(words), 2, 0)
    if policy == "trivial":  # one operator of uniform magnitude; the first choice is the identity
        operations = (choice * (len(OPERATIONS) + 1)).astype(np.int64) - 1
        level = first * _MAX_LEVEL
    else:
        operations = (choice * len(OPERATIONS)).astype(np.int64)
        normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # Box and Muller, 1958
        level = np.clip(_LEVEL + _LEVEL_STD * normal, 0, _MAX_LEVEL)
    operations = np.where(chance < _POLICY_PROBABILITY[policy], operations, -1)
    fraction = np.round(level * _LEVELS) / (_LEVELS * _MAX_LEVEL)
    sign = np.where(words[..., 0] & 1, 1.0, -1.0)
    magnitudes = np.zeros(operations.shape)
    for name, values in _magnitudes(fraction, sign).items():
        magnitudes = np.where(operations == OPERATIONS.index(name), values, magnitudes)
    return operations, magnitudes.astype(np.float32)


def _magnitudes(fraction: NDArray[np.float64], sign: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Convert fractions of the largest level, in [0, 1], to the magnitude of each operator."""
    largest = {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}
    return {
        **{name: sign * strength * fraction for name, strength in largest.items()},
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), np.maximum(0.1, 1 + sign * 0.9 * fraction)),
        "posterize": np.maximum(1, 4 - np.floor(4 * fraction)),  # timm allows 0 bits, which leaves a black image
        "solarize": 256 - np.floor(256 * fraction),
        "solarize_add": np.floor(110 * fraction),
    }


def _sides(
    tries: NDArray[np.float64], area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return heights and widths of boxes of uniform area and log-uniform aspect ratio.

    Args:
        tries: uniform numbers :math:`(..., 4)`; the first two are used.
        area: pixels of the whole image.
        scale: range of the box's fraction of the area.
        ratio: range of width over height.
    """
    areas = area * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = (math.log(end) for end in ratio)
    ratios = np.exp(low + tries[..., 1] * (high - low))
    return np.rint(np.sqrt(areas / ratios)), np.rint(np.sqrt(areas * ratios))


def crop_box(tries: NDArray[np.float64], height: int, width: int, preset: TrainingPreset) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random resized crop, as torchvision's ``RandomResizedCrop``.

    This is the first attempt that fits into the image, or the largest center crop if none does.
    """
    rows, columns = _sides(tries, height * width, preset.crop_scale, preset.crop_ratio)
    fits = np.flatnonzero((columns >= 1) & (columns <= width) & (rows >= 1) & (rows <= height))
    if len(fits):
        best = fits[0]
        tall, broad = int(rows[best]), int(columns[best])
        return int(tries[best, 2] * (height - tall + 1)), int(tries[best, 3] * (width - broad + 1)), tall, broad
    narrow, wide = preset.crop_ratio
    tall = min(height, max(1, round(width / narrow)))
    broad = min(width, max(1, round(height * wide)))
    return (height - tall) // 2, (width - broad) // 2, tall, broad


def erased_box(tries: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Return the first attempt of each row that is smaller than the image, :math:`(B, 4)`, or zeros."""
    columns, rows = _sides(tries, size * size, _ERASED_AREA, _ERASED_RATIO)  # timm's ratio is height over width
    fits = (rows < size) & (columns < size)
    first = fits.argmax(1)[:, None]
    rows, columns, top, left = (
        np.take_along_axis(values, first, 1)[:, 0] for values in (rows, columns, tries[..., 2], tries[..., 3])
    )
    box = np.stack([np.floor(top * (size - rows + 1)), np.floor(left * (size - columns + 1)), rows, columns], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), box, 0).astype(np.int64)


def pasted_box(
    fraction: NDArray[np.float64], top: NDArray[np.float64], left: NDArray[np.float64], size: int
) -> NDArray[np.int64]:
    """Return cutmix's boxes (arXiv:1905.04899) around uniform centers, clipped to the image, :math:`(B, 4)`."""
    side = np.floor(size * np.sqrt(fraction))[:, None]
    center = np.floor(np.stack([top, left], axis=1) * size)
    start, end = (np.clip(center + offset, 0, size) for offset in (-(side // 2), side // 2))
    return np.concatenate([start, end - start], axis=1).astype(np.int64)


def beta_quantile(alpha: float, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return quantiles of Beta(alpha, alpha), which is symmetric about 1/2, at probabilities :math:`(B,)`."""
    half, grid = _beta_table(alpha)
    lower = np.interp(np.minimum(uniform, 1 - uniform), half, grid) ** (1 / alpha)
    return np.where(uniform < 0.5, lower, 1 - lower)


@functools.cache
def _beta_table(alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distribution function on a grid of :math:`s = x^a` over the lower half of [0, 1].

    In :math:`s` the density :math:`x^{a-1} (1-x)^{a-1}` has no pole at 0, and the trapezoid rule is accurate to 1e-6
    for the values of the recipes.
    """
    grid = np.linspace(0, 0.5**alpha, 4097)
    density = (1 - grid ** (1 / alpha)) ** (alpha - 1)
    half = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return half * (0.5 / half[-1]), grid
