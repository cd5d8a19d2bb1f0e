"""``kornia-tinyvit classify``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated

from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.requests import Request, command
from kornia_tinyvit.cli.tables import print_table


@dataclass(frozen=True, kw_only=True)
class ClassifyRequest(Request):
    """The options of ``classify``."""

    photos: options.Photos
    variant: options.Variant = None
    weights: options.Weights = None
    img_size: options.ImgSize = None
    tta: options.Augmented = False
    top_k: Annotated[int, options.output_option(help="Number of classes to print per photo.")] = 5
    device: options.Device = "auto"


@command
def classify(request: ClassifyRequest) -> None:
    """Classify photos; by default into the ten classes of CIFAR-10."""
    classifier = options.build_classifier(
        request.variant, request.weights, request.device, request.img_size, request.tta
    )
    pairs = list(zip(map(str, request.photos), classifier.predict(request.photos, request.top_k), strict=True))
    if request.as_json:
        rows = [{"photo": photo, "predictions": [dataclasses.asdict(each) for each in found]} for photo, found in pairs]
        print(json.dumps(rows, indent=2))
        return
    lines = [
        (photo if rank == 0 else "", each.label, f"{each.score:.1%}")
        for photo, found in pairs
        for rank, each in enumerate(found)
    ]
    print_table(["photo", "class", "score"], lines, left=2)
