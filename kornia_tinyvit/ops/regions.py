"""Small regions and holes of masks, found by joining runs of pixels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["remove_small_regions"]

Integers = NDArray[np.int64]


class _Runs(NamedTuple):
    """Runs of pixels in a mask whose rows are laid one after the other, each followed by one empty pixel."""

    starts: Integers
    ends: Integers
    stride: int


def remove_small_regions(
    mask: NDArray[np.bool_], min_area: float, mode: Literal["holes", "islands"]
) -> tuple[NDArray[np.bool_], bool]:
    """Fill small holes of a mask, or drop its small islands, as segment-anything does with OpenCV.

    Pixels that touch at a corner belong together, in the mask and in its background alike. Background at the border
    of the image counts as a hole too. If every island is small, the largest stays.

    Args:
        mask: boolean :math:`(H, W)`.
        min_area: pixels from which on a region stays.
        mode: ``"holes"`` or ``"islands"``.

    Returns:
        The mask, itself or a changed copy, and whether it was changed.

    Raises:
        ValueError: if ``mode`` is another.

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
    height, width = mask.shape
    padded = np.zeros((height, width + 1), dtype=np.bool_)
    padded[:, :width] = mask
    flat = padded.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return _Runs(edges[0::2], edges[1::2], width + 1)


def _join(runs: _Runs) -> Integers:
    """Return for each run the first run of its region."""
    starts, ends, stride = runs
    # In the row below, a run touches this one if it ends at its start or later and starts at its end or earlier: ends
    # are exclusive, so this is contact by a corner.
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
    """Return the largest region; of several, the one that OpenCV numbers first.

    OpenCV goes through the image in blocks of 2x2 pixels, row of blocks after row of blocks.
    """
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
