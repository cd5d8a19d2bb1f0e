"""Images with boxes around the objects they show."""

from __future__ import annotations

from pathlib import Path

from kornia_tinyvit.data import coco, voc, yolo
from kornia_tinyvit.data.boxes import Boxes, Objects
from kornia_tinyvit.data.datasets import Contents, ImageDataset, check_size

__all__ = ["DetectionDataset"]


class DetectionDataset(ImageDataset[Objects]):
    r"""Images with boxes: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and its :class:`Objects`.

    All labels are read at once. Boxes that stick out of their image are cut at its border; boxes without an area, or
    outside of it, are left out and named. Images without objects count: they show what is none.

    Args:
        contents: what a reader found.
        source: where it was found, for the errors.

    Attributes:
        class_names: names of the classes in the order of their indices.
        num_classes: how many there are.
        left_out: a sentence for each box that was left out, with its file.
        without_image: labels whose image is missing.

    Raises:
        ValueError: if there is no object, or no class.
    """

    class_names: tuple[str, ...]

    def __init__(self, contents: Contents, source: str | Path = "the data set") -> None:
        super().__init__(contents)
        if not self.class_names:
            raise ValueError(f"{source} names no classes.")
        if not any(len(boxes.labels) for boxes in self._targets):
            raise ValueError(
                f"{source} has no object on its {len(self)} images; {len(self.left_out)} boxes have no area."
            )

    @classmethod
    def open(cls, path: str | Path, split: str = "train", *, images: str | Path | None = None) -> DetectionDataset:
        """Open a dataset from one path.

        Args:
            path: one of

                - a YAML file as Ultralytics writes them. It names the classes as ``names``, and for each split a folder
                  of images, a text file that lists some, or several of them, relative to ``path``, which is relative to
                  the file. The labels of ``images/a.jpg`` are in ``labels/a.txt``: ``class x y width height`` per line,
                  the center and the size as fractions of the image, or a class and the corners of an outline. An image
                  without such a file shows no objects. A folder of images that is missing is looked for one folder up;
                - a JSON file as COCO has them. Class indices follow the order of the categories' ids. Its images lie
                  beside it, or, if it is ``annotations/instances_NAME.json``, in ``NAME`` or ``images/NAME`` beside
                  ``annotations``;
                - a folder that holds one of them: ``annotations/instances_SPLIT*.json``,
                  ``SPLIT*/_annotations.coco.json``, or a YAML file;
                - a folder as Pascal VOC has it, with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main/SPLIT.txt``.
                  The classes are the names of all objects, sorted. Coordinates count from 1 and the last ones are
                  inside the box; difficult objects are neither learnt nor counted.
            split: which part of the data: ``"train"``, ``"val"`` or another that the files name.
            images: folder of the images of a COCO file, if it is none of those above.

        Raises:
            FileNotFoundError: if there is no such path, or a file or all images are missing.
            ValueError: if it does not hold what is described above, or labels that cannot be; it names file and line,
                or annotation.
            MissingExtraError: if a YAML file is asked for without PyYAML.
        """
        path = Path(path)
        if voc.holds_annotations(path):
            return cls(voc.read_boxes(path, split), path)
        if path.is_dir():
            path = _find_in_folder(path, split)
        if images is not None or path.suffix.lower() == ".json":
            return cls(coco.read_boxes(path, None if images is None else Path(images)), path)
        return cls(yolo.read_boxes(path, split), path)

    def objects(self, index: int, height: int, width: int) -> Objects:
        """Return the objects of an image whose size is known."""
        boxes: Boxes = self._targets[index]
        return boxes.scale(height, width)

    def _target(self, stored: Boxes, size: tuple[int, int], place: str) -> Objects:
        check_size(place, size, stored.size, "its labels are for")
        return stored.scale(*size)

    def _state(self, stored: Boxes) -> object:
        return [values.tolist() for values in (stored.boxes, stored.labels, stored.crowds)]


def _find_in_folder(folder: Path, split: str) -> Path:
    patterns = (
        f"annotations/instances_{split}*.json",
        f"annotations/{split}*.json",
        f"{split}*/_annotations.coco.json",
        "*.yaml",
        "*.yml",
    )
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} holds several data sets ({names}); name one of the files.")
        if found:
            return found[0]
    raise FileNotFoundError(
        f"There is no data set in {folder} for {split!r}; expected {', '.join(patterns)}, or the folders of Pascal VOC."
    )
