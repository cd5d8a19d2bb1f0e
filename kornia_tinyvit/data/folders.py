"""Images in class folders, or in folders beside their labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.splits import find_splits, is_split


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


#: Parts of a path below the root of a dataset.
Parts = tuple[str, ...]

#: What was left out, by its kind, with ``{s}`` where the plural has an s.
JUNK, DANGLING, _CYCLIC = "hidden or system file{s}", "dangling link{s}", "cyclic link{s}"
_OUTSIDE, _NO_SUFFIX = "image{s} outside of class folders", "file{s} without a suffix"
#: Names that operating systems, archives and network storages add to folders, beside those that begin with a dot.
_SYSTEM = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "desktop.ini", "ehthumbs.db", "lost+found",
    "system volume information", "thumbs.db",
}  # fmt: skip
#: Formats that Pillow identifies but decodes only with other software; for EPS it would run Ghostscript on the file.
_FOREIGN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_HEIF = {".heic", ".heics", ".heif", ".heifs", ".hif"}


class Listing:
    """Images and folders below a root.

    Attributes:
        images: their paths, sorted.
        folders: their paths.
        skipped: how many files and folders of each kind were left out.
    """

    def __init__(self) -> None:
        self.images: list[Parts] = []
        self.folders: list[Parts] = []
        self.skipped: Counter[str] = Counter()

    def label(self, prefix: Parts = ()) -> tuple[tuple[str, ...], list[tuple[str, Parts]]]:
        """Return the class names and the class of each image: the folders directly below a prefix.

        Images that are not in a class folder are counted as skipped.

        Args:
            prefix: path of the folder of the class folders.
        """
        depth = len(prefix)
        inside = [parts for parts in self.images if parts[:depth] == prefix]
        self.skipped[_OUTSIDE] += sum(len(parts) == depth + 1 for parts in inside)
        labeled = [(parts[depth], parts) for parts in inside if len(parts) > depth + 1]
        folders = {parts[depth] for parts in self.folders if len(parts) > depth and parts[:depth] == prefix}
        return tuple(sorted(folders)), sorted(labeled)

    def skip(self, name: str) -> None:
        """Count a file that is not an image."""
        self.skipped[os.path.splitext(name)[1].lower() or _NO_SUFFIX] += 1


def image_suffixes() -> set[str]:
    """Return the suffixes, in lower case, of files that Pillow decodes, and of HEIF with pillow-heif installed."""
    suffixes = Image.registered_extensions()  # loads all plugins, which Image.OPEN lists then
    formats = {*Image.OPEN, "MPO"} - _FOREIGN  # MPO files are opened as JPEG
    heif = _HEIF if find_spec("pillow_heif") else set()  # images.py loads it with the first file
    return {suffix for suffix, name in suffixes.items() if name in formats} | heif


def is_junk(name: str) -> bool:
    """Return whether a file or folder is hidden or belongs to an operating system, an archiver or a storage."""
    return name.startswith(".") or name.lower() in _SYSTEM


def list_folder(root: Path) -> Listing:
    """Return the images and folders below a folder. Links are followed; links to a folder above them are skipped.

    Raises:
        OSError: if a folder cannot be read.
    """
    listing = Listing()
    _scan(str(root), (), {_identity(root)}, listing, image_suffixes())
    return listing


def _scan(folder: str, parts: Parts, above: set[tuple[int, int]], listing: Listing, known: set[str]) -> None:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        below = (*parts, entry.name)
        if is_junk(entry.name):
            listing.skipped[JUNK] += 1
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            identity = _identity(entry.path)
            if identity in above:
                listing.skipped[_CYCLIC] += 1
            else:
                listing.folders.append(below)
                _scan(entry.path, below, above | {identity}, listing, known)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            listing.skipped[DANGLING] += 1
        elif os.path.splitext(entry.name)[1].lower() in known:
            listing.images.append(below)
        else:
            listing.skip(entry.name)


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def read_class_folders(root: Path) -> Contents:
    """Return the images of a folder with one folder per class.

    The class of an image is the folder directly below the root, however deep the image is, as in torchvision's
    ``ImageFolder``.
    """
    listing = list_folder(root)
    class_names, labeled = listing.label()
    position = {name: label for label, name in enumerate(class_names)}
    names = ["/".join(parts) for _, parts in labeled]
    return Contents(Files(root, names), [position[name] for name, _ in labeled], class_names, skipped=listing.skipped)


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folders of the splits of a folder by their names; none if its folders are classes."""
    folders = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and not is_junk(entry.name)]
    found = find_splits({folder.name: is_split(folder.name) and _is_divided(folder) for folder in folders})
    return {name: root / name for name in found}


def _is_divided(folder: Path) -> bool:
    """Return whether a folder holds folders, tar files or parquet files, and no images."""
    known, divided = image_suffixes(), False
    for entry in folder.iterdir():
        if not is_junk(entry.name):
            suffix = entry.suffix.lower()
            if suffix in known and not entry.is_dir():
                return False
            divided |= suffix in (".tar", ".parquet") or entry.is_dir()
    return divided


def list_images(folder: Path) -> list[Path]:
    """Return the sorted paths of the images below a folder, relative to it; none if the folder does not exist."""
    return [Path(*parts) for parts in list_folder(folder).images] if folder.is_dir() else []


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
