"""Folders of images beside folders or files of labels, divided into splits or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kornia_tinyvit.data.splits import UNDIVIDED, check_split, choose_split, is_split, split_names


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
        MissingSplitError: if there are folders of other splits only, or none and the split has an unusual name.
    """
    for kind in kinds:
        found = list_layouts(path, kind, split)
        if found:
            return choose_split(path, split, found)
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
    return {name: layout for name, layout in found.items() if name == split or is_split(name)}


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


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
