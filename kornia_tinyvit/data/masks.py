"""Masks with an id per pixel, and what readers of other formats make masks of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kornia_tinyvit.data.datasets import BrokenImageError, Contents
from kornia_tinyvit.data.folders import Files, files_by_stem
from kornia_tinyvit.images import UNREADABLE

NUM_IDS = 2**16  # what a mask of 16 bits can hold
UNLABELLED_ID = 255  # how most data sets mark pixels without a label
_NO_INSTANCE = 0
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_SMEARED = (".jpg", ".jpeg")  # whose compression makes new values along every edge

Ring = list[tuple[float, float]]  # x and y of a polygon's corners
Masks = list[NDArray[np.bool_]]


@dataclass(frozen=True)
class Instances:
    """The instances of an image.

    Attributes:
        sources: files that hold them, or what a file states of each.
        read: returns the masks :math:`(H, W)` of a source on an image of a height and a width.
        size: height and width of the image, if a file states them.
    """

    sources: tuple[Any, ...]
    read: Callable[[Any, tuple[int, int]], Masks]
    size: tuple[int, int] | None = None

    def masks(self, size: tuple[int, int]) -> Masks:
        """Return the masks of all sources."""
        return [mask for each in self.sources for mask in self.read(each, size)]

    def state(self) -> object:
        """Return what a fingerprint knows of the sources."""
        return [(each.name, each.stat().st_size) if isinstance(each, Path) else each for each in self.sources]


def pair_masks(images: Path, masks: Path) -> Contents:
    """Return the images and the paths of their masks, which have the same name but for the ending.

    Args:
        images: folder of the images.
        masks: folder of the masks.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no pair, two files claim one name, or masks are JPEG files.
    """
    found, labeled = files_by_stem(images), files_by_stem(masks)
    stems = sorted(found.keys() & labeled.keys())
    if not stems:
        raise ValueError(
            f"No image of {images} has a mask of its name in {masks}: {len(found)} images, {len(labeled)} "
            "masks. They are matched by their paths without the ending, such as street/1.jpg and street/1.png."
        )
    smeared = [labeled[stem] for stem in stems if labeled[stem].lower().endswith(_SMEARED)]
    if smeared:
        raise ValueError(f"{masks} holds JPEG masks such as {smeared[0]}, whose ids are smeared; use PNG.")
    return Contents(
        Files(images, [found[stem] for stem in stems]),
        [masks / labeled[stem] for stem in stems],
        without_mask=tuple(found[stem] for stem in sorted(found.keys() - labeled.keys())),
        without_image=tuple(labeled[stem] for stem in sorted(labeled.keys() - found.keys())),
    )


def read_ids(path: Path) -> NDArray[np.int64]:
    """Return the ids of a mask's pixels, :math:`(H, W)`, in [0, 65536).

    Raises:
        BrokenImageError: if it cannot be decoded, or is no mask.
        FileNotFoundError: if there is no such file.
    """
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no mask {path} any more.") from None
    except UNREADABLE as error:
        raise BrokenImageError(f"{path} is not a mask that can be read: {error}") from error
    if mode not in _INDEX_MODES:
        raise BrokenImageError(
            f"{path} is no mask: it has the mode {mode}, not an id a pixel in one channel or a palette."
        )
    ids = ids.astype(np.int64)
    if ids.min() < 0 or ids.max() >= NUM_IDS:
        raise BrokenImageError(f"{path} holds ids from {ids.min()} to {ids.max()}; expected [0, {NUM_IDS}).")
    return ids


def split_ids(path: Path, _: tuple[int, int]) -> Masks:
    """Return a mask for each id of a file but 0 and 255."""
    ids = read_ids(path)
    return [ids == each for each in np.unique(ids) if each not in (_NO_INSTANCE, UNLABELLED_ID)]


def fill_rings(rings: Iterable[Ring], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels inside any of some polygons, :math:`(H, W)`; kornia fills convex ones only."""
    mask = Image.new("1", (size[1], size[0]))
    for ring in rings:
        if len(ring) > 1:
            ImageDraw.Draw(mask).polygon(ring, fill=1)
    return np.array(mask)
