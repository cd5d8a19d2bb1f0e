"""``kornia-tinyvit evaluate`` for networks that return masks or boxes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kornia_tinyvit.cli.options import (
    Augmented,
    Device,
    ImgSize,
    Json,
    MinArea,
    Pretrained,
    TaskName,
    Variant,
    parse_device,
)
from kornia_tinyvit.cli.tables import print_names, print_table
from kornia_tinyvit.data.detection import DetectionDataset
from kornia_tinyvit.data.instances import InstanceDataset
from kornia_tinyvit.data.segmentation import SegmentationDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.evaluation import begin_evaluation
from kornia_tinyvit.training.metrics.average_precision import DetectionScores
from kornia_tinyvit.training.metrics.semantic import Segmentation
from kornia_tinyvit.training.tasks.base import evaluate_network


class OnBroken(StrEnum):
    """What to do about pictures that cannot be decoded."""

    stop = "stop"
    skip = "skip"


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """The options of ``evaluate``."""

    data: Annotated[
        Path,
        typer.Argument(
            help="A folder of class folders, a tar file of one, or the Hugging Face hub's parquet files. Other tasks: "
            "what 'train' takes."
        ),
    ]
    task: Annotated[TaskName, typer.Option(help="What the network was trained for.")] = TaskName.classification
    variant: Variant = None
    pretrained: Pretrained = None
    img_size: ImgSize = None
    device: Device = "cpu"
    tta: Augmented = False
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time; masks are predicted one by one.")] = 64
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many pictures, drawn with a fixed seed.")] = None
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 0
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Tell the top-1 accuracy, or the IoU, of each class.")
    ] = False
    confusion: Annotated[bool, typer.Option("--confusion", help="Tell the most frequent mistakes.")] = False
    calibration: Annotated[bool, typer.Option("--calibration", help="Tell how far to trust the scores.")] = False
    knn: Annotated[Path | None, typer.Option(help="Also classify by the nearest features of this training data.")] = (
        None
    )
    linear: Annotated[Path | None, typer.Option(help="Also train a linear classifier on the features of this.")] = None
    on_broken: Annotated[OnBroken, typer.Option(help="What to do about pictures that cannot be read.")] = OnBroken.stop
    split: Annotated[str, typer.Option(help="Semantic, promptable, detection: which part of the data.")] = "val"
    min_area: MinArea = 1
    as_json: Json = False

    @property
    def skip_broken(self) -> bool:
        """Whether images that cannot be read are left out."""
        return self.on_broken is OnBroken.skip


@dataclass(frozen=True)
class _Kind:
    """How a task is evaluated: what opens network and data, reports the metrics, and prints the report."""

    open: Callable[[EvaluateRequest], tuple[Any, Any]]
    report: Callable[[Any, Any, EvaluateRequest], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


def evaluate_task(asked: EvaluateRequest) -> None:
    """Measure a segmenter, a MobileSAM or a detector and print what was found."""
    kind = _KINDS[asked.task]
    network, images = kind.open(asked)
    network = network.to(parse_device(asked.device))
    images = limited(images, asked.limit)
    module, evaluator = begin_evaluation(network, images, batch_size=asked.batch_size, skip_broken=asked.skip_broken)
    broken = evaluate_network(module, evaluator, asked.workers, progress=not asked.as_json)
    report = {"pictures": len(images) - len(broken), **kind.report(evaluator.counts.compute(), images, asked)}
    print_report(report, broken if asked.skip_broken else None, kind.show, asked.as_json)


def limited(images: Any, limit: int | None) -> Any:
    """Return so many images of a data set, drawn with a fixed seed; all if it has no more."""
    return images if limit is None else images.sample(min(limit, len(images)))


def print_report(
    report: dict[str, Any], broken: list[str] | None, show: Callable[[dict[str, Any]], None], as_json: bool
) -> None:
    """Print a report as JSON or by a function, and the images that could not be read if they were to be skipped."""
    if as_json:
        print(json.dumps(report if broken is None else report | {"broken": broken}))
        return
    show(report)
    print_names("Could not be read and were left out", broken or ())


def _open_file(network: Any, dataset: Any, name: str, asked: EvaluateRequest) -> tuple[Any, Any]:
    """Open a network of which there are no published weights, and its data."""
    if asked.pretrained is None:
        raise ValueError(
            f"There are no published {name}s: name a {name}'s file, --pretrained FILE, such as "
            "runs/train/best.safetensors."
        )
    size = {} if asked.img_size is None else {"img_size": asked.img_size}
    found = network.from_config(asked.variant, pretrained=asked.pretrained, **size)
    return found, dataset.open(asked.data, asked.split)


def _open_sam(asked: EvaluateRequest) -> tuple[MobileSAM, InstanceDataset]:
    sam = MobileSAM.from_config(asked.variant, pretrained=asked.pretrained or True, img_size=asked.img_size)
    return sam, InstanceDataset.open(asked.data, asked.split, asked.min_area)


def _report_segmentation(found: Segmentation, images: SegmentationDataset, asked: EvaluateRequest) -> dict[str, Any]:
    report: dict[str, Any] = {
        "classes_present": found.present,
        "mean_iou": round(found.mean_iou, 2),
        "pixel_accuracy": round(found.pixel_accuracy, 2),
    }
    if asked.per_class:
        rows = zip(images.class_names, found.class_pixels.tolist(), found.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "pixels": pixels, "iou": round(iou, 2)} for name, pixels, iou in rows if pixels
        ]
    return report


def _report_prompts(found: dict[str, float], images: InstanceDataset, asked: EvaluateRequest) -> dict[str, Any]:
    if not found["instances"]:
        raise ValueError(f"None of {len(images)} pictures has an object of at least {asked.min_area} pixels.")
    return {name: round(value, 2) for name, value in found.items()}


def _report_boxes(found: DetectionScores, images: DetectionDataset, asked: EvaluateRequest) -> dict[str, Any]:
    report = found.to_dict()
    if asked.per_class:
        pairs = zip(images.class_names, found.per_class.tolist(), strict=True)
        report["per_class"] = {name: round(value, 4) for name, value in pairs if not math.isnan(value)}
    return report


def _show_segmentation(report: dict[str, Any]) -> None:
    if "per_class" in report:
        rows = [(row["class"], row["pixels"], f"{row['iou']:.2f}") for row in report["per_class"]]
        print_table(("class", "pixels", "IoU"), rows)
    print(
        f"{report['pictures']} pictures: mean IoU {report['mean_iou']:.2f} % over {report['classes_present']} "
        f"classes, pixel accuracy {report['pixel_accuracy']:.2f} %"
    )


def _show_prompts(report: dict[str, Any]) -> None:
    print(
        f"{report['pictures']} pictures, {report['instances']} objects: mean IoU {report['box_iou']:.2f} % from a "
        f"box each, {report['point_iou']:.2f} % from a point each"
    )


def _show_boxes(report: dict[str, Any]) -> None:
    if "per_class" in report:
        print_table(("class", "mAP"), [(name, f"{value:.2f}") for name, value in report["per_class"].items()])
    print(
        f"{report['pictures']} pictures, {report['objects']} objects: mAP {report['map']:.2f} %, "
        f"at an overlap of 50 % {report['map50']:.2f} %, of 75 % {report['map75']:.2f} %"
    )


_open_segmenter = partial(_open_file, SemanticSegmenter, SegmentationDataset, "segmenter")
_open_detector = partial(_open_file, TinyViTDetector, DetectionDataset, "detector")
_KINDS = {
    TaskName.semantic: _Kind(_open_segmenter, _report_segmentation, _show_segmentation),
    TaskName.promptable: _Kind(_open_sam, _report_prompts, _show_prompts),
    TaskName.detection: _Kind(_open_detector, _report_boxes, _show_boxes),
}
