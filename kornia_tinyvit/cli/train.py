"""``kornia-tinyvit train``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kornia_tinyvit.cli.options import Json, MinArea, TaskName, refuse_idle
from kornia_tinyvit.cli.training_options import (
    BatchSize,
    Checkpointing,
    Epochs,
    Frozen,
    InitSeed,
    Limit,
    OnBroken,
    OnCpu,
    Out,
    Precision,
    ProcessBatch,
    Rate,
    Seed,
    Side,
    Start,
    TrainedVariant,
    Validation,
    Workers,
    build_detector,
    build_promptable,
    build_samples,
    build_segmenter,
    build_student,
    parse_precision,
)
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.detection import DetectionDataset
from kornia_tinyvit.data.instances import InstanceDataset
from kornia_tinyvit.data.segmentation import SegmentationDataset
from kornia_tinyvit.training.recipes import RECIPES, Recipe, find_recipe
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION, Task

if TYPE_CHECKING:
    from kornia_tinyvit.training.loop import TrainingResult


_TITLES = {"top1": "top-1", "mean_iou": "mean IoU", "box_iou": "mean IoU of boxes", "map": "mAP"}
_USUAL_RECIPES = {
    TaskName.classification: "in1k",
    TaskName.semantic: "semantic",
    TaskName.promptable: "promptable",
    TaskName.detection: "detection",
}
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
    variant: TrainedVariant = "5m",
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
    out: Out = Path("runs/train"),
    validation: Validation = None,
    validate_every: Annotated[int, typer.Option(min=1, help="Epochs from one measurement to the next.")] = 1,
    pretrained: Start = None,
    epochs: Epochs = None,
    img_size: Side = None,
    batch_size: BatchSize = None,
    process_batch: ProcessBatch = None,
    base_lr: Rate = None,
    seed: Seed = 0,
    init_seed: InitSeed = None,
    workers: Workers = 2,
    precision: Precision = "no",
    gradient_checkpointing: Checkpointing = False,
    cpu: OnCpu = False,
    on_broken: OnBroken = "stop",
    limit: Limit = None,
    class_balance: Annotated[
        float, typer.Option(min=0, max=1, help="Semantic: make up for rare classes; 0 not at all, 1 wholly.")
    ] = 0.0,
    freeze: Annotated[
        list[Frozen] | None, typer.Option(help="Promptable: a part whose weights stay; may be given twice.")
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
    from kornia_tinyvit.training.loop import train as run

    idle = (name for other, names in _OPTIONS_OF_TASKS.items() if other is not task for name in names)
    refuse_idle(context, idle, f"with --task {task}")
    if validation is None:
        refuse_idle(context, ("validate_every",), "without --validation")
    parse_precision(precision)
    chosen = find_recipe(
        recipe or _USUAL_RECIPES[task], epochs=epochs, img_size=img_size, batch_size=batch_size, base_lr=base_lr
    )
    first = seed if init_seed is None else init_seed
    asked = _Asked(
        data, validation, variant, pretrained, chosen, seed, first, on_broken, limit, gradient_checkpointing,
        class_balance, tuple(freeze or ()), prompts, box_share, min_area, queries,
    )  # fmt: skip
    plan = _PLANS[task](asked)
    if not as_json:
        plan.tell()
    result = run(
        plan.model,
        plan.samples,
        plan.objective,
        chosen,
        out,
        task=plan.task,
        validation=plan.validation,
        validate_every=validate_every,
        class_names=plan.class_names,
        origin={"pretrained": pretrained, "init_seed": first},
        process_batch=process_batch,
        workers=workers,
        precision=precision,
        cpu=cpu,
        progress=not as_json,
    )
    report_training(result, as_json)


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
    freeze: tuple[Frozen, ...]
    prompts: int
    box_share: float
    min_area: int
    queries: int


@dataclass(frozen=True)
class _Plan:
    """What the loop takes."""

    model: Any
    samples: Any
    objective: Any
    validation: Any
    class_names: tuple[str, ...] | None
    task: Task = CLASSIFICATION
    left_out: tuple[str, ...] = ()
    useless: tuple[str, ...] = ()

    def tell(self) -> None:
        """Print the names of files that are of no use."""
        if self.left_out:
            some = ", ".join(self.left_out[:5])
            print(f"Left out, since their pictures or masks are missing: {len(self.left_out)}, such as {some}")
        if self.useless:
            print(f"Boxes left out: {len(self.useless)}, such as {'; '.join(self.useless[:3])}")


def _plan_classifier(asked: _Asked) -> _Plan:
    from kornia_tinyvit.training.tasks.classification import Labels

    samples = build_samples(asked.data, asked.recipe, asked.seed, asked.on_broken, asked.limit)
    images = samples.images
    model = build_student(
        asked.variant,
        asked.pretrained,
        asked.recipe,
        images.num_classes,
        asked.init_seed,
        asked.gradient_checkpointing,
    )
    validation = None
    if asked.validation is not None:
        validation = ClassificationDataset.open(asked.validation).with_classes(images.class_names)
    return _Plan(model, samples, Labels(samples.augmentation), validation, images.class_names)


def _plan_segmenter(asked: _Asked) -> _Plan:
    from kornia_tinyvit.training.tasks.semantic import (
        SEMANTIC,
        MaskAugmentation,
        MaskedSamples,
        PixelLabels,
        balanced_weights,
    )

    images = SegmentationDataset.open(asked.data, "train")
    left_out = images.without_mask + images.without_picture
    if asked.limit is not None:
        images = images.sample(asked.limit)
    recipe = asked.recipe
    augmentation = MaskAugmentation(recipe.img_size, recipe.preset, asked.seed, **recipe.changes)
    model = build_segmenter(
        asked.variant, asked.pretrained, recipe, images.class_names, asked.init_seed, asked.gradient_checkpointing
    )
    validation = None
    if asked.validation is not None:
        classes = dict(zip(images.ids, images.class_names, strict=True))
        validation = SegmentationDataset.open(asked.validation, "val", classes, images.ignored)
    samples = MaskedSamples(images, augmentation, asked.on_broken)
    weights = balanced_weights(images, asked.class_balance) if asked.class_balance else None
    objective = PixelLabels(augmentation.preset.label_smoothing, weights)
    return _Plan(model, samples, objective, validation, images.class_names, SEMANTIC, left_out)


def _plan_promptable(asked: _Asked) -> _Plan:
    from kornia_tinyvit.training.tasks.promptable import PROMPTABLE, MaskLoss, PromptedSAM
    from kornia_tinyvit.training.tasks.prompts import PromptAugmentation, PromptedSamples, Prompting

    images = InstanceDataset.open(asked.data, "train", asked.min_area)
    left_out = images.without_mask + images.without_picture
    if asked.limit is not None:
        images = images.sample(asked.limit)
    recipe, prompting = asked.recipe, Prompting(asked.prompts, asked.box_share)
    augmentation = PromptAugmentation(recipe.img_size, recipe.preset, asked.seed, prompting, **recipe.changes)
    sam = build_promptable(asked.variant, asked.pretrained, recipe, asked.init_seed, asked.gradient_checkpointing)
    validation = None
    if asked.validation is not None:
        validation = InstanceDataset.open(asked.validation, "val", asked.min_area)
    samples = PromptedSamples(images, augmentation, asked.on_broken)
    return _Plan(PromptedSAM(sam, asked.freeze), samples, MaskLoss(), validation, None, PROMPTABLE, left_out)


def _plan_detector(asked: _Asked) -> _Plan:
    from kornia_tinyvit.training.tasks.detection import (
        DETECTION,
        BoxAugmentation,
        BoxedSamples,
        DetectionLoss,
        DetectorTraining,
    )

    images = DetectionDataset.open(asked.data, "train")
    left_out, useless = images.without_picture, images.left_out
    if asked.limit is not None:
        images = images.sample(asked.limit)
    recipe = asked.recipe
    augmentation = BoxAugmentation(recipe.img_size, recipe.preset, asked.seed, **recipe.changes)
    detector = build_detector(
        asked.variant, asked.pretrained, recipe, images.class_names, asked.queries, asked.init_seed,
        asked.gradient_checkpointing,
    )  # fmt: skip
    validation = None if asked.validation is None else DetectionDataset.open(asked.validation, "val")
    model, samples = DetectorTraining(detector), BoxedSamples(images, augmentation, asked.on_broken)
    names = images.class_names
    return _Plan(model, samples, DetectionLoss(model), validation, names, DETECTION, left_out, useless)


_PLANS = {
    TaskName.classification: _plan_classifier,
    TaskName.semantic: _plan_segmenter,
    TaskName.promptable: _plan_promptable,
    TaskName.detection: _plan_detector,
}


def report_training(result: TrainingResult, as_json: bool) -> None:
    """Print what a training came to, in the main process."""
    if not result.is_main_process:
        return
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    score = "" if result.score is None else f", {_TITLES[result.measure]} {result.score:.2f} %"
    print(f"{result.steps} steps in {result.seconds:.0f} s{score}: {result.best}")
    if result.broken:
        print(f"Could not be read and were left out: {len(result.broken)}, such as {', '.join(result.broken[:5])}")
