"""``kornia-tinyvit evaluate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kornia_tinyvit.checkpoints.catalog import imagenet_1k_in_22k, imagenet_classes
from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.cli.evaluate_tasks import Asked, evaluate_task
from kornia_tinyvit.cli.options import (
    Augmented,
    Device,
    ImgSize,
    Json,
    MinArea,
    Pretrained,
    TaskName,
    Variant,
    build_classifier,
    refuse_idle,
)
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.datasets import ImageLoader, match_classes
from kornia_tinyvit.progress import track_progress
from kornia_tinyvit.training.metrics.classification import (
    CONFUSION_CLASSES,
    Evaluation,
    Metrics,
    ReadablePictures,
    collate_readable,
    extract_features,
    k_nearest_neighbours,
    linear_probe,
    select_classes,
)

IMAGENET_22K = 21841

_FOR_CLASSIFIERS = ("tta", "confusion", "calibration", "knn", "linear")
# Masks are predicted a picture at a time.
_IDLE = {
    TaskName.classification: ("split", "min_area"),
    TaskName.semantic: (*_FOR_CLASSIFIERS, "batch_size", "min_area"),
    TaskName.promptable: (*_FOR_CLASSIFIERS, "batch_size", "per_class"),
    TaskName.detection: (*_FOR_CLASSIFIERS, "min_area"),
}


class OnBroken(StrEnum):
    """What to do about pictures that cannot be decoded."""

    stop = "stop"
    skip = "skip"


def evaluate(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder of class folders, a tar file of one, or the Hugging Face hub's parquet files. Other tasks: "
            "what 'train' takes."
        ),
    ],
    task: Annotated[TaskName, typer.Option(help="What the network was trained for.")] = TaskName.classification,
    variant: Variant = None,
    pretrained: Pretrained = None,
    img_size: ImgSize = None,
    device: Device = "cpu",
    tta: Augmented = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time; masks are predicted one by one.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many pictures, drawn with a fixed seed.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures.")] = 0,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Tell the top-1 accuracy, or the IoU, of each class.")
    ] = False,
    confusion: Annotated[bool, typer.Option("--confusion", help="Tell the most frequent mistakes.")] = False,
    calibration: Annotated[bool, typer.Option("--calibration", help="Tell how far to trust the scores.")] = False,
    knn: Annotated[
        Path | None, typer.Option(help="Also classify by the nearest features of this training data.")
    ] = None,
    linear: Annotated[Path | None, typer.Option(help="Also train a linear classifier on the features of this.")] = None,
    on_broken: Annotated[OnBroken, typer.Option(help="What to do about pictures that cannot be read.")] = OnBroken.stop,
    split: Annotated[str, typer.Option(help="Semantic, promptable, detection: which part of the data.")] = "val",
    min_area: MinArea = 1,
    as_json: Json = False,
) -> None:
    """Measure the accuracy on labelled pictures."""
    skip_broken = on_broken is OnBroken.skip
    refuse_idle(context, _IDLE[task], f"with --task {task}")
    if task is not TaskName.classification:
        asked = Asked(
            data, split, variant, pretrained, img_size, device, batch_size, limit, workers, per_class, min_area,
            skip_broken, as_json,
        )  # fmt: skip
        evaluate_task(task, asked)
        return
    classifier = build_classifier(variant, pretrained, device, img_size, tta)
    reader = _Reader(classifier, batch_size, workers, skip_broken, quiet=as_json)
    images = ClassificationDataset.open(data)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    head = _Head(classifier, images)
    if confusion and len(head.names) > CONFUSION_CLASSES:
        raise ValueError(f"--confusion takes up to {CONFUSION_CLASSES} classes; the network has {len(head.names)}.")
    found = head.evaluate(reader.batches(images, rows, "evaluating"))
    report = _report(found, head.names, per_class, confusion, calibration)
    report |= _probe(reader, images, rows, knn, linear)
    if on_broken is OnBroken.skip:
        report["broken"] = list(reader.broken.values())
    if as_json:
        print(json.dumps(report))
    else:
        _show(report, found.top_k)


@dataclass
class _Reader:
    """Reads pictures in batches and keeps the names of those that it could not read."""

    classifier: ImageClassifier
    batch_size: int
    workers: int
    skip_broken: bool
    quiet: bool
    broken: dict[tuple[str, str], str] = field(default_factory=dict)

    def batches(
        self, images: ClassificationDataset, rows: list[int], task: str
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Return pictures on the network's device, as floats in [0, 1], and the data's class indices."""
        readable = ReadablePictures(images, rows, self.skip_broken)
        loader = ImageLoader(
            readable, batch_size=self.batch_size, num_workers=self.workers, collate_fn=collate_readable
        )
        first = next(self.classifier.parameters())
        for pictures, labels, broken in track_progress(loader, task, not self.quiet):
            # The features need a second pass, which meets the same pictures again.
            self.broken |= {(images.fingerprint(), name): name for name in broken}
            if pictures:
                yield [picture.to(first.device, first.dtype) for picture in pictures], labels

    def features(self, images: ClassificationDataset, rows: list[int], task: str) -> tuple[Tensor, Tensor]:
        """Return features :math:`(N, D)` and the data's class indices :math:`(N,)`."""
        prepare = self.classifier.preprocessing
        batches = self.batches(images, rows, task)
        return extract_features(
            self.classifier.model,
            (
                (torch.cat([prepare(picture.unsqueeze(0)) for picture in pictures]), labels)
                for pictures, labels in batches
            ),
        )


class _Head:
    """What the logits mean for the data: the network's classes, or ImageNet-1k's among those of ImageNet-22k."""

    def __init__(self, classifier: ImageClassifier, images: ClassificationDataset) -> None:
        self.classifier = classifier
        self.names = classifier.class_names
        self.kept: Tensor | None = None
        known = bool(set(images.class_names or ()) & set(self.names))
        if len(self.names) == IMAGENET_22K and images.num_classes <= len(imagenet_classes()) and not known:
            self.names, self.kept = imagenet_classes(), imagenet_1k_in_22k()
            print("The network's classes are ImageNet-22k's; taking the 1000 of ImageNet-1k.", file=sys.stderr)
        positions = match_classes(images.class_names, self.names)
        self.positions = None if positions is None else torch.tensor(positions)
        if positions is None and images.class_names is not None and images.num_classes < len(self.names):
            print(
                f"The network knows none of the data's {images.num_classes} classes by name; taking them for the first "
                f"of its {len(self.names)}.",
                file=sys.stderr,
            )

    def evaluate(self, batches: Iterable[tuple[list[Tensor], Tensor]]) -> Evaluation:
        """Measure the network on pictures and the data's class indices."""
        metrics = Metrics(len(self.names))
        for pictures, labels in batches:
            metrics.update(self._logits(pictures), labels if self.positions is None else self.positions[labels])
        return metrics.compute()

    @torch.inference_mode()
    def _logits(self, pictures: list[Tensor]) -> Tensor:
        logits: Tensor = self.classifier(pictures)
        return logits if self.kept is None else select_classes(logits, self.kept)


def _report(
    found: Evaluation, names: tuple[str, ...], per_class: bool, confusion: bool, calibration: bool
) -> dict[str, Any]:
    """Return what is printed, in per cent with two decimals."""
    report: dict[str, Any] = {
        "pictures": found.pictures,
        "top1": round(found.top1, 2),
        f"top{found.top_k}": round(found.top5, 2),
    }
    if per_class:
        rows = zip(names, found.class_pictures.tolist(), found.per_class.tolist(), strict=True)
        report["per_class"] = [
            {"class": name, "pictures": count, "top1": round(top1, 2)} for name, count, top1 in rows if count
        ]
    if confusion:
        report["confusion"] = [
            {"class": names[truth], "taken_for": names[answer], "pictures": count}
            for truth, answer, count in found.confusions()
        ]
    if calibration:
        bins = [
            {"pictures": int(count), "score": round(score, 2), "top1": round(top1, 2)}
            for count, score, top1 in found.calibration_bins.tolist()
            if count
        ]
        report["calibration"] = {"error": round(found.calibration_error, 2), "bins": bins}
    return report


def _probe(
    reader: _Reader, images: ClassificationDataset, rows: list[int], knn: Path | None, linear: Path | None
) -> dict[str, float]:
    """Return the top-1 of what the features of training data say, in per cent."""
    if knn is None and linear is None:
        return {}
    features, labels = reader.features(images, rows, "taking features")
    known: dict[Path, tuple[Tensor, Tensor]] = {}
    top1 = {}
    for name, path in (("knn", knn), ("linear", linear)):
        if path is None:
            continue
        training = ClassificationDataset.open(path)
        targets = _targets_in(training, images, labels)
        if path not in known:
            known[path] = reader.features(training, list(range(len(training))), f"taking features of {path.name}")
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


def _show(report: dict[str, Any], top_k: int) -> None:
    console = Console(highlight=False)
    if "per_class" in report:
        table = Table("class", "pictures", "top-1", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in report["per_class"]:
            table.add_row(row["class"], str(row["pictures"]), f"{row['top1']:.2f}")
        console.print(table)
    print(f"{report['pictures']} pictures: top-1 {report['top1']:.2f} %, top-{top_k} {report[f'top{top_k}']:.2f} %")
    for row in report.get("confusion", []):
        print(f"{row['class']} taken for {row['taken_for']}: {row['pictures']}")
    if "calibration" in report:
        print(f"expected calibration error {report['calibration']['error']:.2f} %")
    for name, title in (("knn", "nearest neighbours"), ("linear", "linear classifier")):
        if name in report:
            print(f"{title} on the features: top-1 {report[name]:.2f} %")
    if report.get("broken"):
        print(f"{len(report['broken'])} could not be read and were left out: {', '.join(report['broken'])}")
