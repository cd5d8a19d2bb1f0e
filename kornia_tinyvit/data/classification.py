"""Labelled pictures from class folders, tar files or the Hugging Face hub's parquet files."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import re
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from kornia_tinyvit.data.datasets import BrokenImageError, match_classes
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.images import read_image, read_pixels

__all__ = ["ClassificationDataset"]

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_IMAGE_COLUMNS = ("image", "img")  # what data sets of the hub call them


def read_stored(path: Path) -> Tensor:
    """Return a picture's file as it is stored, :math:`(3, H, W)`, uint8 in [0, 255].

    Raises:
        BrokenImageError: if it cannot be decoded.
        FileNotFoundError: if there is no such file.
    """
    try:
        return read_pixels(path)
    except ValueError as error:
        raise BrokenImageError(str(error)) from error


def read_text(path: Path) -> str:
    """Return what a text file says, in UTF-8.

    Raises:
        ValueError: naming the file, if it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error


class ClassificationDataset(Dataset[tuple[Tensor, int]]):
    r"""Pictures with their class: item :math:`i` is a picture :math:`(3, H, W)` in [0, 1] and a class index.

    Nothing is unpacked: pictures in tar files are read where they lie, and those of parquet files stay in Arrow's
    memory, which the forked workers of a data loader share. Hidden files and folders are ignored.
    :meth:`open` makes one.

    Attributes:
        labels: class index of each picture.
        class_names: names of the classes, sorted, where folders or tar files tell them; ``None`` for parquet files.
        num_classes: how many classes there are; for parquet files one more than the largest label.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source
        self.labels = source.labels
        self.class_names = source.class_names
        self.num_classes = max(self.labels) + 1 if self.class_names is None else len(self.class_names)
        self._fingerprint: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> ClassificationDataset:
        """Open a data set from one path.

        Args:
            path: one of

                - a folder that holds a folder for each class, named after it; a folder without pictures is a class too;
                - a tar file of such a folder, not compressed;
                - a folder of tar files, one a class and named after it, or the one tar file of them, as ImageNet comes;
                - a parquet file as the Hugging Face hub writes them, with a column ``image`` or ``img`` of structs that
                  hold ``bytes`` and an integer column ``label``; or a folder of such files, the pieces of one split.

        Raises:
            FileNotFoundError: if there is no such path.
            ValueError: if there are no labelled pictures in it, or a label is not a class index.
            MissingExtraError: if a parquet file is asked for without pyarrow.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"There is no data set {path}; expected a folder of class folders, a tar file or a parquet file."
            )
        source = _open(path)
        if not source.labels:
            raise ValueError(f"{path} holds no pictures in class folders such as {path}/cat/1.jpg.")
        return cls(source)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._decode(index, read_image), self.labels[index]

    def pixels(self, index: int) -> Tensor:
        """Return a picture as it is stored: :math:`(3, H, W)`, uint8 in [0, 255].

        Raises:
            BrokenImageError: if it cannot be decoded.
        """
        return self._decode(index, read_pixels)

    def name(self, index: int) -> str:
        """Tell where a picture lies: ``cat/1.jpg``, ``pictures.tar: cat/1.jpg`` or ``train.parquet row 17``."""
        return self._source.name(range(len(self))[index])

    def sample(self, count: int, seed: int = 0) -> ClassificationDataset:
        """Return so many of the pictures, drawn with a seed, as a data set of their own with the same classes.

        Raises:
            ValueError: if there are not as many.
        """
        if not 0 < count <= len(self):
            raise ValueError(f"Cannot draw {count} of {len(self)} pictures.")
        return self._take(self._shuffled(seed)[:count])

    def split(self, count: int, seed: int = 0) -> tuple[ClassificationDataset, ClassificationDataset]:
        """Hold out so many of the pictures: return the others, and those that :meth:`sample` draws.

        Raises:
            ValueError: if there are not more pictures than that.
        """
        if not 0 < count < len(self):
            raise ValueError(f"Cannot hold out {count} of {len(self)} pictures and keep some.")
        order = self._shuffled(seed)
        return self._take(order[count:]), self._take(order[:count])

    def _shuffled(self, seed: int) -> Tensor:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def _take(self, chosen: Tensor) -> ClassificationDataset:
        rows = chosen.sort().values.tolist()
        drawn = copy.copy(self)
        drawn._source = _Sample(self._source, rows)
        drawn.labels = drawn._source.labels
        drawn._fingerprint = None
        return drawn

    def with_classes(self, names: tuple[str, ...] | None) -> ClassificationDataset:
        """Return the pictures with the labels of other pictures or of a network, whose classes are told by name.

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
        mapped.labels = [positions[label] for label in self.labels]
        mapped.class_names, mapped.num_classes = names, len(names)
        mapped._fingerprint = None
        return mapped

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that tell this data set from others, wherever it lies.

        They are drawn from the number of pictures, their names, labels and sizes in bytes, and the names of the
        classes; no picture is decoded.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(repr((len(self), self.class_names)).encode())
            for index, (label, size) in enumerate(zip(self.labels, self._source.sizes(), strict=True)):
                digest.update(f"{self._source.name(index)}\0{label}\0{size}\n".encode(errors="surrogateescape"))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _decode(self, index: int, read: Callable[[BinaryIO], Tensor]) -> Tensor:
        index = range(len(self))[index]
        try:
            with self._source.open(index) as file:
                return read(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no picture {self._source.place(index)} any more.") from None
        except (ValueError, OSError) as error:
            reason = error.__cause__ or error
            if isinstance(reason, UnidentifiedImageError):  # which would name an object in memory
                reason = ValueError("Pillow does not know its format")
            raise BrokenImageError(
                f"{self._source.place(index)} is not a picture that can be read: {reason}"
            ) from error


def collate(items: list[tuple[Tensor, int]]) -> tuple[list[Tensor], Tensor]:
    """Put pictures of different sizes into a list and their classes into a tensor, for a data loader."""
    return [picture for picture, _ in items], torch.tensor([label for _, label in items])


class _Source(Protocol):
    """Where pictures lie. It is pickled without open files, since workers may be processes of their own."""

    labels: list[int]
    class_names: tuple[str, ...] | None

    def name(self, index: int) -> str:
        """Tell a picture from the others, the same on each machine."""

    def place(self, index: int) -> str:
        """Tell a person where the picture lies on this machine."""

    def sizes(self) -> Iterable[int]:
        """Return the bytes of each picture."""

    def open(self, index: int) -> BinaryIO:
        """Return a picture as a file; safe in threads and forked processes."""


class _Sample:
    """Some of the pictures of another source."""

    def __init__(self, source: _Source, rows: list[int]) -> None:
        self.source = source
        self.rows = rows
        self.labels = [source.labels[row] for row in rows]
        self.class_names = source.class_names

    def name(self, index: int) -> str:
        return self.source.name(self.rows[index])

    def place(self, index: int) -> str:
        return self.source.place(self.rows[index])

    def sizes(self) -> Iterable[int]:
        sizes = list(self.source.sizes())
        return [sizes[row] for row in self.rows]

    def open(self, index: int) -> BinaryIO:
        return self.source.open(self.rows[index])


def _open(path: Path) -> _Source:
    if not path.is_dir():
        if path.name.lower().endswith(_COMPRESSED):
            raise ValueError(f"{path} is compressed, so pictures cannot be read from its middle; unpack it to a .tar.")
        return _Tars([path], _Tars.by_folder) if path.suffix.lower() == ".tar" else _Parquet([path])
    folders = _Folders(path)
    if folders.labels:
        return folders
    pieces = _visible(path, ".parquet")
    if pieces:
        splits = sorted({re.sub(r"[-_.]*\d.*", "", piece.stem) for piece in pieces})
        if len(splits) > 1:
            raise ValueError(
                f"{path} holds parquet files of several splits ({', '.join(splits[:5])}); name one file, or give each "
                f"split a folder of its own."
            )
        return _Parquet(pieces)
    tars = _visible(path, ".tar")
    return _Tars(tars, _Tars.by_archive) if tars else folders


def _visible(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == suffix and not file.name.startswith("."))


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")  # tools leave hidden folders behind


class _Folders:
    """A folder of class folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.class_names: tuple[str, ...] | None = tuple(
            sorted(each.name for each in root.iterdir() if _is_class(each))
        )
        self.labels: list[int] = []
        self.files: list[str] = []
        for label, name in enumerate(self.class_names):
            files = sorted(pictures_below(root / name), key=lambda file: file.parts)
            self.files += [file.relative_to(root).as_posix() for file in files]
            self.labels += [label] * len(files)

    def name(self, index: int) -> str:
        return self.files[index]

    def place(self, index: int) -> str:
        return str(self.root / self.files[index])

    def sizes(self) -> Iterable[int]:
        return (os.path.getsize(self.root / file) for file in self.files)

    def open(self, index: int) -> BinaryIO:
        return open(self.root / self.files[index], "rb")


def pictures_below(folder: Path) -> Iterator[Path]:
    """Return the files below a folder whose names end as those of pictures do; hidden ones are left out."""
    known = Image.registered_extensions()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in known:
                yield Path(parent, name)


class _Tars:
    """Pictures inside tar files: an index of where each one starts."""

    def __init__(self, archives: list[Path], classes: Callable[[list[_Members]], Iterable[_Classes]]) -> None:
        self.archives = archives
        members = [_Members(archive) for archive in archives]
        found = list(classes(members))
        names = sorted({name for each in found for name in each.names})
        position = {name: label for label, name in enumerate(names)}
        rows = sorted(
            (position[name], PurePosixPath(file).parts, number, file)
            for number, each in enumerate(found)
            for file, name in each.of_pictures.items()
        )
        self.class_names: tuple[str, ...] | None = tuple(names)
        self.labels = [label for label, *_ in rows]
        self.files = [file for *_, file in rows]
        self.archive_of = [number for _, _, number, _ in rows]
        self.spans = [members[number].pictures[file] for _, _, number, file in rows]

    @staticmethod
    def by_archive(members: list[_Members]) -> Iterator[_Classes]:
        """Each archive is a class."""
        for each in members:
            yield _Classes([each.stem], dict.fromkeys(each.pictures, each.stem))

    @staticmethod
    def by_folder(members: list[_Members]) -> Iterator[_Classes]:
        """Each first folder is a class; where all lie in one first folder, each folder in that one."""
        for each in members:
            folders = each.folders
            whole = len({folder[0] for folder in folders}) == 1 and any(len(folder) > 1 for folder in folders)
            depth = 1 if whole else 0
            parts = {file: PurePosixPath(file).parts for file in each.pictures}
            yield _Classes(
                [folder[depth] for folder in folders if len(folder) > depth],
                {file: way[depth] for file, way in parts.items() if len(way) > depth + 1},
            )

    def name(self, index: int) -> str:
        return f"{self.archives[self.archive_of[index]].name}: {self.files[index]}"

    def place(self, index: int) -> str:
        return f"{self.archives[self.archive_of[index]]}: {self.files[index]}"

    def sizes(self) -> Iterable[int]:
        return (size for _, size in self.spans)

    def open(self, index: int) -> BinaryIO:
        # Opening takes microseconds, decoding milliseconds; and ImageNet's thousand files may be more than a process
        # may hold open.
        start, size = self.spans[index]
        with open(self.archives[self.archive_of[index]], "rb") as file:
            file.seek(start)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"the tar file ends after {len(content)} of its {size} bytes")
        return io.BytesIO(content)


class _Classes:
    """What the folders of one archive say: names of classes, and the class of each picture."""

    def __init__(self, names: list[str], of_pictures: dict[str, str]) -> None:
        self.names = names
        self.of_pictures = of_pictures


class _Members:
    """The pictures of one tar file, with their start and size in bytes, and its folders."""

    def __init__(self, archive: Path) -> None:
        self.stem = archive.stem
        self.pictures: dict[str, tuple[int, int]] = {}
        self.folders: set[tuple[str, ...]] = set()
        self._spans: dict[str, tuple[int, int]] = {}
        self._known = Image.registered_extensions()
        try:
            with tarfile.open(archive, "r:") as tar:
                self._index(tar)
        except tarfile.TarError as error:
            raise ValueError(f"{archive} is no tar file, or a compressed or damaged one: {error}") from error

    def _index(self, tar: tarfile.TarFile, prefix: tuple[str, ...] = (), start: int = 0) -> None:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # they would take a kilobyte for each picture
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
        elif not (member.islnk() and member.linkname in self._spans):  # tar stores a file's second name as a link
            return
        source = member.linkname if member.islnk() else member.name
        self.pictures["/".join(parts)] = self._spans[source]
        if len(parts) > 1:
            self.folders.add(parts[:-1])


class _Parquet:
    """Rows of parquet files, kept as Arrow's columns rather than as Python's objects."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        columns = [_read_parquet(file) for file in files]
        self.pictures = [pictures for pictures, _ in columns]
        self.labels = [label for _, labels in columns for label in labels]
        self.ends = list(accumulate(len(pictures) for pictures in self.pictures))

    def __reduce__(self) -> tuple[type[_Parquet], tuple[list[Path]]]:
        return _Parquet, (self.files,)  # reading again is cheaper than sending gigabytes

    def _row(self, index: int) -> tuple[int, int]:
        piece = bisect_right(self.ends, index)
        return piece, index - (self.ends[piece - 1] if piece else 0)

    def name(self, index: int) -> str:
        piece, row = self._row(index)
        return f"{self.files[piece].name} row {row}"

    def place(self, index: int) -> str:
        piece, row = self._row(index)
        return f"{self.files[piece]} row {row}"

    def sizes(self) -> Iterable[int]:
        import pyarrow.compute as pc

        return (size or 0 for pictures in self.pictures for size in pc.binary_length(pictures).to_pylist())

    def open(self, index: int) -> BinaryIO:
        piece, row = self._row(index)
        content = self.pictures[piece][row].as_buffer()
        if content is None:
            raise ValueError("the row holds no bytes")
        return io.BytesIO(content)


def _read_parquet(path: Path) -> tuple[Any, list[int]]:
    """Return the pictures of a file, a chunked array of binary values, and its labels."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("Parquet files need pyarrow: pip install 'kornia-tinyvit[train]'.") from error
    try:
        file = pq.ParquetFile(path, memory_map=True)
        column = next((name for name in _IMAGE_COLUMNS if name in file.schema_arrow.names), _IMAGE_COLUMNS[0])
        table = file.read(columns=[f"{column}.bytes", "label"])
        pictures, labels = pc.struct_field(table[column], "bytes"), table["label"]
        pc.binary_length(pictures)  # refuses a column of anything else
    except (pa.ArrowException, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is no parquet file with a column image or img (structs with bytes) and a column label: {error}"
        ) from error
    if not pa.types.is_integer(labels.type):
        raise ValueError(f"{path} has labels of the type {labels.type}; expected integers, the class indices.")
    values = labels.to_pylist()
    for row, label in enumerate(values):
        if label is None or label < 0:
            raise ValueError(
                f"{path} row {row} has the label {label}; expected a class index from 0. The test pictures of some "
                f"data sets have no labels; take the validation pictures."
            )
    return pictures, values
