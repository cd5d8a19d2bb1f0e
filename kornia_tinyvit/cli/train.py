"""``kornia-tinyvit train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kornia_tinyvit import training
from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.options import MIN_AREA, TaskName
from kornia_tinyvit.cli.requests import argument, command, option
from kornia_tinyvit.data import ClassificationDataset, DetectionDataset, InstanceDataset, SegmentationDataset
from kornia_tinyvit.detection import TinyViTDetector
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training import Recipe
from kornia_tinyvit.training.tasks.base import Task
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION

_PROMPTABLE = "Promptable segmentation"
_OPTIONS_OF_TASKS = {
    TaskName.semantic: ("class_balance",),
    TaskName.promptable: ("prompts", "box_fraction", "min_area"),
    TaskName.detection: ("queries", "hidden_dim"),
}


@dataclass(frozen=True, kw_only=True)
class TrainRequest(shared.LoopRequest):
    """The options of ``train``."""

    data: Path = argument(
        "Images. Classification: folder of class folders, parquet files of the Hugging Face hub, tar files. Semantic: "
        "folder with images and masks, of train and val or not, Pascal VOC folder, or YAML file that names the folders "
        "and the classes. Promptable: the same, folder with images and labels of YOLO, folder per image, or COCO JSON "
        "file. Detection: YAML file of a YOLO dataset, COCO JSON file, folder with one of them or with images and "
        "labels, or Pascal VOC folder."
    )
    task: TaskName = option(
        "Training",
        "classification: a class per image; semantic: a class per pixel; promptable: MobileSAM, a mask per object; "
        "detection: boxes, by RT-DETR.",
        TaskName.classification,
    )
    recipe: str | None = option("Training", f"{shared.RECIPE_NAMES}. Default: by the data, see the notes.", None)
    freeze: list[str] | None = option(
        "Training",
        "Part that is not trained: backbone, stages=N (stem and first N stages of the backbone), prompt_encoder "
        "(promptable), or none; may be repeated. Default: that of the recipe.",
        None,
    )
    layer_decay: float | None = option(
        "Training", "Ratio of the learning rates of a block and the next one. Default: that of the recipe.", None
    )
    ema_decay: float | None = option(
        "Training", "Decay of the moving average of the weights; 0: none. Default: that of the recipe.", None
    )
    crop_scale: str | None = option(
        "Training", "LOW,HIGH: area of the random crop as a fraction of the image's. Default: that of the recipe.", None
    )
    rotate: bool = option(
        "Training", "Rotate images by multiples of 90 degrees, for data without an upright direction.", False
    )
    validate_every: int = option("Training", "Epochs between evaluations.", 1, min=1)
    class_balance: float = option(
        "Semantic segmentation", "Weight of rare classes, from 0 (none) to 1.", 0.0, min=0, max=1
    )
    prompts: int = option(_PROMPTABLE, "Objects per image and step.", 8, min=1)
    box_fraction: float = option(
        _PROMPTABLE, "Fraction of prompts that are boxes; the others are points.", 0.5, min=0, max=1
    )
    min_area: int = option(_PROMPTABLE, MIN_AREA, 1, min=1)
    queries: int = option("Detection", "Maximum number of objects per image.", 300, min=1)
    hidden_dim: int = option("Detection", "Channels of encoder and decoder, a multiple of 8.", 256, min=8)
    out: Path = option("Output", shared.OUT, Path("runs/train"))


@command
def train(request: TrainRequest) -> None:
    """Train a network on labeled images, or resume a training.

    Start it with torchrun or accelerate launch for several GPUs.
    """
    unused = (name for other, names in _OPTIONS_OF_TASKS.items() if other is not request.task for name in names)
    request.reject_unused(unused, f"with --task {request.task}")
    if request.task is TaskName.classification:
        request.reject_unused(("rotate",), "with --task classification")
    images = request.sample(_OPENERS[request.task](request))
    recipe, reason = _find_recipe(request, images)
    task, model, samples, objective, validation = _PLANS[request.task](request, recipe, images)
    if validation is None:
        request.reject_unused(("validate_every", "patience"), "without validation images")
    settings = {"validation": validation, "validate_every": request.validate_every}
    names = samples.images.class_names
    request.train(model, samples, objective, recipe, reason, task=task, class_names=names, **settings)


def _find_recipe(request: TrainRequest, images: Any) -> tuple[Recipe, str]:
    """Return the recipe that was requested, or the one for the data with a note of the reason."""
    name, reason = training.choose_recipe(request.task, len(images), request.weights is not None)
    fields = {"layer_decay": request.layer_decay, "ema_decay": request.ema_decay}
    freeze = tuple(part for part in request.freeze if part != "none") if request.freeze else None
    recipe = request.find_recipe(name, freeze=freeze, **fields)
    changes: dict[str, Any] = {"rotate": True} if request.rotate else {}
    if request.crop_scale is not None:
        changes["crop_scale"] = _parse_range(request.crop_scale)
    return replace(recipe, changes=recipe.changes | changes), "" if request.recipe else f"Recipe {name}: {reason}"


def _parse_range(text: str) -> tuple[float, float]:
    """Return the two numbers of ``--crop-scale``.

    Raises:
        ValueError: if they are no ascending fractions.
    """
    try:
        low, high = (float(each) for each in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low <= high <= 1:
        raise ValueError(f"--crop-scale must be LOW,HIGH with 0 < LOW <= HIGH <= 1, such as 0.2,1; got {text!r}.")
    return low, high


def _augment(request: TrainRequest, recipe: Recipe, kind: Callable[..., Any], **options: Any) -> Any:
    """Return the augmentation of a recipe."""
    return kind(recipe.img_size, recipe.preset, request.seed, **options, **recipe.changes)


#: A task, the network in training, the samples, the loss, and the validation images.
_Plan = tuple[Task, Any, Any, Any, Any]


def _plan_classifier(request: TrainRequest, recipe: Recipe, images: ClassificationDataset) -> _Plan:
    classes: dict[str, Any] = {"num_classes": images.num_classes, "class_names": images.class_names}
    model = request.build_network(TinyViT.from_config, recipe, **classes)
    samples = request.augment(recipe, request.on_broken, images, **model.preprocessing.statistics)
    validation = request.open_validation(ClassificationDataset.open, images)
    return CLASSIFICATION, model, samples, training.ClassificationLoss(samples.augmentation), validation


def _plan_segmenter(request: TrainRequest, recipe: Recipe, images: SegmentationDataset) -> _Plan:
    augmentation = _augment(request, recipe, training.MaskAugmentation)
    samples = training.SegmentationSamples(images, augmentation, request.on_broken)
    model = request.build_network(SemanticSegmenter.from_config, recipe, class_names=images.class_names)
    validation = request.open_validation(images.open_split, images)
    weights = training.balanced_weights(images, request.class_balance) if request.class_balance else None
    objective = training.SegmentationLoss(samples.augmentation.preset.label_smoothing, weights)
    return training.SEMANTIC, model, samples, objective, validation


def _plan_promptable(request: TrainRequest, recipe: Recipe, images: InstanceDataset) -> _Plan:
    prompting = training.Prompting(request.prompts, request.box_fraction)
    augmentation = _augment(request, recipe, training.PromptAugmentation, prompting=prompting)
    # MobileSAM has the same windows at every size.
    sam = request.build_network(training.build_sam, recipe, scale_windows=False)
    validation = request.open_validation(partial(InstanceDataset.open, min_area=request.min_area), images)
    samples = training.PromptedSamples(images, augmentation, request.on_broken)
    model = training.PromptedSAM(sam)
    return training.PROMPTABLE, model, samples, training.MaskLoss(), validation


def _plan_detector(request: TrainRequest, recipe: Recipe, images: DetectionDataset) -> _Plan:
    samples = training.DetectionSamples(images, _augment(request, recipe, training.BoxAugmentation), request.on_broken)
    options: dict[str, Any] = {
        "class_names": images.class_names,
        "num_queries": request.queries,
        "hidden_dim": request.hidden_dim,
    }
    detector = request.build_network(TinyViTDetector.from_config, recipe, scale_windows=False, **options)
    model = training.DetectorTraining(detector)
    validation = request.open_validation(DetectionDataset.open, images)
    return training.DETECTION, model, samples, training.DetectionLoss(model), validation


_OPENERS: dict[TaskName, Callable[[TrainRequest], Any]] = {
    TaskName.classification: lambda request: ClassificationDataset.open(request.data),
    TaskName.semantic: lambda request: SegmentationDataset.open(request.data),
    TaskName.promptable: lambda request: InstanceDataset.open(request.data, min_area=request.min_area),
    TaskName.detection: lambda request: DetectionDataset.open(request.data),
}
_PLANS: dict[TaskName, Callable[[TrainRequest, Recipe, Any], _Plan]] = {
    TaskName.classification: _plan_classifier,
    TaskName.semantic: _plan_segmenter,
    TaskName.promptable: _plan_promptable,
    TaskName.detection: _plan_detector,
}
