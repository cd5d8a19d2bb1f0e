"""YOLO's text files: one line per object, with its box or its outline."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kornia_tinyvit.data.boxes import Box, collect_boxes
from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.descriptions import read_description, read_text
from kornia_tinyvit.data.folders import Files, list_images
from kornia_tinyvit.data.masks import Instances, Masks, Ring, fill_rings

_TOLERANCE = 1e-3  # files round fractions of an image, which may leave [0, 1] by this much


class Pair(NamedTuple):
    """An image, its name, and its label file, which may not exist."""

    image: Path
    name: str
    labels: Path


class _Label(NamedTuple):
    """The label in a line.

    Attributes:
        place: file and line.
        label: class index.
        corners: those of the outline or of the box, as fractions of the image's sides.
    """

    place: str
    label: int
    corners: Ring


def read_boxes(path: Path, split: str) -> Contents:
    """Return the images and boxes of a dataset described by a YAML file of Ultralytics.

    See :meth:`DetectionDataset.open <kornia_tinyvit.data.DetectionDataset.open>` for the format. If a folder of images
    does not exist, the same path one folder up is used, where several sets of labels may share it.

    Raises:
        FileNotFoundError: if a file or a folder does not exist.
        ValueError: if a label has an unknown class or is not a box in fractions of the image; file and line are named.
    """
    described = read_description(path, "a YAML file of a YOLO dataset, a JSON file of a COCO dataset, or its folder")
    if not described.get(split) or not described.get("names"):
        raise ValueError(f"{path} does not describe a YOLO dataset with {split!r}; expected 'names' and '{split}'.")
    class_names = _class_names(path, described["names"])
    pairs = find_pairs(path, described, split)
    _labeled(pairs, f"{split!r} in {path}")
    boxes = [collect_boxes(_box(label) for label in _read_labels(pair.labels, len(class_names))) for pair in pairs]
    return Contents(_files(pairs), boxes, class_names)


def read_outlines(pairs: list[Pair], source: Path) -> Contents:
    """Return the images that have a label file, and these files as instances.

    Args:
        pairs: images and their label files.
        source: their location, for the message.

    Raises:
        ValueError: if no image has a label file.
    """
    labeled = _labeled(pairs, source)
    labels = [Instances((pair.labels,), _read_masks) for pair in labeled]
    without = tuple(pair.name for pair in pairs if not pair.labels.is_file())
    return Contents(_files(labeled), labels, without_mask=without)


def pair_folders(images: Path, labels: Path) -> list[Pair]:
    """Return the images of a folder and their label files in another one."""
    if not images.is_dir():
        raise FileNotFoundError(f"There is no folder {images}.")
    return [Pair(images / name, name.as_posix(), (labels / name).with_suffix(".txt")) for name in list_images(images)]


def find_pairs(path: Path, described: Mapping[str, Any], split: str) -> list[Pair]:
    """Return the images of a split in a YAML file and their label files, with Ultralytics' rules.

    Raises:
        FileNotFoundError: if a file or a folder does not exist.
        ValueError: if the section is neither a folder nor a file, nor a list of them.
    """
    root = path.parent / str(described.get("path") or ".")
    entries = described[split] if isinstance(described[split], list) else [described[split]]
    pairs: list[Pair] = []
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(f"{path} has {str(entry)[:60]} as {split!r}; expected folders or files of images.")
        pairs += _find_entry(root, entry)
    return pairs


def _find_entry(root: Path, entry: str) -> Iterator[Pair]:
    stated = root / entry
    found = stated if stated.exists() else root / ".." / entry
    if found.is_dir():
        for image, name, labels in pair_folders(found, stated):  # the labels stay beside the stated folder
            yield Pair(image, name, _labels_path(labels))
    elif found.is_file():
        for line in filter(None, map(str.strip, read_text(found).splitlines())):
            image = found.parent / line
            if not image.is_file():
                raise FileNotFoundError(f"{found} lists {line}, which does not exist.")
            yield Pair(image, line, _labels_path(image.with_suffix(".txt")))
    else:
        raise FileNotFoundError(f"There are no images {stated}, nor {found}.")


def _labels_path(path: Path) -> Path:
    """Return a path with its last folder ``images`` replaced by ``labels``."""
    return Path(re.sub(r"^(.*/)?images/", r"\1labels/", path.as_posix(), flags=re.DOTALL))


def _files(pairs: list[Pair]) -> Files:
    return Files(Path(), [pair.name for pair in pairs], [str(pair.image) for pair in pairs])


def _labeled(pairs: list[Pair], source: object) -> list[Pair]:
    """Return the images that have a label file, at least one."""
    labeled = [pair for pair in pairs if pair.labels.is_file()]
    if not labeled:
        raise ValueError(
            f"None of the {len(pairs)} images of {source} has a label file; expected labels/a.txt for images/a.jpg."
        )
    return labeled


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{path} names the classes {list(names)[:5]} ...; expected 0, 1, 2, ...")
        names = [names[index] for index in range(len(names))]
    elif not isinstance(names, list):
        raise ValueError(f"{path} has the names {str(names)[:60]}; expected a list, or names by class index.")
    return tuple(str(name) for name in names)


def _read_labels(file: Path, num_classes: float = math.inf) -> Iterator[_Label]:
    """Return the labels in a file; a missing file has none.

    Raises:
        ValueError: naming file and line, if a line is not a label.
    """
    lines = read_text(file).splitlines() if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse_line(line, f"{file}:{number}", num_classes)


def _parse_line(line: str, place: str, num_classes: float) -> _Label:
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError:
        label, numbers = math.nan, []
    outline = len(numbers) >= 6 and len(numbers) % 2 == 0
    if not (len(numbers) == 4 or outline) or not all(math.isfinite(each) for each in (label, *numbers)):
        raise ValueError(f"{place} is not a label: expected 'class x y width height' or an outline; got {line!r}.")
    if label != int(label) or not 0 <= label < num_classes:
        raise ValueError(f"{place} has the class {label:g}; expected an index below {num_classes}.")
    if min(numbers) < -_TOLERANCE or max(numbers) > 1 + _TOLERANCE:
        raise ValueError(
            f"{place} has values outside [0, 1]: {line!r}; expected fractions of the image's sides, not pixels."
        )
    if outline:
        return _Label(place, int(label), list(zip(numbers[::2], numbers[1::2], strict=True)))
    x, y, width, height = numbers
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return _Label(place, int(label), [(left, top), (right, top), (right, bottom), (left, bottom)])


def _box(label: _Label) -> Box:
    columns, rows = zip(*label.corners, strict=True)
    corners = (min(columns), min(rows), max(columns), max(rows))
    return Box(label.label, corners, f"{label.place}: a box without an area")


def _read_masks(file: Path, size: tuple[int, int]) -> Masks:
    height, width = size
    masks = []
    for label in _read_labels(file):
        corners = [(x * width, y * height) for x, y in label.corners]
        masks.append(fill_rings(_split_rings(corners), size))
    return masks


def _split_rings(corners: Ring) -> list[Ring]:
    """Split an outline into closed rings; each ends where it returns to its first corner."""
    rings: list[Ring] = [[]]
    for corner in corners:
        rings[-1].append(corner)
        if len(rings[-1]) > 2 and corner == rings[-1][0]:
            rings.append([])
    return [ring for ring in rings if ring]
