"""Pictures with a mask that tells the class of each pixel."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kornia_tinyvit.data.classification import pictures_below, read_stored, read_text
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.images import UNREADABLE

__all__ = ["IGNORED", "SegmentationDataset"]

#: What masks say of pixels that have no label; torch's losses leave it out.
IGNORED = -100

_UNKNOWN = -1
_IDS = 2**16  # what a mask of 16 bits can hold
_CONVENTIONAL = 255  # how most data sets mark pixels without a label
_UNLABELLED = ("unlabeled", "unlabelled", "void", "ignore", "ignored")
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
_SMEARED = (".jpg", ".jpeg")  # whose compression makes new values along every edge


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    r"""Pictures with class maps: item :math:`i` is a picture :math:`(3, H, W)` in [0, 1] and a mask :math:`(H, W)`.

    A mask is an int64 tensor of class indices, or :data:`IGNORED` where there is no label. Its file has the name of the
    picture's but for the ending, in PNG or another format that loses nothing, with an id a pixel in one channel or a
    palette, of 8 or 16 bits. Pictures without a mask and masks without a picture are left out and named. Pictures are
    turned upright as their camera was held; their masks are taken to lie upright already.

    Args:
        pictures: folder of the pictures.
        masks: folder of the masks.
        classes: what the ids mean: a name for each id, or names of the ids 0, 1, 2, ...; if left out all masks are
            read for the ids that occur. Class indices follow the order of the ids.
        ignored: ids of pixels without a label, besides 255 where no class has it, and ids whose name is "unlabeled",
            "void" or "ignore".

    Attributes:
        class_names: names of the classes in the order of their indices.
        num_classes: how many there are.
        ids: the id of each class.
        without_mask: names of pictures that have no mask.
        without_picture: names of masks that have no picture.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no pair, two files claim one name, or masks are JPEG files.
        BrokenImageError: if the masks have to be read for their ids, and one cannot be.
    """

    def __init__(
        self,
        pictures: str | Path,
        masks: str | Path,
        classes: Mapping[int, str] | Sequence[str] | None = None,
        ignored: Iterable[int] = (),
    ) -> None:
        self._folders = Path(pictures), Path(masks)
        found, labelled = (files_by_stem(folder) for folder in self._folders)
        stems = sorted(found.keys() & labelled.keys())
        self._files = [(found[stem], labelled[stem]) for stem in stems]
        self.without_mask = tuple(found[stem] for stem in sorted(found.keys() - labelled.keys()))
        self.without_picture = tuple(labelled[stem] for stem in sorted(labelled.keys() - found.keys()))
        refuse_unpaired(stems, found, labelled, pictures, masks)
        refuse_smeared((mask for _, mask in self._files), masks)
        self._name_classes(classes, set(ignored))
        self._fingerprint: str | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: str = "train",
        classes: Mapping[int, str] | Sequence[str] | None = None,
        ignored: Iterable[int] = (),
    ) -> SegmentationDataset:
        """Open a data set from one path.

        Args:
            path: a folder with ``images`` and ``masks`` (or ``images/SPLIT`` and ``masks/SPLIT``) and, if names are to
                be told, ``classes.txt`` with the name of an id a line from 0; or a YAML or JSON file with a section
                for each split that names two folders as ``images`` and ``masks``, relative to the file, ``classes``
                that names the ids, and ids to leave out as ``ignored``.
            split: which part of the data.
            classes: what the ids mean, instead of what the path tells, such as those of another split.
            ignored: ids of pixels without a label, besides those that the path tells.

        Raises:
            FileNotFoundError: if there is no such path.
            ValueError: if it does not hold what is told above.
            MissingExtraError: if a YAML file is asked for without PyYAML.
        """
        path = Path(path)
        if path.is_dir():
            pictures, masks = path / "images" / split, path / "masks" / split
            if not (pictures.is_dir() and masks.is_dir()):
                pictures, masks = pictures.parent, masks.parent
            names = path / "classes.txt"
            if classes is None and names.exists():
                classes = read_text(names).splitlines()
            return cls(pictures, masks, classes, ignored)
        told = read_description(path, "'images' and 'masks'")
        try:
            pictures, masks = (path.parent / told[split][kind] for kind in ("images", "masks"))
            ignored = {*ignored, *told.get("ignored", ())}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not tell where the pictures and masks of {split!r} are; expected a section "
                f"'{split}' with 'images' and 'masks', and ids that are left out as a list 'ignored'."
            ) from error
        if classes is None:
            classes = told.get("classes")
            if not (classes is None or isinstance(classes, (Mapping, list))):
                raise ValueError(f"{path} has the classes {str(classes)[:60]}; expected names by their ids, or a list.")
        return cls(pictures, masks, classes, ignored)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, mask = self.read(index)
        return pixels.float() / 255, mask

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a picture as it is stored, :math:`(3, H, W)`, uint8 in [0, 255], and its mask :math:`(H, W)`.

        Raises:
            BrokenImageError: if one of them cannot be decoded, their sizes differ, or the mask holds an id that is
                no class.
        """
        picture, mask = (folder / name for folder, name in zip(self._folders, self._files[index], strict=True))
        pixels = read_stored(picture)
        indices = self._table[read_ids(mask)]
        if pixels.shape[1:] != indices.shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (pixels.shape[1:], indices.shape)]
            raise BrokenImageError(
                f"{picture} is {sizes[0]} pixels upright, but its mask {mask} is {sizes[1]}; a mask has the size of "
                "its picture as it is shown."
            )
        if (indices == _UNKNOWN).any():
            ids = np.unique(read_ids(mask)[indices == _UNKNOWN])
            raise BrokenImageError(
                f"{mask} holds the ids {', '.join(map(str, ids[:5]))}, which are no classes; name them in the classes "
                "or among the ignored ids."
            )
        return pixels, torch.from_numpy(indices)

    def name(self, index: int) -> str:
        """Tell a picture from the others: its path in its folder."""
        return self._files[index][0]

    def sample(self, count: int, seed: int = 0) -> SegmentationDataset:
        """Return so many of the pictures, drawn with a seed, as a data set of their own with the same classes.

        Raises:
            ValueError: if there are not as many.
        """
        drawn = copy.copy(self)
        drawn._files = [self._files[row] for row in draw_rows(len(self), count, seed)]
        drawn._fingerprint = None
        return drawn

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this data set from others, wherever it lies.

        They are drawn from the names and sizes in bytes of pictures and masks, and what the ids mean; no file is read.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(repr((len(self), self.ids, self.class_names, self.ignored)).encode())
            for names in self._files:
                sizes = [(folder / name).stat().st_size for folder, name in zip(self._folders, names, strict=True)]
                digest.update(f"{names}\0{sizes}\n".encode(errors="surrogateescape"))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _name_classes(self, classes: Mapping[int, str] | Sequence[str] | None, ignored: set[int]) -> None:
        if classes is None:
            present = {int(each) for _, mask in self._files for each in np.unique(read_ids(self._folders[1] / mask))}
            classes = {each: f"class {each}" for each in present - {_CONVENTIONAL}}
        elif not isinstance(classes, Mapping):
            classes = dict(enumerate(classes))
        try:
            named = {int(each): str(name).strip() for each, name in classes.items()}  # JSON's ids are texts
            ignored = {int(each) for each in ignored}
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"Ids of classes, and those that are ignored, must be whole numbers: {error}.") from error
        ignored |= {each for each, name in named.items() if name.lower() in _UNLABELLED}
        if _CONVENTIONAL not in named:
            ignored.add(_CONVENTIONAL)
        self.ignored = tuple(sorted(ignored))
        self.ids = tuple(sorted(named.keys() - ignored))
        if not self.ids or self.ids[0] < 0 or self.ids[-1] >= _IDS:
            raise ValueError(
                f"Ids of classes must be in [0, {_IDS}), and one at least not ignored; got {self.ids[:5]}."
            )
        self.class_names = tuple(named[each] for each in self.ids)
        self.num_classes = len(self.ids)
        self._table = np.full(_IDS, _UNKNOWN, dtype=np.int64)
        self._table[list(self.ids)] = np.arange(len(self.ids))
        self._table[[each for each in self.ignored if 0 <= each < _IDS]] = IGNORED


def draw_rows(rows: int, count: int, seed: int) -> list[int]:
    """Return so many of some rows, drawn with a seed, in their order.

    Raises:
        ValueError: if there are not as many.
    """
    if not 0 < count <= rows:
        raise ValueError(f"Cannot draw {count} of {rows} pictures.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    drawn: list[int] = order[:count].sort().values.tolist()
    return drawn


def refuse_unpaired(stems: list[str], found: Sized, labelled: Sized, pictures: str | Path, masks: str | Path) -> None:
    """Refuse a data set none of whose pictures has a mask."""
    if not stems:
        raise ValueError(
            f"No picture of {pictures} has a mask of its name in {masks}: {len(found)} pictures, {len(labelled)} "
            "masks. They are matched by their paths without the ending, such as street/1.jpg and street/1.png."
        )


def refuse_smeared(masks: Iterable[str], folder: str | Path) -> None:
    """Refuse masks in a format that makes new values along every edge."""
    smeared = [mask for mask in masks if mask.lower().endswith(_SMEARED)]
    if smeared:
        raise ValueError(f"{folder} holds JPEG masks such as {smeared[0]}, whose ids are smeared; use PNG.")


def files_by_stem(folder: Path) -> dict[str, str]:
    """Return the paths of the pictures below a folder, relative to it, by their path without the ending."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    files: dict[str, str] = {}
    for file in sorted(pictures_below(folder)):
        name = file.relative_to(folder)
        stem = name.with_suffix("").as_posix()
        if stem in files:
            raise ValueError(f"{folder} holds both {files[stem]} and {name.as_posix()}; a picture has one file.")
        files[stem] = name.as_posix()
    return files


def read_ids(path: Path) -> NDArray[np.int64]:
    """Return the ids of a mask's pixels, :math:`(H, W)`, in [0, 65536)."""
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
    if ids.min() < 0 or ids.max() >= _IDS:
        raise BrokenImageError(f"{path} holds ids from {ids.min()} to {ids.max()}; expected [0, {_IDS}).")
    return ids


def read_description(path: Path, folders: str) -> dict[str, Any]:
    """Return what a YAML or JSON file tells of a data set.

    Args:
        path: the file.
        folders: what a folder would have to hold, for the error.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no data set {path}; expected a folder with {folders}, or a YAML file that names them."
        )
    try:
        told = json.loads(read_text(path)) if path.suffix.lower() == ".json" else read_yaml(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} describes no data set; expected a section for each split, and 'classes'.")
    return told


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML.
        MissingExtraError: if PyYAML is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("YAML files need PyYAML: pip install 'kornia-tinyvit[train]'.") from error
    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
