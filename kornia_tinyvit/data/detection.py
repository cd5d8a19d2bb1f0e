"""Pictures with boxes around the objects they show, as YOLO and COCO store them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kornia_tinyvit.data.classification import pictures_below, read_stored, read_text
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.data.segmentation import draw_rows, read_yaml

__all__ = ["DetectionDataset", "Objects"]

_TOLERANCE = 1e-3  # by which shares of a picture may leave [0, 1]: files round them


class Objects(NamedTuple):
    """The objects of a picture.

    Attributes:
        boxes: left, top, right and bottom in pixels, :math:`(N, 4)`, inside of the picture.
        labels: class indices :math:`(N,)`.
        areas: what COCO tells of an object's size in pixels, :math:`(N,)`: that of its outline; else the box's.
        crowds: whether a box holds a crowd, which is not learnt and not counted, :math:`(N,)`.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    crowds: Tensor


@dataclass(frozen=True)
class _Record:
    """A picture's file and its objects, as shares of its sides; the size it must have if the file tells one."""

    picture: Path
    name: str
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]  # in pixels, NaN where the file tells none
    crowds: NDArray[np.bool_]
    size: tuple[int, int] | None = None  # height and width


class DetectionDataset(Dataset[tuple[Tensor, Objects]]):
    r"""Pictures with boxes: item :math:`i` is a picture :math:`(3, H, W)` in [0, 1] and its :class:`Objects`.

    All labels are read at once. Boxes that stick out of their picture are cut at its border; boxes without an area, or
    outside of it, are left out and named. Pictures without objects count: they show what is none. :meth:`open` finds
    out what a path holds.

    Attributes:
        class_names: names of the classes in the order of their indices.
        num_classes: how many there are.
        left_out: a sentence for each box that was left out, with its file.
        without_picture: labels whose picture is missing.

    Raises:
        ValueError: if there is no picture, or none with an object, or no class.
    """

    def __init__(
        self,
        records: Sequence[_Record],
        class_names: Sequence[str],
        left_out: Sequence[str] = (),
        without_picture: Sequence[str] = (),
        source: str = "the data set",
    ) -> None:
        self._records = list(records)
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.left_out, self.without_picture = tuple(left_out), tuple(without_picture)
        if not self.class_names:
            raise ValueError(f"{source} names no classes.")
        if not any(len(record.labels) for record in self._records):
            raise ValueError(
                f"{source} has no object on its {len(self._records)} pictures; {len(self.left_out)} boxes have no area."
            )
        self._fingerprint: str | None = None

    @classmethod
    def open(cls, path: str | Path, split: str = "train") -> DetectionDataset:
        """Open a data set from one path.

        Args:
            path: one of

                - a YAML file as Ultralytics writes them, for :meth:`from_yolo`;
                - a JSON file as COCO has them, for :meth:`from_coco`. Its pictures lie beside it, or, if it is
                  ``annotations/instances_NAME.json``, in ``NAME`` or ``images/NAME`` beside ``annotations``;
                - a folder that holds one of them: ``annotations/instances_SPLIT*.json``,
                  ``SPLIT*/_annotations.coco.json``, or a YAML file.
            split: which part of the data: ``"train"``, ``"val"`` or another that the files name.

        Raises:
            FileNotFoundError: if there is no such path.
            ValueError: if it does not hold what is told above, or labels that cannot be.
            MissingExtraError: if a YAML file is asked for without PyYAML.
        """
        path = Path(path)
        if path.is_dir():
            path = _find_in_folder(path, split)
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no data set {path}; expected the YAML file of a YOLO data set, a JSON file of COCO's, or a "
                "folder with one of them."
            )
        if path.suffix.lower() == ".json":
            return cls.from_coco(path)
        return cls.from_yolo(path, split)

    @classmethod
    def from_yolo(cls, path: str | Path, split: str = "train") -> DetectionDataset:
        """Open a YOLO data set by the YAML file that describes it, as Ultralytics writes them.

        The file names the classes as ``names``, and for each split a folder of pictures, a text file that lists some,
        or several of them, relative to ``path``, which is relative to the file. The labels of ``images/a.jpg`` are in
        ``labels/a.txt``: ``class x y width height`` a line, the centre and the size as shares of the picture, or a
        class and the corners of an outline. A picture without such a file shows no objects. A folder of pictures that
        is missing is looked for one folder up, where several sets of labels may share it.

        Args:
            path: the YAML file.
            split: the part of the data.

        Raises:
            FileNotFoundError: if a file or a folder is missing.
            ValueError: if a label is no class, or not a box in shares of the picture; it names file and line.
        """
        path = Path(path)
        told = read_yaml(path)
        if not isinstance(told, Mapping) or not told.get(split) or not told.get("names"):
            raise ValueError(f"{path} describes no YOLO data set with {split!r}; expected 'names' and '{split}'.")
        names = told["names"]
        if isinstance(names, Mapping):
            if set(names) != set(range(len(names))):
                raise ValueError(f"{path} names the classes {list(names)[:5]} ...; expected 0, 1, 2, ...")
            names = [names[index] for index in range(len(names))]
        elif not isinstance(names, list):
            raise ValueError(f"{path} has the names {str(names)[:60]}; expected a list, or names by their numbers.")
        class_names = [str(name) for name in names]
        root = path.parent / str(told.get("path") or ".")
        entries = told[split] if isinstance(told[split], list) else [told[split]]
        records: list[_Record] = []
        left_out: list[str] = []
        found = 0
        for entry in entries:
            if not isinstance(entry, str):
                raise ValueError(f"{path} has {str(entry)[:60]} as {split!r}; expected folders or files of pictures.")
            for picture, name, labels in _yolo_pictures(root, entry):
                lines = read_text(labels).splitlines() if labels.is_file() else []
                found += labels.is_file()
                records.append(_yolo_record(picture, name, labels, lines, len(class_names), left_out))
        if not found:
            raise ValueError(
                f"None of the {len(records)} pictures of {split!r} in {path} has a file of labels; those of "
                "images/a.jpg are looked for as labels/a.txt."
            )
        return cls(records, class_names, left_out, (), str(path))

    @classmethod
    def from_coco(cls, path: str | Path, pictures: str | Path | None = None) -> DetectionDataset:
        """Open a COCO data set (cocodataset.org, "Data format") by its JSON file.

        Class indices follow the order of the categories' ids.

        Args:
            path: the JSON file with ``images``, ``annotations`` and ``categories``.
            pictures: folder of the pictures; looked for around the file if left out.

        Raises:
            FileNotFoundError: if the file, or all pictures, are missing.
            ValueError: if the file is no such JSON, or an annotation has an unknown picture or category, or no box.
        """
        path = Path(path)
        content = _read_coco(path)
        categories = sorted((int(each["id"]), str(each["name"])) for each in content["categories"])
        indices = {number: index for index, (number, _) in enumerate(categories)}
        if len(indices) != len(categories):
            raise ValueError(f"{path} has two categories of one id.")
        known = {each["id"] for each in content["images"]}
        of_picture: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for each in content["annotations"]:
            if each["image_id"] not in known:
                raise ValueError(f"{path}: annotation {each.get('id')} is of picture {each['image_id']}, not listed.")
            if each["category_id"] not in indices:
                raise ValueError(
                    f"{path}: annotation {each.get('id')} has the category {each['category_id']}, which is none of the "
                    f"{len(indices)} that the file lists."
                )
            of_picture[each["image_id"]].append(each)
        folder = _find_pictures(path, content["images"]) if pictures is None else Path(pictures)
        records: list[_Record] = []
        left_out: list[str] = []
        missing = []
        for image in content["images"]:
            if not (folder / image["file_name"]).is_file():
                missing.append(image["file_name"])
                continue
            records.append(_coco_record(folder, image, of_picture[image["id"]], indices, path, left_out))
        if not records:
            raise FileNotFoundError(f"No picture of {path} is in {folder}: {', '.join(missing[:5])}.")
        return cls(records, [name for _, name in categories], left_out, missing, str(path))

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[tuple[Tensor, Objects]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Objects]:
        pixels, objects = self.read(index)
        return pixels.float() / 255, objects

    def read(self, index: int) -> tuple[Tensor, Objects]:
        """Return a picture as it is stored, :math:`(3, H, W)`, uint8 in [0, 255], and its objects.

        Raises:
            BrokenImageError: if it cannot be decoded, or its size is not what the labels tell.
        """
        record = self._records[index]
        pixels = read_stored(record.picture)
        height, width = pixels.shape[1:]
        if record.size not in (None, (height, width)):
            raise BrokenImageError(
                f"{record.picture} is {width}x{height} pixels upright, but its labels are for "
                f"{record.size[1]}x{record.size[0]}."
            )
        return pixels, self.objects(index, height, width)

    def objects(self, index: int, height: int, width: int) -> Objects:
        """Return the objects of a picture whose size is known."""
        record = self._records[index]
        boxes = record.boxes * (width, height, width, height)
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = np.where(np.isnan(record.areas), sides.prod(1), record.areas)
        return Objects(
            torch.from_numpy(boxes).float(),
            torch.from_numpy(record.labels),
            torch.from_numpy(areas).float(),
            torch.from_numpy(record.crowds),
        )

    def name(self, index: int) -> str:
        """Tell a picture from the others: its path in its folder."""
        return self._records[index].name

    def path(self, index: int) -> Path:
        """Return a picture's file."""
        return self._records[index].picture

    def sample(self, count: int, seed: int = 0) -> DetectionDataset:
        """Return so many of the pictures, drawn with a seed, as a data set of their own with the same classes.

        Raises:
            ValueError: if there are not as many.
        """
        drawn = copy.copy(self)
        drawn._records = [self._records[row] for row in draw_rows(len(self), count, seed)]
        drawn._fingerprint = None
        return drawn

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this data set from others, wherever it lies.

        They are drawn from the classes, the pictures' names and sizes in bytes, and the boxes; no picture is read.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(repr((len(self), self.class_names)).encode())
            for record in self._records:
                told = f"{record.name}\0{record.picture.stat().st_size}\n"
                digest.update(told.encode(errors="surrogateescape"))
                for values in (record.boxes, record.labels, record.crowds):
                    digest.update(values.tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


def _find_in_folder(folder: Path, split: str) -> Path:
    patterns = (
        f"annotations/instances_{split}*.json", f"annotations/{split}*.json", f"{split}*/_annotations.coco.json",
        "*.yaml", "*.yml",
    )  # fmt: skip
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} holds several data sets ({names}); name one of the files.")
        if found:
            return found[0]
    raise FileNotFoundError(f"There is no data set in {folder} for {split!r}; expected {', '.join(patterns)}.")


def _yolo_pictures(root: Path, entry: str) -> Iterator[tuple[Path, str, Path]]:
    """Yield the pictures of a folder or of a list, their names, and their files of labels."""
    told = root / entry
    there = told if told.exists() else (root / ".." / entry)
    if there.is_dir():
        for picture in sorted(pictures_below(there)):
            name = picture.relative_to(there)
            own = (told / name).with_suffix(".txt")  # beside the labels, wherever the pictures were found
            yield picture, name.as_posix(), _labels_of(own)
    elif there.is_file():
        for line in read_text(there).splitlines():
            if line.strip():
                picture = there.parent / line.strip()
                if not picture.is_file():
                    raise FileNotFoundError(f"{there} lists {line.strip()}, which is not there.")
                yield picture, line.strip(), _labels_of(picture.with_suffix(".txt"))
    else:
        raise FileNotFoundError(f"There are no pictures {told}, nor {there}.")


def _labels_of(path: Path) -> Path:
    """Return a path with its last folder ``images`` replaced by ``labels``, as Ultralytics finds labels."""
    parts = list(path.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts)


def _yolo_record(
    picture: Path, name: str, file: Path, lines: Sequence[str], num_classes: int, left_out: list[str]
) -> _Record:
    boxes, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        label, corners = _parse_yolo(line, place, num_classes)
        box = _clip(corners, 1.0, 1.0)
        if box is None:
            left_out.append(f"{place}: a box without an area")
            continue
        boxes.append(box)
        labels.append(label)
    count = len(labels)
    return _Record(
        picture, name, np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(labels, dtype=np.int64),
        np.full(count, np.nan), np.zeros(count, dtype=bool),
    )  # fmt: skip


def _parse_yolo(line: str, place: str, num_classes: int) -> tuple[int, tuple[float, float, float, float]]:
    """Return the class of a line and its left, top, right and bottom."""
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError:
        label, numbers = math.nan, []
    outline = len(numbers) >= 6 and len(numbers) % 2 == 0
    if not (len(numbers) == 4 or outline) or not all(math.isfinite(each) for each in (label, *numbers)):
        raise ValueError(f"{place} is no label: expected 'class x y width height' or an outline; got {line!r}.")
    if label != int(label) or not 0 <= label < num_classes:
        raise ValueError(f"{place} has the class {label:g}; there are {num_classes} classes, from 0.")
    if min(numbers) < -_TOLERANCE or max(numbers) > 1 + _TOLERANCE:
        raise ValueError(
            f"{place} has values outside of [0, 1]: {line!r}; expected shares of the picture's sides, not pixels."
        )
    if outline:
        return int(label), (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
    x, y, width, height = numbers
    return int(label), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _clip(
    corners: tuple[float, float, float, float], width: float, height: float
) -> tuple[float, float, float, float] | None:
    """Return the part of a box that lies in the picture, as shares of its sides; ``None`` if it has no area."""
    left, right = (min(max(each / width, 0.0), 1.0) for each in corners[::2])
    top, bottom = (min(max(each / height, 0.0), 1.0) for each in corners[1::2])
    return (left, top, right, bottom) if left < right and top < bottom else None


def _read_coco(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise ValueError(f"{path} is no COCO file; expected {', '.join(parts)}.")
    for part in parts:
        for number, entry in enumerate(content[part]):
            known = entry if isinstance(entry, dict) else {}
            lacking = [key for key in _COCO[part] if key not in known]
            if lacking:
                raise ValueError(f"{path}: number {number} of its {part} has no {', '.join(lacking)}.")
            for key, (check, wanted) in _COCO[part].items():
                if not check(entry[key]):
                    told = str(entry[key])[:60]
                    raise ValueError(f"{path}: number {number} of its {part} has {key} {told}; expected {wanted}.")
    return content


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_side(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**31 and value == int(value)


def _is_area(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


#: What COCO's file has to tell: a check of each value, and what it expects.
_COCO: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {
        "id": (_is_id, "a number or a text"),
        "file_name": (lambda value: isinstance(value, str) and "\0" not in value, "a text"),
        "height": (_is_side, "pixels"),
        "width": (_is_side, "pixels"),
    },
    "annotations": {
        "image_id": (_is_id, "a number or a text"),
        "category_id": (_is_id, "a number or a text"),
        "bbox": (lambda value: True, "a box"),
    },
    "categories": {"id": (lambda value: isinstance(value, int), "a number"), "name": (lambda value: True, "a name")},
}


def _find_pictures(path: Path, images: Sequence[Mapping[str, Any]]) -> Path:
    """Return the first of the usual folders that holds a picture of a COCO file."""
    part = path.stem.removeprefix("instances_")
    beside = path.parent.parent
    folders = [path.parent, beside / part, beside / "images" / part, path.parent / part, path.parent / "images"]
    for folder in folders:
        if any((folder / image["file_name"]).is_file() for image in images):
            return folder
    raise FileNotFoundError(
        f"The pictures of {path}, such as {images[0]['file_name'] if images else 'none'}, are in none of "
        f"{', '.join(map(str, folders))}."
    )


def _is_box(numbers: Any) -> bool:
    whole = isinstance(numbers, list) and len(numbers) == 4
    return whole and all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


def _coco_record(
    folder: Path,
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    indices: Mapping[int, int],
    path: Path,
    left_out: list[str],
) -> _Record:
    height, width = int(image["height"]), int(image["width"])
    boxes, labels, areas, crowds = [], [], [], []
    for each in annotations:
        place = f"{path}: annotation {each.get('id')} of {image['file_name']}"
        numbers = each["bbox"]
        if not _is_box(numbers):
            raise ValueError(f"{place} has the box {numbers}; expected left, top, width and height in pixels.")
        left, top, wide, high = numbers
        box = _clip((left, top, left + wide, top + high), width, height)
        if box is None:
            left_out.append(f"{place}: the box {numbers} has no area in {width}x{height} pixels")
            continue
        boxes.append(box)
        labels.append(indices[each["category_id"]])
        area = each.get("area", math.nan)
        if "area" in each and not _is_area(area):
            raise ValueError(f"{place} has the area {str(area)[:60]}; expected pixels.")
        areas.append(float(area))
        crowds.append(bool(each.get("iscrowd", 0)))
    return _Record(
        folder / image["file_name"], image["file_name"], np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(labels, dtype=np.int64), np.array(areas, dtype=np.float64), np.array(crowds, dtype=bool),
        (height, width),
    )  # fmt: skip
