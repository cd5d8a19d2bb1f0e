"""The training loop: the same code for one process, several GPUs and several machines, by accelerate."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from kornia_tinyvit.checkpoints import save_checkpoint
from kornia_tinyvit.distillation.batches import Batch, EpochBatches, ReplayedSamples, replay_loader
from kornia_tinyvit.distillation.store import describe_differences
from kornia_tinyvit.model import TinyViT
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.training.averaging import MovingAverage
from kornia_tinyvit.training.data import LabelledImages, MissingExtraError
from kornia_tinyvit.training.evaluation import Metrics, ReadablePictures, collate_readable
from kornia_tinyvit.training.objectives import Objective
from kornia_tinyvit.training.recipes import Recipe

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
except ImportError as error:  # pragma: no cover
    raise MissingExtraError("Training needs accelerate: pip install 'kornia-tinyvit[train]'.") from error

__all__ = ["TrainingResult", "train"]

_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class TrainingResult:
    """What a training came to.

    Attributes:
        steps: steps of the optimizer.
        top1: top-1 of the kept weights on the validation pictures in percent; ``None`` without them.
        best: file of the weights with the best top-1; without validation that of the last ones.
        last: file of the last weights.
        broken: names of pictures that could not be read.
        seconds: time spent, over all restarts.
        is_main_process: whether this is the process that wrote the files.
    """

    steps: int
    top1: float | None
    best: Path
    last: Path
    broken: tuple[str, ...]
    seconds: float
    is_main_process: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return dataclasses.asdict(self) | {"best": str(self.best), "last": str(self.last)}


def train(
    model: TinyViT,
    samples: ReplayedSamples,
    objective: Objective,
    recipe: Recipe,
    out: str | Path,
    *,
    validation: LabelledImages | None = None,
    replays: list[int] | None = None,
    class_names: tuple[str, ...] | None = None,
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
    and ``last.safetensors`` for :meth:`TinyViT.from_config`, the newest ``state-*`` to go on from, ``run.json`` with
    what was asked for, and TensorBoard's files where it is installed. Started by ``torchrun`` or ``accelerate
    launch`` it runs on all processes; batch norm in training mode uses the statistics of each process.

    Args:
        model: the network.
        samples: the pictures and their augmentation.
        objective: the loss; see :mod:`kornia_tinyvit.training.objectives`.
        recipe: the hyperparameters.
        out: folder for what comes out.
        validation: pictures to measure top-1 and top-5 on after each epoch.
        replays: epochs of the augmentation that are shown in turn, such as those of a store; ``None`` for all.
        class_names: names to write into the checkpoints.
        process_batch: pictures of one process at a time; gradients are accumulated up to the recipe's batch.
        workers: processes that read pictures, for each process.
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        save_minutes: time between two saved states; one is saved after each epoch, too.
        log_every: steps between two lines of metrics.
        cpu: stay on the CPU.
        progress: show a bar with rate and time left.

    Raises:
        ValueError: if the batches do not divide, ``out`` holds another training, or the validation pictures have other
            classes.
        FloatingPointError: if the loss is no longer finite.
    """
    _check_validation(validation, class_names, model.config.num_classes)
    AcceleratorState._reset_state()  # which would refuse another precision than that of an earlier training
    return _Training(
        Accelerator(mixed_precision=precision, cpu=cpu),
        model, samples, objective, recipe, Path(out), validation, replays, class_names, process_batch, workers,
        save_minutes, log_every, progress,
    ).run()  # fmt: skip


class _Training:
    def __init__(
        self,
        accelerator: Accelerator,
        model: TinyViT,
        samples: ReplayedSamples,
        objective: Objective,
        recipe: Recipe,
        out: Path,
        validation: LabelledImages | None,
        replays: list[int] | None,
        class_names: tuple[str, ...] | None,
        process_batch: int | None,
        workers: int,
        save_minutes: float,
        log_every: int,
        progress: bool,
    ) -> None:
        self.accelerator, self.recipe, self.out = accelerator, recipe, out
        self.samples, self.objective, self.validation = samples, objective, validation
        self.config, self.class_names, self.workers = model.config, class_names, workers
        self.save_seconds, self.log_every, self.progress = 60 * save_minutes, log_every, progress
        self.process_batch, self.accumulate = self._batches(process_batch)
        self.replays = replays

        groups = model.parameter_groups(recipe.peak_lr, recipe.weight_decay, recipe.layer_decay)
        optimizer = torch.optim.AdamW(groups, betas=_BETAS, eps=1e-8)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.augmentation = samples.augmentation.to(accelerator.device)
        self.average = MovingAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None

        self.done = 0  # batches of this process, over all epochs
        self.best: float = -1.0
        self.seconds = 0.0
        self.broken: set[str] = set()
        self.losses: list[Tensor] = []  # since the last line of metrics, which was written at this time
        self.logged = 0.0
        self.writer: Any = None

    def _batches(self, process_batch: int | None) -> tuple[int, int]:
        """Return the pictures of a process at a time and how many such batches make a step."""
        processes, whole = self.accelerator.num_processes, self.recipe.batch_size
        process_batch = process_batch or whole // processes
        if process_batch * processes == 0 or whole % (process_batch * processes):
            raise ValueError(
                f"The global batch of {whole} is no multiple of {process_batch} pictures on each of {processes} "
                "processes; choose another batch_size or process_batch."
            )
        return process_batch, whole // (process_batch * processes)

    def run(self) -> TrainingResult:
        self.out.mkdir(parents=True, exist_ok=True)
        self._check_run()
        self._resume()
        if self.accelerator.is_main_process:
            self.writer = _tensorboard(self.out, self.done // self.accumulate)
        order = self.samples.order
        batches = EpochBatches(
            order, self.process_batch, self.recipe.epochs, self.accelerator.process_index,
            self.accelerator.num_processes, self.accumulate, self.done, self.replays,
        )  # fmt: skip
        per_epoch = batches.batches_per_epoch
        began = saved = time.perf_counter()
        already = self.seconds
        self.logged = time.perf_counter()
        with self._bar() as bar:
            task = bar.add_task("training", total=batches.end, completed=self.done, rate="", loss="")
            for batch in replay_loader(self.samples, batches, self.workers):
                self._train_batch(batch, per_epoch)
                self.done += 1
                self.seconds = already + time.perf_counter() - began
                epoch_ends = self.done % per_epoch == 0
                if self.done % (self.log_every * self.accumulate) and not epoch_ends:
                    continue
                bar.update(task, completed=self.done, **self._log(per_epoch))
                if epoch_ends:
                    self._end_epoch(self.done // per_epoch)
                    self.seconds = already + time.perf_counter() - began
                if epoch_ends or self._any(time.perf_counter() - saved > self.save_seconds):
                    self._save_state()
                    saved = time.perf_counter()
        if self.writer is not None:
            self.writer.close()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # gives the network its own forward back
        return TrainingResult(
            self.done // self.accumulate, None if self.best < 0 else self.best, self._weights("best"),
            self._weights("last"), tuple(sorted(self.broken)), self.seconds,
            self.accelerator.is_main_process,
        )  # fmt: skip

    def _train_batch(self, batch: Batch, per_epoch: int) -> None:
        """Add a batch's gradients and, with the last one of a step, move the weights."""
        step, part = divmod(self.done, self.accumulate)
        # Stochastic depth is drawn anew from the step's own seed, so that a resumed run draws the same.
        torch.manual_seed(hash((self.augmentation.seed, self.done, self.accelerator.process_index)) & 0x7FFFFFFF)
        factor = self.recipe.lr_factor(step * self.accumulate / per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self._training_mode()
        self.broken.update(batch.broken)
        device = self.accelerator.device
        images = self.augmentation(batch.crops.to(device, non_blocking=True), batch.draws)
        last = part + 1 == self.accumulate
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

    def _training_mode(self) -> None:
        self.model.train()
        if self.recipe.frozen_batch_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _log(self, per_epoch: int) -> dict[str, Any]:
        """Write the mean loss since the last line and return what the bar shows."""
        loss = float(self.accelerator.reduce(torch.stack(self.losses).mean(), "mean"))
        now = time.perf_counter()
        pictures = len(self.losses) * self.process_batch * self.accelerator.num_processes
        rate = pictures / max(now - self.logged, 1e-9)
        self.losses, self.logged = [], now
        step = self.done // self.accumulate
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {step}. Lower the learning rate; the last saved state is in {self.out}."
            )
        self._write(
            {
                "step": step,
                "epoch": round(self.done / per_epoch, 4),
                "loss": loss,
                "lr": self.optimizer.param_groups[-1]["lr"],
                "images_per_s": round(rate, 1),
            }
        )
        return {"rate": f"{rate:.0f} pictures/s", "loss": f"loss {loss:.4f}"}

    def _end_epoch(self, epoch: int) -> None:
        """Measure and keep the weights, averaged where the recipe averages."""
        with self.average.applied(self.model) if self.average else nullcontext():
            line: dict[str, Any] = {"step": self.done // self.accumulate, "epoch": epoch}
            if self.validation is not None:
                top1, top5 = self._validate(self.validation)
                line |= {"top1": round(top1, 4), "top5": round(top5, 4)}
            self.broken.update(self._everyones_broken())
            line |= {"seconds": round(self.seconds, 1), "broken": len(self.broken)}
            self._keep("last")
            if self.validation is None or top1 >= self.best:
                self.best = top1 if self.validation is not None else -1.0
                self._keep("best")
        self._write(line)

    @torch.inference_mode()
    def _validate(self, images: LabelledImages) -> tuple[float, float]:
        """Return top-1 and top-5 in percent; each process measures its share, all the same number of batches."""
        self.model.eval()
        device, processes = self.accelerator.device, self.accelerator.num_processes
        size = self.recipe.img_size
        mean, std = (tuple(values.tolist()) for values in (self.augmentation.mean, self.augmentation.std))
        prepare = EvaluationPipeline(size, mean=mean, std=std).to(device)
        readable = ReadablePictures(images, range(len(images)), self.samples.on_broken == "skip")
        metrics = Metrics(self.config.num_classes)
        for start in range(0, len(images), self.process_batch * processes):
            first = start + self.accelerator.process_index * self.process_batch
            rows = range(first, min(first + self.process_batch, len(images)))
            pictures, labels, broken = collate_readable([readable[row] for row in rows])
            self.broken.update(f"validation: {name}" for name in broken)
            prepared = [prepare(picture[None].to(device)) for picture in pictures]
            # Without pictures of its own a process still takes part in what the network's processes do together.
            logits = self.model(torch.cat(prepared) if prepared else torch.zeros(1, 3, size, size, device=device))
            if prepared:
                metrics.update(logits, labels)
        metrics.load_state(self.accelerator.reduce(metrics.state().to(device), "sum"))
        result = metrics.compute()
        return result.top1, result.top5

    def _keep(self, name: str) -> None:
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            plain = TinyViT.from_config(self.config)
            plain.load_state_dict(state)
            save_checkpoint(plain, self._weights(name), class_names=self.class_names)

    def _weights(self, name: str) -> Path:
        return self.out / f"{name}.safetensors"

    # State on disk.

    def _check_run(self) -> None:
        """Write down what is trained, or refuse to go on with something else."""
        asked = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.config.to_dict(),
            "augmentation": {**self.augmentation.describe(), "seed": self.augmentation.seed},
            "objective": type(self.objective).__name__,
            "data": self.samples.images.fingerprint(),
        }
        asked = json.loads(json.dumps(asked))
        file = self.out / "run.json"
        if file.exists():
            differences = describe_differences(json.loads(file.read_text()), asked, words=("it has", "asked for"))
            if differences:
                raise ValueError(
                    f"{self.out} holds another training: {'; '.join(differences)}. Give another folder, or remove it."
                )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not file.exists():
            _write_atomically(file, json.dumps(asked, indent=1))

    def _save_state(self) -> None:
        """Save everything to go on from; a kill at any time leaves the state before intact."""
        steps = self.done // self.accumulate  # which mean the same for any number of processes and accumulated batches
        temporary, final = self.out / "state.tmp", self.out / f"state-{steps:09d}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        if self.average:  # by each process, which may have a part of its own of it
            torch.save(self.average.state_dict(), self._average_file(temporary, self.accelerator.process_index))
        broken = self._everyones_broken()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            done = {"done": steps, "best": self.best, "seconds": self.seconds, "broken": broken}
            (temporary / "progress.json").write_text(json.dumps(done))
            os.replace(temporary, final)
            for older in _states(self.out)[:-1]:
                shutil.rmtree(older)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        states = _states(self.out)
        if states:
            self.accelerator.load_state(str(states[-1]))
            if self.average:
                own, first = (self._average_file(states[-1], index) for index in (self.accelerator.process_index, 0))
                self.average.load_state_dict(torch.load(own if own.exists() else first, map_location="cpu"))
            progress = json.loads((states[-1] / "progress.json").read_text())
            self.done = progress["done"] * self.accumulate
            self.best, self.seconds = progress["best"], progress["seconds"]
            self.broken = set(progress["broken"])
        if self.accelerator.is_main_process:
            _forget_after(self.out / "metrics.jsonl", self.done // self.accumulate)

    @staticmethod
    def _average_file(state: Path, process: int) -> Path:
        return state / f"average-{process}.pt"

    def _everyones_broken(self) -> list[str]:
        from accelerate.utils import gather_object

        return sorted(set(gather_object(sorted(self.broken))))

    def _any(self, flag: bool) -> bool:
        """Return whether it is so in the main process, so that all do the same."""
        flags = torch.tensor(float(flag and self.accelerator.is_main_process), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum") > 0)

    def _write(self, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if self.writer is not None:
                for name in ("loss", "lr", "images_per_s", "top1", "top5"):
                    if name in line:
                        self.writer.add_scalar(name, line[name], line["step"])

    def _bar(self) -> Progress:
        shown = self.progress and self.accelerator.is_main_process
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        rest = (TextColumn("{task.fields[rate]}"), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
        return Progress(*columns, *rest, disable=not shown)


def _check_validation(images: LabelledImages | None, class_names: tuple[str, ...] | None, num_classes: int) -> None:
    """Refuse validation pictures whose labels do not mean what the network's classes mean."""
    if images is None:
        return
    if images.num_classes > num_classes:
        raise ValueError(f"The validation pictures have {images.num_classes} classes, but the network {num_classes}.")
    if class_names is not None and images.class_names is not None and images.class_names != tuple(class_names):
        others = sorted(set(images.class_names) ^ set(class_names))[:5]
        raise ValueError(f"The validation pictures have other classes than the network: {', '.join(others)}.")


def _states(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("state-*") if re.fullmatch(r"state-\d{9,}", path.name))


def _forget_after(metrics: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last saved state; they will be written again."""
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines() if _is_at_most(line, step)]
        _write_atomically(metrics, "".join(line + "\n" for line in lines))


def _is_at_most(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:  # the killed run's half line
        return False


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _tensorboard(out: Path, steps: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it is a convenience, not a need
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=steps + 1)  # what a killed run told is told again
