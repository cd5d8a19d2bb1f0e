"""``kornia-tinyvit train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from kornia_tinyvit.cli.options import Json
from kornia_tinyvit.cli.training_options import (
    BatchSize,
    Checkpointing,
    Data,
    Epochs,
    InitSeed,
    Limit,
    OnBroken,
    OnCpu,
    Out,
    Precision,
    ProcessBatch,
    Rate,
    RecipeName,
    Seed,
    Side,
    Start,
    TrainedVariant,
    Validation,
    Workers,
    build_samples,
    build_student,
    parse_precision,
)
from kornia_tinyvit.training.data import LabelledImages
from kornia_tinyvit.training.recipes import find_recipe

if TYPE_CHECKING:
    from kornia_tinyvit.training.loop import TrainingResult


def train(
    data: Data,
    variant: TrainedVariant = "5m",
    recipe: RecipeName = "in1k",
    out: Out = Path("runs/train"),
    validation: Validation = None,
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
    as_json: Json = False,
) -> None:
    """Train a network on labelled pictures; start it with torchrun or accelerate launch for several GPUs."""
    from kornia_tinyvit.training import Labels
    from kornia_tinyvit.training.loop import train as run

    parse_precision(precision)
    chosen = find_recipe(recipe, epochs=epochs, img_size=img_size, batch_size=batch_size, base_lr=base_lr)
    samples = build_samples(data, chosen, seed, on_broken, limit)
    first = seed if init_seed is None else init_seed
    model = build_student(
        variant,
        pretrained,
        chosen,
        samples.images.num_classes,
        first,
        gradient_checkpointing,
    )
    result = run(
        model,
        samples,
        Labels(samples.augmentation),
        chosen,
        out,
        validation=None if validation is None else LabelledImages(validation).with_classes(samples.images.class_names),
        class_names=samples.images.class_names,
        origin={"pretrained": pretrained, "init_seed": first},
        process_batch=process_batch,
        workers=workers,
        precision=precision,
        cpu=cpu,
        progress=not as_json,
    )
    report_training(result, as_json)


def report_training(result: TrainingResult, as_json: bool) -> None:
    """Print what a training came to, in the main process."""
    if not result.is_main_process:
        return
    if as_json:
        print(json.dumps(result.to_dict()))
        return
    top1 = "" if result.top1 is None else f", top-1 {result.top1:.2f} %"
    print(f"{result.steps} steps in {result.seconds:.0f} s{top1}: {result.best}")
    if result.broken:
        print(f"Could not be read and were left out: {len(result.broken)}, such as {', '.join(result.broken[:5])}")
