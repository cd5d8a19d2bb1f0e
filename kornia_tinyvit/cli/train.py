"""``kornia-tinyvit train``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kornia_tinyvit import training
from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.options import Json, MinArea, TaskName, refuse_idle
from kornia_tinyvit.cli.tables import print_names
from kornia_tinyvit.data import ClassificationDataset, DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.recipes import RECIPES, Recipe, find_recipe
from kornia_tinyvit.training.tasks.base import Task
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION

_TITLES = {"top1": "top-1", "mean_iou": "mean IoU", "box_iou": "mean IoU of boxes", "map": "mAP"}
_OPTIONS_OF_TASKS = {
    TaskName.semantic: ("class_balance",),
    TaskName.promptable: ("freeze", "prompts", "box_share", "min_area"),
    TaskName.detection: ("queries",),
}


def train(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Argument(
            help="Pictures: a folder of class folders, parquet files of the Hugging Face hub, or tar files. Semantic: "
            "a folder with images and masks, or a YAML file that names those of train and val and the classes. "
            "Promptable: a folder with images and masks or labels, or a YAML file that names images and instances. "
            "Detection: the YAML file of a YOLO data set, a JSON file of COCO's, or a folder with one of them."
        ),
    ],
    variant: shared.TrainedVariant = "5m",
    task: Annotated[
        TaskName,
        typer.Option(
            help="classification: a class a picture; semantic: a class a pixel; promptable: MobileSAM, on a mask for "
            "each object; detection: boxes, by RT-DETR."
        ),
    ] = TaskName.classification,
    recipe: Annotated[
        str | None, typer.Option(help=f"{', '.join(RECIPES)}. Default: in1k, or that of the task.")
    ] = None,
    out: shared.Out = Path("runs/train"),
    validation: shared.Validation = None,
    validate_every: Annotated[int, typer.Option(min=1, help="Epochs from one measurement to the next.")] = 1,
    pretrained: shared.Start = None,
    epochs: shared.Epochs = None,
    img_size: shared.Side = None,
    batch_size: shared.BatchSize = None,
    process_batch: shared.ProcessBatch = None,
    base_lr: shared.Rate = None,
    seed: shared.Seed = 0,
    init_seed: shared.InitSeed = None,
    workers: shared.Workers = 2,
    precision: shared.Precision = "no",
    gradient_checkpointing: shared.Checkpointing = False,
    cpu: shared.OnCpu = False,
    on_broken: shared.OnBroken = "stop",
    limit: shared.Limit = None,
    class_balance: Annotated[
        float, typer.Option(min=0, max=1, help="Semantic: make up for rare classes; 0 not at all, 1 wholly.")
    ] = 0.0,
    freeze: Annotated[
        list[shared.Frozen] | None, typer.Option(help="Promptable: a part whose weights stay; may be given twice.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Promptable: objects of a picture to ask for each time.")] = 8,
    box_share: Annotated[
        float, typer.Option(min=0, max=1, help="Promptable: share of boxes among the prompts; the others are points.")
    ] = 0.5,
    min_area: MinArea = 1,
    queries: Annotated[int, typer.Option(min=1, help="Detection: how many objects a picture may show.")] = 300,
    as_json: Json = False,
) -> None:
    """Train a network on labelled pictures; start it with torchrun or accelerate launch for several GPUs."""
    idle = (name for other, names in _OPTIONS_OF_TASKS.items() if other is not task for name in names)
    refuse_idle(context, idle, f"with --task {task}")
    if validation is None:
        refuse_idle(context, ("validate_every",), "without --validation")
    shared.parse_precision(precision)
    usual = "in1k" if task is TaskName.classification else task.value
    chosen = find_recipe(recipe or usual, epochs=epochs, img_size=img_size, batch_size=batch_size, base_lr=base_lr)
    first = seed if init_seed is None else init_seed
    asked = _Asked(
        data, validation, variant, pretrained, chosen, seed, first, on_broken, limit, gradient_checkpointing,
        class_balance, tuple(freeze or ()), prompts, box_share, min_area, queries,
    )  # fmt: skip
    plan = _PLANS[task](asked)
    if not as_json:
        tell_useless(plan.samples.images)
    options = {"process_batch": process_batch, "workers": workers, "precision": precision, "cpu": cpu}
    origin = {"pretrained": pretrained, "init_seed": first}
    run_plan(plan, chosen, out, as_json, validate_every=validate_every, origin=origin, **options)


@dataclass(frozen=True)
class _Asked:
    """The options that decide what is trained on what."""

    data: Path
    validation: Path | None
    variant: str
    pretrained: str | None
    recipe: Recipe
    seed: int
    init_seed: int
    on_broken: str
    limit: int | None
    gradient_checkpointing: bool
    class_balance: float
    freeze: tuple[shared.Frozen, ...]
    prompts: int
    box_share: float
    min_area: int
    queries: int

    def drawn(self, images: Any) -> Any:
        """Return the images that are used."""
        return images if self.limit is None else images.sample(self.limit)

    def augmentation(self, kind: Callable[..., Any], **options: Any) -> Any:
        """Return the recipe's augmentation."""
        return kind(self.recipe.img_size, self.recipe.preset, self.seed, **options, **self.recipe.changes)

    def network(self, build: Callable[..., Any], **options: Any) -> Any:
        """Return what is trained, as :func:`~kornia_tinyvit.cli.training_options.build_network` builds it."""
        return shared.build_network(
            build, self.variant, self.pretrained, self.recipe, self.init_seed, self.gradient_checkpointing, **options
        )


@dataclass(frozen=True)
class Plan:
    """What is trained on what."""

    task: Task
    model: Any
    samples: Any
    objective: Any
    validation: Any
    class_names: tuple[str, ...] | None


def _plan_classifier(asked: _Asked) -> Plan:
    samples = shared.build_samples(asked.data, asked.recipe, asked.seed, asked.on_broken, asked.limit)
    images, validation = samples.images, None
    model = asked.network(TinyViT.from_config, num_classes=images.num_classes)
    if asked.validation is not None:
        validation = ClassificationDataset.open(asked.validation).with_classes(images.class_names)
    return Plan(CLASSIFICATION, model, samples, training.Labels(samples.augmentation), validation, images.class_names)


def _plan_segmenter(asked: _Asked) -> Plan:
    images = asked.drawn(SegmentationDataset.open(asked.data, "train"))
    samples = training.MaskedSamples(images, asked.augmentation(training.MaskAugmentation), asked.on_broken)
    model = asked.network(SemanticSegmenter.from_config, class_names=images.class_names)
    validation = None
    if asked.validation is not None:
        classes = dict(zip(images.ids, images.class_names, strict=True))
        validation = SegmentationDataset.open(asked.validation, "val", classes, images.ignored)
    weights = training.balanced_weights(images, asked.class_balance) if asked.class_balance else None
    objective = training.PixelLabels(samples.augmentation.preset.label_smoothing, weights)
    return Plan(training.SEMANTIC, model, samples, objective, validation, images.class_names)


def _plan_promptable(asked: _Asked) -> Plan:
    images = asked.drawn(InstanceDataset.open(asked.data, "train", asked.min_area))
    augmentation = asked.augmentation(
        training.PromptAugmentation, prompting=training.Prompting(asked.prompts, asked.box_share)
    )
    sam = asked.network(training.build_sam, scaled=False)  # windows are MobileSAM's own at every size
    validation = None
    if asked.validation is not None:
        validation = InstanceDataset.open(asked.validation, "val", asked.min_area)
    samples = training.PromptedSamples(images, augmentation, asked.on_broken)
    return Plan(
        training.PROMPTABLE, training.PromptedSAM(sam, asked.freeze), samples, training.MaskLoss(), validation, None
    )


def _plan_detector(asked: _Asked) -> Plan:
    images = asked.drawn(DetectionDataset.open(asked.data, "train"))
    samples = training.BoxedSamples(images, asked.augmentation(training.BoxAugmentation), asked.on_broken)
    options: dict[str, Any] = {"class_names": images.class_names, "num_queries": asked.queries}
    detector = asked.network(TinyViTDetector.from_config, scaled=False, **options)  # its images are large
    model = training.DetectorTraining(detector)
    validation = None if asked.validation is None else DetectionDataset.open(asked.validation, "val")
    return Plan(training.DETECTION, model, samples, training.DetectionLoss(model), validation, images.class_names)


_PLANS = {
    TaskName.classification: _plan_classifier,
    TaskName.semantic: _plan_segmenter,
    TaskName.promptable: _plan_promptable,
    TaskName.detection: _plan_detector,
}


def tell_useless(images: Any) -> None:
    """Print the names of files of a data set that are of no use."""
    missing = (*getattr(images, "without_mask", ()), *getattr(images, "without_picture", ()))
    print_names("Left out, since their pictures or masks are missing", missing)
    print_names("Boxes left out", getattr(images, "left_out", ()))


def run_plan(plan: Plan, recipe: Recipe, out: Path, as_json: bool, **options: Any) -> None:
    """Train, with options of :func:`~kornia_tinyvit.training.train`, and print the result in the main process."""
    options |= {"task": plan.task, "validation": plan.validation, "class_names": plan.class_names}
    result = training.train(plan.model, plan.samples, plan.objective, recipe, out, progress=not as_json, **options)
    if not result.is_main_process:
        return
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    score = "" if result.score is None else f", {_TITLES[result.measure]} {result.score:.2f} %"
    print(f"{result.steps} steps in {result.seconds:.0f} s{score}: {result.best}")
    print_names("Could not be read and were left out", result.broken)
