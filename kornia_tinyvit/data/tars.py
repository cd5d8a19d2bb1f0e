"""Labeled images in tar files, read in place without unpacking."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from PIL import Image

from kornia_tinyvit.data.datasets import Contents

#: Suffixes of compressed tar files.
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class _Span(NamedTuple):
    """The position of an image in the archives, in bytes."""

    archive: int
    file: str
    start: int
    size: int


class _TarFiles:
    """Images in tar files, with an index of their positions."""

    def __init__(self, archives: list[Path], spans: list[_Span]) -> None:
        self.archives, self.spans = archives, spans

    def name(self, index: int) -> str:
        return f"{self.archives[self.spans[index].archive].name}: {self.spans[index].file}"

    def place(self, index: int) -> str:
        return f"{self.archives[self.spans[index].archive]}: {self.spans[index].file}"

    def size(self, index: int) -> int:
        return self.spans[index].size

    def open(self, index: int) -> BinaryIO:
        # Opening takes microseconds, decoding milliseconds. ImageNet's 1,000 files may exceed the limit of open files.
        span = self.spans[index]
        with open(self.archives[span.archive], "rb") as file:
            file.seek(span.start)
            content = file.read(span.size)
        if len(content) < span.size:
            raise OSError(f"the tar file ends after {len(content)} of its {span.size} bytes")
        return io.BytesIO(content)


class Archive:
    """The images and folders of one tar file.

    Attributes:
        stem: its name without the suffix.
        images: start and size in bytes of each image, by the parts of its path.
        folders: the parts of the folders' paths.

    Raises:
        ValueError: if it is not a tar file, or compressed.
    """

    def __init__(self, path: Path) -> None:
        if path.name.lower().endswith(COMPRESSED):
            raise ValueError(f"{path} is compressed, so images cannot be read from its middle; unpack it to a .tar.")
        self.stem = path.stem
        self.images: dict[tuple[str, ...], tuple[int, int]] = {}
        self.folders: set[tuple[str, ...]] = set()
        self._spans: dict[str, tuple[int, int]] = {}
        self._known = Image.registered_extensions()
        try:
            with tarfile.open(path, "r:") as tar:
                self._index(tar)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a tar file, or is compressed or corrupt: {error}") from error

    def _index(self, tar: tarfile.TarFile, prefix: tuple[str, ...] = (), start: int = 0) -> None:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # a kilobyte per image
            parts = prefix + tuple(part for part in PurePosixPath(member.name).parts if part not in ("/", "."))
            if not parts or any(part.startswith(".") for part in parts):
                continue
            if member.isdir():
                self.folders.add(parts)
            elif member.isreg() and parts[-1].lower().endswith(".tar"):
                folder = (*parts[:-1], parts[-1][: -len(".tar")])
                self.folders.add(folder)
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    self._index(inner, folder, start + member.offset_data)
            elif os.path.splitext(parts[-1])[1].lower() in self._known:
                self._add(member, parts, start)

    def _add(self, member: tarfile.TarInfo, parts: tuple[str, ...], start: int) -> None:
        if member.isreg():
            self._spans[member.name] = (start + member.offset_data, member.size)
        span = self._spans.get(member.linkname if member.islnk() else member.name)  # a hard link to an earlier file
        if span is not None:
            self.images[parts] = span
            if len(parts) > 1:
                self.folders.add(parts[:-1])


#: Names of the classes, which may have no images, and the class of each image by the parts of its path.
_Classes = tuple[Iterable[str], dict[tuple[str, ...], str]]


def by_archive(archive: Archive) -> _Classes:
    """Take the archive's name as the class of its images."""
    return [archive.stem], dict.fromkeys(archive.images, archive.stem)


def by_folder(archive: Archive) -> _Classes:
    """Take the top-level folders as classes, or those inside if there is only one top-level folder."""
    folders = archive.folders
    whole = len({folder[0] for folder in folders}) == 1 and any(len(folder) > 1 for folder in folders)
    depth = 1 if whole else 0
    return (
        [folder[depth] for folder in folders if len(folder) > depth],
        {parts: parts[depth] for parts in archive.images if len(parts) > depth + 1},
    )


def read_tars(paths: list[Path], classes: Callable[[Archive], _Classes]) -> Contents:
    """Return the images of tar files and their classes.

    Args:
        paths: the tar files.
        classes: :func:`by_archive` or :func:`by_folder`.

    Raises:
        ValueError: if one is not a tar file, or compressed.
    """
    names: set[str] = set()
    found: list[tuple[str, tuple[str, ...], int, int, int]] = []
    for number, path in enumerate(paths):
        archive = Archive(path)
        known, class_of = classes(archive)
        names.update(known)
        found += [(class_name, parts, number, *archive.images[parts]) for parts, class_name in class_of.items()]
    found.sort()
    class_names = tuple(sorted(names))
    position = {name: label for label, name in enumerate(class_names)}
    spans = [_Span(number, "/".join(parts), start, size) for _, parts, number, start, size in found]
    return Contents(_TarFiles(paths, spans), [position[class_name] for class_name, *_ in found], class_names)
