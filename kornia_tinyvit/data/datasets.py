"""What all datasets have in common: images that lie in files, and a target for each."""

from __future__ import annotations

import copy
import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Generic, Protocol, Self, TypeVar

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from kornia_tinyvit.images import read_image, read_pixels

__all__ = ["BrokenImageError", "ImageDataset"]

Target = TypeVar("Target")


class BrokenImageError(ValueError):
    """An image of a dataset, or its target, cannot be decoded; the message names it."""


class ImageFiles(Protocol):
    """Where images lie. It is pickled without open files, since workers may be processes of their own."""

    def name(self, index: int) -> str:
        """Return a name that no other image has, the same on each machine."""

    def place(self, index: int) -> str:
        """Return where the image lies on this machine, for a person."""

    def size(self, index: int) -> int:
        """Return how many bytes the image has."""

    def open(self, index: int) -> BinaryIO:
        """Return an image as a file; safe in threads and forked processes."""


@dataclass(frozen=True)
class Contents:
    """What the reader of a format found.

    Attributes:
        images: the image files.
        targets: for each image what its dataset makes a target of: a class index, a file, boxes.
        class_names: names of the classes in the order of their indices, where the format states them.
        left_out: a sentence for each label that has no effect.
        without_mask: names of images without labels, which are left out.
        without_image: names of labels without an image, which are left out.
    """

    images: ImageFiles
    targets: Sequence[Any]
    class_names: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()
    without_mask: tuple[str, ...] = ()
    without_image: tuple[str, ...] = ()


class ImageDataset(Dataset[tuple[Tensor, Target]], Generic[Target]):
    """Images with a target each: item :math:`i` is an image :math:`(3, H, W)` in [0, 1] and its target.

    Each subclass has a class method ``open`` that finds out what a path holds.

    Attributes:
        class_names: names of the classes in the order of their indices; ``None`` where nothing states them.
        num_classes: how many classes there are.
        left_out: a sentence for each label that has no effect.
        without_mask: names of images without labels, which are left out.
        without_image: names of labels without an image, which are left out.
    """

    class_names: tuple[str, ...] | None

    def __init__(self, contents: Contents) -> None:
        self._images = contents.images
        self._rows: Sequence[int] = range(len(contents.targets))  # the image of each target
        self._targets = contents.targets
        self.class_names = contents.class_names
        self.num_classes = len(contents.class_names or ())
        self.left_out = contents.left_out
        self.without_mask, self.without_image = contents.without_mask, contents.without_image
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._targets)

    def __iter__(self) -> Iterator[tuple[Tensor, Target]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self._read(index, read_image)

    def read(self, index: int) -> tuple[Tensor, Target]:
        """Return an image as it is stored, :math:`(3, H, W)`, uint8 in [0, 255], and its target.

        Raises:
            BrokenImageError: if one of them cannot be decoded, or they do not fit together.
            FileNotFoundError: if a file is gone.
        """
        return self._read(index, read_pixels)

    def name(self, index: int) -> str:
        """Return an image's name: its path in its folder, ``images.tar: cat/1.jpg`` or ``train.parquet row 17``."""
        return self._images.name(self._rows[index])

    def place(self, index: int) -> str:
        """Return where an image lies on this machine: its path, and what tells it from others in that file."""
        return self._images.place(self._rows[index])

    def sample(self, count: int, seed: int = 0) -> Self:
        """Return so many of the images, drawn with a seed, as a dataset of their own with the same classes.

        Raises:
            ValueError: if there are not as many.
        """
        if not 0 < count <= len(self):
            raise ValueError(f"Cannot draw {count} of {len(self)} images.")
        return self._part(self._shuffled(seed)[:count])

    def split(self, count: int, seed: int = 0) -> tuple[Self, Self]:
        """Hold out so many of the images: return the others, and those that :meth:`sample` draws.

        Raises:
            ValueError: if there are not more images than that.
        """
        if not 0 < count < len(self):
            raise ValueError(f"Cannot hold out {count} of {len(self)} images and keep some.")
        order = self._shuffled(seed)
        return self._part(order[count:]), self._part(order[:count])

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that differ for datasets that differ, wherever they lie.

        They depend on the names of the images and classes, the sizes of the files in bytes, the targets as far as they
        are read when a dataset is opened, and what :meth:`open` was given; no image is decoded.
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
        """Return what the fingerprint knows of a target."""
        return stored

    def _settings(self) -> tuple[object, ...]:
        """Return what the fingerprint knows of the whole dataset."""
        return ()

    def _shuffled(self, seed: int) -> list[int]:
        order: list[int] = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return order

    def _part(self, indices: Iterable[int]) -> Self:
        part = copy.copy(self)
        kept = sorted(indices)
        part._rows = [self._rows[index] for index in kept]
        part._targets = [self._targets[index] for index in kept]
        part._fingerprint = None
        return part

    def _read(self, index: int, read: Callable[[BinaryIO], Tensor]) -> tuple[Tensor, Target]:
        row = self._rows[index]
        place = self._images.place(row)
        try:
            with self._images.open(row) as file:
                image = read(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no image {place} any more.") from None
        except (ValueError, OSError) as error:
            reason = error.__cause__ or error
            if isinstance(reason, UnidentifiedImageError):  # which would name an object in memory
                reason = ValueError("Pillow does not know its format")
            raise BrokenImageError(f"{place} is not an image that can be read: {reason}") from error
        return image, self._target(self._targets[index], (image.shape[1], image.shape[2]), place)


def check_size(place: str, size: tuple[int, int], stated: tuple[int, int] | None, label: str) -> None:
    """Reject labels of another height and width than their image's, which is upright.

    Args:
        place: where the image lies.
        size: its height and width.
        stated: those of its labels, if they have any.
        label: begins what the error says of the labels.

    Raises:
        BrokenImageError: if they differ.
    """
    if stated not in (None, size):
        raise BrokenImageError(
            f"{place} is {size[1]}x{size[0]} pixels upright, but {label} {stated[1]}x{stated[0]}; labels have the size "
            "of their image as it is shown."
        )


def match_classes(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> list[int] | None:
    """Return the positions of a dataset's classes among a network's, or ``None`` to match them by position.

    Args:
        ours: names of the dataset's classes, where they are known.
        theirs: names of the network's.

    Raises:
        ValueError: if some but not all of the dataset's classes are among the network's.
    """
    if ours is None or theirs is None or not set(ours) & set(theirs):
        return None
    unknown = sorted(set(ours) - set(theirs))
    if unknown:
        raise ValueError(f"The network does not know the classes {', '.join(unknown[:5])} of the data.")
    return [theirs.index(name) for name in ours]


def check_names(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> None:
    """Reject a dataset whose classes have other names than a network's, or another order.

    Args:
        ours: names of the dataset's classes, where they are known.
        theirs: names of the network's.

    Raises:
        ValueError: naming some that differ.
    """
    if ours is not None and theirs is not None and tuple(ours) != tuple(theirs):
        others = sorted(set(ours) ^ set(theirs))[:5]
        raise ValueError(f"The validation images have other classes than the network: {', '.join(others)}.")
