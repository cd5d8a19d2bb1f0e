"""COCO's run-length encoding (RLE) of masks, compatible with pycocotools.

Runs are in column-major order and alternate between background and mask, starting with background. The compressed form
is text: from the fourth on each length is stored as the difference to the second last, in two's complement with five
bits per character, lowest first; the sixth bit marks that more follow, and 48 is added for a printable character
(``rleToString`` in ``maskApi.c`` of the COCO API).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RLE", "compress_rle", "decode_rle", "encode_rle", "rle_area", "uncompress_rle"]

BITS = 5  # per character
MORE = 1 << BITS
FIRST_CHARACTER = 48
_SIDES = 2**31
MAX_DIGITS = 7  # enough for lengths below 2**32 and their differences


class RLE(TypedDict):
    """A run-length encoded mask in COCO's format.

    Args:
        size: height and width in pixels.
        counts: run lengths as a list (uncompressed) or text (compressed; bytes in pycocotools).
    """

    size: list[int]
    counts: list[int] | str | bytes


def encode_rle(mask: Tensor | NDArray[np.bool_], compressed: bool = False) -> RLE:
    """Encode a mask.

    Args:
        mask: boolean :math:`(H, W)`.
        compressed: return compressed counts, without a list of run lengths, which takes 20 times the memory.

    Returns:
        The run-length code, a dictionary of ``size`` and ``counts``.

    Raises:
        ValueError: if it is not boolean and two-dimensional.

    Example:
        >>> encode_rle(np.array([[False, True, True], [False, False, True]]))
        {'size': [2, 3], 'counts': [2, 1, 1, 2]}
    """
    pixels = mask.numpy(force=True) if isinstance(mask, Tensor) else np.asarray(mask)
    if pixels.ndim != 2 or pixels.dtype != np.bool_:
        raise ValueError(f"A mask must be boolean (H, W); got {pixels.dtype} {pixels.shape}. Compare, as in x > 0.")
    lengths = _find_lengths(pixels)
    return {"size": list(pixels.shape), "counts": _to_text(lengths) if compressed else lengths.tolist()}


def decode_rle(rle: RLE) -> NDArray[np.bool_]:
    """Decode a mask.

    Args:
        rle: run-length code, compressed or not.

    Returns:
        Boolean array :math:`(H, W)`.

    Raises:
        ValueError: if it is not a run-length code, or the runs do not fill the mask.

    Example:
        >>> decode_rle({"size": [2, 3], "counts": "2111"}).astype(int)
        array([[0, 1, 1],
               [0, 0, 1]])
    """
    counts = _lengths(rle)
    height, width = _size(rle)
    if counts.sum() != height * width:
        raise ValueError(f"The runs cover {counts.sum()} pixels; the mask has {height}x{width}.")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def compress_rle(rle: RLE) -> RLE:
    """Return a run-length code in compressed form, with text counts.

    Args:
        rle: run-length code, compressed or not.

    Raises:
        ValueError: if a length is negative or not below :math:`2^{32}`.

    Example:
        >>> compress_rle({"size": [2, 3], "counts": [2, 1, 1, 2]})
        {'size': [2, 3], 'counts': '2111'}
    """
    counts = rle["counts"].decode("ascii") if isinstance(rle["counts"], bytes) else rle["counts"]
    return {"size": rle["size"], "counts": counts if isinstance(counts, str) else _to_text(_lengths(rle))}


def uncompress_rle(rle: RLE) -> RLE:
    """Return a run-length code in uncompressed form, with a list of run lengths.

    Args:
        rle: run-length code, compressed or not.

    Raises:
        ValueError: if the counts are invalid.

    Example:
        >>> uncompress_rle({"size": [2, 3], "counts": "2111"})
        {'size': [2, 3], 'counts': [2, 1, 1, 2]}
    """
    return {"size": rle["size"], "counts": _lengths(rle).tolist()}


def rle_area(rle: RLE) -> int:
    """Return the number of pixels of a mask without decoding it."""
    return int(_lengths(rle)[1::2].sum())


def _find_lengths(pixels: NDArray[np.bool_]) -> NDArray[np.int64]:
    height, width = pixels.shape
    if not pixels.size:
        return np.zeros(1, dtype=np.int64)
    # Comparing rows and sorting the few changes is faster than transposing all pixels.
    change = np.empty_like(pixels, order="C")
    change[1:] = pixels[1:] != pixels[:-1]
    change[0, 1:] = pixels[0, 1:] != pixels[-1, :-1]
    change[0, 0] = pixels[0, 0]
    rows, columns = np.divmod(np.flatnonzero(change), width)
    starts = np.sort(columns * height + rows)
    return np.diff(starts, prepend=0, append=pixels.size)


def _size(rle: RLE) -> tuple[int, int]:
    size = rle.get("size")
    sides = list(size) if isinstance(size, (Sequence, np.ndarray)) and not isinstance(size, str) else []
    if len(sides) != 2 or not all(isinstance(side, Integral) and 0 <= side < _SIDES for side in sides):
        raise ValueError(f"The size of a mask is two integers below 2**31, height and width; got {str(size)[:60]}.")
    return int(sides[0]), int(sides[1])


def _lengths(rle: RLE) -> NDArray[np.int64]:
    if not isinstance(rle, Mapping) or "counts" not in rle:
        raise ValueError(f"A run-length code has 'size' and 'counts'; got {str(rle)[:60]}.")
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = counts.encode()
    lengths = _from_text(counts) if isinstance(counts, bytes) else _from_list(counts)
    if ((lengths < 0) | (lengths >= 2**32)).any():
        raise ValueError(f"Run lengths must be from 0 to 2**32 - 1; got {lengths.min()} to {lengths.max()}.")
    return lengths


def _from_list(counts: Sequence[int]) -> NDArray[np.int64]:
    try:
        lengths = np.asarray(counts)
    except ValueError:  # nested lists of different lengths
        lengths = np.empty(0, dtype=object)
    if lengths.ndim != 1 or not (lengths.dtype.kind in "iu" or (isinstance(counts, list) and not counts)):
        raise ValueError(f"Run lengths must be a list of integers, or text; got {str(counts)[:60]}.")
    return lengths.astype(np.int64)


def _to_text(lengths: NDArray[np.int64]) -> str:
    numbers = lengths.copy()
    numbers[3:] -= lengths[1:-2]
    # A number takes n digits if it, or its complement if negative, is below 2**(5n - 1).
    limits = np.left_shift(1, BITS * np.arange(1, MAX_DIGITS + 1) - 1)
    digits = 1 + np.searchsorted(limits, np.maximum(numbers, ~numbers), side="right")
    position = _positions(digits)
    characters = np.repeat(numbers, digits) >> BITS * position & MORE - 1
    characters += MORE * (position + 1 < np.repeat(digits, digits))
    return (characters + FIRST_CHARACTER).astype(np.uint8).tobytes().decode("ascii")


def _from_text(text: bytes) -> NDArray[np.int64]:
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - FIRST_CHARACTER
    ends = np.flatnonzero(characters & MORE == 0)
    digits = np.diff(ends, prepend=-1)
    valid = ((characters >= 0) & (characters < 2 * MORE)).all() and (digits <= MAX_DIGITS).all()
    if not len(ends) or ends[-1] != len(characters) - 1 or not valid:
        raise ValueError(f"These are not COCO's compressed counts: {text[:32]!r}.")
    parts = (characters & MORE - 1) << BITS * _positions(digits)
    numbers = np.add.reduceat(parts, ends - digits + 1)
    numbers -= (characters[ends] & MORE >> 1 != 0).astype(np.int64) << BITS * digits
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _positions(digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each digit within its number, concatenated over all numbers."""
    return np.arange(digits.sum()) - np.repeat(np.cumsum(digits) - digits, digits)
