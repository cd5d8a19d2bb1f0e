"""``kornia-tinyvit pretrained``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from kornia_tinyvit.checkpoints import list_pretrained
from kornia_tinyvit.cli.requests import Request, command, option
from kornia_tinyvit.cli.tables import print_table


@dataclass(frozen=True, kw_only=True)
class PretrainedRequest(Request):
    """The options of ``pretrained``."""

    variant: str | None = option("Weights", "1m, 5m, 11m or 21m. Default: all.", None)


@command
def pretrained(request: PretrainedRequest) -> None:
    """List the published weights with their published accuracies in percent and licenses."""
    rows = list_pretrained(request.variant)
    if not rows:
        raise ValueError(f"There are no weights for a variant {request.variant!r}; try 1m, 5m, 11m or 21m.")
    if request.as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    lines = []
    for row in rows:
        accuracies = ["" if value is None else f"{value:.1f}" for value in (row.top1, row.top5)]
        numbers = [row.img_size, "" if row.mobile_sam else row.num_classes]
        lines.append([row.variant, row.name, *numbers, *accuracies, f"{row.trained_on} ({row.license})"])
    columns = ["variant", "weights", "size", "classes", "top-1", "top-5", "trained on"]
    print_table(columns, lines, left=2, notes=1)
