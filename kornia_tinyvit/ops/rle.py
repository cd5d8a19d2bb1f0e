"""COCO's run-length encoding of masks, readable by pycocotools and readable from it.

Runs go down the columns, from left to right, and alternate between background and mask, beginning with the
background. The compressed form writes their lengths as text: from the fourth on the difference to the length before
the last, each number as digits of five bits in two's complement, the lowest first, a sixth bit telling whether more
follow, and 48 added to make a printable character (``rleToString`` of the COCO API's ``maskApi.c``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RLE", "compress_rle", "decode_rle", "encode_rle", "rle_area", "uncompress_rle"]

BITS = 5  # of a number in one character
MORE = 1 << BITS
FIRST_CHARACTER = 48
_SIDES = 2**31
MAX_DIGITS = 7  # what lengths below 2**32 and their differences take


class RLE(TypedDict):
    """A mask as COCO stores it.

    Args:
        size: height and width in pixels.
        counts: lengths of the runs, as a list (uncompressed) or as text (compressed; pycocotools has bytes).
    """

    size: list[int]
    counts: list[int] | str | bytes


def encode_rle(mask: Tensor | NDArray[np.bool_], compressed: bool = False) -> RLE:
    """Encode a mask.

    Args:
        mask: boolean :math:`(H, W)`.
        compressed: write the runs as text, as :func:`compress_rle` does, without the list in between, which takes
            twenty times the memory.

    Returns:
        The run-length code, a dictionary of ``size`` and ``counts``.

    Raises:
        ValueError: if it is not a boolean array of two dimensions.

    Example:
        >>> encode_rle(np.array([[False, True, True], [False, False, True]]))
        {'size': [2, 3], 'counts': [2, 1, 1, 2]}
    """
    pixels = mask.numpy(force=True) if isinstance(mask, Tensor) else np.asarray(mask)
    if pixels.ndim != 2 or pixels.dtype != np.bool_:
        raise ValueError(f"A mask must be boolean (H, W); got {pixels.dtype} {pixels.shape}. Compare it, as in x > 0.")
    lengths = _find_lengths(pixels)
    return {"size": list(pixels.shape), "counts": _to_text(lengths) if compressed else lengths.tolist()}


def decode_rle(rle: RLE) -> NDArray[np.bool_]:
    """Decode a mask, compressed or not.

    Args:
        rle: run-length code, compressed or not.

    Returns:
        Boolean array :math:`(H, W)`.

    Raises:
        ValueError: if it is no such mask, the runs do not fill the image, or the text is not one of COCO's.

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
    """Return a mask with its runs as text, as pycocotools has it (there as bytes); compressed ones as they are.

    Args:
        rle: run-length code, compressed or not.

    Raises:
        ValueError: if a length is negative or not below :math:`2^{32}`.

    Example:
        >>> compress_rle({"size": [2, 3], "counts": [2, 1, 1, 2]})
        {'size': [2, 3], 'counts': '2111'}
    """
    if isinstance(rle["counts"], str):
        return rle
    if isinstance(rle["counts"], bytes):
        return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return {"size": rle["size"], "counts": _to_text(_lengths(rle))}


def uncompress_rle(rle: RLE) -> RLE:
    """Return a mask with its runs as a list; uncompressed ones equal what they were.

    Args:
        rle: run-length code, compressed or not.

    Raises:
        ValueError: if the text is not one of COCO's.

    Example:
        >>> uncompress_rle({"size": [2, 3], "counts": "2111"})
        {'size': [2, 3], 'counts': [2, 1, 1, 2]}
    """
    return {"size": rle["size"], "counts": _lengths(rle).tolist()}


def rle_area(rle: RLE) -> int:
    """Return the pixels of a mask, without decoding it."""
    return int(_lengths(rle)[1::2].sum())


def _find_lengths(pixels: NDArray[np.bool_]) -> NDArray[np.int64]:
    height, width = pixels.shape
    if not pixels.size:
        return np.zeros(1, dtype=np.int64)
    # Comparing neighbors row by row and sorting the few changes is faster than transposing all pixels.
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
        raise ValueError(f"The size of a mask is its height and width, two numbers below 2**31; got {str(size)[:60]}.")
    return int(sides[0]), int(sides[1])


def _lengths(rle: RLE) -> NDArray[np.int64]:
    if not isinstance(rle, Mapping) or "counts" not in rle:
        raise ValueError(f"A mask in run lengths has 'size' and 'counts'; got {str(rle)[:60]}.")
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = counts.encode()
    lengths = _from_text(counts) if isinstance(counts, bytes) else _from_list(counts)
    if ((lengths < 0) | (lengths >= 2**32)).any():
        raise ValueError(f"Runs have lengths from 0 to 2**32 - 1; got {lengths.min()} to {lengths.max()}.")
    return lengths


def _from_list(counts: Sequence[int]) -> NDArray[np.int64]:
    try:
        lengths = np.asarray(counts)
    except ValueError:  # lists in lists, of several lengths
        lengths = np.empty(0, dtype=object)
    if lengths.ndim != 1 or not (lengths.dtype.kind in "iu" or (isinstance(counts, list) and not counts)):
        raise ValueError(f"Runs are a list of whole numbers, or text; got {str(counts)[:60]}.")
    return lengths.astype(np.int64)


def _to_text(lengths: NDArray[np.int64]) -> str:
    numbers = lengths.copy()
    numbers[3:] -= lengths[1:-2]
    # A number takes n digits if it or, where it is negative, its complement is below 2**(5n - 1).
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
        raise ValueError(f"These are not COCO's compressed runs: {text[:32]!r}.")
    parts = (characters & MORE - 1) << BITS * _positions(digits)
    numbers = np.add.reduceat(parts, ends - digits + 1)
    numbers -= (characters[ends] & MORE >> 1 != 0).astype(np.int64) << BITS * digits
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _positions(digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the position of each digit in its number, for all numbers in one row."""
    return np.arange(digits.sum()) - np.repeat(np.cumsum(digits) - digits, digits)
