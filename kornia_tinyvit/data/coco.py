"""COCO's JSON files (cocodataset.org, "Data format"): boxes, polygons and run-length codes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kornia_tinyvit.data.boxes import Box, collect_boxes
from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.descriptions import read_json
from kornia_tinyvit.data.folders import Files, list_images
from kornia_tinyvit.data.masks import Instances, Masks, fill_rings
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
        ValueError: if it is not a COCO file, or an annotation has an unknown image or category, or no box.
    """
    content = _read(path, "bbox")
    categories = sorted((int(each["id"]), str(each["name"])) for each in content["categories"])
    indices = {number: index for index, (number, _) in enumerate(categories)}
    if len(indices) != len(categories):
        raise ValueError(f"{path} has two categories with the same id.")
    for each in content["annotations"]:
        if each["category_id"] not in indices:
            raise ValueError(
                f"{path}: annotation {each.get('id')} has the category {each['category_id']}, which is not one of the "
                f"{len(indices)} in the file."
            )
    folder = folder or _find_folder(path, content["images"])
    files, found, missing = _match_images(path, content, folder)
    boxes = [collect_boxes(_boxes(path, image, each, indices), _size(image)) for image, each in found]
    names = tuple(name for _, name in categories)
    return Contents(files, boxes, names, without_image=missing)


def read_masks(path: Path, folder: Path) -> Contents:
    """Return the images and instances of a file, without crowds.

    Args:
        path: the JSON file with ``images`` and ``annotations``.
        folder: folder of the images.

    Raises:
        FileNotFoundError: if the file or all images do not exist.
        ValueError: if it is not a COCO file, or an annotation has an unknown image, or neither polygons nor run-length
            codes.
    """
    content = _read(path, "segmentation")
    files, found, missing = _match_images(path, content, folder)
    labels = [Instances(_segmentations(path, image, each), _masks, _size(image)) for image, each in found]
    listed = {folder / image["file_name"] for image in content["images"]}
    others = tuple(name.as_posix() for name in list_images(folder) if folder / name not in listed)
    return Contents(files, labels, without_mask=others, without_image=missing)


def _read(path: Path, label: str) -> dict[str, list[_Entry]]:
    """Return the validated content of a file, whose annotations have a kind of label."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in _CHECKS):
        raise ValueError(f"{path} is not a COCO file; expected {', '.join(_CHECKS)}.")
    for part, checks in _CHECKS.items():
        keys = [*checks, label] if part == "annotations" else [*checks]
        for number, entry in enumerate(content[part]):
            place = f"{path}: number {number} of its {part}"
            lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if lacking:
                raise ValueError(f"{place} has no {', '.join(lacking)}.")
            for key, (check, expected) in checks.items():
                if not check(entry[key]):
                    raise ValueError(f"{place} has {key} {str(entry[key])[:60]}; expected {expected}.")
    known_ids = {image["id"] for image in content["images"]}
    for each in content["annotations"]:
        if each["image_id"] not in known_ids:
            raise ValueError(f"{path}: annotation {each.get('id')} has the unknown image_id {each['image_id']}.")
    return content


def _match_images(
    path: Path, content: dict[str, list[_Entry]], folder: Path
) -> tuple[Files, list[_Labeled], tuple[str, ...]]:
    """Return the files of the images that exist, their entries and annotations, and the names of missing files."""
    of_image: dict[Any, list[_Entry]] = defaultdict(list)
    for each in content["annotations"]:
        of_image[each["image_id"]].append(each)
    found = [(image, of_image[image["id"]]) for image in content["images"] if (folder / image["file_name"]).is_file()]
    missing = [image["file_name"] for image in content["images"] if not (folder / image["file_name"]).is_file()]
    if not found:
        raise FileNotFoundError(f"No image of {path} is in {folder}: {', '.join(missing[:5])}.")
    return Files(folder, [image["file_name"] for image, _ in found]), found, tuple(missing)


def _find_folder(path: Path, images: list[_Entry]) -> Path:
    """Return the first of the usual folders that contains an image of a file."""
    part = path.stem.removeprefix("instances_")
    beside = path.parent.parent
    folders = [path.parent, beside / part, beside / "images" / part, path.parent / part, path.parent / "images"]
    for folder in folders:
        if any((folder / image["file_name"]).is_file() for image in images):
            return folder
    raise FileNotFoundError(
        f"The images of {path}, such as {images[0]['file_name'] if images else 'none'}, are in none of "
        f"{', '.join(map(str, folders))}."
    )


def _boxes(path: Path, image: _Entry, annotations: list[_Entry], indices: Mapping[int, int]) -> Iterator[Box]:
    for each in annotations:
        place, numbers, area = _place(path, image, each), each["bbox"], each.get("area", math.nan)
        if not _is_finite(numbers) or len(numbers) != 4:
            raise ValueError(f"{place} has the box {numbers}; expected left, top, width and height in pixels.")
        if "area" in each and not (_is_finite([area]) and area >= 0):
            raise ValueError(f"{place} has the area {str(area)[:60]}; expected pixels.")
        left, top, width, height = numbers
        note = f"{place}: the box {numbers} has no area in {image['width']}x{image['height']} pixels"
        corners = (left, top, left + width, top + height)
        yield Box(indices[each["category_id"]], corners, note, float(area), bool(each.get("iscrowd", 0)))


def _segmentations(path: Path, image: _Entry, annotations: list[_Entry]) -> tuple[Any, ...]:
    for each in annotations:
        if not _is_segmentation(each["segmentation"]):
            raise ValueError(
                f"{_place(path, image, each)} has the segmentation {str(each['segmentation'])[:60]}; expected "
                "polygons with pairs of x and y in pixels, or a run-length code with its size."
            )
    return tuple(each["segmentation"] for each in annotations if not each.get("iscrowd"))


def _masks(segmentation: Any, size: tuple[int, int]) -> Masks:
    if isinstance(segmentation, list):
        return [fill_rings([list(zip(ring[::2], ring[1::2], strict=True)) for ring in segmentation], size)]
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
        return bool(value) and all(_is_finite(ring) and ring and len(ring) % 2 == 0 for ring in value)
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
