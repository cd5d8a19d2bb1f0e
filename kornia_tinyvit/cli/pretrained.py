"""``kornia-tinyvit pretrained``."""

from __future__ import annotations

import dataclasses
import json

from rich import box
from rich.console import Console
from rich.table import Table

from kornia_tinyvit.checkpoints import list_pretrained
from kornia_tinyvit.cli.options import Json, Variant


def pretrained(variant: Variant = None, as_json: Json = False) -> None:
    """List the published weights: accuracies as published, in per cent, and the licence in brackets."""
    rows = list_pretrained(variant)
    if variant is not None and not rows:
        raise ValueError(f"There are no weights for a variant {variant!r}; try 1m, 5m, 11m or 21m.")
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("variant", "pretrained", "size", "classes", "top-1", "top-5"):
        table.add_column(column, no_wrap=True)
    table.add_column("trained on")
    for row in rows:
        accuracies = ["" if value is None else f"{value:.1f}" for value in (row.top1, row.top5)]
        numbers = [str(row.img_size), "" if row.mobile_sam else str(row.num_classes)]
        table.add_row(row.variant, row.name, *numbers, *accuracies, f"{row.trained_on} ({row.licence})")
    Console().print(table)
