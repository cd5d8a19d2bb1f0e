"""The training loop: the same code for one process, several GPUs and several machines, by accelerate."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.data.datasets import ImageLoader
from kornia_tinyvit.data.loader import EpochBatches, replay_loader
from kornia_tinyvit.distillation.losses import Objective
from kornia_tinyvit.extras import MissingExtraError
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import progress_bar
from kornia_tinyvit.training.ema import MovingAverage
from kornia_tinyvit.training.recipes import Recipe
from kornia_tinyvit.training.run_folder import RunFolder
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION, Judge, Samples, Task
from kornia_tinyvit.training.tasks.promptable import PromptedSAM

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
except ImportError as error:  # pragma: no cover
    raise MissingExtraError("Training needs accelerate: pip install 'kornia-tinyvit[train]'.") from error

if TYPE_CHECKING:
    from kornia_tinyvit.semantic import SemanticSegmenter
    from kornia_tinyvit.training.tasks.detection import DetectorTraining

__all__ = ["TrainingResult", "train"]

_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        steps: steps of the optimizer.
        score: what the kept weights reach on the validation pictures in per cent; ``None`` without them.
        best: file of the weights with the best score; without validation that of the last ones.
        last: file of the last weights.
        broken: names of pictures that could not be read.
        seconds: time spent, over all restarts.
        is_main_process: whether this is the process that wrote the files.
        measure: what the score is: the task's :attr:`~kornia_tinyvit.training.tasks.classification.Task.measure`.
    """

    steps: int
    score: float | None
    best: Path
    last: Path
    broken: tuple[str, ...]
    seconds: float
    is_main_process: bool = True
    measure: str = CLASSIFICATION.measure

    @property
    def top1(self) -> float | None:
        """The score of a classifier, its top-1 in per cent; ``None`` for other tasks."""
        return self.score if self.measure == CLASSIFICATION.measure else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold, the score under the name of its measure."""
        told = dataclasses.asdict(self) | {"best": str(self.best), "last": str(self.last)}
        measure, score = told.pop("measure"), told.pop("score")
        return {"steps": told.pop("steps"), measure: score, **told}


def train(
    model: TinyViT | SemanticSegmenter | PromptedSAM | DetectorTraining,
    samples: Samples,
    objective: Objective,
    recipe: Recipe,
    out: str | Path,
    *,
    task: Task = CLASSIFICATION,
    validation: Any = None,
    validate_every: int = 1,
    replays: list[int] | None = None,
    class_names: tuple[str, ...] | None = None,
    origin: dict[str, Any] | None = None,
    process_batch: int | None = None,
    workers: int = 0,
    precision: str = "no",
    save_minutes: float = 10.0,
    log_every: int = 50,
    cpu: bool = False,
    progress: bool = False,
) -> TrainingResult:
    """Train a network, or go on where a killed training stopped.

    ``out`` gets ``metrics.jsonl`` with a line every ``log_every`` steps and one for each epoch, ``best.safetensors``
    and ``last.safetensors`` for the network's ``from_config``, the newest ``state-*`` to go on from, ``run.json`` with
    what was asked for, and TensorBoard's files where it is installed. Started by ``torchrun`` or ``accelerate
    launch`` it runs on all processes; batch norm in training mode uses the statistics of each process. On a CPU the
    process keeps the memory it frees from then on, see :func:`~kornia_tinyvit.allocator.keep_memory`.

    Args:
        model: the network.
        samples: the pictures and their augmentation.
        objective: the loss; see :mod:`kornia_tinyvit.distillation.losses`.
        recipe: the hyperparameters.
        out: folder for what comes out.
        task: what the network is trained for, which decides how it is measured and written.
        validation: pictures to measure the network on, such as :class:`~kornia_tinyvit.data.ClassificationDataset`.
        validate_every: epochs from one measurement to the next; the last one is always measured.
        replays: epochs of the augmentation that are shown in turn, such as those of a store; ``None`` for all.
        class_names: names to write into the checkpoints.
        origin: where the first weights come from, such as a seed or a file's name, for ``run.json``: the same folder
            with another origin is refused.
        process_batch: pictures of one process at a time; gradients are accumulated up to the recipe's batch.
        workers: processes that read pictures, for each process.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        save_minutes: time between two saved states; one is saved after each epoch, too.
        log_every: steps between two lines of metrics.
        cpu: stay on the CPU.
        progress: show a bar with rate and time left.

    Raises:
        ValueError: if the batches do not divide, the augmentation has another size than the recipe, ``out`` holds
            another training or is written by another process, or the validation pictures have other classes.
        FloatingPointError: if the loss is no longer finite.
    """
    _check_sizes(samples, recipe)
    if validation is not None:
        task.check(validation, model.config, class_names)
    if validate_every < 1:
        raise ValueError(f"validate_every must be at least 1; got {validate_every}.")
    # Which would refuse another precision, or keep another device, than an earlier training of this process had.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # MobileSAM's file holds a norm and a head that its forward pass does not use; which weights prompts use depends on
    # their kind.
    idle = isinstance(model, PromptedSAM) or (isinstance(model, TinyViT) and model.config.mobile_sam)
    unused = DistributedDataParallelKwargs(find_unused_parameters=idle)
    # Without a GPU accelerate joins the processes that torchrun started only when told to stay on the CPU.
    cpu = cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[unused])
    if accelerator.device.type == "cpu":
        keep_memory()
    training = _Training(accelerator, model, samples, objective, recipe, process_batch, task)
    evaluate = None if validation is None else _Validation(training, validation, workers, validate_every)
    replays = broadcast_object_list([replays])[0]  # a store that grows may look different to each process
    folder, asked = RunFolder(Path(out)), training.describe(replays) | {"origin": origin}
    with folder.alone() if accelerator.is_main_process else nullcontext():
        return _run(training, folder, asked, evaluate, class_names, workers, save_minutes, log_every, progress)


def _run(
    training: _Training,
    folder: RunFolder,
    asked: dict[str, Any],
    evaluate: _Validation | None,
    class_names: tuple[str, ...] | None,
    workers: int,
    save_minutes: float,
    log_every: int,
    progress: bool,
) -> TrainingResult:
    """Go through the epochs: batch by batch, logging, measuring and saving on the way."""
    accelerator = training.accelerator
    folder.claim(asked)
    accelerator.wait_for_everyone()
    training.resume(folder)
    if accelerator.is_main_process:
        folder.begin(asked, training.step)
    batches = training.batches(asked["replays"])
    saved = time.perf_counter()
    began = saved - training.seconds
    with progress_bar(progress and accelerator.is_main_process, counts=False, fields=("rate", "loss")) as bar:
        task = bar.add_task("training", total=batches.end, completed=training.done, rate="", loss="")
        for batch in replay_loader(training.samples, batches, workers):
            training.train_batch(batch, batches.batches_per_epoch)
            training.seconds = time.perf_counter() - began
            bar.update(task, completed=training.done)
            epoch, inside = divmod(training.done, batches.batches_per_epoch)
            if training.done % (log_every * training.accumulate) and inside:
                continue
            line = training.take_metrics(batches.batches_per_epoch)
            _log(accelerator, folder, line)
            bar.update(task, rate=f"{line['images_per_s']:.0f} pictures/s", loss=f"loss {line['loss']:.4f}")
            if not inside:
                _log(accelerator, folder, training.end_epoch(epoch, folder, evaluate, class_names))
            if not inside or training.agree(time.perf_counter() - saved > 60 * save_minutes):
                training.save(folder)
                saved = training.taken = time.perf_counter()
    folder.close()
    accelerator.unwrap_model(training.model, keep_fp32_wrapper=False)  # gives the network its own forward back
    return TrainingResult(
        training.step, None if training.best < 0 else training.best, folder.weights("best"), folder.weights("last"),
        tuple(sorted(training.broken)), training.seconds, accelerator.is_main_process, training.task.measure,
    )  # fmt: skip


class _Training:
    """A network, its optimizer and its average, and how far they are."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: TinyViT | SemanticSegmenter | PromptedSAM | DetectorTraining,
        samples: Samples,
        objective: Objective,
        recipe: Recipe,
        process_batch: int | None,
        task: Task,
    ) -> None:
        self.accelerator, self.samples, self.objective, self.recipe = accelerator, samples, objective, recipe
        self.config, self.task = model.config, task
        self.process_batch, self.accumulate = _split_batch(recipe.batch_size, accelerator.num_processes, process_batch)
        groups = model.parameter_groups(recipe.peak_lr, recipe.weight_decay, recipe.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=_BETAS, eps=1e-8)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.augmentation = samples.augmentation
        self.average = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None

        self.done = 0  # batches of this process, over all epochs
        self.best = -1.0
        self.seconds = 0.0
        self.broken: set[str] = set()
        self.losses: list[Tensor] = []  # since the metrics were taken, at this time
        self.taken = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps of the optimizer, which mean the same for any number of processes and accumulated batches."""
        return self.done // self.accumulate

    def describe(self, replays: list[int] | None) -> dict[str, Any]:
        """Return what decides the outcome, as JSON's types."""
        asked = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.config.to_dict(),
            "precision": self.accelerator.mixed_precision,
            "augmentation": {**self.augmentation.describe(), "seed": self.augmentation.seed},
            "objective": self.objective.describe(),
            "replays": replays,
            "data": self.samples.images.fingerprint(),
        }
        described: dict[str, Any] = json.loads(json.dumps(asked))
        return described

    def batches(self, replays: list[int] | None) -> EpochBatches:
        """Return what is left for this process to do."""
        accelerator = self.accelerator
        return EpochBatches(
            self.samples.order, self.process_batch, self.recipe.epochs, accelerator.process_index,
            accelerator.num_processes, self.accumulate, self.done, replays,
        )  # fmt: skip

    def train_batch(self, batch: Any, per_epoch: int) -> None:
        """Add a batch's gradients and, with the last one of a step, move the weights."""
        # Stochastic depth is drawn anew from the batch's own seed, so that a resumed run draws the same.
        torch.manual_seed(hash((self.augmentation.seed, self.done, self.accelerator.process_index)) & 0x7FFFFFFF)
        factor = self.recipe.lr_factor(self.step * self.accumulate / per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._training_mode()
        self.broken.update(batch.broken)
        device = self.accelerator.device
        images = self.samples.inputs(batch, device)
        last = (self.done + 1) % self.accumulate == 0
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                outputs = self.model(images)
            losses = self.objective(outputs, images, batch)
            # Broken pictures count with no loss: any split of a global batch over processes gives the same.
            loss = (losses * batch.valid.to(device)).mean()
            self.accelerator.backward(loss / self.accumulate)
        self.losses.append(loss.detach())
        if last:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.average:
                self.average.update(self.model)
        self.done += 1

    def _training_mode(self) -> None:
        self.model.train()
        if self.recipe.frozen_batch_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def take_metrics(self, per_epoch: int) -> dict[str, Any]:
        """Return the mean loss since the last call, and the rate.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        loss = float(self.accelerator.reduce(torch.stack(self.losses).mean(), "mean"))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {self.step}. Lower the learning rate; the last saved state is kept."
            )
        now = time.perf_counter()
        pictures = len(self.losses) * self.process_batch * self.accelerator.num_processes
        rate = pictures / max(now - self.taken, 1e-9)
        self.losses, self.taken = [], now
        lr = self.optimizer.param_groups[-1]["lr"]
        epoch = round(self.done / per_epoch, 4)
        return {"step": self.step, "epoch": epoch, "loss": loss, "lr": lr, "images_per_s": round(rate, 1)}

    def end_epoch(
        self, epoch: int, folder: RunFolder, evaluate: _Validation | None, class_names: tuple[str, ...] | None
    ) -> dict[str, Any]:
        """Measure and keep the weights, averaged where the recipe averages."""
        line: dict[str, Any] = {"step": self.step, "epoch": epoch}
        with self.average.applied(self.model) if self.average else nullcontext():
            names = ["last"]
            if evaluate is None:
                names.append("best")
            elif evaluate.is_due(epoch):
                line |= evaluate()
                if line[self.task.measure] >= self.best:
                    self.best = line[self.task.measure]
                    names.append("best")
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                self.task.save(self.config, state, [folder.weights(name) for name in names], class_names)
        self.broken.update(self._everyones_broken())
        return line | {"seconds": round(self.seconds, 1), "broken": len(self.broken)}

    def save(self, folder: RunFolder) -> None:
        """Save everything to go on from; a kill at any time leaves the state before intact."""
        if self.accelerator.is_main_process:
            folder.clear_pending()
        self.accelerator.wait_for_everyone()
        with folder.writing_state():
            self.accelerator.save_state(str(folder.pending))
            if self.average:  # by each process, which may have a part of its own of it
                torch.save(self.average.state_dict(), folder.pending / _average_name(self.accelerator.process_index))
        broken = self._everyones_broken()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            folder.keep_state({"step": self.step, "best": self.best, "seconds": self.seconds, "broken": broken})
        self.accelerator.wait_for_everyone()

    def resume(self, folder: RunFolder) -> None:
        """Go on from the newest state, if there is one."""
        found = folder.newest_state()
        if found is None:
            return
        state, progress = found
        self.accelerator.load_state(str(state))
        if self.average:
            own, first = (state / _average_name(process) for process in (self.accelerator.process_index, 0))
            self.average.load_state_dict(torch.load(own if own.exists() else first, map_location="cpu"))
        self.done = progress["step"] * self.accumulate
        self.best, self.seconds, self.broken = progress["best"], progress["seconds"], set(progress["broken"])

    def _everyones_broken(self) -> list[str]:
        return sorted(set(gather_object(sorted(self.broken))))

    def agree(self, flag: bool) -> bool:
        """Return whether it is so in the main process, so that all do the same."""
        flags = torch.tensor(float(flag and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum") > 0)


class _Validation:
    """Measures the network on validation pictures; each process takes its share, all the same number of batches."""

    def __init__(self, training: _Training, images: Any, workers: int, every: int) -> None:
        self.training, self.images, self.workers, self.every = training, images, workers, every

    def is_due(self, epoch: int) -> bool:
        """Return whether so many epochs are followed by a measurement."""
        return epoch % self.every == 0 or epoch == self.training.recipe.epochs

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        training, accelerator = self.training, self.training.accelerator
        training.model.eval()
        judge = training.task.judge(
            self.images, training.config, training.samples, training.process_batch, accelerator.device
        )
        for batch in self._batches(judge):
            training.broken.update(f"validation: {name}" for name in judge.add(training.model, batch))
        if accelerator.num_processes > 1:
            state = judge.counts.state().to(accelerator.device)
            judge.counts.load_state(accelerator.reduce(state, "sum"))
        return judge.measures()

    def _batches(self, judge: Judge) -> ImageLoader:
        accelerator, count, batch = self.training.accelerator, len(self.images), judge.batch_size
        rounds = -(-count // (batch * accelerator.num_processes))
        firsts = [(turn * accelerator.num_processes + accelerator.process_index) * batch for turn in range(rounds)]
        rows = [list(range(first, min(first + batch, count))) for first in firsts]
        return ImageLoader(
            judge.pictures, batch_sampler=rows, num_workers=self.workers, collate_fn=judge.collate,
            generator=torch.Generator(),
        )  # fmt: skip


def _log(accelerator: Accelerator, folder: RunFolder, line: dict[str, Any]) -> None:
    if accelerator.is_main_process:
        folder.log(line)


def _average_name(process: int) -> str:
    return f"average-{process}.pt"


def _split_batch(whole: int, processes: int, process_batch: int | None) -> tuple[int, int]:
    """Return the pictures of a process at a time and how many such batches make a step."""
    process_batch = process_batch or whole // processes
    if process_batch * processes == 0 or whole % (process_batch * processes):
        raise ValueError(
            f"The global batch of {whole} is no multiple of {process_batch} pictures on each of {processes} "
            "processes; choose another batch_size or process_batch."
        )
    return process_batch, whole // (process_batch * processes)


def _check_sizes(samples: Samples, recipe: Recipe) -> None:
    if samples.augmentation.img_size != recipe.img_size:
        raise ValueError(
            f"The augmentation makes pictures of {samples.augmentation.img_size} pixels, but the recipe has "
            f"{recipe.img_size}; give find_recipe(..., img_size=...) the same."
        )
