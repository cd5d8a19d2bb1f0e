"""Splits of a dataset: the names of their folders, files and sections."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

__all__ = ["MissingSplitError"]

Part = TypeVar("Part")

UNDIVIDED = "not divided into splits"  # a note for the summary
#: Names of the same split in torchvision, timm, the Hugging Face Hub, Ultralytics and Roboflow.
_SPLITS = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))


class MissingSplitError(FileNotFoundError, ValueError):
    """A dataset does not have the requested split; the message lists those that it has."""


def split_names(split: str) -> tuple[str, ...]:
    """Return the names under which datasets store a split, the given one first."""
    names = next((names for names in _SPLITS if split in names), ())
    return (split, *(name for name in names if name != split))


def match_split(split: str, names: Collection[str]) -> list[str]:
    """Return those of some names that mean a split, the best first: its own, others of it, those with a year.

    Upper and lower case are the same.
    """
    wanted = [re.escape(name) for name in split_names(split)]
    patterns = [*wanted, *(name + r"\d+" for name in wanted)]
    return [name for each in patterns for name in sorted(names) if re.fullmatch(each, name, re.IGNORECASE)]


def is_split(name: str) -> bool:
    """Return whether a folder, file or section of this name is usually a split."""
    return any(match_split(split, [name]) for split in ("train", "val", "test"))


def check_split(path: Path, split: str) -> None:
    """Reject unusual names of splits where there are none.

    Raises:
        MissingSplitError: if the split is not a usual one.
    """
    if not is_split(split):
        raise MissingSplitError(f"{path} is not divided into splits; it has no split {split!r}.")


def choose_split(path: Path, split: str, parts: Mapping[str, Part]) -> Part:
    """Return the part of a dataset that a split names.

    Args:
        path: location of the dataset, for the message.
        split: name of the split.
        parts: the parts by the names of their folders, files or sections.

    Raises:
        MissingSplitError: if there is no such split.
    """
    names = match_split(split, parts)
    if not names:
        available = f"expected one of {', '.join(sorted(parts))}" if parts else "it has none"
        raise MissingSplitError(f"{path} has no split {split!r}; {available}.")
    return parts[names[0]]


def find_splits(folders: Mapping[str, bool]) -> list[str]:
    """Return which folders are the splits of a dataset of class folders; none if they are classes.

    Folders are splits if all have names of splits, or at least two of them hold class folders: ``train`` beside ``car``
    is a class.

    Args:
        folders: whether each folder holds folders and no images, by name.
    """
    found = sorted(name for name, divided in folders.items() if divided and is_split(name))
    return found if len(found) > 1 or all(map(is_split, folders)) else []
