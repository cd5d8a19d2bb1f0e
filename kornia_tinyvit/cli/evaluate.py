"""``kornia-tinyvit evaluate``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import open_pretrained
from kornia_tinyvit.checkpoints.catalog import IMAGENET_22K, imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.options import MIN_AREA, NMS, TTA, WORKERS, NetworkRequest, TaskName
from kornia_tinyvit.cli.requests import argument, command, option
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.data import ClassificationDataset, DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.data.datasets import ImageDataset, match_classes
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.progress import track_progress
from kornia_tinyvit.sam.model import MobileSAM
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.evaluation import create_evaluator
from kornia_tinyvit.training.metrics.average_precision import DetectionScores
from kornia_tinyvit.training.metrics.classification import CONFUSION_CLASSES, ClassificationScores, select_classes
from kornia_tinyvit.training.metrics.precision_recall import save_precision_recall
from kornia_tinyvit.training.metrics.probes import extract_features, k_nearest_neighbors, linear_probe
from kornia_tinyvit.training.metrics.promptable import PromptScores
from kornia_tinyvit.training.metrics.semantic import SegmentationScores
from kornia_tinyvit.training.tasks.base import ReadableItems, evaluate_network, read_batches

OnBroken = StrEnum("OnBroken", ("stop", "skip"))


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(NetworkRequest):
    """The options of ``evaluate``."""

    data: Path = argument(
        "Images: folder of class folders, tar file of one, or parquet files of the Hugging Face hub. Other tasks: see "
        "'train'."
    )
    task: TaskName = option("Data", "What the network was trained for.", TaskName.classification)
    split: str = option("Data", "Split of the data, if it is divided: train, val, test, ...", "val")
    limit: int | None = option("Data", "Number of images, sampled with a fixed seed.", None, min=1)
    on_broken: OnBroken = option("Data", "At an image that cannot be read.", OnBroken.stop)
    tta: bool = option("Weights", TTA, False)
    min_area: int = option("Promptable segmentation", MIN_AREA, 1, min=1)
    nms: float | None = option("Detection", NMS, None, min=0, max=1)
    plot: Path | None = option("Detection", "PNG file for the precision-recall curves at IoU 0.5.", None)
    per_class: bool = option("Metrics", "Top-1 accuracy, IoU, or mAP and best F1 score of each class.", False)
    confusion: bool = option("Metrics", "Most frequent confusions.", False)
    calibration: bool = option("Metrics", "Expected calibration error.", False)
    knn: Path | None = option("Metrics", "k-nearest-neighbor accuracy on features of this training data.", None)
    linear: Path | None = option("Metrics", "Linear-probe accuracy, trained on features of this data.", None)
    batch_size: int = option("Hardware", "Batch size.", 64, min=1)
    workers: int = option("Hardware", WORKERS, 0, min=0)

    @property
    def skip_broken(self) -> bool:
        """Whether to leave out images that cannot be read."""
        return self.on_broken is OnBroken.skip


TITLES = {"top1": "top-1", "iou": "IoU", "map": "mAP", "best_f1": "best F1"}
SUMMARIES = {
    TaskName.classification: "{images} images: {accuracies}",
    TaskName.semantic: "{images} images: mean IoU {mean_iou:.2f} % over {classes_present} classes, pixel accuracy "
    "{pixel_accuracy:.2f} %",
    TaskName.promptable: "{images} images, {instances} objects: mean IoU {box_iou:.2f} % per box, {point_iou:.2f} % "
    "per point",
    TaskName.detection: "{images} images, {objects} objects: mAP {map:.2f} %, AP50 {map50:.2f} %, AP75 {map75:.2f} %",
}
_FOR_CLASSIFIERS = ("tta", "confusion", "calibration", "knn", "linear")
_FOR_DETECTORS = ("nms", "plot")
_UNUSED = {
    TaskName.classification: ("min_area", *_FOR_DETECTORS),
    TaskName.semantic: (*_FOR_CLASSIFIERS, *_FOR_DETECTORS, "batch_size", "min_area"),  # images of any size, one by one
    TaskName.promptable: (*_FOR_CLASSIFIERS, *_FOR_DETECTORS, "batch_size", "per_class"),
    TaskName.detection: (*_FOR_CLASSIFIERS, "min_area"),
}


@command
def evaluate(request: EvaluateRequest) -> None:
    """Evaluate a network on labeled images."""
    request.reject_unused(_UNUSED[request.task], f"with --task {request.task}")
    network: Any
    images: Any
    network, images = _open(request)
    if request.limit is not None:
        images = images.sample(min(request.limit, len(images)))
    device = next(network.parameters()).device
    request.note_run(images, device, request.weights or request.variant or "cifar10")
    if isinstance(network, TinyViT):
        request.reject_unused(("tta", "per_class", "confusion", "calibration"), "with weights that have no classes")
        broken: list[str] = []
        probes = _probe(network, EvaluationPipeline.from_preprocessing(network.preprocessing), images, request, broken)
        _print(request, {"images": len(images) - len(broken), **probes}, broken)
        return
    if request.task is TaskName.classification:
        _choose_classes(network, images, request)
    options: dict[str, Any] = {"batch_size": request.batch_size, "skip_broken": request.skip_broken}
    if request.nms is not None:
        options["nms_threshold"] = request.nms
    module, evaluator = create_evaluator(network, images, **options)
    broken = evaluate_network(module, evaluator, request.workers, progress=request.shows_progress)
    scores = evaluator.counts.compute()
    if request.task is TaskName.promptable and not scores.instances:
        raise ValueError(f"None of {len(images)} images has an object of at least {request.min_area} pixels.")
    report = {"images": len(images) - len(broken), **_describe(scores, getattr(network, "class_names", ()), request)}
    if request.knn is not None or request.linear is not None:
        report |= _probe(network.model, network.preprocessing, images, request, broken)
    if request.plot is not None:
        named = dict(zip(network.class_names, scores.class_curves, strict=True))
        save_precision_recall(request.plot, {"all": scores.curve} | named)
        request.note(f"Precision-recall curves: {request.plot}")
    _print(request, report, broken)


def _print(request: EvaluateRequest, report: dict[str, Any], broken: list[str]) -> None:
    """Print the results, and how many images were left out."""
    if request.as_json:
        print(json.dumps(report | {"broken": broken} if request.skip_broken else report))
    else:
        _show(report, request.task)
    request.note_names("Images left out because they cannot be read", broken)


def _choose_classes(classifier: ImageClassifier, images: ClassificationDataset, request: EvaluateRequest) -> None:
    """Evaluate a classifier of ImageNet-22k on the classes of ImageNet-1k, and note how classes are matched."""
    known = bool(set(images.class_names or ()) & set(classifier.class_names))
    if len(classifier.class_names) == IMAGENET_22K and images.num_classes <= len(imagenet_classes()) and not known:
        kept = imagenet_1k_in_22k()

        def keep(_classifier: nn.Module, _images: Any, logits: Tensor) -> Tensor:
            return select_classes(logits, kept)

        classifier.register_forward_hook(keep)
        classifier.class_names = imagenet_classes()
        request.note("The network has the classes of ImageNet-22k; evaluating the 1000 of ImageNet-1k.")
    names = classifier.class_names
    if not set(images.class_names or ()) & set(names):
        request.note("Classes are matched by position, as they have no common names.")
    elif images.num_classes < len(names):
        request.note(f"The data has {images.num_classes:,} of the network's {len(names):,} classes.")
    if request.confusion and len(names) > CONFUSION_CLASSES:
        raise ValueError(f"--confusion takes up to {CONFUSION_CLASSES} classes; the network has {len(names)}.")


def _open(request: EvaluateRequest) -> tuple[nn.Module, ImageDataset[Any]]:
    """Open the network and the data."""
    if request.task is TaskName.classification:
        images = ClassificationDataset.open(request.data, request.split)
        if request.knn is not None or request.linear is not None:
            found = open_pretrained(request.pretrained, request.variant, request.img_size)
            if found.config.mobile_sam or not found.config.num_classes:  # features only
                # MobileSAM's at the size of its variant
                size = {"img_size": found.config.as_backbone().img_size} if found.config.mobile_sam else {}
                return request.build_network(TinyViT, found, **size), images
        return request.build_classifier(request.tta), images
    if request.task is TaskName.promptable:
        sam = request.build_network(MobileSAM, request.weights or True)
        return sam, InstanceDataset.open(request.data, request.split, request.min_area)
    if request.weights is None:
        raise ValueError(
            f"There are no published weights for --task {request.task}; give --weights FILE, e.g. "
            "runs/train/best.safetensors."
        )
    if request.task is TaskName.semantic:
        segmenter = request.build_network(SemanticSegmenter, request.weights)
        return segmenter, SegmentationDataset.open(request.data, request.split)
    return request.build_network(TinyViTDetector, request.weights), DetectionDataset.open(request.data, request.split)


def _describe(scores: Any, names: Sequence[str], request: EvaluateRequest) -> dict[str, Any]:
    """Return the scores in percent and, if requested, those of each class that the data has."""
    report: dict[str, Any] = {}
    columns: dict[str, Tensor] = {}
    match scores:
        case ClassificationScores():
            report = {"top1": round(scores.top1, 2), f"top{scores.top_k}": round(scores.top5, 2)}
            columns = {"images": scores.class_images, "top1": scores.per_class}
        case SegmentationScores():
            report = {name: round(getattr(scores, name), 2) for name in ("mean_iou", "pixel_accuracy")}
            report["classes_present"] = scores.present
            columns = {"pixels": scores.class_pixels, "iou": scores.per_class}
        case DetectionScores():
            report = scores.to_dict() | {"precision": _rounded("precision", scores.curve.precision.tolist())}
            curves = scores.class_curves
            columns = {
                "map": scores.per_class,
                "best_f1": torch.tensor([each.best_f1 for each in curves]),
                "threshold": torch.tensor([each.threshold for each in curves]),
                "precision": torch.stack([each.precision for each in curves]),
            }
        case PromptScores():
            report = {name: round(value, 2) for name, value in vars(scores).items()}
    if request.per_class:
        rows = zip(names, scores.per_class.tolist(), *(column.tolist() for column in columns.values()), strict=True)
        report["per_class"] = [
            {"class": name} | {column: _rounded(column, value) for column, value in zip(columns, values, strict=True)}
            for name, score, *values in rows
            if not math.isnan(score)
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


def _rounded(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(name, each) for each in value]
    return None if math.isnan(value) else round(value, 4 if name == "threshold" else 2)


def _probe(
    model: TinyViT,
    preprocessing: nn.Module,
    images: ClassificationDataset,
    request: EvaluateRequest,
    broken: list[str],
) -> dict[str, float]:
    """Return the top-1 accuracies of the probes in percent; extend ``broken`` by the images that cannot be read."""
    (features, labels), unread = _features(model, preprocessing, images, request, "features")
    broken += [name for name in unread if name not in broken]
    counted = {images.fingerprint()}
    known: dict[Path, tuple[Tensor, Tensor]] = {}
    top1 = {}
    for name, path in (("knn", request.knn), ("linear", request.linear)):
        if path is None:
            continue
        training = ClassificationDataset.open(path)
        used, owners = sorted(set(images.labels)), ("The data", str(path))
        positions = match_classes(images.class_names, training.class_names, used, owners)
        targets = labels if positions is None else torch.tensor(positions)[labels]
        if path not in known:
            known[path], unread = _features(model, preprocessing, training, request, f"features of {path.name}")
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
    model: TinyViT, preprocessing: nn.Module, images: ClassificationDataset, request: EvaluateRequest, text: str
) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Return features :math:`(N, D)` and class indices :math:`(N,)`, and the names of broken images."""
    device = next(model.parameters()).device
    broken: list[str] = []
    items = ReadableItems(images, skip_broken=request.skip_broken)
    loader = read_batches(items, request.batch_size, request.workers)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in track_progress(loader, text, request.shows_progress):
            read = [sample for _, sample in batch if sample is not None]
            broken.extend(images.name(index) for index, sample in batch if sample is None)
            if read:
                inputs = [preprocessing(image[None].to(device)) for image, _ in read]
                yield torch.cat(inputs), torch.tensor([label for _, label in read])

    return extract_features(model, batches()), broken


def _show(report: dict[str, Any], task: TaskName) -> None:
    if rows := report.get("per_class"):
        columns = [name for name in rows[0] if name != "precision"]
        texts = {float: "{:.2f}", type(None): "-"}
        print_table(
            [TITLES.get(name, name) for name in columns],
            ([texts.get(type(row[name]), "{}").format(row[name]) for name in columns] for row in rows),
        )
    accuracies = [f"{name.replace('top', 'top-')} {report[name]:.2f} %" for name in report if name.startswith("top")]
    print(SUMMARIES[task].format(**report, accuracies=", ".join(accuracies) or "features only"))
    if report.get("threshold") is not None:
        print(f"At IoU 0.5: best F1 {report['best_f1']:.2f} %, at scores of {report['threshold']:.2f} or more")
        shown = (10, 30, 50, 70, 90)
        values = ", ".join(f"{report['precision'][recall]:.1f}" for recall in shown)
        print(f"Precision at recall {', '.join(map(str, shown))} %: {values} %")
    for row in report.get("confusion", []):
        print(f"{row['class']} predicted as {row['predicted']}: {row['images']}")
    if "calibration" in report:
        print(f"expected calibration error {report['calibration']['error']:.2f} %")
    for name, title in (("knn", "nearest neighbors"), ("linear", "linear classifier")):
        if name in report:
            print(f"{title} on the features: top-1 {report[name]:.2f} %")
