"""Labeled images from class folders, tar files or the Hugging Face hub's parquet files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kornia_tinyvit.data.datasets import Contents, ImageDataset, match_classes
from kornia_tinyvit.data.folders import read_class_folders
from kornia_tinyvit.data.parquet import read_parquet
from kornia_tinyvit.data.tars import COMPRESSED, by_archive, by_folder, read_tars

__all__ = ["ClassificationDataset"]


class ClassificationDataset(ImageDataset[int]):
    r"""Images with their class: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and a class index.

    Nothing is unpacked: images in tar files are read where they lie, and those of parquet files stay in Arrow's
    memory, which the forked workers of a data loader share. Hidden files and folders are ignored.

    Attributes:
        class_names: names of the classes, sorted, where folders or tar files state them; ``None`` for parquet files.
        num_classes: how many classes there are; for parquet files one more than the largest label.
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

                - a folder that holds a folder for each class, named after it; a folder without images is a class too;
                - a tar file of such a folder, not compressed;
                - a folder of tar files, one a class and named after it, or the one tar file of them, as ImageNet comes;
                - a parquet file as the Hugging Face hub writes them, with a column ``image`` or ``img`` of structs that
                  hold ``bytes`` and an integer column ``label``; or a folder of such files, the pieces of one split.

        Raises:
            FileNotFoundError: if there is no such path.
            ValueError: if there are no labeled images in it, or a label is not a class index.
            MissingExtraError: if a parquet file is asked for without pyarrow.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"There is no data set {path}; expected a folder of class folders, a tar file or a parquet file."
            )
        contents = _read(path)
        if not contents.targets:
            raise ValueError(f"{path} holds no images in class folders such as {path}/cat/1.jpg.")
        return cls(contents)

    @property
    def labels(self) -> Sequence[int]:
        """Class index of each image."""
        return self._targets

    def with_classes(self, names: tuple[str, ...] | None) -> ClassificationDataset:
        """Return the images with the labels of other images or of a network, whose classes are given by name.

        Where one of the two has no names, or none in common, classes are matched by their position.

        Args:
            names: names of the classes in their order.

        Raises:
            ValueError: if some but not all classes of the data are among them.
        """
        positions = match_classes(self.class_names, names)
        if names is None or positions is None:
            return self
        mapped = copy.copy(self)
        mapped._targets = [positions[label] for label in self.labels]
        mapped.class_names, mapped.num_classes = names, len(names)
        mapped._fingerprint = None
        return mapped

    def _target(self, stored: int, size: tuple[int, int], place: str) -> int:
        return stored


def collate(items: list[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor]:
    """Put images of different sizes into a list and their classes into a tensor, for a data loader."""
    return [image for image, _ in items], torch.tensor([label for _, label in items])


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
