"""``kornia-tinyvit demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.cli.options import Device, Pretrained, Variant, build_classifier
from kornia_tinyvit.preprocessing import read_image
from kornia_tinyvit.visualization import demo_augmentations, save_sheet

_SUFFIXES = {".jpg", ".png"}


def demo(
    photos: Annotated[list[Path] | None, typer.Argument(help="Picture files. Default: those in the package.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("demo"),
    variant: Variant = None,
    pretrained: Pretrained = None,
    device: Device = "cpu",
) -> None:
    """Classify photos, averaged over a flip and a closer look, and draw for each a sheet of what the network sees."""
    torch.manual_seed(0)  # one view has noise
    if not photos:
        photos = sorted(path for path in (ASSETS / "photos").iterdir() if path.suffix in _SUFFIXES)
    sheets = [out / f"{photo.stem}.png" for photo in photos]
    if len({path.resolve() for path in (*photos, *sheets)}) < 2 * len(photos):
        raise ValueError(f"A sheet in {out} would replace a photo or another sheet; rename photos or change --out.")
    classifier = build_classifier(variant, pretrained, device, tta=True)
    views = demo_augmentations()
    table = Table("photo", "class", "score", "second", "score", "sheet")
    for photo, sheet in zip(photos, sheets, strict=True):
        image = read_image(photo).to(device)
        first, second, *_ = save_sheet(sheet, classifier, image, photo.name, views)
        table.add_row(photo.name, first.label, f"{first.score:.1%}", second.label, f"{second.score:.1%}", str(sheet))
    Console(markup=False, emoji=False).print(table)  # a photo's name may look like markup
