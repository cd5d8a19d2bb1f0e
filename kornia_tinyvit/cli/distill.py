"""``kornia-tinyvit distill save``, ``check`` and ``train``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kornia_tinyvit.cli import options
from kornia_tinyvit.cli import training_options as shared
from kornia_tinyvit.cli.requests import argument, command, option
from kornia_tinyvit.data.classification import ClassificationDataset
from kornia_tinyvit.data.loader import ReplayedSamples
from kornia_tinyvit.distillation.losses import OnlineDistillationLoss, StoredLabelLoss
from kornia_tinyvit.distillation.manifest import Manifest, StoreError, estimated_size, readable_size
from kornia_tinyvit.distillation.saving import check_records, save_records
from kornia_tinyvit.distillation.store import LabelStore
from kornia_tinyvit.distillation.teachers import Teacher, device_of, load_teacher
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import ProgressBar
from kornia_tinyvit.training.recipes import find_recipe
from kornia_tinyvit.training.run_folder import RunFolder

BATCH_SIZE = "Batch size of the teacher."
PATIENCE = 1800.0  # seconds to wait for the next shard of a running teacher


@dataclass(frozen=True, kw_only=True)
class StoreRequest(shared.DataRequest):
    """A label store and its teacher."""

    store: Path = argument("Folder of the soft labels.")
    teacher: str = option(
        "Teacher", "file.py:function, timm:NAME, transformers:NAME, path, or VARIANT/NAME such as 21m/in22k."
    )
    recipe: str = option("Training", f"{shared.RECIPE_NAMES}.", "in22k_distill")
    device: str = option("Hardware", options.DEVICE, "auto")

    def load_teacher(self) -> tuple[Teacher, dict[str, Any]]:
        """Return the teacher and its description in the store."""
        teacher = load_teacher(self.teacher, options.find_device(self.device))
        return teacher, {**teacher.describe(), "precision": self.precision}


@dataclass(frozen=True, kw_only=True)
class SaveRequest(StoreRequest):
    """The options of ``distill save``."""

    epochs: int | None = option("Training", shared.EPOCHS, None, min=1)
    top_k: int = option("Teacher", "Classes stored per record.", 10, min=1)
    batch_size: int = option("Hardware", BATCH_SIZE, 128, min=1)
    workers: int = option("Hardware", options.WORKERS, 2, min=0)
    on_broken: str = option("Data", shared.ON_BROKEN, "stop")
    estimate: bool = option("Output", "Print the size on disk and stop.", False)


@command
def save(request: SaveRequest) -> None:
    """Store the soft labels of a teacher for each sample and epoch, or resume.

    Run the command once per GPU or machine to share the work: each process writes shards that no other one writes.
    """
    if request.estimate:
        request.reject_unused(("batch_size", "workers", "on_broken", "precision"), "with --estimate")
    recipe = find_recipe(request.recipe, epochs=request.epochs, img_size=request.img_size)
    samples = request.augment(recipe, request.on_broken)
    teacher, description = request.load_teacher()
    request.note_run(samples.images, device_of(teacher), request.teacher)
    classes, top_k = _count_classes(teacher, samples), request.top_k
    if top_k > classes:
        raise ValueError(f"--top-k must be at most {classes}, the classes of the teacher; got {top_k}.")
    size = estimated_size(len(samples), recipe.epochs, classes, top_k)
    report: dict[str, Any] = {"records": len(samples) * recipe.epochs, "bytes": size}
    if not request.as_json:
        records = f"{len(samples)} samples x {recipe.epochs} epochs x the top {top_k} of {classes} classes"
        print(f"{records}: {readable_size(size)}")
    if not request.estimate:
        manifest = Manifest(num_classes=classes, top_k=top_k, teacher=description, **samples.describe())
        bar = ProgressBar("saving", report["records"], request.shows_progress)
        settings = request.batch_size, request.workers, request.dtype, bar.step
        with LabelStore.create(request.store, manifest) as store, bar:
            done = save_records(store, teacher, samples, range(recipe.epochs), *settings)
        report |= {"written": done.written, "present": done.present, "locked": done.locked, "broken": list(done.broken)}
        if not request.as_json:
            print(f"{done.written} records written, {done.present} already present.")
            if done.locked:
                print(f"Shards that other processes are writing: {done.locked}.")
        request.note_names("Images that cannot be read", done.broken)
    if request.as_json:
        print(json.dumps(report))


@dataclass(frozen=True, kw_only=True)
class CheckRequest(StoreRequest):
    """The options of ``distill check``."""

    records: int = option("Teacher", "Number of records to recompute.", 256, min=1)
    tolerance: float = option("Teacher", "Largest difference of a probability that passes.", 0.02, min=0)
    batch_size: int = option("Hardware", BATCH_SIZE, 32, min=1)


@command
def check(request: CheckRequest) -> None:
    """Recompute a sample of stored records with the teacher and print the largest difference."""
    # The store marks images that could not be read; any other record of such an image fails.
    samples = request.augment(find_recipe(request.recipe, img_size=request.img_size), "skip")
    teacher, description = request.load_teacher()
    store = LabelStore(request.store)
    store.require({**samples.describe(), "teacher": description})
    report = check_records(store, teacher, samples, request.records, request.batch_size, autocast=request.dtype)
    good = report.largest <= request.tolerance and not report.drifted
    if request.as_json:
        values = {"records": report.records, "largest": report.largest, "mean": report.mean}
        print(json.dumps({**values, "drifted": list(report.drifted), "good": good}))
    else:
        print(f"{report.records} records recomputed: largest difference {report.largest:.5f}, mean {report.mean:.6f}.")
        if report.drifted:
            print(f"{len(report.drifted)} samples have another augmentation than in the store.")
    if not good:
        raise StoreError("The store does not match this teacher.")


@dataclass(frozen=True, kw_only=True)
class TrainRequest(shared.LoopRequest):
    """The options of ``distill train``."""

    store: Path | None = argument("Folder of the soft labels; leave it out with --teacher.", None)
    teacher: str | None = option("Teacher", "Run this teacher in each step instead of a store.", None)
    recipe: str = option("Training", f"{shared.RECIPE_NAMES}.", "in22k_distill")
    replays: int | None = option(
        "Training", "Stored epochs to replay in turn; waits for unfinished ones. Default: complete ones.", None, min=1
    )
    hard_weight: float = option("Training", "Weight of the true labels.", 0.0, min=0, max=1)
    out: Path = option("Output", shared.OUT, Path("runs/distill"))


@command
def train(request: TrainRequest) -> None:
    """Train a student on stored soft labels or with its teacher, or resume a training.

    Recipe, seed and size must be those of the store. A training with more epochs than are stored replays them. With
    --replays it may start while the store is being written.
    """
    replays, hard_weight = request.replays, request.hard_weight
    if (request.store is None) == (request.teacher is None):
        raise ValueError("Give either the folder of a store or --teacher.")
    if request.teacher is not None:
        request.reject_unused(("hard_weight", "replays"), "with --teacher")
    recipe = request.find_recipe()
    samples = request.augment(recipe, request.on_broken)
    objective: StoredLabelLoss | OnlineDistillationLoss
    epochs = None
    if request.store is not None:
        store = shared.open_labels(request.store, samples)
        if replays is not None:
            epochs = list(range(replays))
        else:  # a resumed training keeps its epochs, although the store may have grown
            epochs = (RunFolder(request.out).config() or {}).get("replays")
            epochs = epochs or shared.find_epochs(store, recipe.epochs, request)
        patience = 0 if replays is None else PATIENCE
        objective = StoredLabelLoss(store, samples.augmentation, hard_weight, patience=patience)
        classes, names = store.manifest.num_classes, store.manifest.teacher.get("class_names")
    else:
        network = load_teacher(str(request.teacher))
        objective, classes = OnlineDistillationLoss(network, request.dtype), _count_classes(network, samples)
        names = network.class_names
    validation = request.open_validation(ClassificationDataset.open, samples.images)
    try:
        shared.match_labels(samples, names, classes)
    except ValueError:
        if hard_weight or request.validation is not None:
            raise
        validation = None
    if names is None and samples.images.num_classes == classes:
        names = samples.images.class_names
    request.train(
        request.build_network(TinyViT.from_config, recipe, num_classes=classes),
        samples,
        objective,
        recipe,
        validation=validation,
        replays=epochs,
        class_names=None if names is None else tuple(names),
    )


def _count_classes(teacher: torch.nn.Module, samples: ReplayedSamples) -> int:
    size = samples.augmentation.img_size
    with torch.inference_mode():
        return int(teacher(torch.zeros(1, 3, size, size, device=device_of(teacher))).shape[1])
