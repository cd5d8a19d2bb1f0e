"""What a replayed augmentation decides for each sample, drawn with counter-based random numbers on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kornia_tinyvit.data.operators import OPERATIONS
from kornia_tinyvit.preprocessing import TrainingPreset

__all__ = ["Draws"]

ATTEMPTS = 10  # boxes tried before the random crop falls back to the center and erasing to nothing, as in the originals
_LEVELS = 64  # steps between two magnitudes of a policy; rounding makes them equal on all processors

# Magnitudes are those of timm's "rand-m9-mstd0.5-inc1", the recipe of the paper: level 9, spread 0.5, at most 10.
_LEVEL, _SPREAD, _MAX_LEVEL = 9.0, 0.5, 10.0
#: How many operators each policy applies in a row, and the probability of each.
POLICY_LAYERS = {"rand": 2, "trivial": 1, None: 0}
_POLICY_PROBABILITY = {"rand": 0.5, "trivial": 1.0, None: 0.0}
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Draws:
    """What was drawn for the samples of a batch, a row each.

    Attributes:
        epoch: the epoch.
        indices: the samples, :math:`(B,)`.
        crop: uniform numbers in [0, 1) of ten tries: area, aspect ratio, top and left, :math:`(B, 10, 4)`.
        flip: whether to mirror, :math:`(B,)`.
        operations: positions in :data:`~kornia_tinyvit.data.operators.OPERATIONS` of each layer of the policy, -1 for
            none, :math:`(B, L)`.
        magnitudes: their strengths in their own units: degrees, bits, levels of 256, factors, shares of the width,
            :math:`(B, L)`.
        jitter: factors of brightness, contrast and saturation, :math:`(B, 3)`.
        erased: box that noise covers: top, left, height and width in pixels, all 0 for none, :math:`(B, 4)`.
        noise: key of that noise, :math:`(B,)`.
        partners: the samples they are mixed with, themselves for none, :math:`(B,)`.
        share: weight of the partner's image in mixup, 0 for none, :math:`(B,)`.
        pasted: box of the partner that cutmix pastes, as ``erased``, :math:`(B, 4)`.
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
    share: NDArray[np.float32]
    pasted: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def checksums(self) -> NDArray[np.uint32]:
        """Return a CRC-32 of each row, :math:`(B,)`, which tells a replay that it draws what was stored."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "epoch"]
        columns = [np.ascontiguousarray(values).reshape(len(self), -1) for values in fields]
        rows = np.concatenate([values.view(np.uint8) for values in columns], axis=1)
        return np.array([zlib.crc32(row) for row in rows], dtype=np.uint32)


def unit(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    return words.astype(np.float64) * 2.0**-32


def draw_policy(policy: str | None, words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the operations and magnitudes :math:`(B, L)` of a policy from random words :math:`(B, L, 4)`."""
    chance, choice, first, second = np.moveaxis(unit(words), 2, 0)
    if policy == "trivial":  # one operator, or none as its first choice, of any strength
        operations = (choice * (len(OPERATIONS) + 1)).astype(np.int64) - 1
        level = first * _MAX_LEVEL
    else:
        operations = (choice * len(OPERATIONS)).astype(np.int64)
        normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)  # Box and Muller, 1958
        level = np.clip(_LEVEL + _SPREAD * normal, 0, _MAX_LEVEL)
    operations = np.where(chance < _POLICY_PROBABILITY[policy], operations, -1)
    share = np.round(level * _LEVELS) / (_LEVELS * _MAX_LEVEL)
    sign = np.where(words[..., 0] & 1, 1.0, -1.0)
    magnitudes = np.zeros(operations.shape)
    for name, values in _magnitudes(share, sign).items():
        magnitudes = np.where(operations == OPERATIONS.index(name), values, magnitudes)
    return operations, magnitudes.astype(np.float32)


def _magnitudes(share: NDArray[np.float64], sign: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Turn the share of the largest strength, in [0, 1], into what each operator takes."""
    largest = {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3, "translate_x": 0.45, "translate_y": 0.45}
    return {
        **{name: sign * strength * share for name, strength in largest.items()},
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), np.maximum(0.1, 1 + sign * 0.9 * share)),
        "posterize": np.maximum(1, 4 - np.floor(4 * share)),  # with 0 bits, as in the originals, nothing is left
        "solarize": 256 - np.floor(256 * share),
        "solarize_add": np.floor(110 * share),
    }


def _sides(
    tries: NDArray[np.float64], area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the height and width of boxes whose share of an area is uniform, and the ratio of their sides in its log.

    Args:
        tries: uniform numbers :math:`(..., 4)`, of which the first two are taken.
        area: pixels of the whole image.
        scale: range of the share.
        ratio: range of width over height.
    """
    shares = area * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = (math.log(end) for end in ratio)
    ratios = np.exp(low + tries[..., 1] * (high - low))
    return np.rint(np.sqrt(shares / ratios)), np.rint(np.sqrt(shares * ratios))


def crop_box(tries: NDArray[np.float64], height: int, width: int, preset: TrainingPreset) -> tuple[int, int, int, int]:
    """Return top, left, height and width of the first try that fits, or of the largest center crop (torchvision's)."""
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
    """Return for each row the first box that is smaller than the image, :math:`(B, 4)`, or zeros."""
    columns, rows = _sides(tries, size * size, _ERASED_AREA, _ERASED_RATIO)  # whose ratio is of height over width
    fits = (rows < size) & (columns < size)
    first = fits.argmax(1)[:, None]
    rows, columns, top, left = (
        np.take_along_axis(values, first, 1)[:, 0] for values in (rows, columns, tries[..., 2], tries[..., 3])
    )
    box = np.stack([np.floor(top * (size - rows + 1)), np.floor(left * (size - columns + 1)), rows, columns], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), box, 0).astype(np.int64)


def pasted_box(
    share: NDArray[np.float64], top: NDArray[np.float64], left: NDArray[np.float64], size: int
) -> NDArray[np.int64]:
    """Return cutmix's boxes (arXiv:1905.04899) around uniform centers, cut at the border, :math:`(B, 4)`."""
    side = np.floor(size * np.sqrt(share))
    edges = []
    for center in (np.floor(top * size), np.floor(left * size)):
        start = np.clip(center - side // 2, 0, size)
        edges.append((start, np.clip(center + side // 2, 0, size) - start))
    (rows_from, rows), (columns_from, columns) = edges
    return np.stack([rows_from, columns_from, rows, columns], axis=1).astype(np.int64)


def beta_quantile(alpha: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Return the inverse of the distribution function of Beta(alpha, alpha), which is symmetric about 1/2.

    With :math:`s = x^a` the density :math:`x^{a-1} (1-x)^{a-1}` loses its pole at 0, and the trapezoid rule on
    [0, 1/2] is accurate to 1e-6 for the values of the recipes.
    """
    grid = np.linspace(0, 0.5**alpha, 4097)
    density = (1 - grid ** (1 / alpha)) ** (alpha - 1)
    half = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    half *= 0.5 / half[-1]
    return functools.partial(_interpolated, half=half, grid=grid, alpha=alpha)


def _interpolated(
    uniform: NDArray[np.float64], half: NDArray[np.float64], grid: NDArray[np.float64], alpha: float
) -> NDArray[np.float64]:
    lower = np.interp(np.minimum(uniform, 1 - uniform), half, grid) ** (1 / alpha)
    return np.where(uniform < 0.5, lower, 1 - lower)
