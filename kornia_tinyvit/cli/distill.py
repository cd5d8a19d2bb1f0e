"""``kornia-tinyvit distill save``, ``check`` and ``train``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.options import Device, parse_device
from kornia_tinyvit.cli.requests import command
from kornia_tinyvit.cli.tables import print_names
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.distillation.losses import OnlineDistillationLoss, StoredLabelLoss
from kornia_tinyvit.distillation.manifest import Manifest, estimated_size, readable_size
from kornia_tinyvit.distillation.saving import check_records, save_records
from kornia_tinyvit.distillation.store import LabelStore
from kornia_tinyvit.distillation.teachers import Teacher, device_of, load_teacher
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import progress_bar
from kornia_tinyvit.training.recipes import find_recipe
from kornia_tinyvit.training.run_folder import RunFolder

distill = typer.Typer(
    help="Store a teacher's soft labels once, check them, and train students on them.", no_args_is_help=True
)

Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]
PATIENCE = 1800.0  # seconds without the next shard after which a teacher is taken for dead


@dataclass(frozen=True, kw_only=True)
class StoreRequest(shared.DataRequest):
    """A store, its teacher, and where that runs."""

    store: Annotated[Path, typer.Argument(help="Folder of the stored soft labels.")]
    teacher: Annotated[
        str,
        typer.Option(
            help="file.py:function, timm:NAME, transformers:NAME, a checkpoint's path, or VARIANT/NAME such as "
            "21m/in22k."
        ),
    ]
    recipe: shared.RecipeName = "in22k_distill"
    device: Device = "cpu"

    def load_teacher(self) -> tuple[Teacher, dict[str, Any]]:
        """Return the teacher and what a store states about it."""
        teacher = load_teacher(self.teacher, parse_device(self.device))
        return teacher, {**teacher.describe(), "precision": self.precision}


@dataclass(frozen=True, kw_only=True)
class SaveRequest(StoreRequest):
    """The options of ``distill save``."""

    epochs: shared.Epochs = None
    top_k: Annotated[int, typer.Option(min=1, help="Classes kept of each record.")] = 10
    batch_size: Batch = 128
    workers: shared.Workers = 2
    on_broken: shared.OnBroken = "stop"
    estimate: Annotated[bool, typer.Option("--estimate", help="Tell the size on disk and stop.")] = False


@distill.command()
@command
def save(context: typer.Context, asked: SaveRequest) -> None:
    """Write what a teacher says about every sample of every epoch; the same command goes on after a stop.

    Start it as often as there are GPUs or machines: each process takes shards that no other one holds.
    """
    recipe = find_recipe(asked.recipe, epochs=asked.epochs, img_size=asked.img_size)
    samples = asked.samples(recipe, asked.on_broken)
    teacher, told_of_teacher = asked.load_teacher()
    classes, top_k = _count_classes(teacher, samples), asked.top_k
    if top_k > classes:
        raise ValueError(f"--top-k is at most the {classes} classes of the teacher; got {top_k}.")
    size = estimated_size(len(samples), recipe.epochs, classes, top_k)
    told: dict[str, Any] = {"records": len(samples) * recipe.epochs, "bytes": size}
    if not asked.as_json:
        records = f"{len(samples)} samples x {recipe.epochs} epochs x the top {top_k} of {classes} classes"
        print(f"{records}: {readable_size(size)}")
    if not asked.estimate:
        manifest = Manifest(num_classes=classes, top_k=top_k, teacher=told_of_teacher, **samples.describe())
        with LabelStore.create(asked.store, manifest) as opened, progress_bar(not asked.as_json) as bar:
            task = bar.add_task("saving", total=told["records"])
            done = save_records(
                opened, teacher, samples, range(recipe.epochs), asked.batch_size, asked.workers, asked.dtype,
                lambda records: bar.update(task, advance=records),
            )  # fmt: skip
        told |= {"written": done.written, "present": done.present, "locked": done.locked, "broken": list(done.broken)}
        if not asked.as_json:
            print(f"{done.written} records written, {done.present} were there.")
            if done.locked:
                print(f"Left to other processes, which are writing them: {done.locked} shards.")
            print_names("Could not be read", done.broken)
    if asked.as_json:
        print(json.dumps(told))


@dataclass(frozen=True, kw_only=True)
class CheckRequest(StoreRequest):
    """The options of ``distill check``."""

    records: Annotated[int, typer.Option(min=1, help="Records to recompute.")] = 256
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a probability that passes.")] = 0.02
    batch_size: Batch = 32


@distill.command()
@command
def check(context: typer.Context, asked: CheckRequest) -> None:
    """Recompute a sample of the stored records with the teacher and tell the largest difference."""
    # Of images that could not be read the store says so, too; any other record of theirs does not pass.
    samples = asked.samples(find_recipe(asked.recipe, img_size=asked.img_size), "skip")
    teacher, told_of_teacher = asked.load_teacher()
    opened = LabelStore(asked.store)
    opened.require({**samples.describe(), "teacher": told_of_teacher})
    report = check_records(opened, teacher, samples, asked.records, asked.batch_size, autocast=asked.dtype)
    good = report.largest <= asked.tolerance and not report.drifted
    if asked.as_json:
        told = {"records": report.records, "largest": report.largest, "mean": report.mean}
        print(json.dumps({**told, "drifted": list(report.drifted), "good": good}))
    else:
        print(f"{report.records} records recomputed: largest difference {report.largest:.5f}, mean {report.mean:.6f}.")
        if report.drifted:
            print(f"{len(report.drifted)} samples are augmented otherwise than when they were stored.")
    if not good:
        print("The store does not hold what this teacher says.", file=sys.stderr)
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class TrainRequest(shared.LoopRequest):
    """The options of ``distill train``."""

    store: Annotated[
        Path | None, typer.Argument(help="Folder of the stored soft labels; leave it out for --teacher.")
    ] = None
    teacher: Annotated[str | None, typer.Option(help="Ask this teacher at every step instead of a store.")] = None
    recipe: shared.RecipeName = "in22k_distill"
    out: shared.Out = Path("runs/distill")
    replays: Annotated[
        int | None,
        typer.Option(min=1, help="Stored epochs to replay in turn, waiting for those that a teacher is still writing."),
    ] = None
    hard_weight: Annotated[float, typer.Option(min=0, max=1, help="Weight of the true labels.")] = 0.0


@distill.command()
@command
def train(context: typer.Context, asked: TrainRequest) -> None:
    """Train a student on stored soft labels, or beside its teacher.

    The augmentation has to be the one the labels were stored with: the same recipe, seed and size. A training with
    more epochs than are stored replays them again. With --replays it may start while the teacher still writes.
    """
    replays, hard_weight = asked.replays, asked.hard_weight
    if (asked.store is None) == (asked.teacher is None):
        raise ValueError("Give either the folder of a store or --teacher.")
    if asked.teacher is not None and (hard_weight or replays is not None):
        raise ValueError("--hard-weight and --replays belong to a store; leave them out with --teacher.")
    recipe = asked.find_recipe(asked.recipe)
    samples = asked.samples(recipe, asked.on_broken)
    objective: StoredLabelLoss | OnlineDistillationLoss
    shown = None
    if asked.store is not None:
        opened = shared.open_labels(asked.store, samples)
        if replays is not None:
            shown = list(range(replays))
        else:  # a training that is resumed keeps its epochs, though its store may have grown since
            shown = (RunFolder(asked.out).config() or {}).get("replays") or shared.whole_epochs(opened, recipe.epochs)
        objective = StoredLabelLoss(
            opened, samples.augmentation, hard_weight, patience=0 if replays is None else PATIENCE
        )
        classes = opened.manifest.num_classes
    else:
        network = load_teacher(str(asked.teacher))
        objective, classes = OnlineDistillationLoss(network, asked.dtype), _count_classes(network, samples)
    if (hard_weight or asked.validation is not None) and samples.images.num_classes != classes:
        raise ValueError(
            f"The data has {samples.images.num_classes} classes and the teacher {classes}, so labels cannot be used "
            "beside what it says: leave out --hard-weight and --validation."
        )
    names = samples.images.class_names
    asked.train(
        asked.network(TinyViT.from_config, recipe, num_classes=classes),
        samples,
        objective,
        recipe,
        validation=asked.validation_images(names),
        replays=shown,
        class_names=names if names and len(names) == classes else None,
    )


def _count_classes(teacher: torch.nn.Module, samples: ReplayedSamples) -> int:
    size = samples.augmentation.img_size
    with torch.inference_mode():
        return int(teacher(torch.zeros(1, 3, size, size, device=device_of(teacher))).shape[1])
