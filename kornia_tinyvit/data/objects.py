"""Instances with a file per object: a folder per image, as the Data Science Bowl of 2018 publishes them."""

from __future__ import annotations

from pathlib import Path

from kornia_tinyvit.data.datasets import Contents
from kornia_tinyvit.data.folders import Files, images_below
from kornia_tinyvit.data.masks import Instances, Masks, read_ids


def holds_objects(folder: Path) -> bool:
    """Return whether a folder holds folders with ``images`` and ``masks`` in them."""
    return any(images.with_name("masks").is_dir() for images in folder.glob("*/images"))


def read_objects(folder: Path) -> Contents:
    """Return the images of ``SAMPLE/images`` and their objects, each of them the pixels of ``SAMPLE/masks/*`` above 0.

    Samples without an image or without masks are left out and named.

    Raises:
        ValueError: if a sample has several images, or all are left out.
    """
    names: list[str] = []
    labels: list[Instances] = []
    without_mask: list[str] = []
    without_image: list[str] = []
    for sample in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        images, masks = (sorted(images_below(sample / kind)) for kind in ("images", "masks"))
        if len(images) > 1:
            raise ValueError(f"{sample / 'images'} holds {len(images)} images; expected one, whose objects are masks.")
        if not images:
            without_image.append(sample.name)
        elif not masks:
            without_mask.append(sample.name)
        else:
            names.append(images[0].relative_to(folder).as_posix())
            labels.append(Instances(tuple(masks), _read_object))
    if not names:
        raise ValueError(f"No folder in {folder} has both an image in 'images' and masks in 'masks'.")
    return Contents(Files(folder, names), labels, without_mask=tuple(without_mask), without_image=tuple(without_image))


def _read_object(path: Path, _: tuple[int, int]) -> Masks:
    return [read_ids(path) > 0]
