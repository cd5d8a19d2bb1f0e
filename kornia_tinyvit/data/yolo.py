"""YOLO's text files: one line per object, with its box or its outline."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kornia_tinyvit.data.boxes import Box, collect_boxes
from kornia_tinyvit.data.datasets import Contents, count_noun
from kornia_tinyvit.data.descriptions import find_root, find_section, posix, read_description, read_names, read_text
from kornia_tinyvit.data.folders import Files, find_file, list_folder, list_images
from kornia_tinyvit.data.layouts import Layout, list_layouts
from kornia_tinyvit.data.masks import Instances, Masks, Ring, fill_polygons

_TOLERANCE = 0.01  # by which fractions may leave [0, 1], as for Ultralytics; they are clamped
_MAX_CLASSES = 2**16


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

    See :meth:`DetectionDataset.open <kornia_tinyvit.data.DetectionDataset.open>` for the format.

    Raises:
        FileNotFoundError: if a file or a folder does not exist.
        ValueError: if a label has an unknown class or is not a box in fractions of the image; file and line are named.
    """
    described = read_description(path, "a YAML file of a YOLO dataset, a JSON file of a COCO dataset, or its folder")
    find_section(path, described, split)
    if not (described.get("names") or described.get("nc")):
        raise ValueError(f"{path} does not describe a YOLO dataset with {split!r}; expected 'names' and '{split}'.")
    class_names = _class_names(path, described)
    return _read_boxes(find_pairs(path, described, split), class_names, f"{split!r} in {path}")


def read_folder(path: Path, layout: Layout) -> Contents:
    """Return the images and boxes of a folder without a description.

    Args:
        path: the folder of the data set.
        layout: the folders of images and labels.

    Raises:
        ValueError: as :func:`read_boxes`.
    """
    splits = [layout, *list_layouts(path, "labels").values()]
    places = [path, path / "labels", *(each.labels for each in splits)]
    named = next((each / "classes.txt" for each in places if (each / "classes.txt").is_file()), None)
    if named is not None:
        class_names = tuple(read_names(named))
    else:
        files = {pair.labels for each in splits for pair in pair_folders(each.images, each.labels)}
        found = (label.label for file in files if file.is_file() for label in _read_labels(file)[0])
        class_names = tuple(f"class {index}" for index in range(max(found, default=-1) + 1))
    contents = _read_boxes(pair_folders(layout.images, layout.labels), class_names, layout.images)
    return replace(contents, notes=(*layout.notes, *contents.notes), skipped=list_folder(layout.images).skipped)


def _read_boxes(pairs: list[Pair], class_names: tuple[str, ...], source: object) -> Contents:
    notes = _check_labeled(pairs, source)
    labels = [_read_labels(pair.labels, len(class_names)) if pair.labels.is_file() else ([], 0) for pair in pairs]
    boxes = [collect_boxes(map(_box, found)) for found, _ in labels]
    if repeated := sum(count for _, count in labels):
        notes = (*notes, f"{count_noun(repeated, 'repeated label')} left out")
    return Contents(_files(pairs), boxes, class_names, notes=notes)


def read_outlines(pairs: list[Pair], source: object) -> Contents:
    """Return images and their label files as instances; an image without a label file has none.

    Args:
        pairs: images and their label files.
        source: their location, for the message.

    Raises:
        ValueError: if no image has a label file.
    """
    notes = _check_labeled(pairs, source)
    files = [(pair.labels,) if pair.labels.is_file() else () for pair in pairs]
    labels = [Instances(each, _read_masks, count=_count_labels) for each in files]
    return Contents(_files(pairs), labels, notes=notes)


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
    section = find_section(path, described, split)
    if described.get("kpt_shape"):  # keypoints would be taken for outlines
        raise ValueError(f"{path} describes keypoints ('kpt_shape'), which are not read; expected boxes or outlines.")
    root = find_root(path, described)
    pairs: list[Pair] = []
    for entry in section if isinstance(section, list) else [section]:
        if not isinstance(entry, str):
            raise ValueError(f"{path} has {str(entry)[:60]} as {split!r}; expected folders or files of images.")
        pairs += _find_entry(root, posix(entry))
    return pairs


def _find_entry(root: Path, entry: str) -> Iterator[Pair]:
    """Return the pairs of a folder, or of a file that lists images.

    As for Ultralytics, ``../train/images`` also is ``train/images`` (Roboflow's files). Of a missing folder, the same
    path one folder up is used, where several sets of labels may share the images.
    """
    stated = root / entry
    inner = root / entry.removeprefix("../")
    found = next((each for each in (stated, inner, root / ".." / entry) if os.path.exists(each)), None)
    if found is None:
        raise FileNotFoundError(f"There are no images {stated}, nor {inner}, nor {root / '..' / entry}.")
    if found.is_dir():
        labels = inner if found == inner else stated  # the labels stay beside the stated folder
        for image, name, file in pair_folders(found, labels):
            yield Pair(image, name, _labels_path(file))
        return
    for number, line in enumerate(read_text(found).splitlines(), 1):
        if line.strip():
            name = find_file(found.parent, line.strip()) or find_file(root, line.strip())
            if not name:
                raise FileNotFoundError(f"{found} lists {line.strip()} in line {number}, which does not exist.")
            image = next(each / name for each in (found.parent, root) if (each / name).is_file())
            yield Pair(image, name, _labels_path(image.with_suffix(".txt")))


def _labels_path(path: Path) -> Path:
    """Return a path with its last folder ``images`` replaced by ``labels``."""
    return Path(re.sub(r"^(.*/)?images/", r"\1labels/", path.as_posix(), flags=re.DOTALL))


def _files(pairs: list[Pair]) -> Files:
    return Files(Path(), [pair.name for pair in pairs], [str(pair.image) for pair in pairs])


def _check_labeled(pairs: list[Pair], source: object) -> tuple[str, ...]:
    """Reject images without any label file; return a note on those without one."""
    missing = sum(not pair.labels.is_file() for pair in pairs)
    if missing == len(pairs):
        raise ValueError(
            f"None of the {len(pairs)} images of {source} has a label file; expected labels/a.txt for images/a.jpg."
        )
    return (f"{count_noun(missing, 'image')} without a label file taken as background",) if missing else ()


def _class_names(path: Path, described: Mapping[str, Any]) -> tuple[str, ...]:
    """Return ``names``, a list or names by index, or "class 0" and so on for ``nc`` classes."""
    names, count = described.get("names"), described.get("nc")
    if not (count is None or (isinstance(count, int) and 0 < count <= _MAX_CLASSES)):
        raise ValueError(f"{path} has {str(count)[:60]} as 'nc'; expected the number of classes.")
    if not names:
        return tuple(f"class {index}" for index in range(count or 0))
    if isinstance(names, Mapping):
        keys = {int(key) if isinstance(key, str) and key.isdecimal() else key: name for key, name in names.items()}
        if set(keys) != set(range(len(names))):
            raise ValueError(f"{path} names the classes {list(names)[:5]} ...; expected 0, 1, 2, ...")
        names = [keys[index] for index in range(len(names))]
    elif not isinstance(names, list):
        raise ValueError(f"{path} has the names {str(names)[:60]}; expected a list, or names by class index.")
    if count not in (None, len(names)):
        raise ValueError(f"{path} has {len(names)} 'names', but {count} as 'nc'; expected the same number.")
    return tuple(str(name) for name in names)


def _read_labels(file: Path, num_classes: float = math.inf) -> tuple[list[_Label], int]:
    """Return the labels in a file, and how many were left out because they repeat an earlier one.

    Raises:
        ValueError: naming file and line, if a line is not a label.
    """
    lines = enumerate(read_text(file).splitlines(), 1)
    found = [_parse_line(line, f"{file}:{number}", num_classes) for number, line in lines if line.strip()]
    labels: dict[object, _Label] = {}
    for label in found:
        labels.setdefault(label[1:], label)
    return list(labels.values()), len(found) - len(labels)


def _count_labels(file: Path) -> int:
    return len(_read_labels(file)[0])


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
        inside = [min(max(each, 0.0), 1.0) for each in numbers]
        return _Label(place, int(label), tuple(zip(inside[::2], inside[1::2], strict=True)))
    x, y, width, height = numbers
    left, top, right, bottom = (min(max(each, 0.0), 1.0) for each in _corners(x, y, width, height))
    return _Label(place, int(label), ((left, top), (right, top), (right, bottom), (left, bottom)))


def _corners(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _box(label: _Label) -> Box:
    columns, rows = zip(*label.corners, strict=True)
    corners = (min(columns), min(rows), max(columns), max(rows))
    return Box(label.label, corners, f"{label.place}: a box without an area")


def _read_masks(file: Path, size: tuple[int, int]) -> Masks:
    height, width = size
    masks = []
    for label in _read_labels(file)[0]:
        corners = [(x * width, y * height) for x, y in label.corners]
        masks.append(fill_polygons(_split_rings(corners), size))
    return masks


def _split_rings(corners: Ring) -> list[Ring]:
    """Split an outline into closed rings of at least three corners; each ends where it returns to its first corner."""
    rings: list[list[tuple[float, float]]] = [[]]
    for corner in corners:
        rings[-1].append(corner)
        if len(rings[-1]) > 2 and corner == rings[-1][0]:
            rings.append([])
    return [ring for ring in rings if len(ring) > 2]
