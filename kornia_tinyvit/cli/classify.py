"""``kornia-tinyvit classify``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from kornia_tinyvit.cli.options import TTA, NetworkRequest
from kornia_tinyvit.cli.requests import argument, command, option
from kornia_tinyvit.cli.tables import print_table


@dataclass(frozen=True, kw_only=True)
class ClassifyRequest(NetworkRequest):
    """The options of ``classify``."""

    photos: list[Path] = argument("Image files.")
    tta: bool = option("Weights", TTA, False)
    top_k: int = option("Output", "Number of classes to print per photo.", 5)


@command
def classify(request: ClassifyRequest) -> None:
    """Classify photos; by default into the ten classes of CIFAR-10."""
    classifier = request.build_classifier(request.tta)
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
