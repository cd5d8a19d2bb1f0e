"""Labeled images in class folders, tar files or the Hugging Face Hub's parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kornia_tinyvit.data.datasets import Contents, ImageDataset, describe_skipped, shorten
from kornia_tinyvit.data.folders import is_junk, read_class_folders, split_folders
from kornia_tinyvit.data.parquet import read_parquet, read_shards
from kornia_tinyvit.data.splits import UNDIVIDED, check_split, choose_split, is_split
from kornia_tinyvit.data.tars import COMPRESSED, read_class_tars, read_tar

__all__ = ["ClassificationDataset"]


class ClassificationDataset(ImageDataset[int]):
    r"""Images with class labels: item :math:`i` is an image :math:`(3, H, W)`, float32 in [0, 1], and a class index.

    Nothing is unpacked: images in tar files are read in place, and those in parquet files stay in Arrow's memory, which
    forked workers of a data loader share. Everything that Pillow decodes is an image. Other files, hidden files and
    those of operating systems are skipped and counted in :attr:`summary`.

    Args:
        contents: the images and targets, as read by ``open``.

    Attributes:
        class_names: names of the classes: sorted folders, tar files or labels, or those of a parquet file's metadata;
            ``None`` for parquet files without names.
        num_classes: number of classes; without names the largest label plus one.
    """

    def __init__(self, contents: Contents) -> None:
        super().__init__(contents)
        if self.class_names is None:
            self.num_classes = max(self.labels) + 1
        used = set(self.labels)
        self._empty = [name for index, name in enumerate(self.class_names or ()) if index not in used]

    @classmethod
    def open(cls, path: str | Path, split: str = "train") -> ClassificationDataset:
        """Open a dataset from one path.

        Args:
            path: one of

                - a folder with one folder per class, named after it; an empty folder is a class too. The class of an
                  image is the folder directly below ``path``, as in torchvision's ``ImageFolder``;
                - an uncompressed tar file of such a folder;
                - a folder of tar files, one per class and named after it, or a tar file of them, like ImageNet's;
                - a parquet file of the Hugging Face Hub, or a folder of such files, with a column of images, structs
                  that hold ``bytes`` or binary values, and a column of labels, integers or names;
                - a folder or a tar file with one of them for each split, in folders or files named ``train``, ``val``,
                  ``valid``, ``validation`` or ``test``.
            split: name of the split. If ``path`` is not divided into splits, all images are returned.

        Raises:
            FileNotFoundError: if the path does not exist.
            MissingSplitError: if there is no such split.
            ValueError: if it holds no labeled images, or a label is not a class index.
            MissingExtraError: for parquet files, if pyarrow is missing.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"There is no dataset {path}; expected a folder of class folders, a tar file or a parquet file."
            )
        contents = _read(path, split)
        if not contents.targets:
            skipped = ", ".join(describe_skipped(contents.skipped))
            found = f"; it holds {skipped}" if skipped else ""
            raise ValueError(f"{path} holds no images in class folders, such as {path}/cat/1.jpg{found}.")
        return cls(contents)

    @property
    def labels(self) -> Sequence[int]:
        """Class indices of all images."""
        return self._targets

    def _target(self, stored: int, size: tuple[int, int], place: str) -> int:
        return stored

    def _used_classes(self) -> Sequence[int]:
        return sorted(set(self.labels))

    def _move_classes(self, positions: Sequence[int]) -> None:
        self._targets = [positions[label] for label in self.labels]

    def _counts(self) -> list[str]:
        empty = [f"{len(self._empty):,} without images ({shorten(self._empty)})"] if self._empty else []
        return [*super()._counts(), *empty]


def _read(path: Path, split: str) -> Contents:
    """Return the images of a path, or of its split if it is divided."""
    if path.is_file():
        is_tar = path.name.lower().endswith((".tar", *COMPRESSED))
        return read_tar(path, split) if is_tar else _undivided(read_parquet([path]), path, split)
    splits = split_folders(path)
    if splits:
        contents = _read(choose_split(path, split, splits), split)
        return replace(contents, notes=())
    contents = read_class_folders(path)
    pieces, tars = _visible(path, ".parquet"), _visible(path, ".tar")
    if contents.targets or not (pieces or tars):
        return _undivided(contents, path, split)
    if pieces:
        return read_shards(path, split, pieces)
    if all(is_split(tar.stem) for tar in tars):
        return replace(read_tar(choose_split(path, split, {tar.stem: tar for tar in tars}), split), notes=())
    return _undivided(read_class_tars(tars), path, split)


def _undivided(contents: Contents, path: Path, split: str) -> Contents:
    check_split(path, split)
    return replace(contents, notes=(UNDIVIDED,))


def _visible(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == suffix and not is_junk(file.name))
