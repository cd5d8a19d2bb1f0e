"""Labeled images in tar files, read in place without unpacking."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.folders import DANGLING, JUNK, Listing, Parts, image_suffixes, is_junk
from kornia_tinyvit.data.splits import UNDIVIDED, check_split, choose_split, find_splits, is_split

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


class Archive(Listing):
    """The images and folders of one tar file.

    Attributes:
        stem: its name without the suffix.
        spans: start and size in bytes of each image.

    Raises:
        ValueError: if it is not a tar file, or compressed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.name.lower().endswith(COMPRESSED):
            raise ValueError(f"{path} is compressed, so images cannot be read from its middle; unpack it to a .tar.")
        self.stem = path.stem
        self.spans: dict[Parts, tuple[int, int]] = {}
        self._links: dict[Parts, Parts] = {}
        self._known = image_suffixes()
        try:
            with tarfile.open(path, "r:") as tar:
                self._index(tar)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is not a tar file, or is compressed or corrupt: {error}") from error
        for parts, target in self._links.items():
            if target in self.spans:
                self.spans[parts] = self.spans[target]
            else:
                self.skipped[DANGLING] += 1
        self.images = sorted(self.spans)
        self.folders += [parts[:-1] for parts in self.images]

    def _index(self, tar: tarfile.TarFile, prefix: Parts = (), start: int = 0) -> None:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # a kilobyte per image
            parts = prefix + _parts(member.name)
            if not parts:
                continue
            if any(map(is_junk, parts)):
                self.skipped[JUNK] += not member.isdir()
            elif member.isdir():
                self.folders.append(parts)
            elif member.isreg() and parts[-1].lower().endswith(".tar"):
                folder = (*parts[:-1], parts[-1][: -len(".tar")])
                self.folders.append(folder)
                with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                    self._index(inner, folder, start + member.offset_data)
            elif os.path.splitext(parts[-1])[1].lower() not in self._known:
                self.skip(parts[-1])
            elif member.isreg():
                self.spans[parts] = start + member.offset_data, member.size
            elif member.islnk():  # relative to the archive, a symbolic link to its folder
                self._links[parts] = prefix + _parts(member.linkname)
            elif member.issym():
                self._links[parts] = prefix + _parts(posixpath.join(posixpath.dirname(member.name), member.linkname))

    def root(self, split: str, path: Path) -> tuple[Parts, tuple[str, ...]]:
        """Return the folder of the class folders.

        A single folder at the top is this folder if it holds several folders or has the name of the archive. Otherwise
        it is a class, as in a folder.

        Args:
            split: name of the split; without splits all images are returned.
            path: location of the archive, for the message.

        Returns:
            Its path, and a note for the summary if there are no splits.

        Raises:
            MissingSplitError: if there is no such split.
        """
        root: Parts = ()
        tops = self._below(root)
        if len(tops) == 1:
            inner = self._below((tops[0],))
            if len(inner) > 1 or (inner and (tops[0] == self.stem or is_split(inner[0]))):
                root, tops = (tops[0],), inner
        direct = {parts[:-1] for parts in self.images}
        splits = find_splits({top: (*root, top) not in direct and bool(self._below((*root, top))) for top in tops})
        if splits:
            return (*root, choose_split(path, split, {name: name for name in splits})), ()
        check_split(path, split)
        return root, (UNDIVIDED,)

    def _below(self, prefix: Parts) -> list[str]:
        """Return the names of the folders directly below a folder."""
        depth = len(prefix)
        return sorted({parts[depth] for parts in self.folders if len(parts) > depth and parts[:depth] == prefix})


def read_tar(path: Path, split: str) -> Contents:
    """Return the images of a tar file of class folders.

    Args:
        path: the tar file.
        split: name of the split, see :meth:`Archive.root`.

    Raises:
        ValueError: if it is not a tar file, or compressed.
        MissingSplitError: if there is no such split.
    """
    archive = Archive(path)
    root, notes = archive.root(split, path)
    class_names, labeled = archive.label(root)
    found = [(name, parts, 0, archive) for name, parts in labeled]
    return replace(_collect([path], class_names, found, archive.skipped), notes=notes)


def read_class_tars(paths: list[Path]) -> Contents:
    """Return the images of tar files of one class each, which is the name of the file.

    Raises:
        ValueError: if one is not a tar file, or compressed.
    """
    archives = [Archive(path) for path in paths]
    found = [
        (archive.stem, parts, number, archive) for number, archive in enumerate(archives) for parts in archive.images
    ]
    skipped = sum((archive.skipped for archive in archives), Counter[str]())
    return _collect(paths, tuple(sorted({archive.stem for archive in archives})), found, skipped)


def _collect(
    paths: list[Path],
    class_names: tuple[str, ...],
    found: list[tuple[str, Parts, int, Archive]],
    skipped: Counter[str],
) -> Contents:
    """Return the images given by class, path in the archive, and archive."""
    found.sort(key=lambda each: each[:3])
    position = {name: label for label, name in enumerate(class_names)}
    spans = [_Span(number, "/".join(parts), *archive.spans[parts]) for _, parts, number, archive in found]
    return Contents(_TarFiles(paths, spans), [position[name] for name, *_ in found], class_names, skipped=skipped)


def _parts(name: str) -> Parts:
    return tuple(part for part in posixpath.normpath(name).split("/") if part not in ("", "."))
