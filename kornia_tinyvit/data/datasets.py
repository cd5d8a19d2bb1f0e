"""The base of all datasets: images in files, each with a target."""

from __future__ import annotations

import copy
import hashlib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Generic, Protocol, Self, TypeVar

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from kornia_tinyvit.config import name_classes
from kornia_tinyvit.data.splits import UNDIVIDED
from kornia_tinyvit.images import read_image, read_pixels

__all__ = ["BrokenImageError", "ImageDataset"]

Target = TypeVar("Target")

_IMAGENET = (1000, 21841)  # classes of ImageNet-1k and ImageNet-22k
_WORDNET_ID, _NUMBERED = re.compile(r"n\d{8}"), re.compile(r"class (\d+)")


class BrokenImageError(ValueError):
    """An image of a dataset or its target cannot be decoded; the message names it."""


class ImageFiles(Protocol):
    """The stored images of a dataset. Pickled without open files, as workers may be spawned processes."""

    def name(self, index: int) -> str:
        """Return the image's unique name, independent of the machine."""

    def place(self, index: int) -> str:
        """Return the image's location on this machine, for messages."""

    def size(self, index: int) -> int:
        """Return the size of the encoded image in bytes."""

    def open(self, index: int) -> BinaryIO:
        """Open the encoded image; safe in threads and forked processes."""


@dataclass(frozen=True)
class Contents:
    """The contents of a dataset, as returned by the reader of a format.

    Attributes:
        images: the image files.
        targets: for each image what its dataset converts to a target: a class index, a file, boxes.
        class_names: names of the classes in the order of their indices, where the format states them.
        without_mask: names of images without labels, which are dropped.
        without_image: names of labels without an image, which are dropped.
        notes: what else was left out or decided, for the summary.
        skipped: how many files that are not images were left out, by kind.
    """

    images: ImageFiles
    targets: Sequence[Any]
    class_names: tuple[str, ...] | None = None
    without_mask: tuple[str, ...] = ()
    without_image: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)


class ImageDataset(Dataset[tuple[Tensor, Target]], Generic[Target]):
    """Images with a target each: item :math:`i` is an image :math:`(3, H, W)`, float32 in [0, 1], and its target.

    The class method ``open`` of each subclass detects the format of a path.

    Args:
        contents: the images and targets, as read by ``open``.

    Attributes:
        class_names: names of the classes in the order of their indices; ``None`` where the format states none.
        num_classes: number of classes.
        without_mask: names of images without labels, which are dropped.
        without_image: names of labels without an image, which are dropped.
        skipped: how many files that are not images were left out, by kind such as ``".heic"``.
    """

    class_names: tuple[str, ...] | None

    def __init__(self, contents: Contents) -> None:
        self._images = contents.images
        self._rows: Sequence[int] = range(len(contents.targets))  # the image of each target
        self._targets = contents.targets
        self.class_names = contents.class_names
        self.num_classes = len(contents.class_names or ())
        self.without_mask, self.without_image = contents.without_mask, contents.without_image
        self._notes = contents.notes
        self.skipped = contents.skipped
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._targets)

    def __iter__(self) -> Iterator[tuple[Tensor, Target]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self._read(index, read_image)

    def read(self, index: int) -> tuple[Tensor, Target]:
        """Return an image :math:`(3, H, W)`, uint8 in [0, 255], and its target.

        Args:
            index: index of the image.

        Raises:
            BrokenImageError: if one of them cannot be decoded, or their sizes differ.
            FileNotFoundError: if a file no longer exists.
        """
        return self._read(index, read_pixels)

    def name(self, index: int) -> str:
        """Return an image's name: its path in its folder, ``images.tar: cat/1.jpg`` or ``train.parquet row 17``."""
        return self._images.name(self._rows[index])

    def place(self, index: int) -> str:
        """Return an image's location on this machine: the path of its file, and its position in an archive."""
        return self._images.place(self._rows[index])

    @property
    def summary(self) -> str:
        """What the data set holds, in one line: images, objects and classes, then what was left out or decided."""
        unpaired = (("image", "without labels", self.without_mask), ("label", "without an image", self.without_image))
        left_out = [f"{count_noun(len(names), noun)} {reason}" for noun, reason, names in unpaired if names]
        left_out += describe_skipped(self.skipped)
        skipped = [f"skipped {', '.join(left_out)}"] if left_out else []
        return "; ".join([", ".join([count_noun(len(self), "image"), *self._counts()]), *skipped, *self._notes])

    @property
    def is_divided(self) -> bool:
        """Whether the images are one of several splits of the path that was opened."""
        return UNDIVIDED not in self._notes

    def sample(self, count: int, seed: int = 0) -> Self:
        """Return a random subset of the images, with the same classes.

        Args:
            count: number of images.
            seed: random seed.

        Raises:
            ValueError: if ``count`` is not in [1, len(self)].
        """
        if not 0 < count <= len(self):
            raise ValueError(f"Cannot sample {count} of {len(self)} images.")
        return self._subset(self._shuffled(seed)[:count])

    def split(self, count: int, seed: int = 0) -> tuple[Self, Self]:
        """Split off a held-out set; return the other images and the held-out ones, which :meth:`sample` returns.

        Args:
            count: number of held-out images.
            seed: random seed.

        Returns:
            The remaining data set and the held-out one.

        Raises:
            ValueError: if ``count`` is not in [1, len(self) - 1].
        """
        if not 0 < count < len(self):
            raise ValueError(f"Cannot hold out {count} of {len(self)} images and keep some.")
        order = self._shuffled(seed)
        return self._subset(order[count:]), self._subset(order[:count])

    def with_classes(self, names: Sequence[str] | None) -> Self:
        """Return the dataset with the class indices of other classes, such as a network's, matched by name.

        Without names on one side the class indices are unchanged.

        Args:
            names: names of the classes in the order of their indices.

        Raises:
            ValueError: if an image has a class that is not among them.
        """
        positions = match_classes(self.class_names, names, self._used_classes())
        if names is None or positions is None or tuple(names) == self.class_names:
            return self
        mapped = self._subset(range(len(self)))
        mapped._move_classes(positions)
        mapped.class_names, mapped.num_classes = tuple(names), len(names)
        return mapped

    def require_objects(self) -> None:
        """Reject images that have nothing to learn; class labels always have.

        Raises:
            ValueError: if no image has an object.
        """

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify the dataset, independent of its location.

        They depend on the names of the images and classes, the sizes of the files in bytes, the targets as far as
        :meth:`open` reads them, and the arguments of :meth:`open`. No image is decoded.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(repr((len(self), self.class_names, *self._settings())).encode())
            for row, target in zip(self._rows, self._targets, strict=True):
                line = f"{self._images.name(row)}\0{self._state(target)}\0{self._images.size(row)}\n"
                digest.update(line.encode(errors="surrogateescape"))
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    @abstractmethod
    def _target(self, stored: Any, size: tuple[int, int], place: str) -> Target:
        """Return the target of an image of a height and a width."""

    def _state(self, stored: Any) -> object:
        """Return the part of a target that the fingerprint depends on."""
        return stored

    def _counts(self) -> list[str]:
        """Return the parts of the summary that follow the number of images."""
        return [count_noun(self.num_classes, "class")] if self.num_classes else []

    def _used_classes(self) -> Sequence[int]:
        """Return the sorted indices of the classes that have labels."""
        return range(self.num_classes)

    def _move_classes(self, positions: Sequence[int]) -> None:
        """Replace each class index by its position."""
        raise NotImplementedError

    def _settings(self) -> tuple[object, ...]:
        """Return the arguments of :meth:`open` that the fingerprint depends on."""
        return ()

    def _shuffled(self, seed: int) -> list[int]:
        return list(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist())

    def _subset(self, indices: Iterable[int]) -> Self:
        subset = copy.copy(self)
        kept = sorted(indices)
        subset._rows = [self._rows[index] for index in kept]
        subset._targets = [self._targets[index] for index in kept]
        subset._fingerprint = None
        return subset

    def _read(self, index: int, read: Callable[[BinaryIO], Tensor]) -> tuple[Tensor, Target]:
        row = self._rows[index]
        place = self._images.place(row)
        try:
            with self._images.open(row) as file:
                image = read(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"Image {place} no longer exists.") from None
        except (ValueError, OSError) as error:
            reason = error.__cause__ or error
            if isinstance(reason, UnidentifiedImageError):  # its message contains the address of a BytesIO
                reason = ValueError("Pillow does not support its format")
            raise BrokenImageError(f"{place} is not an image that can be read: {reason}") from error
        return image, self._target(self._targets[index], (image.shape[1], image.shape[2]), place)


def count_noun(count: int, noun: str) -> str:
    """Return a number with a noun in the singular or plural, such as "1,920 images".

    Args:
        count: the number.
        noun: the singular.
    """
    plural = noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {plural}"


def check_size(place: str, size: tuple[int, int], stated: tuple[int, int] | None, label: str) -> None:
    """Reject labels whose size is not that of their image, after its EXIF orientation is applied.

    Args:
        place: location of the image.
        size: its height and width.
        stated: height and width of its labels, where known.
        label: subject of the message, such as "its mask is".

    Raises:
        BrokenImageError: if the sizes differ.
    """
    if stated not in (None, size):
        raise BrokenImageError(
            f"{place} is {size[1]}x{size[0]} pixels upright, but {label} {stated[1]}x{stated[0]}; expected labels of "
            "the size of the image after its EXIF orientation is applied."
        )


def describe_skipped(skipped: Mapping[str, int]) -> list[str]:
    """Return texts such as ``20 .heic`` and ``1 dangling link``, in descending order of the numbers."""
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return [f"{count:,} {kind.format(s='s' * (count > 1))}" for kind, count in ordered if count]


def match_classes(
    ours: Sequence[str] | None,
    theirs: Sequence[str] | None,
    used: Iterable[int] | None = None,
    owners: tuple[str, str] = ("The data", "the network"),
) -> list[int] | None:
    """Return the position of each class among other classes, by name, or ``None`` if one side has no names.

    Names such as ``class 3`` stand for indices where no names are stated. The WordNet ids of ImageNet's folders, such
    as ``n01440764``, are in the order of the 1000 or 21841 classes of a network that names them otherwise.

    Args:
        ours: names of the classes, where known.
        theirs: names of the other classes, where known.
        used: indices of our classes that have labels; by default all. The position of another one may be -1.
        owners: who has the classes, for the message.

    Raises:
        ValueError: if the other side does not have a used class.
    """
    if ours is None or theirs is None:
        return None
    if tuple(ours) == tuple(theirs):
        return [*range(len(ours))]  # also of names that occur twice, such as ImageNet's two cranes
    known = {name: position for position, name in reversed([*enumerate(theirs)])}
    if not known.keys() & set(ours):
        if len(ours) == len(theirs) and len(ours) in _IMAGENET and all(map(_WORDNET_ID.fullmatch, ours)):
            return [*range(len(ours))]
        if tuple(theirs) == name_classes(None, len(theirs)):
            return [*range(len(ours))] if len(ours) == len(theirs) else None
        numbers = [int(each[1]) for each in map(_NUMBERED.fullmatch, ours) if each]
        if len(numbers) == len(ours) and max(numbers) < len(theirs):
            return numbers
    unknown = [ours[index] for index in (range(len(ours)) if used is None else used) if ours[index] not in known]
    if unknown:
        raise ValueError(
            f"{owners[0]} has the classes {shorten(unknown)}, but {owners[1]} has {shorten(theirs)}. Classes are "
            "matched by name; rename them, or leave out the images."
        )
    return [known.get(name, -1) for name in ours]


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and how many more there are."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
