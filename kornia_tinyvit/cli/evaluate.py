"""``kornia-tinyvit evaluate``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.catalog import imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.options import MinArea, TaskName
from kornia_tinyvit.cli.requests import command
from kornia_tinyvit.cli.tables import print_names, print_table
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


#: What to do about images that cannot be decoded.
OnBroken = StrEnum("OnBroken", ("stop", "skip"))


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
    variant: options.Variant = None
    pretrained: options.Pretrained = None
    img_size: options.ImgSize = None
    device: options.Device = "cpu"
    tta: options.Augmented = False
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time; masks are predicted one by one.")] = 64
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many images, drawn with a fixed seed.")] = None
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Tell the top-1 accuracy, or the IoU, of each class.")
    ] = False
    confusion: Annotated[bool, typer.Option("--confusion", help="Tell the most frequent mistakes.")] = False
    calibration: Annotated[bool, typer.Option("--calibration", help="Tell how far to trust the scores.")] = False
    knn: Annotated[Path | None, typer.Option(help="Also classify by the nearest features of this training data.")] = (
        None
    )
    linear: Annotated[Path | None, typer.Option(help="Also train a linear classifier on the features of this.")] = None
    on_broken: Annotated[OnBroken, typer.Option(help="What to do about images that cannot be read.")] = OnBroken.stop
    split: Annotated[str, typer.Option(help="Semantic, promptable, detection: which part of the data.")] = "val"
    min_area: MinArea = 1
    as_json: options.Json = False

    @property
    def skip_broken(self) -> bool:
        """Whether images that cannot be read are left out."""
        return self.on_broken is OnBroken.skip


_FOR_CLASSIFIERS = ("tta", "confusion", "calibration", "knn", "linear")
# Masks are predicted an image at a time.
_IDLE = {
    TaskName.classification: ("split", "min_area"),
    TaskName.semantic: (*_FOR_CLASSIFIERS, "batch_size", "min_area"),
    TaskName.promptable: (*_FOR_CLASSIFIERS, "batch_size", "per_class"),
    TaskName.detection: (*_FOR_CLASSIFIERS, "min_area"),
}


@command
def evaluate(context: typer.Context, asked: EvaluateRequest) -> None:
    """Measure the accuracy on labeled images."""
    options.refuse_idle(context, _IDLE[asked.task], f"with --task {asked.task}")
    open_both, describe, show = _TASKS[asked.task]
    network, images = open_both(asked)
    if asked.limit is not None:
        images = images.sample(min(asked.limit, len(images)))
    module, evaluator = create_evaluator(network, images, batch_size=asked.batch_size, skip_broken=asked.skip_broken)
    broken = evaluate_network(module, evaluator, asked.workers, progress=not asked.as_json)
    found = evaluator.counts.compute()
    if asked.task is TaskName.promptable and not found.instances:
        raise ValueError(f"None of {len(images)} images has an object of at least {asked.min_area} pixels.")
    report = {"images": len(images) - len(broken), **describe(found, network, asked)}
    if asked.knn is not None or asked.linear is not None:
        report |= _probe(network, images, asked, broken)
    if asked.as_json:
        print(json.dumps(report | {"broken": broken} if asked.skip_broken else report))
    else:
        show(report)
        print_names("Could not be read and were left out", broken)


def _open_classifier(asked: EvaluateRequest) -> tuple[ImageClassifier, ClassificationDataset]:
    """Open a classifier, of whose classes the data's or ImageNet-1k's among ImageNet-22k's count, and its data."""
    classifier = options.build_classifier(asked.variant, asked.pretrained, asked.device, asked.img_size, asked.tta)
    images = ClassificationDataset.open(asked.data)
    known = bool(set(images.class_names or ()) & set(classifier.class_names))
    if len(classifier.class_names) == IMAGENET_22K and images.num_classes <= len(imagenet_classes()) and not known:
        kept = imagenet_1k_in_22k()

        def keep(_classifier: nn.Module, _images: Any, logits: Tensor) -> Tensor:
            return select_classes(logits, kept)

        classifier.register_forward_hook(keep)
        classifier.class_names = imagenet_classes()
        print("The network's classes are ImageNet-22k's; taking the 1000 of ImageNet-1k.", file=sys.stderr)
    names = classifier.class_names
    unknown = match_classes(images.class_names, names) is None
    if unknown and images.class_names is not None and images.num_classes < len(names):
        print(
            f"The network knows none of the data's {images.num_classes} classes by name; taking them for the first "
            f"of its {len(names)}.",
            file=sys.stderr,
        )
    if asked.confusion and len(names) > CONFUSION_CLASSES:
        raise ValueError(f"--confusion takes up to {CONFUSION_CLASSES} classes; the network has {len(names)}.")
    return classifier, images


def _open_segmenter(asked: EvaluateRequest) -> tuple[SemanticSegmenter, SegmentationDataset]:
    return _build_trained(SemanticSegmenter, "segmenter", asked), SegmentationDataset.open(asked.data, asked.split)


def _open_detector(asked: EvaluateRequest) -> tuple[TinyViTDetector, DetectionDataset]:
    return _build_trained(TinyViTDetector, "detector", asked), DetectionDataset.open(asked.data, asked.split)


def _open_sam(asked: EvaluateRequest) -> tuple[MobileSAM, InstanceDataset]:
    sam = options.build_network(MobileSAM, asked.variant, asked.pretrained or True, asked.device, asked.img_size)
    return sam, InstanceDataset.open(asked.data, asked.split, asked.min_area)


def _build_trained(kind: type[options.Network], name: str, asked: EvaluateRequest) -> options.Network:
    """Build a network of a kind of which there are no published weights."""
    if asked.pretrained is None:
        raise ValueError(
            f"There are no published {name}s: name a {name}'s file, --pretrained FILE, such as "
            "runs/train/best.safetensors."
        )
    return options.build_network(kind, asked.variant, asked.pretrained, asked.device, asked.img_size)


def _describe_classes(found: ClassificationScores, network: ImageClassifier, asked: EvaluateRequest) -> dict[str, Any]:
    names = network.class_names
    report: dict[str, Any] = {"top1": round(found.top1, 2), f"top{found.top_k}": round(found.top5, 2)}
    if asked.per_class:
        rows = zip(names, found.class_images.tolist(), found.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "images": count, "top1": round(top1, 2)} for name, count, top1 in rows if count
        ]
    if asked.confusion:
        report["confusion"] = [
            {"class": names[truth], "taken_for": names[answer], "images": count}
            for truth, answer, count in found.confusions()
        ]
    if asked.calibration:
        bins = [
            {"images": int(count), "score": round(score, 2), "top1": round(top1, 2)}
            for count, score, top1 in found.calibration_bins.tolist()
            if count
        ]
        report["calibration"] = {"error": round(found.calibration_error, 2), "bins": bins}
    return report


def _describe_pixels(found: SegmentationScores, network: SemanticSegmenter, asked: EvaluateRequest) -> dict[str, Any]:
    report: dict[str, Any] = {
        "classes_present": found.present,
        "mean_iou": round(found.mean_iou, 2),
        "pixel_accuracy": round(found.pixel_accuracy, 2),
    }
    if asked.per_class:
        rows = zip(network.class_names, found.class_pixels.tolist(), found.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "pixels": pixels, "iou": round(iou, 2)} for name, pixels, iou in rows if pixels
        ]
    return report


def _describe_objects(found: PromptScores, network: MobileSAM, asked: EvaluateRequest) -> dict[str, Any]:
    return {name: round(value, 2) for name, value in vars(found).items()}


def _describe_boxes(found: DetectionScores, network: TinyViTDetector, asked: EvaluateRequest) -> dict[str, Any]:
    report = found.to_dict()
    if asked.per_class:
        pairs = zip(network.class_names, found.per_class.tolist(), strict=True)
        report["per_class"] = {name: round(value, 4) for name, value in pairs if not math.isnan(value)}
    return report


def _probe(
    classifier: ImageClassifier, images: ClassificationDataset, asked: EvaluateRequest, broken: list[str]
) -> dict[str, float]:
    """Return the top-1 of what the features of training data say, in per cent; add images of it that are broken."""
    (features, labels), _ = _features(classifier, images, asked, "taking features")  # its broken ones are known
    counted = {images.fingerprint()}
    known: dict[Path, tuple[Tensor, Tensor]] = {}
    top1 = {}
    for name, path in (("knn", asked.knn), ("linear", asked.linear)):
        if path is None:
            continue
        training = ClassificationDataset.open(path)
        targets = _targets_in(training, images, labels)
        if path not in known:
            known[path], unread = _features(classifier, training, asked, f"taking features of {path.name}")
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
    classifier: ImageClassifier, images: ClassificationDataset, asked: EvaluateRequest, text: str
) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Return features :math:`(N, D)` with the data's class indices :math:`(N,)`, and names of broken images."""
    device = next(classifier.parameters()).device
    broken: list[str] = []
    items = ReadableItems(images, skip_broken=asked.skip_broken)
    loader = read_batches(items, asked.batch_size, asked.workers)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in track_progress(loader, text, not asked.as_json):
            read = [sample for _, sample in batch if sample is not None]
            broken.extend(images.name(index) for index, sample in batch if sample is None)
            if read:
                inputs = [classifier.preprocessing(image[None].to(device)) for image, _ in read]
                yield torch.cat(inputs), torch.tensor([label for _, label in read])

    return extract_features(classifier.model, batches()), broken


def _targets_in(training: ClassificationDataset, images: ClassificationDataset, labels: Tensor) -> Tensor:
    """Return the classes of images as indices of the training data's classes: by name where both tell names."""
    if training.class_names is None or images.class_names is None:
        return labels
    unknown = sorted(set(images.class_names) - set(training.class_names))
    if unknown:
        raise ValueError(f"The training data has no classes {', '.join(unknown[:5])}, but the data to evaluate does.")
    return torch.tensor([training.class_names.index(name) for name in images.class_names])[labels]


def _show_classes(report: dict[str, Any]) -> None:
    if "per_class" in report:
        rows = [(row["class"], row["images"], f"{row['top1']:.2f}") for row in report["per_class"]]
        print_table(("class", "images", "top-1"), rows)
    shares = [f"{name.replace('top', 'top-')} {report[name]:.2f} %" for name in report if name.startswith("top")]
    print(f"{report['images']} images: {', '.join(shares)}")
    for row in report.get("confusion", []):
        print(f"{row['class']} taken for {row['taken_for']}: {row['images']}")
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
        f"{report['images']} images, {report['instances']} objects: mean IoU {report['box_iou']:.2f} % from a "
        f"box each, {report['point_iou']:.2f} % from a point each"
    )


def _show_boxes(report: dict[str, Any]) -> None:
    if "per_class" in report:
        print_table(("class", "mAP"), [(name, f"{value:.2f}") for name, value in report["per_class"].items()])
    print(
        f"{report['images']} images, {report['objects']} objects: mAP {report['map']:.2f} %, "
        f"at an overlap of 50 % {report['map50']:.2f} %, of 75 % {report['map75']:.2f} %"
    )


_TASKS: dict[TaskName, tuple[Callable[..., Any], Callable[..., dict[str, Any]], Callable[[dict[str, Any]], None]]] = {
    TaskName.classification: (_open_classifier, _describe_classes, _show_classes),
    TaskName.semantic: (_open_segmenter, _describe_pixels, _show_pixels),
    TaskName.promptable: (_open_sam, _describe_objects, _show_objects),
    TaskName.detection: (_open_detector, _describe_boxes, _show_boxes),
}
