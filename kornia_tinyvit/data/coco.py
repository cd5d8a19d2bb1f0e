"""COCO's JSON files (cocodataset.org, "Data format"): boxes, polygons and run-length codes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kornia_tinyvit.data.boxes import Box, collect_boxes
from kornia_tinyvit.data.datasets import Contents, count_noun
from kornia_tinyvit.data.descriptions import read_json
from kornia_tinyvit.data.folders import Files, find_file
from kornia_tinyvit.data.masks import Instances, Masks, fill_polygons
from kornia_tinyvit.ops.rle import decode_rle

_Entry = dict[str, Any]
_Labeled = tuple[_Entry, list[_Entry]]  # an image and its annotations


def read_boxes(path: Path, folder: Path | None = None) -> Contents:
    """Return the images and boxes of a file. Class indices follow the order of the category ids.

    Args:
        path: the JSON file with ``images``, ``annotations`` and ``categories``.
        folder: folder of the images; by default the usual folders around the file are searched.

    Raises:
        FileNotFoundError: if the file or all images do not exist.
        ValueError: if it is not a COCO file, or an annotation has an unknown image or category, or an invalid box.
    """
    content = _read(path, "bbox")
    categories = sorted((each["id"], str(each["name"])) for each in content["categories"])
    indices = {number: index for index, (number, _) in enumerate(categories)}
    files, found, missing = _match_images(path, content, folder)
    boxes = [collect_boxes(_boxes(path, image, each, indices), _size(image)) for image, each in found]
    return Contents(files, boxes, tuple(name for _, name in categories), without_image=missing)


def read_masks(path: Path, folder: Path | None = None, content: Any = None) -> Contents:
    """Return the images and instances of a file, without crowds. The file may lack categories.

    Args:
        path: the JSON file with ``images`` and ``annotations``.
        folder: folder of the images; by default the usual folders around the file are searched.
        content: the content of the file, if it has been read.

    Raises:
        FileNotFoundError: if the file or all images do not exist.
        ValueError: if it is not a COCO file, or an annotation has an unknown image or category, an invalid box, or
            neither polygons nor run-length codes.
    """
    content = _read(path, "segmentation", content)
    files, found, missing = _match_images(path, content, folder)
    labels = [Instances(_segmentations(path, image, each), _masks, _size(image)) for image, each in found]
    crowds = sum(bool(each.get("iscrowd")) for _, annotations in found for each in annotations)
    notes = (f"{count_noun(crowds, 'crowd')} left out",) if crowds else ()
    return Contents(files, labels, without_image=missing, notes=notes)


def _read(path: Path, label: str, content: Any = None) -> dict[str, list[_Entry]]:
    """Return the validated content of a file, whose annotations have a kind of label."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    content = read_json(path) if content is None else content
    has_classes = label == "bbox" or (isinstance(content, dict) and bool(content.get("categories")))
    parts = _CHECKS if has_classes else _CHECKS_WITHOUT_CLASSES
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise ValueError(f"{path} is not a COCO file; expected {', '.join(parts)}.")
    for part, checks in parts.items():
        keys = [*checks, label] if part == "annotations" else [*checks]
        for number, entry in enumerate(content[part]):
            place = f"{path}: number {number} of its {part}"
            lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if lacking:
                raise ValueError(f"{place} has no {', '.join(lacking)}.")
            for key, (check, expected) in checks.items():
                if not check(entry[key]):
                    raise ValueError(f"{place} has {key} {str(entry[key])[:60]}; expected {expected}.")
    _check_ids(path, content, has_classes)
    return content


def _check_ids(path: Path, content: dict[str, list[_Entry]], has_classes: bool) -> None:
    images = {image["id"] for image in content["images"]}
    categories = {each["id"] for each in content["categories"]} if has_classes else set()
    for part in ("images", "categories") if has_classes else ("images",):
        if len({each["id"] for each in content[part]}) != len(content[part]):
            raise ValueError(f"{path} has two {part} with the same id.")
    for each in content["annotations"]:
        if each["image_id"] not in images:
            raise ValueError(f"{path}: annotation {each.get('id')} has the unknown image_id {each['image_id']}.")
        if has_classes and each["category_id"] not in categories:
            raise ValueError(
                f"{path}: annotation {each.get('id')} has the category {each['category_id']}, which is not one of the "
                f"{len(categories)} in the file."
            )


def _match_images(
    path: Path, content: dict[str, list[_Entry]], folder: Path | None
) -> tuple[Files, list[_Labeled], tuple[str, ...]]:
    """Return the files of the images that exist, their entries and annotations, and the names of missing files."""
    images = content["images"]
    folder = folder or _find_folder(path, images)
    of_image: dict[Any, list[_Entry]] = defaultdict(list)
    for each in content["annotations"]:
        of_image[each["image_id"]].append(each)
    names = [find_file(folder, image["file_name"]) for image in images]
    found = [(image, of_image[image["id"]]) for image, name in zip(images, names, strict=True) if name]
    missing = tuple(image["file_name"] for image, name in zip(images, names, strict=True) if not name)
    if not found:
        raise FileNotFoundError(f"No image of {path} is in {folder}: {', '.join(missing[:5])}.")
    return Files(folder, [name for name in names if name]), found, missing


def _find_folder(path: Path, images: list[_Entry]) -> Path:
    """Return the first of the usual folders that contains an image of a file."""
    part = path.stem.removeprefix("instances_")
    beside = path.parent.parent
    folders = [
        path.parent, beside / part, beside / "images" / part, path.parent / part, path.parent / "images",
        beside / "images", beside,
    ]  # fmt: skip
    for folder in folders:
        if any(find_file(folder, image["file_name"]) for image in images):
            return folder
    raise FileNotFoundError(
        f"The images of {path}, such as {images[0]['file_name'] if images else 'none'}, are in none of "
        f"{', '.join(map(str, folders))}."
    )


def _boxes(path: Path, image: _Entry, annotations: list[_Entry], indices: Mapping[Any, int]) -> Iterator[Box]:
    for each in annotations:
        place = _place(path, image, each)
        _check_box(place, each)
        left, top, width, height = each["bbox"]
        note = f"{place}: the box {each['bbox']} has no area in {image['width']}x{image['height']} pixels"
        corners = (left, top, left + width, top + height)
        area = float(math.nan if each.get("area") is None else each["area"])
        yield Box(indices[each["category_id"]], corners, note, area, bool(each.get("iscrowd", 0)))


def _segmentations(path: Path, image: _Entry, annotations: list[_Entry]) -> tuple[Any, ...]:
    for each in annotations:
        place = _place(path, image, each)
        if each.get("bbox"):
            _check_box(place, each)
        if not _is_segmentation(each["segmentation"]):
            raise ValueError(
                f"{place} has the segmentation {str(each['segmentation'])[:60]}; expected polygons of at least three "
                "corners, x and y in pixels, or a run-length code with its size."
            )
        if isinstance(each["segmentation"], list):
            _check_corners(place, image, each["segmentation"])
    return tuple(each["segmentation"] for each in annotations if not each.get("iscrowd"))


def _check_box(place: str, annotation: _Entry) -> None:
    numbers, area = annotation["bbox"], annotation.get("area")
    if not _is_finite(numbers) or len(numbers) != 4:
        raise ValueError(f"{place} has the box {numbers}; expected left, top, width and height in pixels.")
    if area is not None and not (_is_finite([area]) and area >= 0):
        raise ValueError(f"{place} has the area {str(area)[:60]}; expected pixels.")


def _check_corners(place: str, image: _Entry, rings: list[list[float]]) -> None:
    """Reject polygons of another image size: parts outside are cut off, but not beyond the size of the image."""
    height, width = _size(image)
    for ring in rings:
        for x, y in zip(ring[::2], ring[1::2], strict=True):
            if not (-width <= x <= 2 * width and -height <= y <= 2 * height):
                raise ValueError(
                    f"{place} has a corner at ({x:g}, {y:g}), far outside of its {width}x{height} pixels; expected "
                    "polygons in pixels of the image."
                )


def _masks(segmentation: Any, size: tuple[int, int]) -> Masks:
    if isinstance(segmentation, list):
        return [fill_polygons([list(zip(ring[::2], ring[1::2], strict=True)) for ring in segmentation], size)]
    stated = segmentation["size"]
    if stated != list(size):  # before a mask of that size is allocated
        raise ValueError(f"a mask has the size {str(stated)[:60]}, but the image {list(size)} (height, width)")
    return [decode_rle({"size": list(size), "counts": segmentation["counts"]})]


def _place(path: Path, image: _Entry, annotation: _Entry) -> str:
    return f"{path}: annotation {annotation.get('id')} of {image['file_name']}"


def _size(image: _Entry) -> tuple[int, int]:
    return int(image["height"]), int(image["width"])


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_side(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**31 and value == int(value)


def _is_finite(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers)


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_finite(ring) and len(ring) >= 6 and len(ring) % 2 == 0 for ring in value)
    return isinstance(value, Mapping) and {"size", "counts"} <= value.keys()


#: The required fields of a COCO file, each with a check and the expected value for the message.
_CHECKS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {
        "id": (_is_id, "a number or a string"),
        "file_name": (lambda value: isinstance(value, str) and "\0" not in value, "a string"),
        "height": (_is_side, "pixels"),
        "width": (_is_side, "pixels"),
    },
    "annotations": {"image_id": (_is_id, "a number or a string"), "category_id": (_is_id, "a number or a string")},
    "categories": {"id": (lambda value: isinstance(value, int), "a number"), "name": (lambda value: True, "a name")},
}
#: Those of a file without categories.
_CHECKS_WITHOUT_CLASSES = {
    "images": _CHECKS["images"],
    "annotations": {key: check for key, check in _CHECKS["annotations"].items() if key != "category_id"},
}
