"""``kornia-tinyvit detect``."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kornia_tinyvit.cli.options import NMS, NetworkRequest
from kornia_tinyvit.cli.requests import argument, command, option
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.files import write_text
from kornia_tinyvit.images import read_image
from kornia_tinyvit.visualization import draw_detections, save_image


@dataclass(frozen=True, kw_only=True)
class DetectRequest(NetworkRequest):
    """The options of ``detect``."""

    photos: list[Path] = argument("Image files.")
    weights: str = option("Weights", "Path of a detector, e.g. of 'train --task detection'.")
    threshold: float = option("Output", "Lowest score of a detection.", 0.3, min=0, max=0.999)
    nms: float | None = option("Output", NMS, None, min=0, max=1)
    out: Path = option("Output", "Folder for images with boxes and detections.json.", Path("detections"))


@command
def detect(request: DetectRequest) -> None:
    """Detect objects in photos and draw their boxes."""
    detector = request.build_network(TinyViTDetector, request.weights)
    request.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for photo in request.photos:
        seen[photo.stem] += 1  # photos of several folders may have one name
        suffix = "" if seen[photo.stem] == 1 else f"-{seen[photo.stem]}"
        image = read_image(photo)
        (found,) = detector.predict(image, request.threshold, nms_threshold=request.nms)
        drawn = request.out / f"{photo.stem}{suffix}.png"
        save_image(drawn, draw_detections(image, found))
        size = {"width": image.shape[2], "height": image.shape[1]}
        rows.append({"photo": str(photo), "drawn": str(drawn), **size, "detections": [vars(each) for each in found]})
    write_text(request.out / "detections.json", json.dumps(rows, indent=1))
    if request.as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        count = len(row["detections"])
        print(f"{row['photo']}: {count} {'object' if count == 1 else 'objects'}, see {row['drawn']}")
        for each in row["detections"]:
            left, top, right, bottom = (round(value) for value in each["box"])
            print(f"{100 * each['score']:6.1f} %  {each['label']} at ({left}, {top}) to ({right}, {bottom})")
