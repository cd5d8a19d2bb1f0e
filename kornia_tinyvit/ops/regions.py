"""Removal of small connected regions and holes of masks, by union of runs of pixels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["remove_small_regions"]

Integers = NDArray[np.int64]


class _Runs(NamedTuple):
    """Runs of pixels in a flattened mask, with an empty pixel after each row."""

    starts: Integers
    ends: Integers
    stride: int


def remove_small_regions(
    mask: NDArray[np.bool_], min_area: float, mode: Literal["holes", "islands"]
) -> tuple[NDArray[np.bool_], bool]:
    """Fill small holes of a mask or remove its small islands, as ``remove_small_regions`` of segment-anything.

    Regions are 8-connected, in the mask and in its background. Background at the border of the image counts as a
    hole. If every island is small, the largest is kept.

    Args:
        mask: boolean :math:`(H, W)`.
        min_area: regions with fewer pixels are small.
        mode: ``"holes"`` or ``"islands"``.

    Returns:
        The mask, or a changed copy of it, and whether it was changed.

    Raises:
        ValueError: if ``mode`` is unknown.

    Example:
        >>> mask = np.array([[True, True, True, False], [True, False, True, False], [True, True, True, False]])
        >>> remove_small_regions(mask, 2, "holes")[0].astype(int)
        array([[1, 1, 1, 0],
               [1, 1, 1, 0],
               [1, 1, 1, 0]])
    """
    if mode not in {"holes", "islands"}:
        raise ValueError(f"mode must be 'holes' or 'islands'; got {mode!r}.")
    runs = _find_runs(~mask if mode == "holes" else mask)
    region = _join(runs)
    areas = np.bincount(region, runs.ends - runs.starts, len(region)).astype(np.int64)
    small = areas[region] < min_area
    if not small.any():
        return mask, False
    if mode == "holes":
        return mask | _paint(runs, small, mask.shape), True
    if small.all():
        small = region != _largest(runs, region, areas)
    return _paint(runs, ~small, mask.shape), True


def _find_runs(mask: NDArray[np.bool_]) -> _Runs:
    flat = np.pad(mask, ((0, 0), (0, 1))).ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return _Runs(edges[0::2], edges[1::2], mask.shape[1] + 1)


def _join(runs: _Runs) -> Integers:
    """Return the first run of each run's region."""
    starts, ends, stride = runs
    # A run of the next row is connected if it ends at or after this start and starts at or before this end: ends are
    # exclusive, so equality is contact at a corner.
    first = np.searchsorted(ends, starts + stride, side="left")
    count = np.searchsorted(starts, ends + stride, side="right") - first
    above = np.repeat(np.arange(len(starts)), count)
    below = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - first, count)
    region = np.arange(len(starts))
    while True:
        pair = np.sort(np.stack([region[above], region[below]]), axis=0)
        apart = pair[0] != pair[1]
        if not apart.any():
            return region
        np.minimum.at(region, pair[1][apart], pair[0][apart])
        while not np.array_equal(region, region[region]):
            region = region[region]


def _largest(runs: _Runs, region: Integers, areas: Integers) -> int:
    """Return the largest region; of equal ones, the first in OpenCV's order, row-major over blocks of 2x2 pixels."""
    rows, columns = np.divmod(runs.starts, runs.stride)
    candidates = np.flatnonzero(areas[region] == areas.max())
    order = np.lexsort((columns[candidates] // 2, rows[candidates] // 2))
    return int(region[candidates[order[0]]])


def _paint(runs: _Runs, chosen: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    change = np.zeros(shape[0] * runs.stride, dtype=np.int8)
    change[runs.starts[chosen]] = 1
    change[runs.ends[chosen]] = -1
    painted = np.cumsum(change, dtype=np.int8).view(np.bool_)
    return painted.reshape(shape[0], runs.stride)[:, : shape[1]]
