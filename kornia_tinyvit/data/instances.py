"""Images with a mask for each object in them."""

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
from kornia_tinyvit.data.masks import Instances, pair_masks, split_ids
from kornia_tinyvit.data.objects import holds_objects, read_objects
from kornia_tinyvit.preprocessing import check_counts

__all__ = ["InstanceDataset"]


class InstanceDataset(ImageDataset[Tensor]):
    r"""Images with instances: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and masks :math:`(N, H, W)`.

    Masks are boolean, and those of an image may overlap. They come from one of

    - a folder of masks with an id per pixel, as :class:`~kornia_tinyvit.data.SegmentationDataset` reads them: each id
      but 0 and 255 is an instance;
    - a folder of text files in YOLO's format: a line per instance, its class and the corners of its outline, or its
      box, as fractions of width and height. A line that comes back to its first corner begins another part of the same
      instance;
    - a JSON file in COCO's format: polygons or run lengths, compressed or not. Crowds are left out;
    - a folder per image with ``images`` and ``masks`` in it, where each object has a file of its own.

    Files of a folder have the name of their image but for the ending. Images without labels are left out and named.
    They are turned upright as their camera was held; their masks are taken to lie upright already.

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
                folders with ``images`` and ``masks``, or ``SPLIT`` with such folders in it; or a YAML or JSON file with
                a section for each split that names the folder of images as ``images`` and the folder or file of
                instances as ``instances``, relative to the file. A section may also be what Ultralytics' files have:
                folders of images, or text files that list some. Their labels are then found as
                :class:`~kornia_tinyvit.data.DetectionDataset` finds them.
            split: which part of the data.
            min_area: leave out instances of fewer pixels of their image; COCO calls those below 1024 small.
            instances: folder or JSON file of the instances, if ``path`` is the folder of their images.

        Raises:
            FileNotFoundError: if there is no such path.
            ValueError: if it does not hold what is described above, or nothing fits together.
            MissingExtraError: if a YAML file is asked for without PyYAML.
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
                f"{path} does not tell where the images and instances of {split!r} are; expected a section '{split}' "
                "with 'images' and 'instances', or the folder of the images."
            )
        root = path.parent / str(described.get("path") or ".")
        return cls(_read(root / section["images"], root / section["instances"]), min_area)

    def with_instances(self) -> InstanceDataset:
        """Return the images that have instances, as a dataset of their own; all are read once.

        Raises:
            BrokenImageError: if one cannot be read.
            ValueError: if no image has any.
        """
        rows = [row for row in range(len(self)) if len(self.read(row)[1])]
        if not rows:
            raise ValueError(f"None of {len(self)} images has an instance of at least {self.min_area} pixels.")
        return self._part(rows)

    def _target(self, stored: Instances, size: tuple[int, int], place: str) -> Tensor:
        check_size(place, size, stored.size, "its labels are for")
        try:
            masks = stored.masks(size)
        except (ValueError, TypeError, LookupError) as error:
            raise BrokenImageError(f"The instances of {place} cannot be read: {error}") from error
        for mask in masks:
            check_size(place, size, mask.shape, "its masks are")
        kept = [mask for mask in masks if mask.sum() >= self.min_area]
        return torch.from_numpy(np.stack(kept) if kept else np.zeros((0, *size), dtype=np.bool_))

    def _state(self, stored: Instances) -> object:
        return stored.state()

    def _settings(self) -> tuple[object, ...]:
        return (self.min_area,)


def _read_folder(path: Path, split: str) -> Contents:
    folders = find_folders(path, split, "masks") or find_folders(path, split, "labels")
    if folders:
        return _read(*folders)
    for folder in (path / split, path):
        if holds_objects(folder):
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
