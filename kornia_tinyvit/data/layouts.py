"""Folders of images beside folders or files of labels, divided into splits or not."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from kornia_tinyvit.data.descriptions import split_names

UNDIVIDED = "not divided into splits"  # a note for the summary


class Layout(NamedTuple):
    """The folders of a split.

    Attributes:
        images: folder of the images.
        labels: folder of the labels.
        notes: for the summary, a note if the folders are not divided into splits.
    """

    images: Path
    labels: Path
    notes: tuple[str, ...] = ()


def find_layout(path: Path, split: str, kinds: Sequence[str]) -> Layout | None:
    """Return ``images/SPLIT`` and ``KIND/SPLIT``, ``SPLIT/images`` and ``SPLIT/KIND``, or ``images`` and ``KIND``.

    A split is also found under other usual names, such as ``valid`` for ``val``, and followed by a year, as in
    ``train2017``.

    Args:
        path: the folder of the data set.
        split: name of the split.
        kinds: names of the folder of labels, the first of which is taken. If there is none, ``None`` is returned.

    Raises:
        ValueError: if there are folders of other splits only.
    """
    for kind in kinds:
        found = list_layouts(path, kind, split)
        names = match_split(split, found)
        if names:
            return found[names[0]]
        if found:
            raise ValueError(f"{path} has no split {split!r}; expected one of {', '.join(sorted(found))}.")
        if (path / "images").is_dir() and (path / kind).is_dir():
            check_split(path, split)
            return Layout(path / "images", path / kind, (UNDIVIDED,))
    return None


def list_layouts(path: Path, kind: str, split: str = "") -> dict[str, Layout]:
    """Return the splits in a folder with their folders: those with usual names, and a given one."""
    found = {}
    for folder in _folders(path):
        if (folder / "images").is_dir() and (folder / kind).is_dir():
            found[folder.name] = Layout(folder / "images", folder / kind)
    for images in _folders(path / "images"):
        if (path / kind / images.name).is_dir():
            found[images.name] = Layout(images, path / kind / images.name)
    return {name: layout for name, layout in found.items() if name == split or _is_split(name)}


def find_in_folder(folder: Path, split: str) -> Path | None:
    """Return the COCO file of a split, or the YAML file, in a folder; ``None`` if there is none.

    Raises:
        ValueError: if there are several.
    """
    for name in split_names(split):
        patterns = (
            f"annotations/instances_{name}*.json",
            f"annotations/{name}*.json",
            f"{name}*/_annotations.coco.json",
            "*.yaml",
            "*.yml",
        )
        for pattern in patterns:
            found = sorted(folder.glob(pattern))
            if len(found) > 1:
                names = ", ".join(file.name for file in found)
                raise ValueError(f"{folder} holds several datasets ({names}); open one of the files.")
            if found:
                return found[0]
    return None


def match_split(split: str, names: Collection[str]) -> list[str]:
    """Return those of some names that mean a split, the best first: its own, others of it, those with a year."""
    wanted = split_names(split)
    years = [name for each in wanted for name in sorted(names) if re.fullmatch(re.escape(each) + r"\d+", name)]
    return [*(name for name in wanted if name in names), *years]


def check_split(path: Path, split: str) -> None:
    """Reject unusual names of splits where there are none."""
    if not _is_split(split):
        raise ValueError(f"{path} is not divided into splits; it has no split {split!r}.")


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def _is_split(name: str) -> bool:
    return any(match_split(split, [name]) for split in ("train", "val", "test"))
