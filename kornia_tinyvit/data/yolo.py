"""YOLO's text files: a line per object, with its box or its outline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kornia_tinyvit.data.boxes import Box, collect_boxes
from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.descriptions import read_description, read_text
from kornia_tinyvit.data.folders import Files, images_below
from kornia_tinyvit.data.masks import Instances, Masks, Ring, fill_rings

_TOLERANCE = 1e-3  # by which fractions of an image may leave [0, 1]: files round them


class Pair(NamedTuple):
    """An image, its name, and its file of labels, which may be missing."""

    image: Path
    name: str
    labels: Path


class _Label(NamedTuple):
    """What a line states.

    Attributes:
        place: file and line.
        label: class index.
        corners: those of the outline or of the box, as fractions of the image's sides.
    """

    place: str
    label: int
    corners: Ring


def read_boxes(path: Path, split: str) -> Contents:
    """Return the images and boxes of a dataset that a YAML file describes, as Ultralytics writes them.

    The file names the classes as ``names``, and for each split a folder of images, a text file that lists some, or
    several of them, relative to ``path``, which is relative to the file. The labels of ``images/a.jpg`` are in
    ``labels/a.txt``: ``class x y width height`` per line, the center and the size as fractions of the image, or a class
    and the corners of an outline. An image without such a file shows no objects. A folder of images that is missing is
    looked for one folder up, where several sets of labels may share it.

    Raises:
        FileNotFoundError: if a file or a folder is missing.
        ValueError: if a label is no class, or not a box in fractions of the image; it names file and line.
    """
    described = read_description(path, "the YAML file of a YOLO data set, a JSON file of COCO's, or a folder of one")
    if not described.get(split) or not described.get("names"):
        raise ValueError(f"{path} describes no YOLO data set with {split!r}; expected 'names' and '{split}'.")
    class_names = _class_names(path, described["names"])
    pairs = find_pairs(path, described, split)
    _require_labels(pairs, f"{split!r} in {path}")
    left_out: list[str] = []
    boxes = [
        collect_boxes((_box(label) for label in _read_labels(pair.labels, len(class_names))), left_out)
        for pair in pairs
    ]
    return Contents(_files(pairs), boxes, class_names, tuple(left_out))


def read_outlines(pairs: list[Pair], source: Path) -> Contents:
    """Return the images that have a file of labels, and these files, from which masks are made.

    Args:
        pairs: images and their files of labels.
        source: where they were found, for the error.

    Raises:
        ValueError: if no image has one.
    """
    _require_labels(pairs, source)
    labeled = [pair for pair in pairs if pair.labels.is_file()]
    labels = [Instances((pair.labels,), _read_masks) for pair in labeled]
    without = tuple(pair.name for pair in pairs if not pair.labels.is_file())
    return Contents(_files(labeled), labels, without_mask=without)


def pair_folders(images: Path, labels: Path) -> list[Pair]:
    """Return the images of a folder, and where another one has their labels."""
    if not images.is_dir():
        raise FileNotFoundError(f"There is no folder {images}.")
    files = sorted(images_below(images))
    names = [file.relative_to(images) for file in files]
    return [
        Pair(file, name.as_posix(), (labels / name).with_suffix(".txt"))
        for file, name in zip(files, names, strict=True)
    ]


def find_pairs(path: Path, described: Mapping[str, Any], split: str) -> list[Pair]:
    """Return the images that a YAML file names for a split, and where Ultralytics finds their labels.

    Raises:
        FileNotFoundError: if a file or a folder is missing.
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
        for image, name, own in pair_folders(found, stated):  # beside the labels, wherever the images were found
            yield Pair(image, name, _labels_beside(own))
    elif found.is_file():
        for line in read_text(found).splitlines():
            if line.strip():
                image = found.parent / line.strip()
                if not image.is_file():
                    raise FileNotFoundError(f"{found} lists {line.strip()}, which is not there.")
                yield Pair(image, line.strip(), _labels_beside(image.with_suffix(".txt")))
    else:
        raise FileNotFoundError(f"There are no images {stated}, nor {found}.")


def _labels_beside(path: Path) -> Path:
    """Return a path with its last folder ``images`` replaced by ``labels``."""
    parts = list(path.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts)


def _files(pairs: list[Pair]) -> Files:
    return Files(Path(), [pair.name for pair in pairs], [str(pair.image) for pair in pairs])


def _require_labels(pairs: list[Pair], source: object) -> None:
    if not any(pair.labels.is_file() for pair in pairs):
        raise ValueError(
            f"None of the {len(pairs)} images of {source} has a file of labels; those of images/a.jpg are looked for "
            "as labels/a.txt."
        )


def _class_names(path: Path, names: Any) -> tuple[str, ...]:
    if isinstance(names, Mapping):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{path} names the classes {list(names)[:5]} ...; expected 0, 1, 2, ...")
        names = [names[index] for index in range(len(names))]
    elif not isinstance(names, list):
        raise ValueError(f"{path} has the names {str(names)[:60]}; expected a list, or names by their numbers.")
    return tuple(str(name) for name in names)


def _read_labels(file: Path, num_classes: float = math.inf) -> Iterator[_Label]:
    """Return what the lines of a file state; a file that is missing states nothing.

    Raises:
        ValueError: naming file and line, if one is no label.
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
        raise ValueError(f"{place} is no label: expected 'class x y width height' or an outline; got {line!r}.")
    if label != int(label) or not 0 <= label < num_classes:
        raise ValueError(f"{place} has the class {label:g}; there are {num_classes} classes, from 0.")
    if min(numbers) < -_TOLERANCE or max(numbers) > 1 + _TOLERANCE:
        raise ValueError(
            f"{place} has values outside of [0, 1]: {line!r}; expected shares of the image's sides, not pixels."
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
        rings = [[(x * width, y * height) for x, y in ring] for ring in _split_rings(label.corners)]
        masks.append(fill_rings(rings, size))
    return masks


def _split_rings(corners: Ring) -> list[Ring]:
    """Return the closed parts of an outline; each ends where it comes back to its first corner."""
    rings: list[Ring] = [[]]
    for corner in corners:
        rings[-1].append(corner)
        if len(rings[-1]) > 2 and corner == rings[-1][0]:
            rings.append([])
    return [ring for ring in rings if ring]
