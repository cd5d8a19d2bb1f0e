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
from kornia_tinyvit.data.loader import EpochBatches, replay_loader
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import progress_bar
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.ema import MovingAverage
from kornia_tinyvit.training.recipes import Recipe
from kornia_tinyvit.training.run_folder import RunFolder
from kornia_tinyvit.training.tasks.base import Loss, Samples, Task, evaluate_network
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION
from kornia_tinyvit.training.tasks.detection import DetectorTraining
from kornia_tinyvit.training.tasks.promptable import PromptedSAM

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainingResult", "train"]

_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        steps: steps of the optimizer.
        score: what the kept weights reach on the validation images in per cent; ``None`` without them.
        best: file of the weights with the best score; without validation that of the last ones.
        last: file of the last weights.
        broken: names of images that could not be read.
        seconds: time spent, over all restarts.
        is_main_process: whether this is the process that wrote the files.
        metric: what the score is: the task's :attr:`~kornia_tinyvit.training.tasks.base.Task.metric`.
    """

    steps: int
    score: float | None
    best: Path
    last: Path
    broken: tuple[str, ...]
    seconds: float
    is_main_process: bool = True
    metric: str = CLASSIFICATION.metric

    @property
    def top1(self) -> float | None:
        """The score of a classifier, its top-1 in per cent; ``None`` for other tasks."""
        return self.score if self.metric == CLASSIFICATION.metric else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold, the score under the name of its measure."""
        told = dataclasses.asdict(self) | {"best": str(self.best), "last": str(self.last)}
        metric, score = told.pop("metric"), told.pop("score")
        return {"steps": told.pop("steps"), metric: score, **told}


def train(
    model: TinyViT | SemanticSegmenter | PromptedSAM | DetectorTraining,
    samples: Samples,
    objective: Loss,
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
        samples: the images and their augmentation.
        objective: the loss, such as :class:`~kornia_tinyvit.training.ClassificationLoss` or a loss of distillation.
        recipe: the hyperparameters.
        out: folder for what comes out.
        task: what the network is trained for, which decides how it is measured and written.
        validation: images to measure the network on, such as :class:`~kornia_tinyvit.data.ClassificationDataset`.
        validate_every: epochs from one measurement to the next; the last one is always measured.
        replays: epochs of the augmentation that are shown in turn, such as those of a store; ``None`` for all.
        class_names: names to write into the checkpoints.
        origin: where the first weights come from, such as a seed or a file's name, for ``run.json``: the same folder
            with another origin is refused.
        process_batch: images of one process at a time; gradients are accumulated up to the recipe's batch.
        workers: processes that read images, for each process.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        save_minutes: time between two saved states; one is saved after each epoch, too.
        log_every: steps between two lines of metrics.
        cpu: stay on the CPU.
        progress: show a bar with rate and time left.

    Raises:
        ValueError: if the batches do not divide, the augmentation has another size than the recipe, ``out`` holds
            another training or is written by another process, or the validation images have other classes.
        FloatingPointError: if the loss is no longer finite.
        MissingExtraError: if accelerate is missing.
    """
    if samples.augmentation.img_size != recipe.img_size:
        raise ValueError(
            f"The augmentation makes images of {samples.augmentation.img_size} pixels, but the recipe has "
            f"{recipe.img_size}; give find_recipe(..., img_size=...) the same."
        )
    if validation is not None:
        task.check(validation, model.config, class_names)
    if validate_every < 1:
        raise ValueError(f"validate_every must be at least 1; got {validate_every}.")
    accelerator = _accelerate(model, precision, cpu)
    folder = RunFolder(Path(out))
    training = _Training(accelerator, model, samples, objective, recipe, process_batch, task, folder)
    asked = training.describe(replays) | {"origin": origin}
    with folder.alone() if accelerator.is_main_process else nullcontext():
        training.begin(asked)
        batches = training.batches(asked["replays"])
        per_epoch = batches.batches_per_epoch
        saved = time.perf_counter()
        began = saved - training.seconds
        with progress_bar(progress and accelerator.is_main_process, counts=False, fields=("rate", "loss")) as bar:
            shown = bar.add_task("training", total=batches.end, completed=training.done, rate="", loss="")
            for batch in replay_loader(samples, batches, workers):
                training.train_batch(batch, per_epoch)
                training.seconds = time.perf_counter() - began
                bar.update(shown, completed=training.done)
                epoch, inside = divmod(training.done, per_epoch)
                if training.done % (log_every * training.accumulate) and inside:
                    continue
                line = training.log_metrics(per_epoch)
                bar.update(shown, rate=f"{line['images_per_s']:.0f} images/s", loss=f"loss {line['loss']:.4f}")
                if not inside:
                    due = validation is not None and (epoch % validate_every == 0 or epoch == recipe.epochs)
                    training.end_epoch(epoch, validation, due, class_names, workers)
                if not inside or training.agree(time.perf_counter() - saved > 60 * save_minutes):
                    training.save()
                    saved = training.taken = time.perf_counter()
        folder.close()
    accelerator.unwrap_model(training.model, keep_fp32_wrapper=False)  # gives the network its own forward back
    return TrainingResult(
        training.step, None if training.best < 0 else training.best, folder.weights("best"), folder.weights("last"),
        tuple(sorted(training.broken)), training.seconds, accelerator.is_main_process, task.metric,
    )  # fmt: skip


def _accelerate(model: nn.Module, precision: str, cpu: bool) -> Accelerator:
    """Return what runs the same code on one process or several."""
    with optional_imports("Training needs accelerate", "'kornia-tinyvit[train]'"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

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
    return accelerator


class _Training:
    """A network, its optimizer and its average, how far they are, and the folder that they are written to."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: TinyViT | SemanticSegmenter | PromptedSAM | DetectorTraining,
        samples: Samples,
        objective: Loss,
        recipe: Recipe,
        process_batch: int | None,
        task: Task,
        folder: RunFolder,
    ) -> None:
        self.accelerator, self.samples, self.objective, self.recipe = accelerator, samples, objective, recipe
        self.config, self.task, self.folder = model.config, task, folder
        self.preprocessing = task.preprocessing(model, samples)
        self.process_batch, self.accumulate = _split_batch(recipe.batch_size, accelerator.num_processes, process_batch)
        groups = model.parameter_groups(recipe.peak_lr, recipe.weight_decay, recipe.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=_BETAS, eps=1e-8)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
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
        from accelerate.utils import broadcast_object_list

        augmentation = self.samples.augmentation
        asked = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.config.to_dict(),
            "precision": self.accelerator.mixed_precision,
            "augmentation": {**augmentation.describe(), "seed": augmentation.seed},
            "objective": self.objective.describe(),
            "replays": broadcast_object_list([replays])[0],  # a store that grows may look different to each process
            "data": self.samples.images.fingerprint(),
        }
        described: dict[str, Any] = json.loads(json.dumps(asked))
        return described

    def begin(self, asked: dict[str, Any]) -> None:
        """Go on from the newest state of the folder, if there is one, unless it holds another training."""
        self.folder.claim(asked)
        self.accelerator.wait_for_everyone()
        found = self.folder.newest_state()
        if found is not None:
            state, progress = found
            self.accelerator.load_state(str(state))
            if self.average:
                own, first = (state / _average_name(process) for process in (self.accelerator.process_index, 0))
                self.average.load_state_dict(torch.load(own if own.exists() else first, map_location="cpu"))
            self.done = progress["step"] * self.accumulate
            self.best, self.seconds, self.broken = progress["best"], progress["seconds"], set(progress["broken"])
        if self.accelerator.is_main_process:
            self.folder.begin(asked, self.step)

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
        key = (self.samples.augmentation.seed, self.done, self.accelerator.process_index)
        torch.manual_seed(hash(key) & 0x7FFFFFFF)
        factor = self.recipe.lr_factor(self.step * self.accumulate / per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.model.train()
        for module in self.model.modules() if self.recipe.frozen_batch_norm else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        self.broken.update(batch.broken)
        device = self.accelerator.device
        images = self.samples.inputs(batch, device)
        last = (self.done + 1) % self.accumulate == 0
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                outputs = self.model(images)
            losses = self.objective(outputs, images, batch)
            # Broken images count with no loss: any split of a global batch over processes gives the same.
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

    def log_metrics(self, per_epoch: int) -> dict[str, Any]:
        """Write down and return the mean loss since the last call, and the rate.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        loss = float(self.accelerator.reduce(torch.stack(self.losses).mean(), "mean"))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {self.step}. Lower the learning rate; the last saved state is kept."
            )
        now = time.perf_counter()
        images = len(self.losses) * self.process_batch * self.accelerator.num_processes
        rate = round(images / max(now - self.taken, 1e-9), 1)
        self.losses, self.taken = [], now
        lr = self.optimizer.param_groups[-1]["lr"]
        return self._log({"epoch": round(self.done / per_epoch, 4), "loss": loss, "lr": lr, "images_per_s": rate})

    def end_epoch(
        self, epoch: int, validation: Any, due: bool, class_names: tuple[str, ...] | None, workers: int
    ) -> None:
        """Measure, if it is due, and keep the weights, averaged where the recipe averages."""
        measures: dict[str, float] = {}
        with self.average.applied(self.model) if self.average else nullcontext():
            names = ["last"]
            if validation is None:
                names.append("best")
            elif due:
                measures = self._evaluate(validation, workers)
                if measures[self.task.metric] >= self.best:
                    self.best = measures[self.task.metric]
                    names.append("best")
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                write = self.task.writer(self.config, state, class_names, self.preprocessing)
                for name in names:
                    write(self.folder.weights(name))
        self.broken.update(self._everyones_broken())
        self._log({"epoch": epoch, **measures, "seconds": round(self.seconds, 1), "broken": len(self.broken)})

    def _evaluate(self, images: Any, workers: int) -> dict[str, float]:
        """Measure the network on validation images; each process takes its share, all the same number of batches."""
        accelerator = self.accelerator
        evaluator = self.task.evaluator(
            images, self.config, self.samples, device=accelerator.device, batch_size=self.process_batch,
            skip_broken=self.samples.on_broken == "skip",
        )  # fmt: skip
        place = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        broken = evaluate_network(self.model, evaluator, workers, **place)
        self.broken.update(f"validation: {name}" for name in broken)
        if accelerator.num_processes > 1:
            state = evaluator.counts.state().to(accelerator.device)
            evaluator.counts.load_state(accelerator.reduce(state, "sum"))
        return evaluator.measures()

    def _log(self, line: dict[str, Any]) -> dict[str, Any]:
        line = {"step": self.step, **line}
        if self.accelerator.is_main_process:
            self.folder.log(line)
        return line

    def save(self) -> None:
        """Save everything to go on from; a kill at any time leaves the state before intact."""
        accelerator, folder = self.accelerator, self.folder
        if accelerator.is_main_process:
            folder.clear_pending()
        accelerator.wait_for_everyone()
        with folder.writing_state():
            accelerator.save_state(str(folder.pending))
            if self.average:  # by each process, which may have a part of its own of it
                torch.save(self.average.state_dict(), folder.pending / _average_name(accelerator.process_index))
        broken = self._everyones_broken()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.keep_state({"step": self.step, "best": self.best, "seconds": self.seconds, "broken": broken})
        accelerator.wait_for_everyone()

    def _everyones_broken(self) -> list[str]:
        from accelerate.utils import gather_object

        return sorted(set(gather_object(sorted(self.broken))))

    def agree(self, flag: bool) -> bool:
        """Return whether it is so in the main process, so that all do the same."""
        flags = torch.tensor(float(flag and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum") > 0)


def _average_name(process: int) -> str:
    return f"average-{process}.pt"


def _split_batch(whole: int, processes: int, process_batch: int | None) -> tuple[int, int]:
    """Return the images of a process at a time and how many such batches make a step."""
    process_batch = process_batch or whole // processes
    if process_batch * processes == 0 or whole % (process_batch * processes):
        raise ValueError(
            f"The global batch of {whole} is no multiple of {process_batch} images on each of {processes} "
            "processes; choose another batch_size or process_batch."
        )
    return process_batch, whole // (process_batch * processes)
