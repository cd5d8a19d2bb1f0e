"""Images with a mask that states the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kornia_tinyvit.data.datasets import BrokenImageError, Contents, ImageDataset, check_size
from kornia_tinyvit.data.descriptions import read_description, read_text
from kornia_tinyvit.data.folders import find_folders
from kornia_tinyvit.data.masks import NUM_IDS, UNLABELLED_ID, pair_masks, read_ids

__all__ = ["IGNORED", "SegmentationDataset"]

#: The class index of pixels that have no label; torch's losses leave it out.
IGNORED = -100

_UNKNOWN = -1
_UNLABELLED = ("unlabeled", "unlabeled", "void", "ignore", "ignored")

Classes = Mapping[int, str] | Sequence[str]


class SegmentationDataset(ImageDataset[Tensor]):
    r"""Images with class maps: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and a mask :math:`(H, W)`.

    A mask is an int64 tensor of class indices, or :data:`IGNORED` where there is no label. Its file has the name of the
    image's but for the ending, in PNG or another format that loses nothing, with an id per pixel in one channel or a
    palette, of 8 or 16 bits. Images without a mask and masks without an image are left out and named. Images are
    turned upright as their camera was held; their masks are taken to lie upright already.

    Attributes:
        class_names: names of the classes in the order of their indices.
        num_classes: how many there are.
        ids: the id of each class.
        ignored: ids of pixels without a label.
        without_mask: names of images that have no mask.
        without_image: names of masks that have no image.
    """

    class_names: tuple[str, ...]

    def __init__(self, contents: Contents, classes: Classes | None = None, ignored: Iterable[int] = ()) -> None:
        super().__init__(contents)
        self._name_classes(classes, set(ignored))

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
            path: a folder with ``images`` and ``masks`` (or ``images/SPLIT`` and ``masks/SPLIT``) and, if classes have
                names, ``classes.txt`` with the name of an id per line from 0; or a YAML or JSON file with a section
                for each split that names two folders as ``images`` and ``masks``, relative to the file, ``classes``
                that names the ids, and ids to leave out as ``ignored``.
            split: which part of the data.
            classes: what the ids mean, instead of what the path states, such as those of another split: a name for
                each id, or names of the ids 0, 1, 2, ...; if neither states it, all masks are read for the ids that
                occur. Class indices follow the order of the ids.
            ignored: ids of pixels without a label, besides those that the path states, 255 where no class has it, and
                ids whose name is "unlabeled", "void" or "ignore".
            masks: folder of the masks, if ``path`` is the folder of their images.

        Raises:
            FileNotFoundError: if there is no such path.
            ValueError: if it does not hold what is described above, there is no pair, two files claim one name, or
                masks are JPEG files.
            BrokenImageError: if the masks have to be read for their ids, and one cannot be.
            MissingExtraError: if a YAML file is asked for without PyYAML.
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
                f"{path} does not tell where the images and masks of {split!r} are; expected a section "
                f"'{split}' with 'images' and 'masks', and ids that are left out as a list 'ignored'."
            ) from error
        if classes is None:
            classes = described.get("classes")
            if not (classes is None or isinstance(classes, (Mapping, list))):
                raise ValueError(f"{path} has the classes {str(classes)[:60]}; expected names by their ids, or a list.")
        return cls(pair_masks(*folders), classes, ignored)

    def _target(self, stored: Path, size: tuple[int, int], place: str) -> Tensor:
        ids = read_ids(stored)
        check_size(place, size, ids.shape, f"its mask {stored} is")
        indices = self._table[ids]
        if (indices == _UNKNOWN).any():
            unknown = np.unique(ids[indices == _UNKNOWN])
            raise BrokenImageError(
                f"{stored} holds the ids {', '.join(map(str, unknown[:5]))}, which are no classes; name them in the "
                "classes or among the ignored ids."
            )
        return torch.from_numpy(indices)

    def _state(self, stored: Path) -> object:
        return stored.name, stored.stat().st_size

    def _settings(self) -> tuple[object, ...]:
        return self.ids, self.ignored

    def _name_classes(self, classes: Classes | None, ignored: set[int]) -> None:
        if classes is None:
            present = {int(each) for mask in self._targets for each in np.unique(read_ids(mask))}
            classes = {each: f"class {each}" for each in present - {UNLABELLED_ID}}
        elif not isinstance(classes, Mapping):
            classes = dict(enumerate(classes))
        try:
            named = {int(each): str(name).strip() for each, name in classes.items()}  # JSON's ids are texts
            ignored = {int(each) for each in ignored}
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"Ids of classes, and those that are ignored, must be whole numbers: {error}.") from error
        ignored |= {each for each, name in named.items() if name.lower() in _UNLABELLED}
        if UNLABELLED_ID not in named:
            ignored.add(UNLABELLED_ID)
        self.ignored = tuple(sorted(ignored))
        self.ids = tuple(sorted(named.keys() - ignored))
        if not self.ids or self.ids[0] < 0 or self.ids[-1] >= NUM_IDS:
            raise ValueError(
                f"Ids of classes must be in [0, {NUM_IDS}), and one at least not ignored; got {self.ids[:5]}."
            )
        self.class_names = tuple(named[each] for each in self.ids)
        self.num_classes = len(self.ids)
        self._table = np.full(NUM_IDS, _UNKNOWN, dtype=np.int64)
        self._table[list(self.ids)] = np.arange(len(self.ids))
        self._table[[each for each in self.ignored if 0 <= each < NUM_IDS]] = IGNORED
