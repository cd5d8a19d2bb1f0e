"""Images with a mask for each object."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kornia_tinyvit.data import coco, yolo
from kornia_tinyvit.data.datasets import BrokenImageError, Contents, ImageDataset, check_size
from kornia_tinyvit.data.descriptions import read_description
from kornia_tinyvit.data.folders import find_folders
from kornia_tinyvit.data.masks import Instances, pair_masks, read_objects, split_ids
from kornia_tinyvit.preprocessing import check_counts

__all__ = ["InstanceDataset"]


class InstanceDataset(ImageDataset[Tensor]):
    r"""Images with instances: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and masks :math:`(N, H, W)`.

    Masks are boolean and may overlap. The supported formats are

    - a folder of masks with an id per pixel, as in :class:`~kornia_tinyvit.data.SegmentationDataset`: each id but 0
      and 255 is an instance;
    - a folder of text files in YOLO's format: one line per instance with its class and the corners of its outline, or
      its box, as fractions of width and height. Where an outline returns to its first corner, another part of the
      instance begins;
    - a JSON file in COCO's format: polygons or run-length codes, compressed or not. Crowds are dropped;
    - one folder per image with ``images`` and ``masks``, where each object has a file.

    Files of a folder have the name of their image but for the suffix. Images without labels are dropped and reported.
    The EXIF orientation is applied to images but not to masks.

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
            path: a folder with ``images`` and ``masks`` or ``labels`` (or ``images/SPLIT`` and so on); a folder of
                folders with ``images`` and ``masks``, or with such folders in ``SPLIT``; or a YAML or JSON file with a
                section per split, whose ``images`` names the folder of images and whose ``instances`` names the folder
                or file of instances, relative to the file. A section may also hold folders of images or text files
                that list some, as in Ultralytics' files; see :meth:`DetectionDataset.open` for their labels.
            split: name of the split.
            min_area: drop instances of fewer pixels; COCO calls instances below 1024 pixels small.
            instances: folder or JSON file of the instances, if ``path`` is the folder of their images.

        Raises:
            FileNotFoundError: if the path does not exist.
            ValueError: if it holds none of these formats, or no image with labels.
            MissingExtraError: for YAML files, if PyYAML is missing.
        """
        check_counts(min_area=min_area)
        path = Path(path)
        if instances is not None:
            return cls(_read(path, Path(instances)), min_area)
        if path.is_dir():
            return cls(_read_folder(path, split), min_area)
        expected = "a folder with 'images' and 'masks' or 'labels', or a YAML file that names them"
        described = read_description(path, expected)
        section = described.get(split)
        if isinstance(section, (str, list)):
            return cls(yolo.read_outlines(yolo.find_pairs(path, described, split), path), min_area)
        if not isinstance(section, dict) or not {"images", "instances"} <= section.keys():
            raise ValueError(
                f"{path} does not state the images and instances of {split!r}; expected a section '{split}' with "
                "'images' and 'instances', or the folder of the images."
            )
        root = path.parent / str(described.get("path") or ".")
        return cls(_read(root / section["images"], root / section["instances"]), min_area)

    def with_instances(self) -> InstanceDataset:
        """Return the subset of the images that have instances; this reads all images.

        Raises:
            BrokenImageError: if one cannot be decoded.
            ValueError: if no image has instances.
        """
        rows = [row for row in range(len(self)) if len(self.read(row)[1])]
        if not rows:
            raise ValueError(f"None of {len(self)} images has an instance of at least {self.min_area} pixels.")
        return self._subset(rows)

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

    def _state(self, stored: Instances) -> object:
        return [(each.name, each.stat().st_size) if isinstance(each, Path) else each for each in stored.sources]

    def _settings(self) -> tuple[object, ...]:
        return (self.min_area,)


def _read_folder(path: Path, split: str) -> Contents:
    folders = find_folders(path, split, "masks") or find_folders(path, split, "labels")
    if folders:
        return _read(*folders)
    for folder in (path / split, path):
        if any(images.with_name("masks").is_dir() for images in folder.glob("*/images")):
            return read_objects(folder)
    raise ValueError(f"{path} holds neither 'masks' nor 'labels' beside 'images'; expected one of them.")


def _read(images: Path, instances: Path) -> Contents:
    if instances.is_file():
        return coco.read_masks(instances, images)
    if not instances.is_dir():
        raise FileNotFoundError(f"There is no folder or file {instances}.")
    texts = {file for file in instances.rglob("*.txt") if not file.name.startswith(".")}
    if not texts:
        contents = pair_masks(images, instances)
        return replace(contents, targets=[Instances((mask,), split_ids) for mask in contents.targets])
    pairs = yolo.pair_folders(images, instances)
    unused = sorted(texts - {pair.labels for pair in pairs})
    return replace(
        yolo.read_outlines(pairs, images),
        without_image=tuple(file.relative_to(instances).as_posix() for file in unused),
    )
