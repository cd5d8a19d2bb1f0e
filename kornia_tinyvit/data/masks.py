"""Masks in image files: an id per pixel, or one file per object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kornia_tinyvit.data.datasets import BrokenImageError, Contents
from kornia_tinyvit.data.folders import Files, files_by_stem, list_folder, list_images
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.images import UNREADABLE
from kornia_tinyvit.ops.rle import decode_rle

NUM_IDS = 2**16  # of a 16-bit mask
UNLABELED_ID = 255  # of unlabeled pixels in most datasets of 8-bit class masks
BINARY = {0, 255}  # the ids of masks that were saved as black and white images
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_LOSSY = (".jpg", ".jpeg")  # compression changes the ids along edges

Ring = Sequence[tuple[float, float]]  # x and y of a polygon's vertices
Masks = list[NDArray[np.bool_]]


@dataclass(frozen=True)
class Instances:
    """The stored instances of an image.

    Attributes:
        sources: files, or entries of a file, that hold one or several instances each.
        read: returns the masks :math:`(H, W)` in a source, given the image's height and width.
        size: height and width of the image, if a file states them.
        count: returns the number of instances in a source; ``None`` if each holds one.
    """

    sources: tuple[Any, ...]
    read: Callable[[Any, tuple[int, int]], Masks]
    size: tuple[int, int] | None = None
    count: Callable[[Any], int] | None = None

    @property
    def num_objects(self) -> int:
        """The number of instances; this may read the sources."""
        return len(self.sources) if self.count is None else sum(map(self.count, self.sources))


def pair_masks(images: Path, masks: Path) -> Contents:
    """Return images and the paths of their masks, matched by their path without the suffix.

    Args:
        images: folder of the images.
        masks: folder of the masks.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if there is no pair, two files have the same path without the suffix, or masks are JPEG files.
    """
    found, labeled = files_by_stem(images), files_by_stem(masks)
    stems = sorted(found.keys() & labeled.keys())
    if not stems:
        raise ValueError(
            f"No image of {images} has a mask in {masks}: {len(found)} images, {len(labeled)} masks. They are matched "
            "by their paths without the suffix, such as street/1.jpg and street/1.png."
        )
    lossy = [labeled[stem] for stem in stems if labeled[stem].lower().endswith(_LOSSY)]
    if lossy:
        raise ValueError(f"{masks} holds JPEG masks such as {lossy[0]}, whose compression changes ids; use PNG.")
    return Contents(
        Files(images, [found[stem] for stem in stems]),
        [masks / labeled[stem] for stem in stems],
        without_mask=tuple(found[stem] for stem in sorted(found.keys() - labeled.keys())),
        without_image=tuple(labeled[stem] for stem in sorted(labeled.keys() - found.keys())),
        skipped=list_folder(images).skipped,
    )


def read_objects(folder: Path) -> Contents:
    """Return the images of ``SAMPLE/images`` and their objects, each the pixels above 0 of a file ``SAMPLE/masks/*``.

    This is the format of the Data Science Bowl 2018.
    Samples without an image or without masks are dropped and reported.

    Raises:
        ValueError: if a sample has several images, or all are dropped.
    """
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    samples = [each for each in folders if (each / "images").is_dir() or (each / "masks").is_dir()]
    found = [(sample, list_images(sample / "images"), list_images(sample / "masks")) for sample in samples]
    names: list[str] = []
    labels: list[Instances] = []
    for sample, images, masks in found:
        if len(images) > 1:
            raise ValueError(f"{sample / 'images'} holds {len(images)} images; expected one per folder.")
        if images and masks:
            names.append(f"{sample.name}/images/{images[0].as_posix()}")
            labels.append(Instances(tuple(sample / "masks" / mask for mask in masks), _read_object))
    if not names:
        raise ValueError(f"No folder in {folder} has both an image in 'images' and masks in 'masks'.")
    without_mask = tuple(sample.name for sample, images, masks in found if images and not masks)
    without_image = tuple(sample.name for sample, images, _ in found if not images)
    return Contents(Files(folder, names), labels, without_mask=without_mask, without_image=without_image)


def _read_object(path: Path, _: tuple[int, int]) -> Masks:
    return [read_ids(path) > 0]


def read_ids(path: Path) -> NDArray[np.uint8] | NDArray[np.int64]:
    """Return the ids of a mask's pixels, :math:`(H, W)`, in [0, 65536); of type uint8 if the file has 8 bits.

    Raises:
        BrokenImageError: if the file cannot be decoded or is not a mask.
        FileNotFoundError: if it does not exist.
    """
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"Mask {path} no longer exists.") from None
    except UNREADABLE as error:
        raise BrokenImageError(f"{path} is not a mask that can be read: {error}") from error
    if mode not in _INDEX_MODES:
        raise BrokenImageError(
            f"{path} is not a mask: it has the mode {mode}; expected ids in one channel or a palette."
        )
    if mode in ("1", "L", "P"):
        return ids.astype(np.uint8)
    ids = ids.astype(np.int64)
    if ids.min() < 0 or ids.max() >= NUM_IDS:
        raise BrokenImageError(f"{path} holds ids from {ids.min()} to {ids.max()}; expected [0, {NUM_IDS}).")
    return ids


def split_ids(path: Path, _: tuple[int, int]) -> Masks:
    """Return a mask for each id of a file except 0."""
    ids = read_ids(path)
    return [ids == each for each in _instance_ids(ids)]


def count_ids(path: Path) -> int:
    """Return the number of masks of :func:`split_ids`."""
    return len(_instance_ids(read_ids(path)))


def split_voc_ids(path: Path, _: tuple[int, int]) -> Masks:
    """Return a mask for each id of Pascal VOC's ``SegmentationObject``, in which 255 is unlabeled."""
    ids = read_ids(path)
    return [ids == each for each in _instance_ids(ids) if each != UNLABELED_ID]


def count_voc_ids(path: Path) -> int:
    """Return the number of masks of :func:`split_voc_ids`."""
    return sum(each != UNLABELED_ID for each in _instance_ids(read_ids(path)).tolist())


def _instance_ids(ids: NDArray[Any]) -> NDArray[np.int64]:
    found = np.flatnonzero(np.bincount(ids.ravel()))
    return found[found > 0]


def find_ids(masks: Iterable[Path]) -> tuple[set[int], bool]:
    """Return the ids in masks, and whether one has 16 bits; masks that cannot be read are left out."""
    present, deep = np.zeros(NUM_IDS, dtype=np.bool_), False
    for mask in masks:
        try:
            ids = read_ids(mask)
        except (BrokenImageError, OSError):  # reported when the sample is read
            continue
        present[ids.ravel()] = True
        deep |= ids.dtype != np.uint8
    return set(np.flatnonzero(present).tolist()), deep


def is_binary(masks: Iterable[Path]) -> bool:
    """Return whether masks hold the ids 0 and 255 and no other one; reading stops at the first other one."""
    found: set[int] = set()
    for mask in masks:
        found |= find_ids([mask])[0]
        if not found <= BINARY:
            return False
    return found == BINARY


def fill_polygons(rings: Iterable[Ring], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the union of polygons, with the pixels of pycocotools.

    Args:
        rings: polygons of at least three corners in pixels. Their parts outside of the image are cut off.
        size: height and width of the image.

    Returns:
        Mask :math:`(H, W)`.

    Raises:
        MissingExtraError: if pycocotools is missing.
    """
    with optional_imports("Masks from polygons need pycocotools", "'kornia-tinyvit[train]'"):
        from pycocotools import mask as coco_masks
    flat = [[number for corner in ring for number in corner] for ring in rings]
    if not flat:
        return np.zeros(size, dtype=np.bool_)
    return decode_rle(coco_masks.merge(coco_masks.frPyObjects(flat, *size)))
