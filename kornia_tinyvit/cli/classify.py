"""``kornia-tinyvit classify``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from kornia_tinyvit.cli.options import Augmented, Device, ImgSize, Json, Pretrained, Variant, build_classifier
from kornia_tinyvit.cli.tables import print_table


def classify(
    photos: Annotated[list[Path], typer.Argument(help="Image files.")],
    top_k: Annotated[int, typer.Option(help="How many classes to name.")] = 5,
    variant: Variant = None,
    pretrained: Pretrained = None,
    img_size: ImgSize = None,
    device: Device = "cpu",
    tta: Augmented = False,
    as_json: Json = False,
) -> None:
    """Name what photos show; without --variant, with the ten classes of the network in the package."""
    classifier = build_classifier(variant, pretrained, device, img_size, tta)
    predictions = classifier.predict(photos, top_k)
    if as_json:
        rows = [
            {"photo": str(photo), "predictions": [dataclasses.asdict(each) for each in found]}
            for photo, found in zip(photos, predictions, strict=True)
        ]
        print(json.dumps(rows, indent=2))
        return
    lines = [
        (photo if rank == 0 else "", each.label, f"{each.score:.1%}")
        for photo, found in zip(photos, predictions, strict=True)
        for rank, each in enumerate(found)
    ]
    print_table(["photo", "class", "score"], lines, left=2)
