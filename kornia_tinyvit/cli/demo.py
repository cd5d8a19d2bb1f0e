"""``kornia-tinyvit demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlparse

import torch
import typer

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.cli.options import Device, Pretrained, Variant, build_classifier, refuse_idle
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.images import read_image
from kornia_tinyvit.visualization import demo_augmentations, save_figure

_SUFFIXES = {".jpg", ".png"}
_HOST, _SAM = "127.0.0.1", "mobile_sam"


def demo(
    context: typer.Context,
    photos: Annotated[list[Path] | None, typer.Argument(help="Image files. Default: those in the package.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the sheets.")] = Path("demo"),
    variant: Variant = None,
    pretrained: Pretrained = None,
    device: Device = "cpu",
    web: Annotated[bool, typer.Option("--web", help="Serve a page to play with; the photos are its examples.")] = False,
    host: Annotated[
        str,
        typer.Option(
            help="With --web: address to listen on; the default is this machine alone, 0.0.0.0 lets the whole network "
            "in, without a password."
        ),
    ] = _HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --web: port; 0 for any that is free.")] = 7860,
    sam: Annotated[
        str,
        typer.Option(
            help="With --web: file or URL of a whole MobileSAM to segment with, or mobile_sam, the published one, "
            "downloaded once at the first use."
        ),
    ] = _SAM,
) -> None:
    """Classify photos, averaged over a flip and a closer look, and draw for each a sheet of what the network sees.

    With --web, serve a page where photos can be classified, augmented and segmented instead.
    """
    photos = photos or sorted(path for path in (ASSETS / "photos").iterdir() if path.suffix in _SUFFIXES)
    if web:
        refuse_idle(context, ("out",), "with --web")
        from kornia_tinyvit.web.page import serve  # gradio takes seconds, and may be missing

        sam = sam or _SAM
        if sam != _SAM and not urlparse(sam).scheme and not Path(sam).is_file():
            raise FileNotFoundError(f"There is no file {sam} for --sam.")
        missing = [path for path in photos if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"There is no image {missing[0]}.")
        classifier = build_classifier(variant, pretrained, device, tta=True)
        # A script's empty variable means the default: an empty address would listen to the whole network.
        serve(classifier, sam, device, photos, host or _HOST, port)
        return
    refuse_idle(context, ("host", "port", "sam"), "without --web")
    torch.manual_seed(0)  # one view has noise
    sheets = [out / f"{photo.stem}.png" for photo in photos]
    if len({path.resolve() for path in (*photos, *sheets)}) < 2 * len(photos):
        raise ValueError(f"A sheet in {out} would replace a photo or another sheet; rename photos or change --out.")
    classifier = build_classifier(variant, pretrained, device, tta=True)
    views = demo_augmentations()
    rows = []
    for photo, sheet in zip(photos, sheets, strict=True):
        image = read_image(photo).to(device)
        first, second, *_ = save_figure(sheet, classifier, image, photo.name, views)
        rows.append([photo.name, first.label, f"{first.score:.1%}", second.label, f"{second.score:.1%}", sheet])
    print_table(["photo", "class", "score", "second", "score", "sheet"], rows, left=6)
