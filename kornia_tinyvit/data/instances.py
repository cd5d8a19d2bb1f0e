"""Pictures with a mask for each object in them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from kornia_tinyvit.data.classification import read_stored, read_text
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.data.segmentation import (
    draw_rows,
    files_by_stem,
    read_description,
    read_ids,
    refuse_smeared,
    refuse_unpaired,
)
from kornia_tinyvit.ops.rle import decode_rle

__all__ = ["InstanceDataset"]

_NO_INSTANCE = 0
_CONVENTIONAL = 255  # how most data sets mark pixels that belong to nothing they tell of
_KINDS = ("masks", "labels")  # folders beside "images"

_Label = Path | tuple[Mapping[str, Any], ...]  # a file of a picture's own, or COCO's annotations of it
_Ring = list[tuple[float, float]]


class InstanceDataset(Dataset[tuple[Tensor, Tensor]]):
    r"""Pictures with instances: item :math:`i` is a picture :math:`(3, H, W)` in [0, 1] and masks :math:`(N, H, W)`.

    Masks are boolean, and those of a picture may overlap. They come from one of

    - a folder of pictures with an integer id a pixel, as :class:`~kornia_tinyvit.data.SegmentationDataset` reads them:
      each id but 0 and 255 is an instance;
    - a folder of text files in YOLO's segmentation format: a line an instance, its class and its corners in shares of
      width and height. A line that comes back to its first corner begins another part of the same instance;
    - a JSON file in COCO's format: polygons or run lengths, compressed or not. Crowds are left out.

    Files of a folder have the name of their picture but for the ending. Pictures about which nothing is told are left
    out and named. They are turned upright as their camera was held; their masks are taken to lie upright already.

    Args:
        pictures: folder of the pictures.
        instances: folder or JSON file of their instances.
        min_area: leave out instances of fewer pixels of their picture; COCO calls those below 1024 small.

    Attributes:
        without_mask: names of pictures of which no instances are told.
        without_picture: names of files that belong to no picture, or of COCO's pictures that are not there.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if nothing fits together, or the JSON file is not COCO's.
    """

    def __init__(self, pictures: str | Path, instances: str | Path, min_area: int = 1) -> None:
        if min_area < 1:
            raise ValueError(f"min_area must be at least 1; got {min_area}.")
        self.min_area = min_area
        self._folder = Path(pictures)
        found = files_by_stem(self._folder)
        told = _read_coco(Path(instances)) if Path(instances).is_file() else _files_of(Path(instances))
        stems = sorted(found.keys() & told.keys())
        refuse_unpaired(stems, found, told, pictures, instances)
        self._files = [(found[stem], told[stem]) for stem in stems]
        self.without_mask = tuple(found[stem] for stem in sorted(found.keys() - told.keys()))
        self.without_picture = tuple(sorted(told.keys() - found.keys()))
        self._fingerprint: str | None = None

    @classmethod
    def open(cls, path: str | Path, split: str = "train", min_area: int = 1) -> InstanceDataset:
        """Open a data set from one path.

        Args:
            path: a folder with ``images`` and ``masks`` or ``labels`` (or ``images/SPLIT`` and so on); or a YAML or
                JSON file with a section for each split that names the folder of pictures as ``images`` and the folder
                or file of instances as ``instances``, relative to the file. A section may also be the folder of
                pictures alone, as in Ultralytics' files: the labels then lie in the folder whose last ``images`` is
                ``labels``.
            split: which part of the data.
            min_area: as above.

        Raises:
            FileNotFoundError: if there is no such path.
            ValueError: if it does not hold what is told above.
            MissingExtraError: if a YAML file is asked for without PyYAML.
        """
        path = Path(path)
        if path.is_dir():
            return cls(*_folders_in(path, split), min_area)
        told = read_description(path, "'images' and 'masks' or 'labels'")
        section = told.get(split)
        root = path.parent / str(told.get("path", "."))
        if isinstance(section, str):
            return cls(root / section, _beside(root / section), min_area)
        if not isinstance(section, dict) or not {"images", "instances"} <= section.keys():
            raise ValueError(
                f"{path} does not tell where the pictures and instances of {split!r} are; expected a section '{split}' "
                "with 'images' and 'instances', or the folder of the pictures."
            )
        return cls(root / section["images"], root / section["instances"], min_area)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, masks = self.read(index)
        return pixels.float() / 255, masks

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a picture as it is stored, :math:`(3, H, W)`, uint8 in [0, 255], and its masks :math:`(N, H, W)`.

        Raises:
            BrokenImageError: if one of them cannot be decoded, or their sizes differ.
        """
        name, label = self._files[index]
        pixels = read_stored(self._folder / name)
        size = (pixels.shape[1], pixels.shape[2])
        try:
            masks = _masks_of(label, size)
        except (ValueError, TypeError, LookupError) as error:
            raise BrokenImageError(f"The instances of {self._folder / name} cannot be read: {error}") from error
        wrong = [mask.shape for mask in masks if mask.shape != size]
        if wrong:
            raise BrokenImageError(
                f"{self._folder / name} is {size[1]}x{size[0]} pixels upright, but its masks are "
                f"{wrong[0][1]}x{wrong[0][0]}; masks have the size of their picture as it is shown."
            )
        kept = [mask for mask in masks if mask.sum() >= self.min_area]
        return pixels, torch.from_numpy(np.stack(kept) if kept else np.zeros((0, *size), dtype=np.bool_))

    def name(self, index: int) -> str:
        """Tell a picture from the others: its path in its folder."""
        return self._files[index][0]

    def sample(self, count: int, seed: int = 0) -> InstanceDataset:
        """Return so many of the pictures, drawn with a seed, as a data set of their own.

        Raises:
            ValueError: if there are not as many.
        """
        return self._part(draw_rows(len(self), count, seed))

    def with_instances(self) -> InstanceDataset:
        """Return the pictures that have instances, as a data set of their own; all are read once.

        Raises:
            BrokenImageError: if one cannot be read.
            ValueError: if no picture has any.
        """
        rows = [row for row in range(len(self)) if len(self.read(row)[1])]
        if not rows:
            raise ValueError(f"None of {len(self)} pictures has an instance of at least {self.min_area} pixels.")
        return self._part(rows)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this data set from others, wherever it lies.

        They are drawn from the names and sizes in bytes of pictures and files of instances, from COCO's annotations,
        and from the smallest area; no picture is read.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(repr((len(self), self.min_area)).encode())
            for name, label in self._files:
                told = (label.stem, label.stat().st_size) if isinstance(label, Path) else json.dumps(label, default=str)
                line = f"{name}\0{(self._folder / name).stat().st_size}\0{told}\n"
                digest.update(line.encode(errors="surrogateescape"))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _part(self, rows: list[int]) -> InstanceDataset:
        part = copy.copy(self)
        part._files = [self._files[row] for row in rows]
        part._fingerprint = None
        return part


def _folders_in(path: Path, split: str) -> tuple[Path, Path]:
    pictures = path / "images"
    for kind in _KINDS:
        if (pictures / split).is_dir() and (path / kind / split).is_dir():
            return pictures / split, path / kind / split
        if (path / kind).is_dir():
            return pictures, path / kind
    raise ValueError(f"{path} holds neither 'masks' nor 'labels' beside 'images'; expected one of them.")


def _beside(pictures: Path) -> Path:
    """Return where Ultralytics' data sets have the labels of a folder of pictures."""
    parts = list(pictures.parts)
    if "images" not in parts:
        raise ValueError(f"{pictures} has no folder 'images' in its path, so its labels cannot be found.")
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _files_of(folder: Path) -> dict[str, _Label]:
    """Return the files of a folder that tell of instances by the path of their picture without the ending."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder or file {folder}.")
    texts = sorted(file.relative_to(folder) for file in folder.rglob("*.txt") if not file.name.startswith("."))
    if texts:
        return {file.with_suffix("").as_posix(): folder / file for file in texts}
    files = files_by_stem(folder)
    refuse_smeared(files.values(), folder)
    return {stem: folder / name for stem, name in files.items()}


def _read_coco(path: Path) -> dict[str, _Label]:
    """Return COCO's annotations of each picture by its path without the ending; those of a crowd are left out."""
    try:
        told = json.loads(read_text(path))
        stems = {each["id"]: Path(each["file_name"]).with_suffix("").as_posix() for each in told["images"]}
        annotations: dict[str, list[Mapping[str, Any]]] = {stem: [] for stem in stems.values()}
        for each in told["annotations"]:
            if not each.get("iscrowd"):
                annotations[stems[each["image_id"]]].append({"segmentation": each["segmentation"]})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of instances in COCO's format: {error!r}") from error
    return {stem: tuple(each) for stem, each in annotations.items()}


def _masks_of(label: _Label, size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    if not isinstance(label, Path):
        return [_coco_mask(each["segmentation"], size) for each in label]
    if label.suffix == ".txt":
        lines = [line for line in read_text(label).splitlines() if line.strip()]
        return [_fill(_yolo_rings(line, size), size) for line in lines]
    ids = read_ids(label)
    return [ids == each for each in np.unique(ids) if each not in (_NO_INSTANCE, _CONVENTIONAL)]


def _coco_mask(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    if isinstance(segmentation, Mapping):
        told = segmentation["size"]
        if told != list(size):  # before so many pixels are made
            raise ValueError(f"a mask of the size {str(told)[:60]} lies on a picture of {list(size)}, height and width")
        return decode_rle({"size": list(size), "counts": segmentation["counts"]})
    return _fill([_pairs(ring) for ring in segmentation], size)


def _yolo_rings(line: str, size: tuple[int, int]) -> list[_Ring]:
    """Return the closed parts of an instance, in pixels; each ends where it comes back to its first corner."""
    height, width = size
    corners = _pairs([float(number) for number in line.split()[1:]])
    if not corners or any(not 0 <= number <= 1 for corner in corners for number in corner):
        raise ValueError(f"expected a class and corners in [0, 1], got {line[:60]!r}")
    rings: list[_Ring] = [[]]
    for corner in corners:
        rings[-1].append(corner)
        if len(rings[-1]) > 2 and corner == rings[-1][0]:
            rings.append([])
    return [[(x * width, y * height) for x, y in ring] for ring in rings if ring]


def _pairs(numbers: Sequence[float]) -> _Ring:
    if len(numbers) % 2:
        raise ValueError(f"a polygon has {len(numbers)} numbers, which are no pairs of x and y")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _fill(rings: list[_Ring], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels inside any of some polygons; kornia fills convex ones only."""
    mask = Image.new("1", (size[1], size[0]))
    for ring in rings:
        if len(ring) > 1:
            ImageDraw.Draw(mask).polygon(ring, fill=1)
    return np.array(mask)
