"""Labeled images in class folders, tar files or the Hugging Face Hub's parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kornia_tinyvit.data.datasets import Contents, ImageDataset, match_classes
from kornia_tinyvit.data.folders import read_class_folders
from kornia_tinyvit.data.parquet import read_parquet
from kornia_tinyvit.data.tars import COMPRESSED, by_archive, by_folder, read_tars

__all__ = ["ClassificationDataset"]


class ClassificationDataset(ImageDataset[int]):
    r"""Images with class labels: item :math:`i` is an image :math:`(3, H, W)`, float32 in [0, 1], and a class index.

    Nothing is unpacked: images in tar files are read in place, and those in parquet files stay in Arrow's memory, which
    forked workers of a data loader share. Hidden files and folders are ignored.

    Args:
        contents: the images and targets, as read by ``open``.

    Attributes:
        class_names: sorted names of the classes, where folders or tar files state them; ``None`` for parquet files.
        num_classes: number of classes; for parquet files the largest label plus one.
    """

    def __init__(self, contents: Contents) -> None:
        super().__init__(contents)
        if self.class_names is None:
            self.num_classes = max(self.labels) + 1

    @classmethod
    def open(cls, path: str | Path) -> ClassificationDataset:
        """Open a dataset from one path.

        Args:
            path: one of

                - a folder with one folder per class, named after it; an empty folder is a class too;
                - an uncompressed tar file of such a folder;
                - a folder of tar files, one per class and named after it, or a tar file of them, like ImageNet's;
                - a parquet file of the Hugging Face Hub, with a column ``image`` or ``img`` of structs that hold
                  ``bytes`` and an integer column ``label``; or a folder of such files, the parts of one split.

        Raises:
            FileNotFoundError: if the path does not exist.
            ValueError: if it holds no labeled images, or a label is not a class index.
            MissingExtraError: for parquet files, if pyarrow is missing.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"There is no dataset {path}; expected a folder of class folders, a tar file or a parquet file."
            )
        contents = _read(path)
        if not contents.targets:
            raise ValueError(f"{path} holds no images in class folders, such as {path}/cat/1.jpg.")
        return cls(contents)

    @property
    def labels(self) -> Sequence[int]:
        """Class indices of all images."""
        return self._targets

    def with_classes(self, names: tuple[str, ...] | None) -> ClassificationDataset:
        """Return the dataset with the class indices of other class names, such as a network's.

        Without names, or without a common name, the class indices are unchanged.

        Args:
            names: names of the classes in the order of their indices.

        Raises:
            ValueError: if some but not all classes of the dataset are among them.
        """
        positions = match_classes(self.class_names, names)
        if names is None or positions is None:
            return self
        mapped = self._subset(range(len(self)))
        mapped._targets = [positions[label] for label in self.labels]
        mapped.class_names, mapped.num_classes = names, len(names)
        return mapped

    def _target(self, stored: int, size: tuple[int, int], place: str) -> int:
        return stored


def _read(path: Path) -> Contents:
    if not path.is_dir():
        is_tar = path.name.lower().endswith((".tar", *COMPRESSED))
        return read_tars([path], by_folder) if is_tar else read_parquet([path])
    contents = read_class_folders(path)
    if contents.targets:
        return contents
    pieces = _visible(path, ".parquet")
    if pieces:
        return read_parquet(pieces)
    tars = _visible(path, ".tar")
    return read_tars(tars, by_archive) if tars else contents


def _visible(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == suffix and not file.name.startswith("."))
