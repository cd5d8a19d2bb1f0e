"""``kornia-tinyvit evaluate`` for networks that return masks or boxes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich import print as print_rich
from rich.console import Console
from rich.table import Table
from torch import nn

from kornia_tinyvit.cli.options import TaskName, parse_device
from kornia_tinyvit.data.detection import DetectionDataset
from kornia_tinyvit.data.instances import InstanceDataset
from kornia_tinyvit.data.segmentation import SegmentationDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.tasks.classification import Judge, check_names, measure_network
from kornia_tinyvit.training.tasks.promptable import PromptedSAM, PromptJudge
from kornia_tinyvit.training.tasks.semantic import SEMANTIC, PixelJudge


@dataclass(frozen=True)
class Asked:
    """The options of the command that these tasks have."""

    data: Path
    split: str
    variant: str | None
    pretrained: str | None
    img_size: int | None
    device: str
    batch_size: int
    limit: int | None
    workers: int
    per_class: bool
    min_area: int
    skip_broken: bool
    as_json: bool


def evaluate_task(task: TaskName, asked: Asked) -> None:
    """Measure a segmenter, a MobileSAM or a detector and print what was found."""
    measure, show = _TASKS[task]
    report = measure(asked)
    if asked.as_json:
        print(json.dumps(report))
    else:
        show(report)


def _measure_semantic(asked: Asked) -> dict[str, Any]:
    if asked.pretrained is None:
        raise ValueError("Name the segmenter's file: --pretrained FILE, such as runs/train/best.safetensors.")
    size: dict[str, Any] = {} if asked.img_size is None else {"img_size": asked.img_size}
    segmenter = SemanticSegmenter.from_config(asked.variant, pretrained=asked.pretrained, **size)
    images = SegmentationDataset.open(asked.data, asked.split)
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
    sam = MobileSAM.from_config(asked.variant, asked.pretrained or True, img_size=asked.img_size)
    images = _limited(InstanceDataset.open(asked.data, asked.split, asked.min_area), asked.limit)
    device = parse_device(asked.device)
    network = PromptedSAM(sam).to(device)
    judge = PromptJudge(images, network.config, asked.skip_broken, device)
    broken = _measure(network, judge, asked)
    found = judge.counts.compute()
    if not found["instances"]:
        raise ValueError(f"None of {len(images)} pictures has an object of at least {asked.min_area} pixels.")
    rounded = {name: round(value, 2) for name, value in found.items()}
    return {"pictures": len(images) - len(broken.get("broken", ())), **rounded} | broken


def _measure_detection(asked: Asked) -> dict[str, Any]:
    from kornia_tinyvit.training.tasks.detection import BoxJudge

    if asked.pretrained is None:
        raise ValueError("There are no published detectors: name a detector's file as --pretrained.")
    device = parse_device(asked.device)
    size: dict[str, Any] = {} if asked.img_size is None else {"img_size": asked.img_size}
    detector = TinyViTDetector.from_config(asked.variant, pretrained=asked.pretrained, **size).to(device).eval()
    images = DetectionDataset.open(asked.data, asked.split)
    check_names(images.class_names, detector.class_names)
    images = _limited(images, asked.limit)
    judge = BoxJudge(images, detector.config, asked.skip_broken, asked.batch_size, device)
    broken = _measure(detector, judge, asked)
    found = judge.counts.compute()
    report: dict[str, Any] = found.to_dict()
    if asked.per_class:
        pairs = zip(images.class_names, found.per_class.tolist(), strict=True)
        report["per_class"] = {name: round(value, 4) for name, value in pairs if not math.isnan(value)}
    return report | broken


def _limited(images: Any, limit: int | None) -> Any:
    return images if limit is None else images.sample(min(limit, len(images)))


def _measure(network: nn.Module, judge: Judge, asked: Asked) -> dict[str, list[str]]:
    broken = measure_network(network, judge, asked.workers, progress=not asked.as_json)
    return {"broken": broken} if asked.skip_broken else {}


def _show_semantic(report: dict[str, Any]) -> None:
    if "per_class" in report:
        table = Table("class", "pixels", "IoU", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in report["per_class"]:
            table.add_row(row["class"], str(row["pixels"]), f"{row['iou']:.2f}")
        Console(highlight=False).print(table)
    print(
        f"{report['pictures']} pictures: mean IoU {report['mean_iou']:.2f} % over {report['classes_present']} "
        f"classes, pixel accuracy {report['pixel_accuracy']:.2f} %"
    )
    _show_broken(report)


def _show_promptable(report: dict[str, Any]) -> None:
    print(
        f"{report['pictures']} pictures, {report['instances']} objects: mean IoU {report['box_iou']:.2f} % from a "
        f"box each, {report['point_iou']:.2f} % from a point each"
    )
    _show_broken(report)


def _show_broken(report: dict[str, Any]) -> None:
    if report.get("broken"):
        print(f"{len(report['broken'])} could not be read and were left out: {', '.join(report['broken'])}")


def _show_detection(report: dict[str, Any]) -> None:
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
        print_rich(table)


_TASKS = {
    TaskName.semantic: (_measure_semantic, _show_semantic),
    TaskName.promptable: (_measure_promptable, _show_promptable),
    TaskName.detection: (_measure_detection, _show_detection),
}
