"""Images with a class per pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kornia_tinyvit.data.datasets import BrokenImageError, Contents, ImageDataset, check_size
from kornia_tinyvit.data.descriptions import read_description, read_text
from kornia_tinyvit.data.folders import find_folders
from kornia_tinyvit.data.masks import NUM_IDS, UNLABELED_ID, pair_masks, read_ids

__all__ = ["IGNORED", "SegmentationDataset"]

#: The class index of unlabeled pixels; the default ``ignore_index`` of torch's losses.
IGNORED = -100

_UNKNOWN = -1
_UNLABELED = ("unlabeled", "unlabelled", "void", "ignore", "ignored")

Classes = Mapping[int, str] | Sequence[str]


class SegmentationDataset(ImageDataset[Tensor]):
    r"""Images with masks: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and a mask :math:`(H, W)`.

    A mask is an int64 tensor of class indices, or :data:`IGNORED` for unlabeled pixels. Its file has the name of the
    image but for the suffix, in PNG or another lossless format, with an id per pixel in one channel or a palette, of 8
    or 16 bits. Images without a mask and masks without an image are dropped and reported. The EXIF orientation is
    applied to images but not to masks.

    Args:
        contents: the images and targets, as read by ``open``.
        classes: names and ids of the classes, see :meth:`open`.

    Raises:
        ValueError: if the names do not match the ids; see :meth:`open`.

    Attributes:
        class_names: names of the classes in the order of their indices.
        num_classes: number of classes.
        ids: the id of each class.
        ignored: ids of unlabeled pixels.
        without_mask: names of images that have no mask.
        without_image: names of masks that have no image.
    """

    class_names: tuple[str, ...]

    def __init__(self, contents: Contents, classes: Classes | None = None, ignored: Iterable[int] = ()) -> None:
        super().__init__(contents)
        if classes is None:
            present = {int(each) for mask in self._targets for each in np.unique(read_ids(mask))}
            classes = {each: f"class {each}" for each in present - {UNLABELED_ID}}
        elif not isinstance(classes, Mapping):
            classes = dict(enumerate(classes))
        try:
            named = {int(each): str(name).strip() for each, name in classes.items()}  # JSON's ids are strings
            ids = {int(each) for each in ignored}
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"Ids of classes and ignored ids must be integers: {error}.") from error
        ids |= {each for each, name in named.items() if name.lower() in _UNLABELED}
        if UNLABELED_ID not in named:
            ids.add(UNLABELED_ID)
        self.ignored = tuple(sorted(ids))
        self.ids = tuple(sorted(named.keys() - ids))
        if not self.ids or self.ids[0] < 0 or self.ids[-1] >= NUM_IDS:
            raise ValueError(
                f"Expected at least one class that is not ignored, with ids in [0, {NUM_IDS}); got {self.ids[:5]}."
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
            path: a folder with ``images`` and ``masks`` (or ``images/SPLIT`` and ``masks/SPLIT``) and, to name the
                classes, ``classes.txt`` with one name per id from 0; or a YAML or JSON file with a section per split,
                which names two folders as ``images`` and ``masks``, relative to the file, and optionally ``classes``,
                names by id, and ``ignored``, a list of ids.
            split: name of the split.
            classes: names by id, or a list of the names of the ids 0, 1, 2, ..., instead of those of the path, for
                example those of another split. If neither states classes, all masks are read for the ids that occur.
                Class indices follow the order of the ids.
            ignored: ids of unlabeled pixels, in addition to those of the path, 255 unless it is a class, and ids named
                "unlabeled", "void" or "ignore".
            masks: folder of the masks, if ``path`` is the folder of their images.

        Raises:
            FileNotFoundError: if the path does not exist.
            ValueError: if it holds none of these formats, no image has a mask, two files have the same path without
                the suffix, or masks are JPEG files.
            BrokenImageError: if all masks are read for their ids, and one cannot be decoded.
            MissingExtraError: for YAML files, if PyYAML is missing.
        """
        path = Path(path)
        if masks is not None:
            return cls(pair_masks(path, Path(masks)), classes, ignored)
        if path.is_dir():
            names = path / "classes.txt"
            if classes is None and names.exists():
                classes = read_text(names).splitlines()
            folders = find_folders(path, split, "masks") or (path / "images", path / "masks")
            return cls(pair_masks(*folders), classes, ignored)
        described = read_description(path, "a folder with 'images' and 'masks', or a YAML file that names them")
        try:
            folders = path.parent / described[split]["images"], path.parent / described[split]["masks"]
            ignored = {*ignored, *described.get("ignored", ())}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not state the images and masks of {split!r}; expected a section '{split}' with 'images' "
                "and 'masks', and optionally a list 'ignored' of ids."
            ) from error
        if classes is None:
            classes = described.get("classes")
            if not (classes is None or isinstance(classes, (Mapping, list))):
                raise ValueError(f"{path} has the classes {str(classes)[:60]}; expected names by id, or a list.")
        return cls(pair_masks(*folders), classes, ignored)

    def _target(self, stored: Path, size: tuple[int, int], place: str) -> Tensor:
        ids = read_ids(stored)
        check_size(place, size, ids.shape, f"its mask {stored} is")
        indices = self._table[ids]
        if (indices == _UNKNOWN).any():
            unknown = np.unique(ids[indices == _UNKNOWN])
            raise BrokenImageError(
                f"{stored} holds the ids {', '.join(map(str, unknown[:5]))}, which are not classes; add them to "
                "'classes' or 'ignored'."
            )
        return torch.from_numpy(indices)

    def _state(self, stored: Path) -> object:
        return stored.name, stored.stat().st_size

    def _settings(self) -> tuple[object, ...]:
        return self.ids, self.ignored
