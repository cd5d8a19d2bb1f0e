"""``kornia-tinyvit pretrained``."""

from __future__ import annotations

import dataclasses
import json

from kornia_tinyvit.checkpoints import list_pretrained
from kornia_tinyvit.cli.options import Json, Variant
from kornia_tinyvit.cli.tables import print_table


def pretrained(variant: Variant = None, as_json: Json = False) -> None:
    """List the published weights: accuracies as published, in per cent, and the license in brackets."""
    rows = list_pretrained(variant)
    if variant is not None and not rows:
        raise ValueError(f"There are no weights for a variant {variant!r}; try 1m, 5m, 11m or 21m.")
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    lines = []
    for row in rows:
        accuracies = ["" if value is None else f"{value:.1f}" for value in (row.top1, row.top5)]
        numbers = [row.img_size, "" if row.mobile_sam else row.num_classes]
        lines.append([row.variant, row.name, *numbers, *accuracies, f"{row.trained_on} ({row.license})"])
    columns = ["variant", "pretrained", "size", "classes", "top-1", "top-5", "trained on"]
    print_table(columns, lines, left=2, notes=1)
