"""``kornia-tinyvit detect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kornia_tinyvit.cli.options import Device, Json, build_network
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.files import write_text
from kornia_tinyvit.images import read_image
from kornia_tinyvit.visualization import draw_detections, save_image


def detect(
    photos: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[Path, typer.Option(help="A detector's file, such as 'train --task detection' writes.")],
    out: Annotated[Path, typer.Option(help="Folder for the images with boxes and detections.json.")] = Path(
        "detections"
    ),
    threshold: Annotated[float, typer.Option(min=0, max=0.999, help="Least score of what is told.")] = 0.3,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the objects of photos and draw boxes around them."""
    detector = build_network(TinyViTDetector, None, checkpoint, device)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for photo, name in zip(photos, _names(photos), strict=True):
        image = read_image(photo)
        (found,) = detector.predict(image, threshold)
        drawn = out / f"{name}.png"
        save_image(drawn, draw_detections(image, found))
        height, width = image.shape[1:]
        rows.append({
            "photo": str(photo), "drawn": str(drawn), "width": width, "height": height,
            "detections": [vars(each) for each in found],
        })  # fmt: skip
    write_text(out / "detections.json", json.dumps(rows, indent=1))
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        _show(row)


def _names(photos: Sequence[Path]) -> list[str]:
    """Return a file name for each photo: its own, with a number where several have one name."""
    seen: Counter[str] = Counter()
    names = []
    for photo in photos:
        seen[photo.stem] += 1
        names.append(photo.stem if seen[photo.stem] == 1 else f"{photo.stem}-{seen[photo.stem]}")
    return names


def _show(row: dict[str, Any]) -> None:
    count = len(row["detections"])
    print(f"{row['photo']}: {count} {'object' if count == 1 else 'objects'}, see {row['drawn']}")
    for each in row["detections"]:
        left, top, right, bottom = (round(value) for value in each["box"])
        print(f"{100 * each['score']:6.1f} %  {each['label']} at ({left}, {top}) to ({right}, {bottom})")
