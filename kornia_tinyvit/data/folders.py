"""Images in folders: of a class each, or beside folders of labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from kornia_tinyvit.data.datasets import Contents


class Files:
    """Images that are files of their own.

    Args:
        root: a folder.
        names: names of the images.
        files: their paths, absolute or in the folder; the names if left out.
    """

    def __init__(self, root: Path, names: Sequence[str], files: Sequence[str] | None = None) -> None:
        self.root, self.names = root, names
        self.files = names if files is None else files

    def name(self, index: int) -> str:
        """Return an image's name."""
        return self.names[index]

    def place(self, index: int) -> str:
        """Return an image's path."""
        return os.path.join(self.root, self.files[index])

    def size(self, index: int) -> int:
        """Return how many bytes it has."""
        return os.path.getsize(self.place(index))

    def open(self, index: int) -> BinaryIO:
        """Open it."""
        return open(self.place(index), "rb")


def read_class_folders(root: Path) -> Contents:
    """Return the images of a folder of folders, each of which is a class."""
    class_names = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )  # tools leave hidden folders behind
    labels: list[int] = []
    names: list[str] = []
    for label, class_name in enumerate(class_names):
        files = sorted(images_below(root / class_name), key=lambda file: file.parts)
        names += [file.relative_to(root).as_posix() for file in files]
        labels += [label] * len(files)
    return Contents(Files(root, names), labels, tuple(class_names))


def images_below(folder: Path) -> Iterator[Path]:
    """Return the files below a folder whose names end as those of images do; hidden ones are left out."""
    known = Image.registered_extensions()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in known:
                yield Path(parent, name)


def files_by_stem(folder: Path) -> dict[str, str]:
    """Return the paths of the images below a folder, relative to it, by their path without the ending.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if two files differ in their ending only.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    files: dict[str, str] = {}
    for file in sorted(images_below(folder)):
        name = file.relative_to(folder)
        stem = name.with_suffix("").as_posix()
        if stem in files:
            raise ValueError(f"{folder} holds both {files[stem]} and {name.as_posix()}; an image has one file.")
        files[stem] = name.as_posix()
    return files


def find_folders(path: Path, split: str, kind: str) -> tuple[Path, Path] | None:
    """Return the folders of a split's images and labels, or those of all; ``None`` if there are no such labels.

    Args:
        path: a folder that holds ``images``.
        split: which part of the data, a folder in ``images`` and in the folder of labels.
        kind: name of the folder of labels.
    """
    images, labels = path / "images", path / kind
    if (images / split).is_dir() and (labels / split).is_dir():
        return images / split, labels / split
    return (images, labels) if labels.is_dir() else None
