"""The training loop: the same code for one process, several GPUs and several machines, by accelerate."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kornia_tinyvit.allocator import keep_memory
from kornia_tinyvit.data.datasets import ImageDataset, count_noun
from kornia_tinyvit.data.loader import EpochBatches, replay_loader
from kornia_tinyvit.extras import optional_imports
from kornia_tinyvit.files import writing
from kornia_tinyvit.interruption import deferred_interrupt
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.progress import ProgressBar
from kornia_tinyvit.semantic import SemanticSegmenter
from kornia_tinyvit.training.batch_norm import freeze_statistics
from kornia_tinyvit.training.ema import MovingAverage
from kornia_tinyvit.training.figures import save_predictions
from kornia_tinyvit.training.freezing import freeze_parts
from kornia_tinyvit.training.recipes import Recipe
from kornia_tinyvit.training.run_folder import RunFolder
from kornia_tinyvit.training.tasks.base import Loss, Samples, Task, evaluate_network
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION, ClassificationLoss
from kornia_tinyvit.training.tasks.detection import DetectorTraining
from kornia_tinyvit.training.tasks.promptable import PromptedSAM

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainingResult", "train"]

_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class TrainingResult:
    """Result of :func:`train`.

    Attributes:
        steps: optimizer steps.
        score: score of the best weights on the validation images in per cent; ``None`` without validation.
        best: file of the weights with the best score; without validation that of the last weights.
        last: file of the last weights.
        broken: names of the corrupt images.
        seconds: training time, over all restarts.
        is_main_process: whether this process wrote the files.
        metric: name of the score, see :attr:`~kornia_tinyvit.training.tasks.base.Task.metrics`.
        best_epoch: epoch with the best score, counted from 1; ``None`` without validation.
        stopped_early: whether the training ended because the score did not improve for ``recipe.patience`` epochs.
    """

    steps: int
    score: float | None
    best: Path
    last: Path
    broken: tuple[str, ...]
    seconds: float
    is_main_process: bool = True
    metric: str = CLASSIFICATION.metric
    best_epoch: int | None = None
    stopped_early: bool = False

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy of a classifier in per cent; ``None`` for other tasks."""
        return self.score if self.metric == CLASSIFICATION.metric else None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; the score is stored under the name of its metric."""
        fields = dataclasses.asdict(self) | {"best": str(self.best), "last": str(self.last)}
        metric, score = fields.pop("metric"), fields.pop("score")
        return {"steps": fields.pop("steps"), metric: score, **fields}


def train(
    model: TinyViT | SemanticSegmenter | PromptedSAM | DetectorTraining,
    samples: Samples,
    loss: Loss,
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
    note: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Train a network, or resume the training in ``out``.

    With more ``epochs`` and an otherwise equal recipe, a finished or unfinished training in ``out`` is extended: it
    continues from its last state, without another warm-up, at the learning rate that the cosine schedule of the new
    length has at the epoch reached.

    The folder ``out`` receives ``metrics.jsonl`` with a line every ``log_every`` steps and one per epoch;
    ``best.safetensors`` and ``last.safetensors``, which the network's ``from_config`` reads; ``predictions.png``, the
    predictions of the best weights on up to 8 validation images beside the ground truth; the newest state ``state-*``
    to resume from; ``run.json`` with the configuration of the training; and TensorBoard's files where TensorBoard is
    installed. Under ``torchrun`` or ``accelerate launch`` it trains on all ranks; batch norm in training mode uses the
    statistics of each rank. On a CPU the process keeps freed memory, see
    :func:`~kornia_tinyvit.allocator.keep_memory`.

    Args:
        model: the network.
        samples: the images and their augmentation.
        loss: the loss, such as :class:`~kornia_tinyvit.training.ClassificationLoss` or a loss of distillation.
        recipe: the hyperparameters.
        out: output folder.
        task: the task, which evaluates and saves the network.
        validation: validation images, such as a :class:`~kornia_tinyvit.data.ClassificationDataset`.
        validate_every: epochs between two evaluations; the last epoch is always evaluated.
        replays: epochs of the augmentation to cycle through, such as those of a store; ``None`` for all.
        class_names: class names to store in the checkpoints.
        origin: where the initial weights come from, such as a seed or a file name, for ``run.json``: a folder with
            another origin is rejected.
        process_batch: images per rank and forward pass; gradients are accumulated up to the recipe's batch.
        workers: number of loader processes per rank.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        save_minutes: minutes between two saved states; a state is also saved after each epoch.
        log_every: optimizer steps between two lines of metrics.
        cpu: train on the CPU even if there is an accelerator.
        progress: show a progress bar.
        note: function that is called with lines about the training, such as its learning rates, on the main process;
            e.g. ``print``.

    Returns:
        The result of the training.

    Raises:
        ValueError: if the batch is not divisible by ranks and ``process_batch``, the augmentation has another size
            than the recipe, ``out`` holds another training or is in use, the training images have no objects, or the
            validation images have other classes.
        FloatingPointError: if the loss is not finite.
        KeyboardInterrupt: after Ctrl-C (SIGINT), when the current step is finished and the state is saved; with
            several ranks at the next line of metrics. A second one raises it at once.
        MissingExtraError: if accelerate is missing.
    """
    if samples.augmentation.img_size != recipe.img_size:
        raise ValueError(
            f"The augmentation makes images of {samples.augmentation.img_size} pixels, but the recipe has "
            f"{recipe.img_size}; give find_recipe(..., img_size=...) the same."
        )
    if isinstance(samples.images, ImageDataset):  # an own class with the same methods need not have this one
        samples.images.require_objects()
    if validation is not None:
        validation = task.match(validation, model.config, class_names)
    if isinstance(loss, ClassificationLoss) and isinstance(model, TinyViT) and model.config.num_classes == 1:
        warnings.warn("Training a classifier on one class learns nothing; add images of other classes.", stacklevel=2)
    if validate_every < 1:
        raise ValueError(f"validate_every must be at least 1; got {validate_every}.")
    accelerator = _create_accelerator(model, precision, cpu)
    from accelerate.utils import broadcast_object_list

    folder = RunFolder(Path(out))
    process_batch = process_batch or recipe.batch_size // accelerator.num_processes
    frozen = freeze_statistics(model, backbone_only=True) if recipe.frozen_batch_norm else nullcontext()
    with frozen, freeze_parts(model, recipe.freeze):
        evaluation = _Evaluation(validation, validate_every, class_names, workers)
        trainer = _Trainer(accelerator, model, samples, loss, recipe, process_batch, task, folder, evaluation, note)
        replays = broadcast_object_list([replays])[0]  # a store that grows may differ between ranks
        config = trainer.describe() | {"replays": replays, "origin": origin}
        batches = EpochBatches(
            samples.order, process_batch, recipe.epochs, accelerator.process_index, accelerator.num_processes,
            trainer.accumulate, replays=replays,
        )  # fmt: skip
        with folder.lock() if accelerator.is_main_process else nullcontext():
            trainer.resume(config, batches.batches_per_epoch)
            if not trainer.stopped:
                shown = progress and accelerator.is_main_process
                _run(trainer, batches, save_minutes, log_every, shown)
            folder.close()
    accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # restores the network's own forward
    return trainer.result()


def _run(trainer: _Trainer, batches: EpochBatches, save_minutes: float, log_every: int, shown: bool) -> None:
    """Train on the remaining batches.

    Raises:
        KeyboardInterrupt: after Ctrl-C, when the state is saved.
    """
    from accelerate.utils import broadcast_object_list

    accelerator, per_epoch = trainer.accelerator, batches.batches_per_epoch
    batches.start = trainer.done
    saved = time.perf_counter()
    began = saved - trainer.seconds
    with deferred_interrupt() as interrupted, ProgressBar("training", batches.end, shown, trainer.done) as bar:
        for batch in replay_loader(trainer.samples, batches, trainer.evaluation.workers):
            trainer.train_batch(batch, per_epoch)
            trainer.seconds = time.perf_counter() - began
            bar.step()
            epoch, inside = divmod(trainer.done, per_epoch)
            logged = not inside or trainer.done % (log_every * trainer.accumulate) == 0
            # Ranks exchange the flag only where they exchange the loss: both wait for the GPU.
            interrupt = trainer.done % trainer.accumulate == 0 and _any_rank(accelerator, interrupted.is_set(), logged)
            if not (logged or interrupt):
                continue
            line = trainer.log_metrics(per_epoch)
            bar.step(0, f"{line['images_per_s']:.0f} images/s, loss {line['loss']:.4f}, lr {line['lr']:.2g}")
            if not inside:
                trainer.end_epoch(epoch)
            late = time.perf_counter() - saved > 60 * save_minutes
            if interrupt or not inside or broadcast_object_list([late])[0]:
                trainer.save()
                saved = trainer.logged = time.perf_counter()
            if trainer.stopped:
                return
            if interrupt:
                break
    if trainer.done < batches.end:
        raise KeyboardInterrupt


def _describe_rates(recipe: Recipe, rates: list[float]) -> str:
    """Return a line on the learning rates, given those of the parameter groups at the peak."""
    lowest = f", {min(rates):.3g} in the first layers" if min(rates) < max(rates) else ""
    final = max(rates) * recipe.lr_factor(recipe.epochs)
    return (
        f"Learning rate {max(rates):.3g}{lowest}, by a cosine to {final:.3g} after {count_noun(recipe.epochs, 'epoch')}"
    )


def _describe_start(recipe: Recipe, extensions: list[Any], before: list[Any], epoch: float) -> str:
    """Return a line on where a training is resumed or extended."""
    verb = f"Extended from {extensions[-1]['from']} to {recipe.epochs} epochs: r" if extensions != before else "R"
    return f"{verb}esumes after epoch {epoch:g} with learning rate {recipe.peak_lr * recipe.lr_factor(epoch):.3g}"


def _any_rank(accelerator: Accelerator, flag: bool, exchange: bool) -> bool:
    """Return whether the flag is set on any rank; with several ranks false unless they exchange it now."""
    if accelerator.num_processes == 1:
        return flag
    if flag:
        accelerator.set_trigger()
    return exchange and accelerator.check_trigger()


def _create_accelerator(model: nn.Module, precision: str, cpu: bool) -> Accelerator:
    with optional_imports("Training needs accelerate", "'kornia-tinyvit[train]'"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

    # The state is shared by all accelerators of a process: a second training could not change precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    # MobileSAM's file has a norm and a head that its forward pass does not use; the prompt encoder's weights in use
    # depend on the kind of prompt.
    unused = isinstance(model, PromptedSAM) or (isinstance(model, TinyViT) and model.config.mobile_sam)
    # Without a GPU accelerate joins torchrun's processes only with cpu=True.
    cpu = cpu or not torch.accelerator.is_available()
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=unused)
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[kwargs])
    if accelerator.device.type == "cpu":
        keep_memory()
    return accelerator


class _Evaluation(NamedTuple):
    """The evaluation at the end of epochs."""

    images: Any
    every: int
    class_names: tuple[str, ...] | None
    workers: int


@dataclass
class _Trainer:
    """A network with its optimizer, its moving average, its progress and its folder."""

    accelerator: Accelerator
    model: TinyViT | SemanticSegmenter | PromptedSAM | DetectorTraining
    samples: Samples
    loss: Loss
    recipe: Recipe
    process_batch: int
    task: Task
    folder: RunFolder
    evaluation: _Evaluation
    note: Callable[[str], None] | None

    def __post_init__(self) -> None:
        accelerator, model, recipe = self.accelerator, self.model, self.recipe
        self.config, self.preprocessing = model.config, self.task.preprocessing(model, self.samples)
        ranks = accelerator.num_processes
        self.accumulate, rest = divmod(recipe.batch_size, max(self.process_batch * ranks, 1))
        if self.process_batch == 0 or rest:
            raise ValueError(
                f"The global batch of {recipe.batch_size} is no multiple of {self.process_batch} images on each of "
                f"{ranks} ranks; choose another batch_size or process_batch."
            )
        groups = model.parameter_groups(recipe.peak_lr, recipe.weight_decay, recipe.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=_BETAS, eps=1e-8)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None

        self.done = 0  # batches of this rank, over all epochs
        self.best = -1.0
        self.best_epoch = 0
        self.extended = 0.0  # the epoch from which the last extension applies
        self.stopped = False  # by the patience of the recipe
        self.seconds = 0.0
        self.broken: set[str] = set()
        self.losses: list[Tensor] = []  # since the last line of metrics, which was written at this time
        self.logged = time.perf_counter()

    @property
    def step(self) -> int:
        """Optimizer steps, which do not depend on the world size and on accumulation."""
        return self.done // self.accumulate

    def describe(self) -> dict[str, Any]:
        """Return what determines the result, as JSON types."""
        augmentation = self.samples.augmentation
        config = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.config.to_dict(),
            "precision": self.accelerator.mixed_precision,
            "augmentation": {**augmentation.describe(), "seed": augmentation.seed},
            "loss": self.loss.describe(),
            "data": self.samples.images.fingerprint(),
        }
        return dict(json.loads(json.dumps(config)))

    def resume(self, config: dict[str, Any], per_epoch: int) -> None:
        """Load the newest state of the folder, if there is one of the same configuration or of fewer epochs."""
        newest = self.folder.newest_state()
        epoch = 0.0 if newest is None else round(newest[1]["step"] * self.accumulate / per_epoch, 4)
        before = (self.folder.config() or {}).get("extensions", [])
        config = self.folder.check_config(config, epoch)
        self.recipe = dataclasses.replace(self.recipe, warmup_epochs=config["recipe"]["warmup_epochs"])
        self.accelerator.wait_for_everyone()
        self._note(_describe_rates(self.recipe, [group["lr"] for group in self.optimizer.param_groups]))
        if newest is not None:
            state, progress = newest
            self.accelerator.load_state(str(state))
            if self.average:
                own, first = (state / f"average-{rank}.pt" for rank in (self.accelerator.process_index, 0))
                self.average.load_state_dict(torch.load(own if own.exists() else first, map_location="cpu"))
            self.done = progress["step"] * self.accumulate
            for name in ("best", "best_epoch", "stopped", "seconds"):
                setattr(self, name, progress[name])
            self.broken = set(progress["broken"])
            self.extended = max((each["epoch"] for each in config["extensions"]), default=0.0)
            self.stopped = self.stopped and self.extended < epoch
            if epoch < self.recipe.epochs and not self.stopped:
                self._note(_describe_start(self.recipe, config["extensions"], before, epoch))
        if self.accelerator.is_main_process:
            self.folder.start(config, self.step)

    def train_batch(self, batch: Any, per_epoch: int) -> None:
        """Accumulate a batch's gradients; the last batch of a step updates the weights."""
        # The batch's own seed: a resumed training drops the same paths.
        key = (self.samples.augmentation.seed, self.done, self.accelerator.process_index)
        torch.manual_seed(hash(key) & 0x7FFFFFFF)
        factor = self.recipe.lr_factor(self.step * self.accumulate / per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.model.train()
        self.broken.update(batch.broken)
        device = self.accelerator.device
        inputs = self.samples.inputs(batch, device)
        last = (self.done + 1) % self.accumulate == 0
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                outputs = self.model(inputs)
            losses = self.loss(outputs, inputs, batch)
            # Corrupt images count with a loss of 0: the mean does not depend on the split over ranks.
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
        """Log and return the mean loss and the rate since the last call.

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
        rate = round(images / max(now - self.logged, 1e-9), 1)
        self.losses, self.logged = [], now
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        return self._log({"epoch": round(self.done / per_epoch, 4), "loss": loss, "lr": lr, "images_per_s": rate})

    def end_epoch(self, epoch: int) -> None:
        """Evaluate the network if it is due, and save its weights; both use the moving average if there is one."""
        metrics: dict[str, float] = {}
        images, every, class_names, _ = self.evaluation
        names = ["last"] if images is not None else ["last", "best"]
        with self.average.applied(self.model) if self.average else nullcontext():
            if images is not None and (epoch % every == 0 or epoch == self.recipe.epochs):
                metrics = self._evaluate()
                if metrics[self.task.metric] > self.best:
                    self.best, self.best_epoch = metrics[self.task.metric], epoch
                    names.append("best")
                waited = epoch - max(self.best_epoch, self.extended)
                self.stopped = 0 < self.recipe.patience <= waited and epoch < self.recipe.epochs
            state = self.accelerator.get_state_dict(self.model)
            if self.accelerator.is_main_process:
                network = self.task.restore(self.config, state, class_names, self.preprocessing)
                for name in names:
                    self.task.save(network, self.folder.weights(name))
                if images is not None and "best" in names:
                    network.to(self.accelerator.device)
                    save_predictions(self.folder.predictions, self.task, network, images)
        self._gather_broken()
        self._log({"epoch": epoch, **metrics, "seconds": round(self.seconds, 1), "broken": len(self.broken)})

    def _evaluate(self) -> dict[str, float]:
        """Return the metrics on validation images, which are sharded across ranks."""
        accelerator = self.accelerator
        evaluator = self.task.evaluator(
            self.evaluation.images, self.config, self.preprocessing, device=accelerator.device,
            batch_size=self.process_batch, skip_broken=self.samples.on_broken == "skip",
        )  # fmt: skip
        shard = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self.model.eval()  # train_batch sets the mode of each batch; a sharded network cannot be copied
        broken = evaluate_network(self.model, evaluator, self.evaluation.workers, **shard)
        self.model.train()
        self.broken.update(f"validation: {name}" for name in broken)
        if accelerator.num_processes > 1:
            state = evaluator.counts.state().to(accelerator.device)
            evaluator.counts.load_state(accelerator.reduce(state, "sum"))
        return self.task.report(evaluator.counts.compute())

    def _log(self, line: dict[str, Any]) -> dict[str, Any]:
        line = {"step": self.step, **line}
        if self.accelerator.is_main_process:
            self.folder.log(line)
        return line

    def save(self) -> None:
        """Save a state to resume from; a process killed meanwhile leaves the previous state intact.

        Raises:
            OSError: naming the state, if the disk is full or fails.
        """
        accelerator, folder = self.accelerator, self.folder
        if accelerator.is_main_process:
            folder.clear_pending()
        accelerator.wait_for_everyone()
        try:
            with writing(folder.pending):
                accelerator.save_state(str(folder.pending))
                if self.average:  # each rank saves its shard
                    torch.save(self.average.state_dict(), folder.pending / f"average-{accelerator.process_index}.pt")
        except OSError:
            folder.clear_pending()
            raise
        self._gather_broken()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            names = ("step", "best", "best_epoch", "stopped", "seconds")
            progress = {name: getattr(self, name) for name in names}
            folder.publish_state(progress | {"broken": sorted(self.broken)})
        accelerator.wait_for_everyone()

    def result(self) -> TrainingResult:
        """Return the result of the training."""
        folder, scored = self.folder, self.best >= 0
        return TrainingResult(
            self.step, self.best if scored else None, folder.weights("best"), folder.weights("last"),
            tuple(sorted(self.broken)), self.seconds, self.accelerator.is_main_process, self.task.metric,
            self.best_epoch if scored else None, self.stopped,
        )  # fmt: skip

    def _note(self, line: str) -> None:
        if self.note is not None and self.accelerator.is_main_process:
            self.note(line)

    def _gather_broken(self) -> None:
        """Collect the names of corrupt images from all ranks."""
        from accelerate.utils import gather_object

        self.broken = set(gather_object(sorted(self.broken)))
