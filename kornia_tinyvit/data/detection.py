"""Images with bounding boxes of their objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kornia_tinyvit.data import coco, voc, yolo
from kornia_tinyvit.data.boxes import Boxes, Objects
from kornia_tinyvit.data.datasets import Contents, ImageDataset, check_size, count_noun
from kornia_tinyvit.data.layouts import find_in_folder, find_layout
from kornia_tinyvit.data.splits import UNDIVIDED, MissingSplitError, check_split

__all__ = ["DetectionDataset"]

_LAYOUTS = (
    "a YAML file of Ultralytics, images/ and labels/, images/SPLIT/ and labels/SPLIT/, SPLIT/images/ and SPLIT/labels/ "
    "(SPLIT is train, val or test), annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json of COCO, or the "
    "folders of Pascal VOC"
)


class DetectionDataset(ImageDataset[Objects]):
    r"""Images with boxes: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and its :class:`Objects`.

    All labels are read at once. Boxes are clipped to their image; those without an area inside are dropped and
    reported. Images without objects are kept as negative examples.

    Args:
        contents: the result of a reader.
        source: its location, for the messages.

    Attributes:
        class_names: names of the classes in the order of their indices.
        num_classes: number of classes.
        left_out: a message for each box that is dropped, with its file.
        without_image: labels whose image does not exist.

    Raises:
        ValueError: if there is no object, or no class.
    """

    class_names: tuple[str, ...]

    def __init__(self, contents: Contents, source: str | Path = "the dataset") -> None:
        super().__init__(contents)
        self.left_out = tuple(message for boxes in contents.targets for message in boxes.left_out)
        if not self.class_names:
            raise ValueError(f"{source} names no classes.")
        if not any(len(boxes.labels) for boxes in self._targets):
            raise ValueError(
                f"{source} has no object in its {len(self)} images; {len(self.left_out)} boxes have no area."
            )

    @classmethod
    def open(cls, path: str | Path, split: str = "train", *, images: str | Path | None = None) -> DetectionDataset:
        """Open a dataset from one path.

        Args:
            path: one of

                - a YAML file of Ultralytics or Roboflow. It has the class names as ``names``, or their number ``nc``,
                  and for each split a folder of images, a text file that lists some, or several of them, relative to
                  ``path``, which is relative to the file. The labels of ``images/a.jpg`` are in ``labels/a.txt``:
                  ``class x y width height`` per line, with center and size as fractions of the image, or a class and
                  the corners of an outline. As for Ultralytics, fractions may leave [0, 1] by 0.01 and are clamped,
                  repeated lines are dropped, an image without a label file has no objects, and ``../train/images`` also
                  is ``train/images``. If a folder of images does not exist, the same path one folder up is used;
                - a JSON file in COCO's format. Class indices follow the order of the category ids. Its images lie
                  beside it, or, for ``annotations/instances_NAME.json``, in ``NAME`` or ``images/NAME`` beside
                  ``annotations``;
                - a folder that holds one of them: ``annotations/instances_SPLIT*.json``,
                  ``SPLIT*/_annotations.coco.json``, or a YAML file;
                - a folder with ``images`` and ``labels`` in YOLO's format, with ``images/SPLIT`` and ``labels/SPLIT``,
                  or with ``SPLIT/images`` and ``SPLIT/labels``; ``classes.txt`` in it or beside the labels names the
                  classes, which are "class 0" and so on without;
                - a folder in Pascal VOC's format, with ``JPEGImages``, ``Annotations`` and
                  ``ImageSets/Main/SPLIT.txt``. The classes are the sorted names of all objects. Coordinates count from
                  1 and the last pixels are inside the box; difficult objects are ignored in training and evaluation.
            split: name of the split: ``"train"``, ``"val"`` or another one of the files.
            images: folder of the images of a COCO file, if it is none of the above.

        Raises:
            FileNotFoundError: if the path, a file or all images do not exist.
            ValueError: if it holds none of these formats, or invalid labels, naming file and line or annotation.
            MissingExtraError: for YAML files, if PyYAML is missing.
        """
        path = Path(path)
        if voc.holds_annotations(path):
            return cls(voc.read_boxes(path, split), path)
        if path.is_dir():
            found = find_in_folder(path, split)
            layout = None if found else find_layout(path, split, ("labels",))
            if layout is not None:
                return cls(yolo.read_folder(path, layout), path)
            if found is None:
                raise MissingSplitError(f"{path} holds no images with boxes of {split!r}. Expected {_LAYOUTS}.")
            path = found
        elif path.suffix.lower() == ".json":
            check_split(path, split)
            contents = coco.read_boxes(path, None if images is None else Path(images))
            return cls(replace(contents, notes=(*contents.notes, UNDIVIDED)), path)
        if images is not None or path.suffix.lower() == ".json":
            return cls(coco.read_boxes(path, None if images is None else Path(images)), path)
        return cls(yolo.read_boxes(path, split), path)

    def require_objects(self) -> None:
        """Reject images without objects, or with objects that are ignored in training only.

        Raises:
            ValueError: if no image has an object.
        """
        if not any((~boxes.crowds).any() for boxes in self._targets):
            raise ValueError(
                f"None of {count_noun(len(self), 'image')} has an object, such as {self.place(0)}; "
                f"{count_noun(self.num_objects, 'crowd or difficult object')} and "
                f"{count_noun(len(self.left_out), 'box')} without an area do not count."
            )

    @property
    def num_objects(self) -> int:
        """Number of objects in all images."""
        return sum(len(boxes.labels) for boxes in self._targets)

    def objects(self, index: int, height: int, width: int) -> Objects:
        """Return the objects of an image of a known size without decoding it.

        Args:
            index: index of the image.
            height: its height in pixels.
            width: its width in pixels.
        """
        boxes: Boxes = self._targets[index]
        return boxes.scale(height, width)

    def _target(self, stored: Boxes, size: tuple[int, int], place: str) -> Objects:
        check_size(place, size, stored.size, "its labels are for")
        return stored.scale(*size)

    def _counts(self) -> list[str]:
        crowds = int(sum(boxes.crowds.sum() for boxes in self._targets))
        ignored = [f"{count_noun(crowds, 'crowd or difficult object')} ignored"] if crowds else []
        empty = [f"{count_noun(len(self.left_out), 'box')} without an area left out"] if self.left_out else []
        return [count_noun(self.num_objects - crowds, "object"), *super()._counts(), *ignored, *empty]

    def _used_classes(self) -> Sequence[int]:
        return sorted({label for boxes in self._targets for label in boxes.labels.tolist()})

    def _move_classes(self, positions: Sequence[int]) -> None:
        moved = np.array(positions)
        self._targets = [replace(boxes, labels=moved[boxes.labels]) for boxes in self._targets]

    def _state(self, stored: Boxes) -> object:
        return [values.tolist() for values in (stored.boxes, stored.labels, stored.crowds)]
