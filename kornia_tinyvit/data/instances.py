"""Images with a mask for each object."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kornia_tinyvit.data import coco, voc, yolo
from kornia_tinyvit.data.datasets import BrokenImageError, Contents, ImageDataset, check_size, count_noun
from kornia_tinyvit.data.descriptions import find_root, find_section, posix, read_description
from kornia_tinyvit.data.folders import list_folder
from kornia_tinyvit.data.layouts import find_in_folder, find_layout
from kornia_tinyvit.data.masks import (
    Instances,
    count_ids,
    count_voc_ids,
    is_binary,
    pair_masks,
    read_objects,
    split_ids,
    split_voc_ids,
)
from kornia_tinyvit.data.splits import UNDIVIDED, check_split, choose_split
from kornia_tinyvit.preprocessing import check_counts

__all__ = ["InstanceDataset"]

_LAYOUTS = (
    "images/ and masks/ or labels/, images/SPLIT/ and masks/SPLIT/, SPLIT/images/ and SPLIT/masks/ (SPLIT is train, "
    "val or test), a folder per image with images/ and masks/, a COCO file, the folders of Pascal VOC, or a YAML file "
    "that names images and instances"
)


class InstanceDataset(ImageDataset[Tensor]):
    r"""Images with instances: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and masks :math:`(N, H, W)`.

    Masks are boolean and may overlap. The supported formats are

    - a folder of masks with an id per pixel, as in :class:`~kornia_tinyvit.data.SegmentationDataset`: each id but 0 is
      an instance, also 255;
    - a folder of text files in YOLO's format: one line per instance with its class and the corners of its outline, or
      its box, as fractions of width and height. Where an outline returns to its first corner, another part of the
      instance begins. A line with four numbers is a box, which is filled, also beside outlines. An image without a
      file has no instances; see :meth:`DetectionDataset.open` for what else is tolerated;
    - a JSON file in COCO's format: polygons or run-length codes, compressed or not. Crowds are dropped;
    - one folder per image with ``images`` and ``masks``, where each object has a file.

    Polygons have the pixels of pycocotools, which the extra ``train`` installs. Files of a folder have the name of
    their image but for the suffix. Images without a mask are dropped and reported. The EXIF orientation is applied to
    images but not to masks.

    Args:
        contents: the images and targets, as read by ``open``.
        min_area: least area of an instance in pixels.

    Attributes:
        class_names: ``None``: classes are not read.
        without_mask: names of images that have no labels.
        without_image: names of labels that have no image.
    """

    def __init__(self, contents: Contents, min_area: int = 1) -> None:
        super().__init__(contents)
        self.min_area = min_area

    @classmethod
    def open(
        cls, path: str | Path, split: str = "train", min_area: int = 1, *, instances: str | Path | None = None
    ) -> InstanceDataset:
        """Open a dataset from one path.

        Args:
            path: one of

                - a folder with ``images`` and ``masks`` or ``labels``, with ``images/SPLIT`` and so on, or with
                  ``SPLIT/images`` and so on, where the split may also be called ``valid`` or ``train2017``;
                - a folder of folders with ``images`` and ``masks`` for one image each, or with such folders in
                  ``SPLIT``;
                - a folder in Pascal VOC's format, with ``JPEGImages``, ``SegmentationObject`` and
                  ``ImageSets/Segmentation/SPLIT.txt``; in its masks 255 is no object;
                - a JSON file in COCO's format or a folder with one, as for :meth:`DetectionDataset.open`;
                - a YAML or JSON file with a section per split, whose ``images`` names the folder of images and whose
                  ``instances`` names the folder or file of instances, relative to the file. A section may also hold
                  folders of images or text files that list some, as in Ultralytics' files; see
                  :meth:`DetectionDataset.open` for their labels.
            split: name of the split.
            min_area: drop instances of fewer pixels; COCO calls instances below 1024 pixels small.
            instances: folder or JSON file of the instances, if ``path`` is the folder of their images.

        Raises:
            FileNotFoundError: if the path does not exist.
            ValueError: if it holds none of these formats, or no image with labels.
            MissingExtraError: for YAML files, if PyYAML is missing; for polygons, when one is read, if pycocotools is.
        """
        check_counts(min_area=min_area)
        path = Path(path)
        if instances is not None:
            return cls(_read(path, Path(instances)), min_area)
        if path.is_dir():
            return cls(_read_folder(path, split), min_area)
        return cls(_read_described(path, split), min_area)

    def with_instances(self) -> InstanceDataset:
        """Return the subset of the images that have instances; this reads all images.

        Raises:
            BrokenImageError: if one cannot be decoded.
            ValueError: if no image has instances.
        """
        rows = [row for row in range(len(self)) if len(self.read(row)[1])]
        if not rows:
            raise self._without_instances()
        return self._subset(rows)

    def require_objects(self) -> None:
        """Reject images without instances; reading stops at the first one, and corrupt images are left out.

        Raises:
            ValueError: if no image has instances.
        """
        for row in range(len(self)):
            with contextlib.suppress(BrokenImageError, OSError):
                if len(self.read(row)[1]):
                    return
        raise self._without_instances()

    def _without_instances(self) -> ValueError:
        labels = [str(source)[:100] for stored in self._targets for source in stored.sources]
        example = f", such as in {labels[0]}" if labels else ""
        return ValueError(
            f"None of {count_noun(len(self), 'image')} has an instance of at least {self.min_area} pixels{example}."
        )

    def _target(self, stored: Instances, size: tuple[int, int], place: str) -> Tensor:
        check_size(place, size, stored.size, "its labels are for")
        try:
            masks = [mask for source in stored.sources for mask in stored.read(source, size)]
        except (ValueError, TypeError, LookupError) as error:
            raise BrokenImageError(f"The instances of {place} cannot be read: {error}") from error
        for mask in masks:
            check_size(place, size, mask.shape, "its masks are")
        kept = [mask for mask in masks if mask.sum() >= self.min_area]
        return torch.from_numpy(np.stack(kept) if kept else np.zeros((0, *size), dtype=np.bool_))

    @property
    def num_objects(self) -> int:
        """Number of instances of any area in all images; this reads the label files, and leaves out broken ones."""
        return sum(map(_count, self._targets))

    def _counts(self) -> list[str]:
        return [count_noun(self.num_objects, "object")]

    def _state(self, stored: Instances) -> object:
        return [(each.name, each.stat().st_size) if isinstance(each, Path) else each for each in stored.sources]

    def _settings(self) -> tuple[object, ...]:
        return (self.min_area,)


def _count(stored: Instances) -> int:
    try:
        return stored.num_objects
    except (ValueError, OSError):
        return 0


def _read_folder(path: Path, split: str) -> Contents:
    layout = find_layout(path, split, ("masks", "labels"))
    if layout is not None:
        contents = _read(layout.images, layout.labels)
        return replace(contents, notes=(*layout.notes, *contents.notes))
    if voc.holds_masks(path, voc.OBJECTS):
        contents = voc.read_masks(path, split, voc.OBJECTS)
        return replace(
            contents, targets=[Instances((mask,), split_voc_ids, count=count_voc_ids) for mask in contents.targets]
        )
    splits = {folder.name: folder for folder in path.iterdir() if folder.is_dir() and _holds_objects(folder)}
    if splits:
        return read_objects(choose_split(path, split, splits))
    if _holds_objects(path):
        check_split(path, split)
        return replace(read_objects(path), notes=(UNDIVIDED,))
    found = find_in_folder(path, split)
    if found is not None:
        contents = _read_described(found, split)
        return replace(contents, notes=tuple(note for note in contents.notes if note != UNDIVIDED))
    boxes = " It holds boxes of Pascal VOC, which are for --task detection." if voc.holds_annotations(path) else ""
    raise ValueError(f"{path} holds no images with instances. Expected {_LAYOUTS}.{boxes}")


def _holds_objects(folder: Path) -> bool:
    """Return whether a folder holds folders with ``images`` and ``masks``."""
    return any(images.with_name("masks").is_dir() for images in folder.glob("*/images"))


def _read_described(path: Path, split: str) -> Contents:
    described = read_description(path, _LAYOUTS)
    if {"images", "annotations"} <= described.keys():
        contents = coco.read_masks(path, content=described)
        check_split(path, split)
        return replace(contents, notes=(*contents.notes, UNDIVIDED))
    section = find_section(path, described, split)
    if isinstance(section, (str, list)):
        return yolo.read_outlines(yolo.find_pairs(path, described, split), path)
    if not isinstance(section, dict) or not {"images", "instances"} <= section.keys():
        raise ValueError(
            f"{path} does not state the images and instances of {split!r}; expected a section '{split}' with "
            "'images' and 'instances', or the folder of the images."
        )
    root = find_root(path, described)
    return _read(root / posix(section["images"]), root / posix(section["instances"]))


def _read(images: Path, instances: Path) -> Contents:
    if instances.is_file():
        return coco.read_masks(instances, images)
    if not instances.is_dir():
        raise FileNotFoundError(f"There is no folder or file {instances}.")
    texts = {file for file in instances.rglob("*.txt") if file.name != "classes.txt" and not file.name.startswith(".")}
    if not texts:
        contents = pair_masks(images, instances)
        labels = [Instances((mask,), split_ids, count=count_ids) for mask in contents.targets]
        notes = ("255 is the object, one per image, as the masks hold only 0 and 255",)
        return replace(contents, targets=labels, notes=notes if is_binary(contents.targets) else ())
    pairs = yolo.pair_folders(images, instances)
    unused = sorted(texts - {pair.labels for pair in pairs})
    return replace(
        yolo.read_outlines(pairs, images),
        without_image=tuple(file.relative_to(instances).as_posix() for file in unused),
        skipped=list_folder(images).skipped,
    )
