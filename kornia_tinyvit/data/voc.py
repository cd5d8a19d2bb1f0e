"""Pascal VOC's boxes in XML files, and its masks."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from kornia_tinyvit.data.boxes import Box, collect_boxes
from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.descriptions import read_text
from kornia_tinyvit.data.folders import Files, files_by_stem
from kornia_tinyvit.data.splits import UNDIVIDED, check_split, choose_split

#: Folders of masks: a class per pixel, and an object per pixel.
CLASSES, OBJECTS = "SegmentationClass", "SegmentationObject"


def holds_annotations(folder: Path) -> bool:
    """Return whether a folder is a VOC dataset with boxes."""
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def holds_masks(folder: Path, kind: str) -> bool:
    """Return whether a folder is a VOC dataset with masks of a kind, :data:`CLASSES` or :data:`OBJECTS`."""
    return (folder / kind).is_dir() and (folder / "JPEGImages").is_dir()


def read_masks(folder: Path, split: str, kind: str) -> Contents:
    """Return the images of ``JPEGImages`` and the paths of their masks, for ``ImageSets/Segmentation/SPLIT.txt``.

    Without this file the images of ``ImageSets/Main/SPLIT.txt`` that have a mask are returned.

    Raises:
        MissingSplitError: if the split does not exist.
        ValueError: if no image of it has a mask.
    """
    lists = next((each for each in ("Segmentation", "Main") if (folder / "ImageSets" / each).is_dir()), "Segmentation")
    stems, notes = _list_stems(folder, split, lists, folder / kind)
    images, masks = files_by_stem(folder / "JPEGImages"), files_by_stem(folder / kind)
    there = [stem for stem in stems if stem in images and stem in masks]
    if not there:
        raise ValueError(f"None of {len(stems)} images of {split!r} in {folder} has a mask in {kind}.")
    return Contents(
        Files(folder / "JPEGImages", [images[stem] for stem in there]),
        [folder / kind / masks[stem] for stem in there],
        without_mask=tuple(stem for stem in stems if stem in images and stem not in masks),
        without_image=tuple(stem for stem in stems if stem not in images),
        notes=notes,
    )


def read_boxes(folder: Path, split: str) -> Contents:
    """Return the images and boxes of ``JPEGImages``, ``Annotations`` and ``ImageSets/Main/SPLIT.txt``.

    The classes are the sorted names of all objects in ``Annotations``, the same for each split. Without ``ImageSets``
    all images are returned.

    VOC counts pixels from 1, and ``xmax`` and ``ymax`` are the last pixels inside (VOC development kit: the upper left
    pixel is (1, 1)). A box's left edge therefore is ``xmin - 1`` and its right edge ``xmax``: a box from 1 to the width
    covers the whole width. Boxes of tools that count from 0 come out one pixel larger at the left and at the top; the
    files do not state which convention they follow.

    Difficult objects are ignored in training and evaluation, as in VOC's own evaluation.

    Raises:
        MissingSplitError: if the split does not exist.
        FileNotFoundError: if an image of it has no annotation.
        ValueError: if a file is not XML, or lacks the image's size or an object's name or box.
    """
    stems, notes = _list_stems(folder, split, "Main", folder / "Annotations")
    trees = {file: _parse(file) for file in sorted((folder / "Annotations").glob("*.xml"))}
    class_names = sorted({_text(each, "name", file) for file, tree in trees.items() for each in tree.iter("object")})
    images = files_by_stem(folder / "JPEGImages")
    there = [stem for stem in stems if stem in images]
    boxes = []
    for stem in there:
        file = folder / "Annotations" / f"{stem}.xml"
        if file not in trees:
            raise FileNotFoundError(f"There is no file {file} for an image of {split!r}, {stem}.")
        boxes.append(collect_boxes(_boxes(trees[file], file, class_names), _size(trees[file], file)))
    files = Files(folder / "JPEGImages", [images[stem] for stem in there])
    missing = tuple(stem for stem in stems if stem not in images)
    return Contents(files, boxes, tuple(class_names), without_image=missing, notes=notes)


def _list_stems(folder: Path, split: str, kind: str, labels: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of a split's images without suffix, and a note; without lists those of all labels."""
    lists = {file.stem: file for file in sorted((folder / "ImageSets" / kind).glob("*.txt"))}
    if not lists:
        check_split(folder, split)
        return sorted(file.stem for file in labels.iterdir() if not file.name.startswith(".")), (UNDIVIDED,)
    listed = choose_split(folder, split, lists)
    return [line.split()[0] for line in read_text(listed).splitlines() if line.strip()], ()


def _parse(file: Path) -> ET.Element:
    try:
        return ET.parse(file).getroot()  # noqa: S314  # expat limits the expansion of entities
    except (ET.ParseError, ValueError, LookupError) as error:  # the others are for unknown encodings
        raise ValueError(f"{file} is not XML: {error}") from error


def _boxes(tree: ET.Element, file: Path, class_names: list[str]) -> Iterator[Box]:
    for number, each in enumerate(tree.iter("object"), 1):
        left, top, right, bottom = (_number(each, f"bndbox/{key}", file) for key in ("xmin", "ymin", "xmax", "ymax"))
        note = f"{file}: the box of its object {number} has no area"
        difficult = each.findtext("difficult", "0").strip() == "1"
        label = class_names.index(_text(each, "name", file))
        yield Box(label, (left - 1, top - 1, right, bottom), note, crowd=difficult)


def _size(tree: ET.Element, file: Path) -> tuple[int, int]:
    height, width = (_number(tree, f"size/{key}", file) for key in ("height", "width"))
    if height < 1 or width < 1:
        raise ValueError(f"{file} states an image of {width:g}x{height:g} pixels; expected positive sizes.")
    return int(height), int(width)


def _number(element: ET.Element, key: str, file: Path) -> float:
    text = _text(element, key, file)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{file} has {text[:60]!r} as {key}; expected a number of pixels.")
    return number


def _text(element: ET.Element, key: str, file: Path) -> str:
    text = element.findtext(key, "").strip()
    if not text:
        raise ValueError(f"{file} has no {key} in its {element.tag!r}.")
    return text
