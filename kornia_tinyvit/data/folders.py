"""Images in class folders, or in folders beside their labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from kornia_tinyvit.data.datasets import Contents


class Files:
    """Images in one file each.

    Args:
        root: their folder.
        names: names of the images.
        files: their paths, absolute or relative to the folder; by default the names.
    """

    def __init__(self, root: Path, names: Sequence[str], files: Sequence[str] | None = None) -> None:
        self.root, self.names, self.files = root, names, files or names

    def name(self, index: int) -> str:
        """Return an image's name."""
        return self.names[index]

    def place(self, index: int) -> str:
        """Return an image's path."""
        return os.path.join(self.root, self.files[index])

    def size(self, index: int) -> int:
        """Return the size of its file in bytes."""
        return os.path.getsize(self.place(index))

    def open(self, index: int) -> BinaryIO:
        """Open its file."""
        return open(self.place(index), "rb")


def read_class_folders(root: Path) -> Contents:
    """Return the images of a folder with one folder per class; hidden folders are skipped."""
    class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    labels: list[int] = []
    names: list[str] = []
    for label, class_name in enumerate(class_names):
        files = list_images(root / class_name)
        names += [f"{class_name}/{file.as_posix()}" for file in files]
        labels += [label] * len(files)
    return Contents(Files(root, names), labels, tuple(class_names))


def list_images(folder: Path) -> list[Path]:
    """Return the sorted paths of the image files below a folder, relative to it; hidden ones are skipped."""
    known, found = Image.registered_extensions(), []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in known:
                found.append(Path(parent, name).relative_to(folder))
    return sorted(found, key=lambda file: file.parts)


def find_file(folder: Path, name: str) -> str:
    """Return the name of a file in a folder, also if it was written with backslashes; "" if there is none."""
    names = (name, name.replace("\\", "/"))
    return next((each for each in names if each.strip() and (folder / each).is_file()), "")


def files_by_stem(folder: Path) -> dict[str, str]:
    """Return the paths of the images below a folder, relative to it, by their path without the suffix.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if two files differ only in their suffix.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    files: dict[str, str] = {}
    for name in list_images(folder):
        stem = name.with_suffix("").as_posix()
        if stem in files:
            raise ValueError(f"{folder} holds both {files[stem]} and {name.as_posix()}; expected one file per image.")
        files[stem] = name.as_posix()
    return files
