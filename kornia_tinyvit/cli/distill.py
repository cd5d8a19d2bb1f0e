"""``kornia-tinyvit distill save``, ``check`` and ``train``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.options import Device, Json, parse_device
from kornia_tinyvit.cli.tables import print_names
from kornia_tinyvit.cli.train import Plan, run_plan
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.distillation.losses import OnlineTeacher, StoredLabels
from kornia_tinyvit.distillation.manifest import Manifest, estimated_size, readable_size
from kornia_tinyvit.distillation.saving import check_records, save_records
from kornia_tinyvit.distillation.store import LabelStore
from kornia_tinyvit.distillation.teachers import Teacher, device_of, load_teacher
from kornia_tinyvit.progress import progress_bar
from kornia_tinyvit.training.recipes import find_recipe
from kornia_tinyvit.training.run_folder import RunFolder
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION

distill = typer.Typer(
    help="Store a teacher's soft labels once, check them, and train students on them.", no_args_is_help=True
)

TeacherName = Annotated[
    str,
    typer.Option(
        "--teacher",
        help="file.py:function, timm:NAME, transformers:NAME, a checkpoint's path, or VARIANT/NAME such as 21m/in22k.",
    ),
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at a time.")]
PATIENCE = 1800.0  # seconds without the next shard after which a teacher is taken for dead


@distill.command()
def save(
    data: shared.Data,
    store: shared.Store,
    teacher: TeacherName,
    recipe: shared.RecipeName = "in22k_distill",
    epochs: shared.Epochs = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes kept of each record.")] = 10,
    img_size: shared.Side = None,
    seed: shared.Seed = 0,
    batch_size: Batch = 128,
    workers: shared.Workers = 2,
    device: Device = "cpu",
    precision: shared.Precision = "no",
    on_broken: shared.OnBroken = "stop",
    limit: shared.Limit = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Tell the size on disk and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Write what a teacher says about every sample of every epoch; the same command goes on after a stop.

    Start it as often as there are GPUs or machines: each process takes shards that no other one holds.
    """
    autocast = shared.parse_precision(precision)
    chosen = find_recipe(recipe, epochs=epochs, img_size=img_size)
    samples = shared.build_samples(data, chosen, seed, on_broken, limit)
    network = load_teacher(teacher, parse_device(device))
    classes = _count_classes(network, samples)
    if top_k > classes:
        raise ValueError(f"--top-k is at most the {classes} classes of the teacher; got {top_k}.")
    size = estimated_size(len(samples), chosen.epochs, classes, top_k)
    told: dict[str, Any] = {"records": len(samples) * chosen.epochs, "bytes": size}
    if not as_json:
        records = f"{len(samples)} samples x {chosen.epochs} epochs x the top {top_k} of {classes} classes"
        print(f"{records}: {readable_size(size)}")
    if not estimate:
        manifest = Manifest(num_classes=classes, top_k=top_k, teacher=_told(network, precision), **samples.describe())
        with LabelStore.create(store, manifest) as opened, progress_bar(not as_json) as bar:
            task = bar.add_task("saving", total=told["records"])
            done = save_records(
                opened, network, samples, range(chosen.epochs), batch_size, workers, autocast,
                lambda records: bar.update(task, advance=records),
            )  # fmt: skip
        told |= asdict(done)
        if not as_json:
            print(f"{done.written} records written, {done.present} were there.")
            if done.locked:
                print(f"Left to other processes, which are writing them: {done.locked} shards.")
            print_names("Could not be read", done.broken)
    if as_json:
        print(json.dumps(told))


@distill.command()
def check(
    data: shared.Data,
    store: shared.Store,
    teacher: TeacherName,
    recipe: shared.RecipeName = "in22k_distill",
    records: Annotated[int, typer.Option(min=1, help="Records to recompute.")] = 256,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a probability that passes.")] = 0.02,
    img_size: shared.Side = None,
    seed: shared.Seed = 0,
    batch_size: Batch = 32,
    device: Device = "cpu",
    precision: shared.Precision = "no",
    limit: shared.Limit = None,
    as_json: Json = False,
) -> None:
    """Recompute a sample of the stored records with the teacher and tell the largest difference."""
    # Of pictures that could not be read the store says so, too; any other record of theirs does not pass.
    samples = shared.build_samples(data, find_recipe(recipe, img_size=img_size), seed, "skip", limit)
    network = load_teacher(teacher, parse_device(device))
    opened = LabelStore(store)
    opened.require({**samples.describe(), "teacher": _told(network, precision)})
    report = check_records(opened, network, samples, records, batch_size, autocast=shared.parse_precision(precision))
    good = report.largest <= tolerance and not report.drifted
    if as_json:
        print(json.dumps({**asdict(report), "good": good}))
    else:
        print(f"{report.records} records recomputed: largest difference {report.largest:.5f}, mean {report.mean:.6f}.")
        if report.drifted:
            print(f"{len(report.drifted)} samples are augmented otherwise than when they were stored.")
    if not good:
        print("The store does not hold what this teacher says.", file=sys.stderr)
        raise typer.Exit(1)


@distill.command()
def train(
    data: shared.Data,
    store: Annotated[
        Path | None, typer.Argument(help="Folder of the stored soft labels; leave it out for --teacher.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Ask this teacher at every step instead of a store.")] = None,
    variant: shared.TrainedVariant = "5m",
    recipe: shared.RecipeName = "in22k_distill",
    out: shared.Out = Path("runs/distill"),
    validation: shared.Validation = None,
    pretrained: shared.Start = None,
    replays: Annotated[
        int | None,
        typer.Option(min=1, help="Stored epochs to replay in turn, waiting for those that a teacher is still writing."),
    ] = None,
    hard_share: Annotated[float, typer.Option(min=0, max=1, help="Weight of the true labels.")] = 0.0,
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
    as_json: Json = False,
) -> None:
    """Train a student on stored soft labels, or beside its teacher.

    The augmentation has to be the one the labels were stored with: the same recipe, seed and size. A training with
    more epochs than are stored replays them again. With --replays it may start while the teacher still writes.
    """
    if (store is None) == (teacher is None):
        raise ValueError("Give either the folder of a store or --teacher.")
    if teacher is not None and (hard_share or replays is not None):
        raise ValueError("--hard-share and --replays belong to a store; leave them out with --teacher.")
    chosen = find_recipe(recipe, epochs=epochs, img_size=img_size, batch_size=batch_size, base_lr=base_lr)
    samples = shared.build_samples(data, chosen, seed, on_broken, limit)
    objective: StoredLabels | OnlineTeacher
    shown = None
    if store is not None:
        opened = shared.open_labels(store, samples)
        if replays is not None:
            shown = list(range(replays))
        else:
            shown = _begun(out) or shared.whole_epochs(opened, chosen.epochs)
        objective = StoredLabels(opened, samples.augmentation, hard_share, patience=0 if replays is None else PATIENCE)
        classes = opened.manifest.num_classes
    else:
        network = load_teacher(str(teacher))
        objective, classes = OnlineTeacher(network, shared.parse_precision(precision)), _count_classes(network, samples)
    if (hard_share or validation is not None) and samples.images.num_classes != classes:
        raise ValueError(
            f"The data has {samples.images.num_classes} classes and the teacher {classes}, so labels cannot be used "
            "beside what it says: leave out --hard-share and --validation."
        )
    first = seed if init_seed is None else init_seed
    model = shared.build_student(variant, pretrained, chosen, classes, first, gradient_checkpointing)
    names = samples.images.class_names
    others = None if validation is None else ClassificationDataset.open(validation).with_classes(names)
    known = names if names and len(names) == classes else None
    options = {"process_batch": process_batch, "workers": workers, "precision": precision, "cpu": cpu}
    origin = {"pretrained": pretrained, "init_seed": first}
    plan = Plan(CLASSIFICATION, model, samples, objective, others, known)
    run_plan(plan, chosen, out, as_json, replays=shown, origin=origin, **options)


def _told(teacher: Teacher, precision: str) -> dict[str, Any]:
    return {**teacher.describe(), "precision": precision}


def _begun(out: Path) -> list[int] | None:
    """Return the epochs that a training which is gone on with replays; its store may have grown since."""
    return (RunFolder(out).begun() or {}).get("replays")


def _count_classes(teacher: torch.nn.Module, samples: ReplayedSamples) -> int:
    size = samples.augmentation.img_size
    with torch.inference_mode():
        return int(teacher(torch.zeros(1, 3, size, size, device=device_of(teacher))).shape[1])
