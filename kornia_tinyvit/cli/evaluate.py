"""``kornia-tinyvit evaluate``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from kornia_tinyvit.checkpoints.catalog import imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli import options
from kornia_tinyvit.cli.evaluate_tasks import EvaluateRequest, evaluate_task, limited, print_report
from kornia_tinyvit.cli.options import TaskName
from kornia_tinyvit.cli.requests import command
from kornia_tinyvit.cli.tables import print_table
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import match_classes
from kornia_tinyvit.progress import track_progress
from kornia_tinyvit.training.metrics.classification import CONFUSION_CLASSES, Evaluation, select_classes
from kornia_tinyvit.training.metrics.probes import extract_features, k_nearest_neighbours, linear_probe
from kornia_tinyvit.training.tasks.base import ReadableItems, evaluate_network, read_batches
from kornia_tinyvit.training.tasks.classification import AccuracyEvaluator

IMAGENET_22K = 21841

_FOR_CLASSIFIERS = ("tta", "confusion", "calibration", "knn", "linear")
# Masks are predicted a picture at a time.
_IDLE = {
    TaskName.classification: ("split", "min_area"),
    TaskName.semantic: (*_FOR_CLASSIFIERS, "batch_size", "min_area"),
    TaskName.promptable: (*_FOR_CLASSIFIERS, "batch_size", "per_class"),
    TaskName.detection: (*_FOR_CLASSIFIERS, "min_area"),
}


@command
def evaluate(context: typer.Context, asked: EvaluateRequest) -> None:
    """Measure the accuracy on labelled pictures."""
    options.refuse_idle(context, _IDLE[asked.task], f"with --task {asked.task}")
    if asked.task is not TaskName.classification:
        evaluate_task(asked)
        return
    classifier = options.build_classifier(asked.variant, asked.pretrained, asked.device, asked.img_size, asked.tta)
    images = limited(ClassificationDataset.open(asked.data), asked.limit)
    network, names = _match_head(classifier, images)
    if asked.confusion and len(names) > CONFUSION_CLASSES:
        raise ValueError(f"--confusion takes up to {CONFUSION_CLASSES} classes; the network has {len(names)}.")
    reading = _Reading(asked)
    evaluator = AccuracyEvaluator(
        images.with_classes(names), len(names), list, device=next(classifier.parameters()).device,
        batch_size=asked.batch_size, skip_broken=asked.skip_broken,
    )  # fmt: skip
    reading.add_broken(images, evaluate_network(network, evaluator, asked.workers, progress=not asked.as_json))
    report = _report(evaluator.counts.compute(), names, asked)
    report |= _probe(classifier, images, {"knn": asked.knn, "linear": asked.linear}, reading)
    print_report(report, list(reading.broken.values()) if asked.skip_broken else None, _show, asked.as_json)


class _KeptClasses(nn.Module):
    """A classifier of which some classes count."""

    def __init__(self, classifier: ImageClassifier, indices: Tensor) -> None:
        super().__init__()
        self.classifier, self.indices = classifier, indices

    def forward(self, images: list[Tensor]) -> Tensor:
        return select_classes(self.classifier(images), self.indices)


def _match_head(classifier: ImageClassifier, images: ClassificationDataset) -> tuple[nn.Module, tuple[str, ...]]:
    """Return what the logits mean for the data: the network's classes, or ImageNet-1k's among those of ImageNet-22k."""
    network: nn.Module = classifier
    names = classifier.class_names
    known = bool(set(images.class_names or ()) & set(names))
    if len(names) == IMAGENET_22K and images.num_classes <= len(imagenet_classes()) and not known:
        network, names = _KeptClasses(classifier, imagenet_1k_in_22k()), imagenet_classes()
        print("The network's classes are ImageNet-22k's; taking the 1000 of ImageNet-1k.", file=sys.stderr)
    if (
        match_classes(images.class_names, names) is None
        and images.class_names is not None
        and images.num_classes < len(names)
    ):
        print(
            f"The network knows none of the data's {images.num_classes} classes by name; taking them for the first "
            f"of its {len(names)}.",
            file=sys.stderr,
        )
    return network, names


def _report(found: Evaluation, names: tuple[str, ...], asked: EvaluateRequest) -> dict[str, Any]:
    """Return what is printed, in per cent with two decimals."""
    report: dict[str, Any] = {
        "pictures": found.pictures,
        "top1": round(found.top1, 2),
        f"top{found.top_k}": round(found.top5, 2),
    }
    if asked.per_class:
        rows = zip(names, found.class_pictures.tolist(), found.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "pictures": count, "top1": round(top1, 2)} for name, count, top1 in rows if count
        ]
    if asked.confusion:
        report["confusion"] = [
            {"class": names[truth], "taken_for": names[answer], "pictures": count}
            for truth, answer, count in found.confusions()
        ]
    if asked.calibration:
        bins = [
            {"pictures": int(count), "score": round(score, 2), "top1": round(top1, 2)}
            for count, score, top1 in found.calibration_bins.tolist()
            if count
        ]
        report["calibration"] = {"error": round(found.calibration_error, 2), "bins": bins}
    return report


@dataclass
class _Reading:
    """How images are read, and which could not be: the features need a second pass, which meets the same again."""

    asked: EvaluateRequest
    broken: dict[tuple[str, str], str] = field(default_factory=dict)

    def add_broken(self, images: ClassificationDataset, names: list[str]) -> None:
        self.broken |= {(images.fingerprint(), name): name for name in names}

    def features(self, classifier: ImageClassifier, images: ClassificationDataset, text: str) -> tuple[Tensor, Tensor]:
        """Return features :math:`(N, D)` and the data's class indices :math:`(N,)`."""
        return extract_features(classifier.model, self._inputs(classifier, images, text))

    def _inputs(
        self, classifier: ImageClassifier, images: ClassificationDataset, text: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(classifier.parameters()).device
        items = ReadableItems(images, skip_broken=self.asked.skip_broken)
        for batch in track_progress(
            read_batches(items, self.asked.batch_size, self.asked.workers), text, not self.asked.as_json
        ):
            read = [sample for _, sample in batch if sample is not None]
            self.add_broken(images, [images.name(index) for index, sample in batch if sample is None])
            if read:
                inputs = [classifier.preprocessing(image[None].to(device)) for image, _ in read]
                yield torch.cat(inputs), torch.tensor([label for _, label in read])


def _probe(
    classifier: ImageClassifier, images: ClassificationDataset, probes: dict[str, Path | None], reading: _Reading
) -> dict[str, float]:
    """Return the top-1 of what the features of training data say, in per cent."""
    paths = {name: path for name, path in probes.items() if path is not None}
    if not paths:
        return {}
    features, labels = reading.features(classifier, images, "taking features")
    known: dict[Path, tuple[Tensor, Tensor]] = {}
    top1 = {}
    for name, path in paths.items():
        training = ClassificationDataset.open(path)
        targets = _targets_in(training, images, labels)
        if path not in known:
            known[path] = reading.features(classifier, training, f"taking features of {path.name}")
        if name == "knn":
            answers = k_nearest_neighbours(*known[path], features, num_classes=training.num_classes)
        else:
            answers = linear_probe(*known[path], training.num_classes)(features)
        top1[name] = round(100 * float((answers.argmax(1) == targets).double().mean()), 2)
    return top1


def _targets_in(training: ClassificationDataset, images: ClassificationDataset, labels: Tensor) -> Tensor:
    """Return the classes of pictures as indices of the training data's classes: by name where both tell names."""
    if training.class_names is None or images.class_names is None:
        return labels
    unknown = sorted(set(images.class_names) - set(training.class_names))
    if unknown:
        raise ValueError(f"The training data has no classes {', '.join(unknown[:5])}, but the data to evaluate does.")
    return torch.tensor([training.class_names.index(name) for name in images.class_names])[labels]


def _show(report: dict[str, Any]) -> None:
    if "per_class" in report:
        rows = [(row["class"], row["pictures"], f"{row['top1']:.2f}") for row in report["per_class"]]
        print_table(("class", "pictures", "top-1"), rows)
    shares = [f"{name.replace('top', 'top-')} {report[name]:.2f} %" for name in report if name.startswith("top")]
    print(f"{report['pictures']} pictures: {', '.join(shares)}")
    for row in report.get("confusion", []):
        print(f"{row['class']} taken for {row['taken_for']}: {row['pictures']}")
    if "calibration" in report:
        print(f"expected calibration error {report['calibration']['error']:.2f} %")
    for name, title in (("knn", "nearest neighbours"), ("linear", "linear classifier")):
        if name in report:
            print(f"{title} on the features: top-1 {report[name]:.2f} %")
