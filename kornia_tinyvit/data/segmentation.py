"""Images with a class per pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kornia_tinyvit.data import voc
from kornia_tinyvit.data.datasets import (
    BrokenImageError,
    Contents,
    ImageDataset,
    check_size,
    count_noun,
    match_classes,
)
from kornia_tinyvit.data.descriptions import find_section, posix, read_description, read_names
from kornia_tinyvit.data.folders import list_images
from kornia_tinyvit.data.layouts import find_in_folder, find_layout, list_layouts
from kornia_tinyvit.data.masks import BINARY, NUM_IDS, UNLABELED_ID, find_ids, is_binary, pair_masks, read_ids

__all__ = ["IGNORED", "SegmentationDataset"]

#: The class index of unlabeled pixels; the default ``ignore_index`` of torch's losses.
IGNORED = -100

_UNKNOWN = -1
_UNLABELED = ("unlabeled", "unlabelled", "void", "ignore", "ignored")

_KINDS = ("masks", "annotations", "labels")  # folders of masks
_LAYOUTS = (
    "images/ and masks/, images/SPLIT/ and masks/SPLIT/, SPLIT/images/ and SPLIT/masks/ (SPLIT is train, val or test), "
    "the folders of Pascal VOC, or a YAML file that names the folders of images and masks"
)

Classes = Mapping[int, str] | Sequence[str]


class SegmentationDataset(ImageDataset[Tensor]):
    r"""Images with masks: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and a mask :math:`(H, W)`.

    A mask is an int64 tensor of class indices, or :data:`IGNORED` for unlabeled pixels. Its file has the name of the
    image but for the suffix, in PNG or another lossless format, with an id per pixel in one channel or a palette, of 8
    or 16 bits. Images without a mask and masks without an image are dropped and reported. The EXIF orientation is
    applied to images but not to masks.

    Masks of 0 and 255 only have two classes, "background" and "object", or the names of the ids 0 and 1 where these are
    the only ones stated. Else 255 is unlabeled in masks of 8 bits, unless it is named.

    Args:
        contents: the images and targets, as read by ``open``.
        classes: names and ids of the classes, see :meth:`open`.
        ignored: ids of unlabeled pixels, see :meth:`open`.
        others: masks of other splits, whose ids are also classes if ``classes`` are not given.

    Raises:
        ValueError: if there are fewer than two classes, or the names do not match the ids; see :meth:`open`.

    Attributes:
        class_names: names of the classes in the order of their indices.
        num_classes: number of classes.
        ids: the id of each class; -1 for a class of a network that the masks do not have.
        ignored: ids of unlabeled pixels.
        without_mask: names of images that have no mask.
        without_image: names of masks that have no image.
    """

    class_names: tuple[str, ...]

    def __init__(
        self,
        contents: Contents,
        classes: Classes | None = None,
        ignored: Iterable[int] = (),
        others: Sequence[Path] = (),
    ) -> None:
        super().__init__(contents)
        void = {UNLABELED_ID}
        if classes is None:
            present, deep = find_ids([*self._targets, *others])
            void = set() if deep else void
            classes = {each: f"class {each}" for each in present - void}
            if present == BINARY:
                classes = dict(zip(sorted(BINARY), ("background", "object"), strict=True))
                self._notes = (*self._notes, "255 is the object, as the masks hold only 0 and 255")
            elif len(classes) < 2:
                raise ValueError(
                    f"All labeled pixels of {count_noun(len(contents.targets), 'mask')} have the id "
                    f"{min(classes, default=UNLABELED_ID)}, such as in {contents.targets[0]}; expected at least two "
                    "classes."
                )
        elif not isinstance(classes, Mapping):
            classes = dict(enumerate(classes))
        try:
            named = {int(each): str(name).strip() for each, name in classes.items()}  # JSON's ids are strings
            ids = {int(each) for each in ignored}
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"Ids of classes and ignored ids must be integers: {error}.") from error
        if named.keys() == {0, 1} and not ids & {0, 1, UNLABELED_ID} and is_binary(self._targets):
            named[UNLABELED_ID] = named.pop(1)
            self._notes = (*self._notes, f"255 is {named[UNLABELED_ID]!r}, as the masks hold only 0 and 255")
        ids |= {each for each, name in named.items() if name.lower() in _UNLABELED}
        self._customary = void - named.keys() - ids  # in masks of 8 bits only
        ids |= self._customary
        self.ignored = tuple(sorted(ids))
        self.ids = tuple(sorted(named.keys() - ids))
        if len(self.ids) < 2 or self.ids[0] < 0 or self.ids[-1] >= NUM_IDS:
            raise ValueError(
                f"Expected at least two classes that are not ignored, with ids in [0, {NUM_IDS}); got {self.ids[:5]}."
            )
        self.class_names = tuple(named[each] for each in self.ids)
        self.num_classes = len(self.ids)
        self._table = np.full(NUM_IDS, _UNKNOWN, dtype=np.int64)
        self._table[list(self.ids)] = np.arange(len(self.ids))
        self._table[[each for each in self.ignored if 0 <= each < NUM_IDS]] = IGNORED

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: str = "train",
        classes: Classes | None = None,
        ignored: Iterable[int] = (),
        *,
        masks: str | Path | None = None,
    ) -> SegmentationDataset:
        """Open a dataset from one path.

        Args:
            path: one of

                - a folder with ``images`` and ``masks``, with ``images/SPLIT`` and ``masks/SPLIT``, or with
                  ``SPLIT/images`` and ``SPLIT/masks``, and, to name the classes, ``classes.txt`` with one name per id
                  from 0. ``masks`` may also be called ``annotations`` or ``labels``, and the split ``valid`` or
                  ``train2017``;
                - a folder in Pascal VOC's format, with ``JPEGImages``, ``SegmentationClass`` and
                  ``ImageSets/Segmentation/SPLIT.txt``, and optionally ``classes.txt``;
                - a YAML or JSON file with a section per split, which names two folders as ``images`` and ``masks``,
                  relative to the file, and optionally ``classes``, names by id, and ``ignored``, a list of ids; or a
                  folder with one.
            split: name of the split.
            classes: names by id, or a list of the names of the ids 0, 1, 2, ..., instead of those of the path. If
                neither states classes, all masks of all splits are read for the ids that occur, so that each split has
                the same classes. Class indices follow the order of the ids.
            ignored: ids of unlabeled pixels, in addition to those of the path, 255 in masks of 8 bits unless it is a
                class, and ids named "unlabeled", "void" or "ignore".
            masks: folder of the masks, if ``path`` is the folder of their images.

        Raises:
            FileNotFoundError: if the path does not exist.
            ValueError: if it holds none of these formats or has no such split, no image has a mask, there are fewer
                than two classes, two files have the same path without the suffix, or masks are JPEG files.
            MissingExtraError: for YAML files, if PyYAML is missing.
        """
        found = _find(Path(path), split, None if masks is None else Path(masks))
        return cls(found.contents, classes or found.classes, {*ignored, *found.ignored}, found.others)

    def open_split(
        self, path: str | Path, split: str = "val", *, masks: str | Path | None = None
    ) -> SegmentationDataset:
        """Open other images, such as those for validation, with the classes of this data set.

        Classes are matched by name if the path states names, else by id.

        Args:
            path: as for :meth:`open`.
            split: name of the split.
            masks: as for :meth:`open`.

        Raises:
            FileNotFoundError: see :meth:`open`.
            ValueError: see :meth:`open`; or if the path has a class that this data set has not.
        """
        found = _find(Path(path), split, None if masks is None else Path(masks))
        if found.classes is None:
            classes = {each: name for each, name in zip(self.ids, self.class_names, strict=True) if each >= 0}
            return SegmentationDataset(found.contents, classes, {*self.ignored, *found.ignored})
        opened = SegmentationDataset(found.contents, found.classes, found.ignored)
        return opened.with_classes(self.class_names)

    def with_classes(self, names: Sequence[str] | None) -> SegmentationDataset:
        """Return the data set with the class indices of other class names, such as a network's.

        Names such as "class 3", which stand for ids where no names are stated, are also matched by their number.

        Args:
            names: names of the classes in the order of their indices.

        Raises:
            ValueError: if not all classes of the data set are among them.
        """
        two = set(self.ids) == BINARY and names is not None and len(names) == 2
        positions = [0, 1] if two else match_classes(self.class_names, names)
        if names is None or positions is None or tuple(names) == self.class_names:
            return self
        mapped = self._subset(range(len(self)))
        mapped.class_names, mapped.num_classes = tuple(names), len(names)
        ids = dict(zip(positions, self.ids, strict=True))
        mapped.ids = tuple(ids.get(index, -1) for index in range(len(names)))
        mapped._table = np.where(self._table >= 0, np.array(positions)[self._table.clip(0)], self._table)
        return mapped

    def require_objects(self) -> None:
        """Reject masks in which fewer than two classes occur; reading stops at the second one.

        Raises:
            ValueError: if all labeled pixels have the same class.
        """
        found: set[int] = set()
        for mask in self._targets:
            found |= {int(self._table[each]) for each in find_ids([mask])[0]} - {IGNORED, _UNKNOWN}
            if len(found) > 1:
                return
        only = f"the class {self.class_names[min(found)]!r}" if found else "no class"
        raise ValueError(
            f"All labeled pixels of {count_noun(len(self), 'mask')} have {only}, such as in {self._targets[0]}; "
            f"expected at least two classes. Ignored ids: {', '.join(map(str, self.ignored)) or 'none'}."
        )

    def _target(self, stored: Path, size: tuple[int, int], place: str) -> Tensor:
        ids = read_ids(stored)
        check_size(place, size, ids.shape, f"its mask {stored} is")
        indices = self._table[ids]
        if ids.dtype != np.uint8 and UNLABELED_ID in self._customary:
            indices[ids == UNLABELED_ID] = _UNKNOWN
        if (indices == _UNKNOWN).any():
            unknown = np.unique(ids[indices == _UNKNOWN])
            raise BrokenImageError(
                f"{stored} holds the ids {', '.join(map(str, unknown[:5]))}, which are not classes; add them to "
                "'classes' or 'ignored'."
            )
        return torch.from_numpy(indices)

    def _counts(self) -> list[str]:
        ignored = [f"ignored ids {', '.join(map(str, self.ignored))}"] if self.ignored else []
        return [*super()._counts(), *ignored]

    def _state(self, stored: Path) -> object:
        return stored.name, stored.stat().st_size

    def _settings(self) -> tuple[object, ...]:
        return self.ids, self.ignored


class _Found(NamedTuple):
    """A data set as found in a path.

    Attributes:
        contents: the images and masks.
        classes: the classes that the path states.
        ignored: the ids of unlabeled pixels that it states.
        others: masks of its other splits, if it states no classes.
    """

    contents: Contents
    classes: Classes | None = None
    ignored: Iterable[int] = ()
    others: Sequence[Path] = ()


def _find(path: Path, split: str, masks: Path | None) -> _Found:
    if masks is not None:
        return _Found(pair_masks(path, masks))
    return _find_in_folder(path, split) if path.is_dir() else _find_described(path, split)


def _find_in_folder(path: Path, split: str) -> _Found:
    names = path / "classes.txt"
    classes = read_names(names) if names.exists() else None
    if voc.holds_masks(path, voc.CLASSES):
        everything = sorted((path / voc.CLASSES).glob("*.png")) if classes is None else []
        return _Found(voc.read_masks(path, split, voc.CLASSES), classes, others=everything)
    layout = find_layout(path, split, _KINDS)
    if layout is None:
        described = find_in_folder(path, split)
        if described is None or described.suffix.lower() == ".json":
            raise ValueError(f"{path} holds no images with masks. Expected {_LAYOUTS}.")
        return _find_described(described, split)
    contents = replace(pair_masks(layout.images, layout.labels), notes=layout.notes)
    others: list[Path] = []
    if classes is None:
        kind = next(kind for kind in _KINDS if kind in layout.labels.relative_to(path).parts)
        folders = {each.labels for each in list_layouts(path, kind).values()} - {layout.labels}
        others = [folder / name for folder in sorted(folders) for name in list_images(folder)]
    return _Found(contents, classes, others=others)


def _find_described(path: Path, split: str) -> _Found:
    described = read_description(path, _LAYOUTS)
    section = find_section(path, described, split)
    try:
        folders = path.parent / posix(section["images"]), path.parent / posix(section["masks"])
        ignored = set(described.get("ignored", ()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not state the images and masks of {split!r}; expected a section '{split}' with 'images' "
            "and 'masks', and optionally a list 'ignored' of ids."
        ) from error
    classes = described.get("classes")
    if not (classes is None or isinstance(classes, (Mapping, list))):
        raise ValueError(f"{path} has the classes {str(classes)[:60]}; expected names by id, or a list.")
    others: list[Path] = []
    if classes is None:
        sections = [each for each in described.values() if isinstance(each, Mapping) and "masks" in each]
        masks = {path.parent / posix(each["masks"]) for each in sections} - {folders[1]}
        others = [folder / name for folder in sorted(masks) if folder.is_dir() for name in list_images(folder)]
    return _Found(pair_masks(*folders), classes, ignored, others)
