"""``kornia-tinyvit train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kornia_tinyvit import training
from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.options import MinArea, TaskName, refuse_idle
from kornia_tinyvit.cli.requests import command
from kornia_tinyvit.cli.tables import print_names
from kornia_tinyvit.data import DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import RECIPES, Recipe
from kornia_tinyvit.training.tasks.base import Task
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION

#: Parts of MobileSAM whose weights may stay as they are.
Frozen = StrEnum("Frozen", ("image_encoder", "prompt_encoder"))

_OPTIONS_OF_TASKS = {
    TaskName.semantic: ("class_balance",),
    TaskName.promptable: ("freeze", "prompts", "box_fraction", "min_area"),
    TaskName.detection: ("queries",),
}


@dataclass(frozen=True, kw_only=True)
class TrainRequest(shared.LoopRequest):
    """The options of ``train``."""

    data: Annotated[
        Path,
        typer.Argument(
            help="Images: a folder of class folders, parquet files of the Hugging Face hub, or tar files. Semantic: "
            "a folder with images and masks, or a YAML file that names those of train and val and the classes. "
            "Promptable: a folder with images and masks or labels, or a YAML file that names images and instances. "
            "Detection: the YAML file of a YOLO data set, a JSON file of COCO's, or a folder with one of them."
        ),
    ]
    task: Annotated[
        TaskName,
        typer.Option(
            help="classification: a class an image; semantic: a class a pixel; promptable: MobileSAM, on a mask for "
            "each object; detection: boxes, by RT-DETR."
        ),
    ] = TaskName.classification
    recipe: Annotated[str | None, typer.Option(help=f"{', '.join(RECIPES)}. Default: in1k, or that of the task.")] = (
        None
    )
    out: shared.Out = Path("runs/train")
    validate_every: Annotated[int, typer.Option(min=1, help="Epochs from one measurement to the next.")] = 1
    class_balance: Annotated[
        float, typer.Option(min=0, max=1, help="Semantic: make up for rare classes; 0 not at all, 1 wholly.")
    ] = 0.0
    freeze: Annotated[
        list[Frozen] | None, typer.Option(help="Promptable: a part whose weights stay; may be given twice.")
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Promptable: objects of an image to ask for each time.")] = 8
    box_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Promptable: share of boxes among the prompts; the others are points.")
    ] = 0.5
    min_area: MinArea = 1
    queries: Annotated[int, typer.Option(min=1, help="Detection: how many objects an image may show.")] = 300


@command
def train(context: typer.Context, asked: TrainRequest) -> None:
    """Train a network on labeled images; start it with torchrun or accelerate launch for several GPUs."""
    idle = (name for other, names in _OPTIONS_OF_TASKS.items() if other is not asked.task for name in names)
    refuse_idle(context, idle, f"with --task {asked.task}")
    if asked.validation is None:
        refuse_idle(context, ("validate_every",), "without --validation")
    usual = "in1k" if asked.task is TaskName.classification else asked.task.value
    recipe = asked.find_recipe(asked.recipe or usual)
    task, model, samples, objective, validation = _PLANS[asked.task](asked, recipe)
    images = samples.images
    if not asked.as_json:
        missing = (*getattr(images, "without_mask", ()), *getattr(images, "without_image", ()))
        print_names("Left out, since their images or masks are missing", missing)
        print_names("Boxes left out", getattr(images, "left_out", ()))
    asked.train(
        model,
        samples,
        objective,
        recipe,
        task=task,
        validation=validation,
        validate_every=asked.validate_every,
        class_names=images.class_names,
    )


def _augment(asked: TrainRequest, recipe: Recipe, kind: Callable[..., Any], **options: Any) -> Any:
    """Return a recipe's augmentation."""
    return kind(recipe.img_size, recipe.preset, asked.seed, **options, **recipe.changes)


#: A task, what is trained, its samples, the loss, and the validation data.
_Plan = tuple[Task, Any, Any, Any, Any]


def _plan_classifier(asked: TrainRequest, recipe: Recipe) -> _Plan:
    samples = asked.samples(recipe, asked.on_broken)
    images = samples.images
    model = asked.network(TinyViT.from_config, recipe, num_classes=images.num_classes)
    validation = asked.validation_images(images.class_names)
    return CLASSIFICATION, model, samples, training.ClassificationLoss(samples.augmentation), validation


def _plan_segmenter(asked: TrainRequest, recipe: Recipe) -> _Plan:
    images = asked.drawn(SegmentationDataset.open(asked.data, "train"))
    samples = training.SegmentationSamples(images, _augment(asked, recipe, training.MaskAugmentation), asked.on_broken)
    model = asked.network(SemanticSegmenter.from_config, recipe, class_names=images.class_names)
    validation = None
    if asked.validation is not None:
        classes = dict(zip(images.ids, images.class_names, strict=True))
        validation = SegmentationDataset.open(asked.validation, "val", classes, images.ignored)
    weights = training.balanced_weights(images, asked.class_balance) if asked.class_balance else None
    objective = training.SegmentationLoss(samples.augmentation.preset.label_smoothing, weights)
    return training.SEMANTIC, model, samples, objective, validation


def _plan_promptable(asked: TrainRequest, recipe: Recipe) -> _Plan:
    images = asked.drawn(InstanceDataset.open(asked.data, "train", asked.min_area))
    augmentation = _augment(
        asked, recipe, training.PromptAugmentation, prompting=training.Prompting(asked.prompts, asked.box_fraction)
    )
    sam = asked.network(training.build_sam, recipe, scaled=False)  # windows are MobileSAM's own at every size
    held_out = asked.validation
    validation = None if held_out is None else InstanceDataset.open(held_out, "val", asked.min_area)
    samples = training.PromptedSamples(images, augmentation, asked.on_broken)
    model = training.PromptedSAM(sam, asked.freeze or ())
    return training.PROMPTABLE, model, samples, training.MaskLoss(), validation


def _plan_detector(asked: TrainRequest, recipe: Recipe) -> _Plan:
    images = asked.drawn(DetectionDataset.open(asked.data, "train"))
    samples = training.DetectionSamples(images, _augment(asked, recipe, training.BoxAugmentation), asked.on_broken)
    options: dict[str, Any] = {"class_names": images.class_names, "num_queries": asked.queries}
    detector = asked.network(TinyViTDetector.from_config, recipe, scaled=False, **options)  # its images are large
    model = training.DetectorTraining(detector)
    validation = None if asked.validation is None else DetectionDataset.open(asked.validation, "val")
    return training.DETECTION, model, samples, training.DetectionLoss(model), validation


_PLANS = {
    TaskName.classification: _plan_classifier,
    TaskName.semantic: _plan_segmenter,
    TaskName.promptable: _plan_promptable,
    TaskName.detection: _plan_detector,
}
