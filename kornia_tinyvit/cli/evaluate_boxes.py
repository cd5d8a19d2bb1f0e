"""``kornia-tinyvit evaluate --task detection``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import print as show
from rich.table import Table

from kornia_tinyvit.cli.options import parse_device
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.training.boxes import BoxedImages
from kornia_tinyvit.training.tasks import check_names, measure_network


@dataclass(frozen=True)
class AskedBoxes:
    """The options that decide what is measured.

    Args:
        data: what 'train --task detection' takes.
        split: which part of it.
        pretrained: the detector's file.
        device: where to compute.
        batch_size: pictures at a time.
        limit: how many pictures, drawn with a fixed seed.
        workers: processes that read pictures.
        per_class: whether to tell each class.
        skip_broken: whether to go on at pictures that cannot be read.
        as_json: whether to print JSON.
    """

    data: Path
    split: str
    pretrained: str | None
    device: str
    batch_size: int
    limit: int | None
    workers: int
    per_class: bool
    skip_broken: bool
    as_json: bool


def evaluate_boxes(asked: AskedBoxes) -> None:
    """Measure a detector by COCO's mAP and print what came out."""
    from kornia_tinyvit.training.detection import BoxJudge

    if asked.pretrained is None:
        raise ValueError("There are no published detectors: name a detector's file as --pretrained.")
    device = parse_device(asked.device)
    detector = TinyViTDetector.from_config(pretrained=asked.pretrained).to(device).eval()
    images = BoxedImages.open(asked.data, asked.split)
    check_names(images.class_names, detector.class_names)
    if asked.limit is not None:
        images = images.sample(min(asked.limit, len(images)))
    judge = BoxJudge(images, detector.config, asked.skip_broken, asked.batch_size, device)
    broken = measure_network(detector, judge, asked.workers, progress=not asked.as_json)
    found = judge.counts.compute()
    report: dict[str, Any] = found.to_dict()
    if asked.per_class:
        pairs = zip(images.class_names, found.per_class.tolist(), strict=True)
        report["per_class"] = {name: round(value, 4) for name, value in pairs if not math.isnan(value)}
    if asked.skip_broken:
        report["broken"] = broken
    if asked.as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['pictures']} pictures, {report['objects']} objects: mAP {report['map']:.2f} %, "
        f"at an overlap of 50 % {report['map50']:.2f} %, of 75 % {report['map75']:.2f} %"
    )
    if report.get("broken"):
        some = ", ".join(report["broken"][:5])
        print(f"Could not be read and were left out: {len(report['broken'])}, such as {some}")
    if "per_class" in report:
        table = Table("class", "mAP")
        for name, value in report["per_class"].items():
            table.add_row(name, f"{value:.2f} %")
        show(table)
