"""``kornia-tinyvit evaluate`` for networks that return masks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from kornia_tinyvit.cli.options import TaskName, parse_device
from kornia_tinyvit.segmentation.mobile_sam import MobileSAM
from kornia_tinyvit.segmentation.semantic import SemanticSegmenter
from kornia_tinyvit.training.instances import InstanceImages
from kornia_tinyvit.training.masks import MaskedImages
from kornia_tinyvit.training.promptable import PromptedSAM, PromptJudge
from kornia_tinyvit.training.semantic import SEMANTIC, PixelJudge
from kornia_tinyvit.training.tasks import Judge, measure_network


@dataclass(frozen=True)
class Asked:
    """The options of the command that both tasks have."""

    data: Path
    split: str
    variant: str | None
    pretrained: str | None
    img_size: int | None
    device: str
    limit: int | None
    workers: int
    per_class: bool
    min_area: int
    skip_broken: bool
    as_json: bool


def evaluate_masks(task: TaskName, asked: Asked) -> None:
    """Measure a segmenter or a MobileSAM and print what was found."""
    report = _measure_semantic(asked) if task is TaskName.semantic else _measure_promptable(asked)
    if asked.as_json:
        print(json.dumps(report))
    else:
        _show(report)


def _measure_semantic(asked: Asked) -> dict[str, Any]:
    if asked.pretrained is None:
        raise ValueError("Name the segmenter's file: --pretrained FILE, such as runs/train/best.safetensors.")
    size: dict[str, Any] = {} if asked.img_size is None else {"img_size": asked.img_size}
    segmenter = SemanticSegmenter.from_config(asked.variant, pretrained=asked.pretrained, **size)
    images = MaskedImages.open(asked.data, asked.split)
    SEMANTIC.check(images, segmenter.config, segmenter.class_names)
    images = _limited(images, asked.limit)
    device = parse_device(asked.device)
    judge = PixelJudge(images, segmenter.config, asked.skip_broken, device)
    broken = _measure(segmenter.to(device), judge, asked)
    found = judge.counts.compute()
    report: dict[str, Any] = {
        "pictures": len(images) - len(broken.get("broken", ())),
        "classes_present": found.present,
        "mean_iou": round(found.mean_iou, 2),
        "pixel_accuracy": round(found.pixel_accuracy, 2),
    }
    if asked.per_class:
        rows = zip(segmenter.class_names, found.class_pixels.tolist(), found.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "pixels": pixels, "iou": round(iou, 2)} for name, pixels, iou in rows if pixels
        ]
    return report | broken


def _measure_promptable(asked: Asked) -> dict[str, Any]:
    if asked.per_class:
        raise ValueError("--per-class is not for --task promptable: its masks have no classes.")
    sam = MobileSAM.from_config(asked.variant, asked.pretrained or True, img_size=asked.img_size)
    images = _limited(InstanceImages.open(asked.data, asked.split, asked.min_area), asked.limit)
    device = parse_device(asked.device)
    network = PromptedSAM(sam).to(device)
    judge = PromptJudge(images, network.config, asked.skip_broken, device)
    broken = _measure(network, judge, asked)
    found = judge.counts.compute()
    if not found["instances"]:
        raise ValueError(f"None of {len(images)} pictures has an object of at least {asked.min_area} pixels.")
    rounded = {name: round(value, 2) for name, value in found.items()}
    return {"pictures": len(images) - len(broken.get("broken", ())), **rounded} | broken


def _limited(images: Any, limit: int | None) -> Any:
    return images if limit is None else images.sample(min(limit, len(images)))


def _measure(network: nn.Module, judge: Judge, asked: Asked) -> dict[str, list[str]]:
    broken = measure_network(network, judge, asked.workers, progress=not asked.as_json)
    return {"broken": broken} if asked.skip_broken else {}


def _show(report: dict[str, Any]) -> None:
    if "per_class" in report:
        table = Table("class", "pixels", "IoU", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in report["per_class"]:
            table.add_row(row["class"], str(row["pixels"]), f"{row['iou']:.2f}")
        Console(highlight=False).print(table)
    if "mean_iou" in report:
        print(
            f"{report['pictures']} pictures: mean IoU {report['mean_iou']:.2f} % over {report['classes_present']} "
            f"classes, pixel accuracy {report['pixel_accuracy']:.2f} %"
        )
    else:
        print(
            f"{report['pictures']} pictures, {report['instances']} objects: mean IoU {report['box_iou']:.2f} % from a "
            f"box each, {report['point_iou']:.2f} % from a point each"
        )
    if report.get("broken"):
        print(f"{len(report['broken'])} could not be read and were left out: {', '.join(report['broken'])}")
