"""``kornia-tinyvit evaluate``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.catalog import imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.options import TaskName
from kornia_tinyvit.cli.requests import Request, command
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.data import ClassificationDataset, DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.data.datasets import match_classes
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.progress import track_progress
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.evaluation import create_evaluator
from kornia_tinyvit.training.metrics.average_precision import DetectionScores
from kornia_tinyvit.training.metrics.classification import CONFUSION_CLASSES, ClassificationScores, select_classes
from kornia_tinyvit.training.metrics.probes import extract_features, k_nearest_neighbors, linear_probe
from kornia_tinyvit.training.metrics.promptable import PromptScores
from kornia_tinyvit.training.metrics.semantic import SegmentationScores
from kornia_tinyvit.training.tasks.base import ReadableItems, evaluate_network, read_batches

IMAGENET_22K = 21841
OnBroken = StrEnum("OnBroken", ("stop", "skip"))

metric_option = partial(typer.Option, rich_help_panel="Metrics")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Request):
    """The options of ``evaluate``."""

    data: Annotated[
        Path,
        typer.Argument(
            help="Images: folder of class folders, tar file of one, or parquet files of the Hugging Face hub. Other "
            "tasks: see 'train'."
        ),
    ]
    task: Annotated[TaskName, options.data_option(help="What the network was trained for.")] = TaskName.classification
    split: Annotated[str, options.data_option(help="Split of the data; not for classification.")] = "val"
    limit: Annotated[int | None, options.data_option(min=1, help="Number of images, sampled with a fixed seed.")] = None
    on_broken: Annotated[OnBroken, options.data_option(help="At an image that cannot be read.")] = OnBroken.stop
    variant: options.Variant = None
    weights: options.Weights = None
    img_size: options.ImgSize = None
    tta: options.Augmented = False
    min_area: options.MinArea = 1
    per_class: Annotated[bool, metric_option("--per-class", help="Top-1 accuracy, IoU or mAP of each class.")] = False
    confusion: Annotated[bool, metric_option("--confusion", help="Most frequent confusions.")] = False
    calibration: Annotated[bool, metric_option("--calibration", help="Expected calibration error.")] = False
    knn: Annotated[
        Path | None, metric_option(help="k-nearest-neighbor accuracy on features of this training data.")
    ] = None
    linear: Annotated[Path | None, metric_option(help="Linear-probe accuracy, trained on features of this data.")] = (
        None
    )
    device: options.Device = "auto"
    batch_size: Annotated[int, options.hardware_option(min=1, help="Batch size.")] = 64
    workers: options.Workers = 0

    @property
    def skip_broken(self) -> bool:
        """Whether to leave out images that cannot be read."""
        return self.on_broken is OnBroken.skip


_FOR_CLASSIFIERS = ("tta", "confusion", "calibration", "knn", "linear")
_UNUSED = {
    TaskName.classification: ("split", "min_area"),
    TaskName.semantic: (*_FOR_CLASSIFIERS, "batch_size", "min_area"),  # images of any size, one by one
    TaskName.promptable: (*_FOR_CLASSIFIERS, "batch_size", "per_class"),
    TaskName.detection: (*_FOR_CLASSIFIERS, "min_area"),
}


@command
def evaluate(request: EvaluateRequest) -> None:
    """Evaluate a network on labeled images."""
    request.reject_unused(_UNUSED[request.task], f"with --task {request.task}")
    open_both, describe, show = _TASKS[request.task]
    network, images = open_both(request)
    if request.limit is not None:
        images = images.sample(min(request.limit, len(images)))
    device = next(network.parameters()).device
    request.note_run(images, device, request.weights or request.variant or "cifar10")
    module, evaluator = create_evaluator(
        network, images, batch_size=request.batch_size, skip_broken=request.skip_broken
    )
    broken = evaluate_network(module, evaluator, request.workers, progress=request.shows_progress)
    scores = evaluator.counts.compute()
    if request.task is TaskName.promptable and not scores.instances:
        raise ValueError(f"None of {len(images)} images has an object of at least {request.min_area} pixels.")
    report = {"images": len(images) - len(broken), **describe(scores, network, request)}
    if request.knn is not None or request.linear is not None:
        report |= _probe(network, images, request, broken)
    if request.as_json:
        print(json.dumps(report | {"broken": broken} if request.skip_broken else report))
    else:
        show(report)
    request.note_names("Images left out because they cannot be read", broken)


def _open_classifier(request: EvaluateRequest) -> tuple[ImageClassifier, ClassificationDataset]:
    """Open a classifier and its data; one of ImageNet-22k may be evaluated on the classes of ImageNet-1k."""
    classifier = options.build_classifier(
        request.variant, request.weights, request.device, request.img_size, request.tta
    )
    images = ClassificationDataset.open(request.data)
    known = bool(set(images.class_names or ()) & set(classifier.class_names))
    if len(classifier.class_names) == IMAGENET_22K and images.num_classes <= len(imagenet_classes()) and not known:
        kept = imagenet_1k_in_22k()

        def keep(_classifier: nn.Module, _images: Any, logits: Tensor) -> Tensor:
            return select_classes(logits, kept)

        classifier.register_forward_hook(keep)
        classifier.class_names = imagenet_classes()
        request.note("The network has the classes of ImageNet-22k; evaluating the 1000 of ImageNet-1k.")
    names = classifier.class_names
    unknown = match_classes(images.class_names, names) is None
    if unknown and images.class_names is not None and images.num_classes < len(names):
        request.note(
            f"No class name of the data is a class of the network; taking its {images.num_classes} classes for the "
            f"first of the network's {len(names)}."
        )
    if request.confusion and len(names) > CONFUSION_CLASSES:
        raise ValueError(f"--confusion takes up to {CONFUSION_CLASSES} classes; the network has {len(names)}.")
    return classifier, images


def _open_segmenter(request: EvaluateRequest) -> tuple[SemanticSegmenter, SegmentationDataset]:
    return _build_trained(SemanticSegmenter, "segmenter", request), SegmentationDataset.open(
        request.data, request.split
    )


def _open_detector(request: EvaluateRequest) -> tuple[TinyViTDetector, DetectionDataset]:
    return _build_trained(TinyViTDetector, "detector", request), DetectionDataset.open(request.data, request.split)


def _open_sam(request: EvaluateRequest) -> tuple[MobileSAM, InstanceDataset]:
    sam = options.build_network(MobileSAM, request.variant, request.weights or True, request.device, request.img_size)
    return sam, InstanceDataset.open(request.data, request.split, request.min_area)


def _build_trained(kind: type[options.Network], name: str, request: EvaluateRequest) -> options.Network:
    """Build a network without published weights."""
    if request.weights is None:
        raise ValueError(f"There are no published {name}s; give --weights FILE, e.g. runs/train/best.safetensors.")
    return options.build_network(kind, request.variant, request.weights, request.device, request.img_size)


def _describe_classes(
    scores: ClassificationScores, network: ImageClassifier, request: EvaluateRequest
) -> dict[str, Any]:
    names = network.class_names
    report: dict[str, Any] = {"top1": round(scores.top1, 2), f"top{scores.top_k}": round(scores.top5, 2)}
    if request.per_class:
        rows = zip(names, scores.class_images.tolist(), scores.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "images": count, "top1": round(top1, 2)} for name, count, top1 in rows if count
        ]
    if request.confusion:
        report["confusion"] = [
            {"class": names[truth], "predicted": names[answer], "images": count}
            for truth, answer, count in scores.confusions()
        ]
    if request.calibration:
        bins = [
            {"images": int(count), "score": round(score, 2), "top1": round(top1, 2)}
            for count, score, top1 in scores.calibration_bins.tolist()
            if count
        ]
        report["calibration"] = {"error": round(scores.calibration_error, 2), "bins": bins}
    return report


def _describe_pixels(
    scores: SegmentationScores, network: SemanticSegmenter, request: EvaluateRequest
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "classes_present": scores.present,
        "mean_iou": round(scores.mean_iou, 2),
        "pixel_accuracy": round(scores.pixel_accuracy, 2),
    }
    if request.per_class:
        rows = zip(network.class_names, scores.class_pixels.tolist(), scores.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "pixels": pixels, "iou": round(iou, 2)} for name, pixels, iou in rows if pixels
        ]
    return report


def _describe_objects(scores: PromptScores, network: MobileSAM, request: EvaluateRequest) -> dict[str, Any]:
    return {name: round(value, 2) for name, value in vars(scores).items()}


def _describe_boxes(scores: DetectionScores, network: TinyViTDetector, request: EvaluateRequest) -> dict[str, Any]:
    report = scores.to_dict()
    if request.per_class:
        pairs = zip(network.class_names, scores.per_class.tolist(), strict=True)
        report["per_class"] = {name: round(value, 4) for name, value in pairs if not math.isnan(value)}
    return report


def _probe(
    classifier: ImageClassifier, images: ClassificationDataset, request: EvaluateRequest, broken: list[str]
) -> dict[str, float]:
    """Return the top-1 accuracies of the probes in percent; extend ``broken`` by images of their training data."""
    (features, labels), _ = _features(classifier, images, request, "features")
    counted = {images.fingerprint()}
    known: dict[Path, tuple[Tensor, Tensor]] = {}
    top1 = {}
    for name, path in (("knn", request.knn), ("linear", request.linear)):
        if path is None:
            continue
        training = ClassificationDataset.open(path)
        targets = _targets_in(training, images, labels)
        if path not in known:
            known[path], unread = _features(classifier, training, request, f"features of {path.name}")
            if training.fingerprint() not in counted:
                broken += unread
                counted.add(training.fingerprint())
        if name == "knn":
            answers = k_nearest_neighbors(*known[path], features, num_classes=training.num_classes)
        else:
            answers = linear_probe(*known[path], training.num_classes)(features)
        top1[name] = round(100 * float((answers.argmax(1) == targets).double().mean()), 2)
    return top1


def _features(
    classifier: ImageClassifier, images: ClassificationDataset, request: EvaluateRequest, text: str
) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Return features :math:`(N, D)` and class indices :math:`(N,)`, and the names of broken images."""
    device = next(classifier.parameters()).device
    broken: list[str] = []
    items = ReadableItems(images, skip_broken=request.skip_broken)
    loader = read_batches(items, request.batch_size, request.workers)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in track_progress(loader, text, request.shows_progress):
            read = [sample for _, sample in batch if sample is not None]
            broken.extend(images.name(index) for index, sample in batch if sample is None)
            if read:
                inputs = [classifier.preprocessing(image[None].to(device)) for image, _ in read]
                yield torch.cat(inputs), torch.tensor([label for _, label in read])

    return extract_features(classifier.model, batches()), broken


def _targets_in(training: ClassificationDataset, images: ClassificationDataset, labels: Tensor) -> Tensor:
    """Return the classes of images as class indices of the training data, matched by name where both have names."""
    if training.class_names is None or images.class_names is None:
        return labels
    unknown = sorted(set(images.class_names) - set(training.class_names))
    if unknown:
        raise ValueError(f"The training data lacks the classes {', '.join(unknown[:5])} of the data.")
    return torch.tensor([training.class_names.index(name) for name in images.class_names])[labels]


def _show_classes(report: dict[str, Any]) -> None:
    if "per_class" in report:
        rows = [(row["class"], row["images"], f"{row['top1']:.2f}") for row in report["per_class"]]
        print_table(("class", "images", "top-1"), rows)
    accuracies = [f"{name.replace('top', 'top-')} {report[name]:.2f} %" for name in report if name.startswith("top")]
    print(f"{report['images']} images: {', '.join(accuracies)}")
    for row in report.get("confusion", []):
        print(f"{row['class']} predicted as {row['predicted']}: {row['images']}")
    if "calibration" in report:
        print(f"expected calibration error {report['calibration']['error']:.2f} %")
    for name, title in (("knn", "nearest neighbors"), ("linear", "linear classifier")):
        if name in report:
            print(f"{title} on the features: top-1 {report[name]:.2f} %")


def _show_pixels(report: dict[str, Any]) -> None:
    if "per_class" in report:
        rows = [(row["class"], row["pixels"], f"{row['iou']:.2f}") for row in report["per_class"]]
        print_table(("class", "pixels", "IoU"), rows)
    print(
        f"{report['images']} images: mean IoU {report['mean_iou']:.2f} % over {report['classes_present']} "
        f"classes, pixel accuracy {report['pixel_accuracy']:.2f} %"
    )


def _show_objects(report: dict[str, Any]) -> None:
    print(
        f"{report['images']} images, {report['instances']} objects: mean IoU {report['box_iou']:.2f} % per "
        f"box, {report['point_iou']:.2f} % per point"
    )


def _show_boxes(report: dict[str, Any]) -> None:
    if "per_class" in report:
        print_table(("class", "mAP"), [(name, f"{value:.2f}") for name, value in report["per_class"].items()])
    print(
        f"{report['images']} images, {report['objects']} objects: mAP {report['map']:.2f} %, "
        f"AP50 {report['map50']:.2f} %, AP75 {report['map75']:.2f} %"
    )


_TASKS: dict[TaskName, tuple[Callable[..., Any], Callable[..., dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    TaskName.classification: (_open_classifier, _describe_classes, _show_classes),
    TaskName.semantic: (_open_segmenter, _describe_pixels, _show_pixels),
    TaskName.promptable: (_open_sam, _describe_objects, _show_objects),
    TaskName.detection: (_open_detector, _describe_boxes, _show_boxes),
}
