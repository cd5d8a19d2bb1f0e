"""The training loop: steps, output files, errors, and resuming after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import resource
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim import optimizer as optimizers

from kornia_tinyvit import ImageClassifier, TinyViT, progress
from kornia_tinyvit.data import ClassificationDataset, ReplayableAugmentation, ReplayedSamples
from kornia_tinyvit.data.datasets import BrokenImageError
from kornia_tinyvit.distillation import LabelStore, Manifest, StoredLabelLoss
from kornia_tinyvit.preprocessing import EvaluationPipeline
from kornia_tinyvit.training import ClassificationLoss, Recipe, loop, train
from kornia_tinyvit.training.ema import MovingAverage
from kornia_tinyvit.training.figures import save_predictions
from kornia_tinyvit.training.run_folder import RunFolder
from kornia_tinyvit.training.tasks.classification import CLASSIFICATION
from tests.conftest import TINY
from tests.distillation.helpers import write_records
from tests.processes import PROCESSES, start
from tests.scenes import CLASSES, damage, make_images
from tests.training.runs import Interrupted, losses, metrics

RECIPE = Recipe(
    img_size=32, epochs=2, warmup_epochs=0, batch_size=8, base_lr=0.128, min_lr=0.0128, preset="small",
    changes={"label_smoothing": 0.0},
)  # fmt: skip
EASY = replace(RECIPE, base_lr=0.5, min_lr=0.05, changes={"erasing": 0.0, "color_jitter": 0.0, "label_smoothing": 0.0})
FROZEN = replace(RECIPE, frozen_batch_norm=True)
STEPS = 3  # of an epoch of the 24 images


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_images(tmp_path / "data")


def make_model(**changes) -> TinyViT:
    torch.manual_seed(0)
    return TinyViT(**(TINY | {"num_classes": 3, "img_size": 32} | changes))


def make_samples(folder, recipe=RECIPE, on_broken="stop") -> ReplayedSamples:
    images = ClassificationDataset.open(folder)
    augmentation = ReplayableAugmentation(
        recipe.img_size, recipe.preset, seed=1, num_samples=len(images), **recipe.changes
    )
    return ReplayedSamples(images, augmentation, on_broken)


class HookedLoss(ClassificationLoss):
    """A loss that calls a function before each batch and multiplies by its result."""

    def __init__(self, augmentation, before) -> None:
        super().__init__(augmentation)
        self.before, self.calls = before, 0

    def __call__(self, outputs, images, batch):
        self.calls += 1
        loss = super().__call__(outputs, images, batch)
        return loss * self.before(self.calls)


class OwnImages:
    """A data set with the methods that the training needs, and no more."""

    def __init__(self, images) -> None:
        self.read, self.name, self.fingerprint = images.read, images.name, images.fingerprint
        self.labels, self.count = images.labels, len(images)

    def __len__(self) -> int:
        return self.count


def fit(folder, out, recipe=RECIPE, model=None, before=None, on_broken="stop", **options):
    samples = make_samples(folder, recipe, on_broken)
    loss = ClassificationLoss(samples.augmentation)
    if before is not None:
        loss = HookedLoss(samples.augmentation, before)
        loss.__class__ = type("ClassificationLoss", (HookedLoss,), {})  # the name in run.json
    options = {"cpu": True, "log_every": 1, "class_names": CLASSES} | options
    return train(model or make_model(), samples, loss, recipe, out, **options)


def hold(out, connection):
    """Lock a folder until this process is killed."""
    with RunFolder(out).lock():
        connection.send("locked")
        time.sleep(600)


def stop_at(call):
    def before(number):
        if number == call:
            raise Interrupted
        return 1

    return before


def weights(path) -> TinyViT:
    return TinyViT.from_config(pretrained=path).eval()


def assert_same_run(out, other):
    """Assert that metrics, except times, and weights are equal."""
    one, two = ([{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in metrics(each)]
                for each in (out, other))  # fmt: skip
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-6)
    for name in ("best", "last"):
        first, second = (weights(each / f"{name}.safetensors").state_dict() for each in (out, other))
        assert all(torch.allclose(first[key], second[key], rtol=1e-5, atol=1e-7) for key in first)


@pytest.fixture
def spy():
    """Record the learning rates of all groups and the norm of the gradients at each step."""
    seen = []

    def before(optimizer, args, kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        seen.append(([group["lr"] for group in optimizer.param_groups], norm))

    handle = optimizers.register_optimizer_step_pre_hook(before)
    yield seen
    handle.remove()


class TestOutputs:
    def test_it_learns(self, folder, tmp_path):
        validation = ClassificationDataset.open(make_images(tmp_path / "val", each=5, seed=9))
        recipe = replace(EASY, epochs=8, warmup_epochs=1)
        result = fit(folder, tmp_path / "out", recipe, validation=validation)
        curve = losses(tmp_path / "out")
        assert len(curve) == 8 * STEPS
        assert np.mean(curve[-3:]) < 0.5 * np.mean(curve[:3])
        assert result.top1 > 60
        assert result.steps == 24
        assert result.is_main_process

    def test_own_data_class(self, folder, tmp_path):
        samples = make_samples(folder)
        samples.images = OwnImages(samples.images)
        own = train(
            make_model(), samples, ClassificationLoss(samples.augmentation), RECIPE, tmp_path / "own", log_every=1,
            cpu=True,
        )  # fmt: skip
        fit(folder, tmp_path / "ours")
        assert own.steps == 2 * STEPS
        assert losses(tmp_path / "own") == losses(tmp_path / "ours")

    def test_metrics(self, folder, tmp_path):
        out = tmp_path / "out"
        validation = ClassificationDataset.open(make_images(tmp_path / "val", each=3, seed=9))
        result = fit(folder, out, validation=validation, log_every=2)
        lines = metrics(out)
        rows = [(line["step"], line["epoch"], "loss" in line) for line in lines]
        assert rows == [(2, 0.6667, True), (3, 1, True), (3, 1, False),
                        (4, 1.3333, True), (6, 2, True), (6, 2, False)]  # fmt: skip
        for line in lines:
            if "loss" in line:
                assert line.keys() == {"step", "epoch", "loss", "lr", "images_per_s"}
                assert line["images_per_s"] > 0
            else:
                assert line.keys() == {"step", "epoch", "top1", "top5", "seconds", "broken"}
                assert line["broken"] == 0
        assert result.to_dict() == json.loads(json.dumps(result.to_dict())) | {"broken": ()}
        assert result.top1 == pytest.approx(max(line.get("top1", 0) for line in lines), abs=1e-4)
        names = {path.name for path in out.iterdir()} - {"tensorboard"}
        weights = {"best.safetensors", "last.safetensors", "state-000000006"}
        assert names == weights | {"metrics.jsonl", "run.json", "predictions.png", ".lock"}

    def test_losses_are_means_over_the_logged_steps(self, folder, tmp_path):
        fit(folder, tmp_path / "each")
        fit(folder, tmp_path / "some", log_every=2)
        each, some = losses(tmp_path / "each"), losses(tmp_path / "some")
        wanted = [np.mean(each[0:2]), each[2], each[3], np.mean(each[4:6])]
        assert some == pytest.approx(wanted, rel=1e-5)

    def test_checkpoints(self, folder, tmp_path):
        model = make_model()
        result = fit(folder, tmp_path / "out", model=model)
        assert (result.best, result.last) == (tmp_path / "out/best.safetensors", tmp_path / "out/last.safetensors")
        assert result.top1 is None
        for path in (result.best, result.last):
            network = weights(path)
            assert network.config == model.config
            for key, value in model.state_dict().items():
                assert torch.equal(network.state_dict()[key], value.cpu())
        answer = ImageClassifier.from_config(pretrained=result.last).predict(Image.new("RGB", (40, 40), "red"))
        assert {each.label for each in answer[0]} == set(CLASSES)

    @pytest.mark.slow
    def test_the_best_is_kept(self, folder, tmp_path):
        """The gradient is inverted in the last epochs, and the weights of an earlier epoch remain the best."""
        validation = ClassificationDataset.open(folder)
        recipe = replace(EASY, epochs=10, min_lr=0.5)

        def before(number):
            return 1 if number <= 7 * STEPS else -1

        model = make_model()
        result = fit(folder, tmp_path / "out", recipe, model, before, validation=validation)
        top1 = [line["top1"] for line in metrics(tmp_path / "out") if "top1" in line]
        assert top1[-1] < max(top1)
        assert result.top1 == pytest.approx(max(top1), abs=1e-4)
        assert accuracy(result.best, validation) == pytest.approx(max(top1), abs=1e-3)
        assert accuracy(result.last, validation) == pytest.approx(top1[-1], abs=1e-3)
        save_predictions(tmp_path / "figure.png", CLASSIFICATION, weights(result.best), validation)
        assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "out" / "predictions.png").read_bytes()

    def test_validation_accuracy(self, folder, tmp_path):
        validation = ClassificationDataset.open(make_images(tmp_path / "val", each=7, seed=9, size=36))
        result = fit(folder, tmp_path / "out", validation=validation, process_batch=4)  # 21 images, 6 batches
        assert result.top1 == pytest.approx(accuracy(result.best, validation), abs=1e-4)
        assert metrics(tmp_path / "out")[-1]["top5"] == 100  # of three classes

    def test_other_validation_classes(self, folder, tmp_path):
        data = make_images(tmp_path / "val", each=1)
        (data / "green").rename(data / "yellow")
        with pytest.raises(ValueError, match="The data has the classes yellow, but the network has blue, green, red"):
            fit(folder, tmp_path / "out", validation=ClassificationDataset.open(data))
        (data / "violet").mkdir()
        with pytest.raises(ValueError, match="The data has 4 classes, but the network has 3"):
            fit(folder, tmp_path / "out", validation=ClassificationDataset.open(data), class_names=None)
        assert not (tmp_path / "out").exists()


def accuracy(path, images) -> float:
    network, prepare = weights(path), EvaluationPipeline(32)
    with torch.no_grad():
        right = [int(network(prepare(image[None])).argmax()) == label for image, label in
                 (images[row] for row in range(len(images)))]  # fmt: skip
    return 100 * sum(right) / len(right)


class TestSteps:
    def test_learning_rates(self, folder, tmp_path, spy):
        recipe = replace(RECIPE, warmup_epochs=1, layer_decay=0.5)
        fit(folder, tmp_path / "out", recipe)
        assert recipe.peak_lr == 0.128 * 8 / 512
        wanted = [recipe.peak_lr * recipe.lr_factor(step / STEPS) for step in range(2 * STEPS)]
        lines = [line["lr"] for line in metrics(tmp_path / "out") if "loss" in line]
        assert lines == pytest.approx(wanted)
        assert wanted[1] == pytest.approx(recipe.peak_lr / 3)
        for (rates, _), highest in zip(spy, wanted, strict=True):
            assert sorted(set(rates)) == pytest.approx([highest * 0.5**block for block in (4, 3, 2, 1, 0)])

    def test_accumulated_steps_have_one_learning_rate(self, folder, tmp_path, spy):
        recipe = replace(RECIPE, warmup_epochs=1)
        fit(folder, tmp_path / "out", recipe, process_batch=2)
        assert len(spy) == 2 * STEPS
        wanted = [recipe.peak_lr * recipe.lr_factor(step / STEPS) for step in range(2 * STEPS)]
        assert [rates[0] for rates, _ in spy] == pytest.approx(wanted)

    def test_weight_decay_groups(self, folder, tmp_path):
        decays = []

        def before(optimizer, args, kwargs):
            decays.append({id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]})
            assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)

        handle = optimizers.register_optimizer_step_pre_hook(before)
        model = make_model()
        try:
            fit(folder, tmp_path / "out", replace(RECIPE, weight_decay=0.37, epochs=1), model)
        finally:
            handle.remove()
        for name, parameter in model.named_parameters():
            plain = parameter.ndim == 1 or name.endswith("attention_biases")
            assert decays[0][id(parameter)] == (0 if plain else 0.37), name

    def test_clipping(self, folder, tmp_path, spy):
        fit(folder, tmp_path / "free", replace(RECIPE, clip_norm=1e9))
        free = [norm for _, norm in spy]
        spy.clear()
        limit = min(free) / 2
        fit(folder, tmp_path / "clipped", replace(RECIPE, clip_norm=limit))
        assert [norm for _, norm in spy] == pytest.approx([limit] * len(free), rel=1e-3)

    @pytest.mark.parametrize("recipe", [FROZEN, replace(FROZEN, ema_decay=0.9)])
    def test_accumulation_equals_the_large_batch(self, folder, tmp_path, recipe):
        for size in (8, 2):
            fit(folder, tmp_path / str(size), recipe, process_batch=size)
        assert losses(tmp_path / "8") == pytest.approx(losses(tmp_path / "2"), rel=1e-4)
        one, two = (weights(tmp_path / size / "last.safetensors").state_dict() for size in ("8", "2"))
        for key, value in one.items():
            assert torch.allclose(value, two[key], atol=2e-4), key

    def test_frozen_batch_norm(self, folder, tmp_path):
        for recipe, kept in ((FROZEN, True), (RECIPE, False)):
            model = make_model()
            before = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
            fit(folder, tmp_path / str(kept), recipe, model)
            after = model.state_dict()
            assert before
            assert all(torch.equal(value, after[key]) == kept for key, value in before.items())

    def test_average(self, folder, tmp_path):
        model = make_model()
        recipe = replace(RECIPE, ema_decay=0.3)
        parameters = list(model.parameters())
        expected, number = [p.detach().clone() for p in parameters], 0

        def after(optimizer, args, kwargs):
            nonlocal expected, number
            kept = min(0.3, (1 + number) / (10 + number))
            expected = [kept * a + (1 - kept) * p.detach() for a, p in zip(expected, parameters, strict=True)]
            number += 1

        handle = optimizers.register_optimizer_step_post_hook(after)
        try:
            result = fit(folder, tmp_path / "out", recipe, model)
        finally:
            handle.remove()
        assert number == 2 * STEPS
        for path in (result.best, result.last):
            for value, wanted in zip(weights(path).parameters(), expected, strict=True):
                assert torch.allclose(value, wanted, atol=1e-6)
        own = next(model.head.parameters())
        assert not torch.allclose(own, weights(result.last).head.weight)
        assert MovingAverage(model, 0.3).updates == 0

    def test_gradient_checkpointing(self, folder, tmp_path):
        for name in ("plain", "recomputed"):
            model = make_model(drop_path_rate=0.4, use_checkpoint=name == "recomputed")
            fit(folder, tmp_path / name, model=model)
        assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "recomputed"), rel=1e-5)

    def test_gradient_checkpointing_is_on(self, folder, tmp_path, monkeypatch):
        from kornia_tinyvit import model as module

        calls = []
        original = module.checkpoint
        monkeypatch.setattr(module, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
        fit(folder, tmp_path / "out", replace(RECIPE, epochs=1), make_model(use_checkpoint=True))
        assert len(calls) == STEPS * 5

    def test_drop_path_differs_between_steps(self, folder, tmp_path):
        """With a negligible learning rate, the same images have other losses in each epoch."""
        recipe = replace(FROZEN, base_lr=1e-12, min_lr=1e-12, epochs=3, batch_size=24)
        for name, rate in (("same", 0.0), ("other", 0.5)):
            fit(folder, tmp_path / name, recipe, make_model(drop_path_rate=rate), replays=[0])
        assert losses(tmp_path / "same") == pytest.approx([losses(tmp_path / "same")[0]] * 3, rel=1e-5)
        assert len({round(loss, 5) for loss in losses(tmp_path / "other")}) == 3

    def test_lower_precision(self, folder, tmp_path):
        """Trainings of one process may differ in precision, and the network's own forward is restored."""
        curves = []
        for number, precision in enumerate(("no", "bf16", "no")):
            model, kinds = make_model(), []
            model.head.register_forward_hook(lambda module, inputs, output, kinds=kinds: kinds.append(output.dtype))
            fit(folder, tmp_path / str(number), FROZEN, model, precision=precision)
            assert set(kinds) == {torch.bfloat16 if precision == "bf16" else torch.float32}
            kinds.clear()
            model.eval()(torch.zeros(1, 3, 32, 32))
            assert kinds == [torch.float32]
            curves.append(losses(tmp_path / str(number)))
        first, half, second = curves
        assert first == second
        assert half == pytest.approx(first, rel=0.1)
        assert half != first

    def test_unknown_precision(self, folder, tmp_path):
        with pytest.raises(ValueError, match="fp7"):
            fit(folder, tmp_path / "out", precision="fp7")

    def test_stored_labels(self, folder, tmp_path):
        """The stored epochs are replayed, and the network learns their labels."""
        samples = make_samples(folder, EASY)
        manifest = Manifest(num_samples=24, num_classes=3, top_k=2, seed=1)
        with LabelStore.create(tmp_path / "store", manifest) as store:
            for epoch in (0, 1):
                order = samples.order.permutation(epoch)
                wrong = (torch.tensor(samples.images.labels)[order.tolist()] + 1) % 3
                params = samples.augmentation.sample_params(epoch, order)
                write_records(store, epoch, order, F.one_hot(wrong, 3).float(), params.checksums())
        loss = StoredLabelLoss(LabelStore(tmp_path / "store"), samples.augmentation)
        recipe = replace(EASY, epochs=8)
        train(make_model(), samples, loss, recipe, tmp_path / "out", replays=[0, 1], log_every=1, cpu=True)
        curve = losses(tmp_path / "out")
        assert np.mean(curve[-3:]) < 0.6 * np.mean(curve[:3])
        assert accuracy(tmp_path / "out" / "last.safetensors", samples.images) < 34  # the stored labels are wrong

    def test_memory_is_kept_on_a_cpu(self, folder, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(loop, "keep_memory", lambda: calls.append(1))
        fit(folder, tmp_path / "out", replace(RECIPE, epochs=1))
        assert calls == [1]

    def test_workers(self, folder, tmp_path):
        fit(folder, tmp_path / "none")
        fit(folder, tmp_path / "one", workers=1)
        assert_same_run(tmp_path / "none", tmp_path / "one")


class TestErrors:
    @pytest.mark.parametrize(("batch", "message"), [(3, "no multiple of 3"), (5, "no multiple of 5"), (1, "even")])
    def test_indivisible_batches(self, folder, tmp_path, batch, message):
        with pytest.raises(ValueError, match=message):
            fit(folder, tmp_path / "out", process_batch=batch)

    def test_too_few_images(self, folder, tmp_path):
        with pytest.raises(ValueError, match="24 samples, fewer than a global batch of 32"):
            fit(folder, tmp_path / "out", replace(RECIPE, batch_size=32))

    def test_another_training(self, folder, tmp_path):
        out = tmp_path / "out"
        fit(folder, out)
        before = (out / "metrics.jsonl").read_text()
        with pytest.raises(ValueError, match=r"another training.*recipe\.base_lr: .*0\.128.*0\.064"):
            fit(folder, out, replace(RECIPE, base_lr=0.064))
        with pytest.raises(ValueError, match=r"model\.drop_path_rate"):
            fit(folder, out, model=make_model(drop_path_rate=0.1))
        with pytest.raises(ValueError, match=r"augmentation\.flip"):
            fit(folder, out, replace(RECIPE, changes=RECIPE.changes | {"flip": 0.1}))
        make_images(tmp_path / "more", seed=5)
        with pytest.raises(ValueError, match="data: "):
            fit(tmp_path / "more", out)
        assert (out / "metrics.jsonl").read_text() == before

    @pytest.mark.slow
    def test_another_process_trains_in_the_folder(self, folder, tmp_path):
        out = tmp_path / "out"
        receiver, sender = PROCESSES.Pipe()
        other = start(hold, out, sender)
        try:
            assert receiver.poll(60), "the other process did not start"
            with pytest.raises(ValueError, match=r"Another process trains in .*out; wait"):
                fit(folder, out)
            assert [path.name for path in out.iterdir()] == [".lock"]
        finally:
            other.kill()
            other.join()
        assert fit(folder, out).steps == 2 * STEPS

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_loss_that_is_not_finite(self, folder, tmp_path, value):
        out = tmp_path / "out"
        with pytest.raises(FloatingPointError, match=r"The loss is (nan|inf) at step 5"):
            fit(folder, out, before=lambda number: value if number == 5 else 1)
        assert [line["step"] for line in metrics(out)] == [1, 2, 3, 3, 4]
        assert (out / "state-000000003").is_dir()
        fit(folder, tmp_path / "undisturbed")
        fit(folder, out)  # resumes before the failure
        assert_same_run(out, tmp_path / "undisturbed")


class TestCorruptImages:
    def test_stop(self, folder, tmp_path):
        damage(folder / "green" / "02.png")
        with pytest.raises(BrokenImageError, match=r"green/02\.png"):
            fit(folder, tmp_path / "out", replace(RECIPE, batch_size=24))

    def test_skipped_and_counted_over_a_restart(self, folder, tmp_path):
        recipe = replace(RECIPE, batch_size=12)
        names = ("blue/07.png", "green/02.png")
        whole = [damage(folder / name) for name in names]
        with pytest.raises(Interrupted):
            fit(folder, tmp_path / "out", recipe, on_broken="skip", before=stop_at(4))
        assert metrics(tmp_path / "out")[-2]["broken"] == 2
        for name, content in zip(names, whole, strict=True):
            (folder / name).write_bytes(content)  # the resumed training does not see them
        result = fit(folder, tmp_path / "out", recipe, on_broken="skip")
        assert result.broken == names
        assert [line["broken"] for line in metrics(tmp_path / "out") if "broken" in line] == [2, 2]
        assert fit(folder, tmp_path / "out", recipe, on_broken="skip").broken == names

    def test_they_do_not_count(self, folder, tmp_path):
        """Losses and gradients depend on the other images only."""
        recipe = replace(FROZEN, epochs=1, batch_size=24)
        for number, name in enumerate(("first", "second")):
            damage(folder / "red" / "03.png")
            model = make_model()
            weight = torch.where(torch.tensor(broken_row(folder)), 1.0 + 50 * number, 1.0)
            fit(folder, tmp_path / name, recipe, model, lambda _, weight=weight: weight, on_broken="skip")
        assert losses(tmp_path / "first") == losses(tmp_path / "second")

    def test_a_batch_of_corrupt_images(self, folder, tmp_path):
        for path in folder.rglob("*.png"):
            damage(path)
        result = fit(folder, tmp_path / "out", on_broken="skip")
        assert losses(tmp_path / "out") == [0] * 6
        assert len(result.broken) == 24

    def test_in_validation(self, folder, tmp_path):
        data = make_images(tmp_path / "val", each=3, seed=9)
        damage(data / "green" / "00.png")
        with pytest.raises(BrokenImageError, match=r"green/00\.png"):
            fit(folder, tmp_path / "stopped", validation=ClassificationDataset.open(data), process_batch=2)
        result = fit(
            folder, tmp_path / "out", validation=ClassificationDataset.open(data), on_broken="skip", process_batch=2
        )
        assert result.broken == ("validation: green/00.png",)
        assert metrics(tmp_path / "out")[-1]["broken"] == 1
        (data / "green" / "00.png").unlink()
        assert result.top1 == pytest.approx(accuracy(result.best, ClassificationDataset.open(data)), abs=1e-4)


def broken_row(folder):
    samples = make_samples(folder, FROZEN)
    index = [samples.images.name(row) for row in range(24)].index("red/03.png")
    return samples.order.permutation(0) == index


RESUMED = replace(RECIPE, epochs=3, ema_decay=0.9)
PAUSE = 0.05  # seconds before each batch: kills hit both steps and saves


def resumable(folder, out, save_minutes, pause=0.0):
    torch.set_num_threads(1)

    def before(number):
        time.sleep(pause)
        return 1

    validation = ClassificationDataset.open(folder.parent / "val")
    model = make_model(drop_path_rate=0.4, drop_rate=0.1)
    return fit(folder, out, RESUMED, model, before, validation=validation, save_minutes=save_minutes, process_batch=4)


def train_on_a_full_disk(folder, out, queue):
    """Train until the first state, and limit the size of files from then on."""
    torch.set_num_threads(1)

    def before(number):
        if number == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        return 1

    try:
        fit(folder, out, RESUMED, before=before, save_minutes=0)
    except OSError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


class TestResuming:
    def test_full_disk(self, folder, tmp_path):
        """A state that does not fit on the disk is removed, and the training resumes from the previous one."""
        out, queue = tmp_path / "out", PROCESSES.Queue()
        process = start(train_on_a_full_disk, folder, out, queue)
        assert re.search(rf"(File too large|No space left on device): '{out}/state.tmp'", queue.get(timeout=300))
        process.join()
        assert process.exitcode == 0
        assert [path.name for path in out.glob("state*")] == ["state-000000001"]
        for place in (out, tmp_path / "undisturbed"):
            fit(folder, place, RESUMED, save_minutes=0)
        assert_same_run(out, tmp_path / "undisturbed")

    @pytest.mark.parametrize("save_minutes", [0, 10], ids=["each step", "each epoch"])
    @pytest.mark.slow
    def test_killed(self, folder, tmp_path, save_minutes):
        """A training that is killed several times within epochs equals an uninterrupted one."""
        make_images(tmp_path / "val", each=3, seed=9)
        out, chance = tmp_path / "out", random.Random(3)
        reached = []
        for target in (2, 5, 8) if save_minutes == 0 else (6, 9):
            process = start(resumable, folder, out, save_minutes, PAUSE)
            file = out / "metrics.jsonl"
            while not file.exists() or file.read_text().count("\n") < target:
                assert process.is_alive()
                time.sleep(0.01)
            time.sleep(chance.random() * PAUSE * 1.5)  # in a step, or while a state is saved
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            reached.append(metrics(out)[-1]["step"])
        assert reached[-1] < 3 * STEPS, f"killed too late: {reached}"
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "epo')  # an incomplete line
        resumable(folder, out, save_minutes)
        resumable(folder, tmp_path / "undisturbed", save_minutes)
        assert len(losses(out)) == 3 * STEPS
        assert_same_run(out, tmp_path / "undisturbed")
        assert [path.name for path in out.glob("state*")] == ["state-000000009"]

    @pytest.mark.parametrize("call", [1, 3, 4, 5, 6])
    def test_interrupted(self, folder, tmp_path, call):
        """With the incomplete files of a killed process."""
        model = {"drop_path_rate": 0.4}
        fit(folder, tmp_path / "undisturbed", model=make_model(**model))
        out = tmp_path / "out"
        with pytest.raises(Interrupted):
            fit(folder, out, model=make_model(**model), before=stop_at(call))
        (out / "state.tmp").mkdir()
        (out / "state.tmp" / "model.safetensors").write_text("half")
        (out / ".last.safetensors.x.tmp").write_text("half")
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2')
        fit(folder, out, model=make_model(**model))
        assert_same_run(out, tmp_path / "undisturbed")
        assert not (out / "state.tmp").exists()

    def test_an_older_state_is_removed(self, folder, tmp_path):
        out = tmp_path / "out"
        fit(folder, tmp_path / "undisturbed")
        with pytest.raises(Interrupted):
            fit(folder, out, before=stop_at(5))
        (out / "state-000000001").mkdir()  # a process was killed while it removed this state
        fit(folder, out)
        assert_same_run(out, tmp_path / "undisturbed")
        assert [path.name for path in out.glob("state*")] == ["state-000000006"]

    @pytest.mark.parametrize(("first", "second"), [(8, 2), (2, 8)])
    def test_another_process_batch(self, folder, tmp_path, first, second):
        """The state counts steps, not batches: a training may resume with another ``process_batch``."""
        recipe = replace(FROZEN, ema_decay=0.5)
        fit(folder, tmp_path / "undisturbed", recipe)
        out = tmp_path / "out"
        with pytest.raises(Interrupted):
            fit(folder, out, recipe, before=stop_at(5 * 8 // first), process_batch=first, save_minutes=0)
        fit(folder, out, recipe, process_batch=second)
        assert losses(out) == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-4)
        assert [line["step"] for line in metrics(out)] == [1, 2, 3, 3, 4, 5, 6, 6]

    def test_finished(self, folder, tmp_path):
        first = fit(folder, tmp_path / "out", validation=ClassificationDataset.open(folder))
        before = (tmp_path / "out" / "metrics.jsonl").read_text()
        model = make_model()
        second = fit(
            folder, tmp_path / "out", model=model, validation=ClassificationDataset.open(folder), before=stop_at(1)
        )
        assert (second.steps, second.top1, second.best) == (first.steps, first.top1, first.best)
        assert (tmp_path / "out" / "metrics.jsonl").read_text() == before


class TestEarlyStopping:
    """The first epoch scores best, as the weights are zero afterwards."""

    RECIPE = replace(RECIPE, epochs=6, patience=2)

    def fit(self, folder, out, recipe=RECIPE, **options):
        validation = ClassificationDataset.open(folder)
        return fit(folder, out, recipe, before=lambda _: 0, validation=validation, **options)

    def test_it_stops_and_stays_stopped(self, folder, tmp_path):
        """A tie is no better score."""
        out = tmp_path / "out"
        result = self.fit(folder, out)
        assert (result.steps, result.best_epoch, result.stopped_early) == (3 * STEPS, 1, True)
        assert [line["epoch"] for line in metrics(out) if "top1" in line] == [1, 2, 3]
        before = (out / "metrics.jsonl").read_text()
        again = self.fit(folder, out)
        assert (again.steps, again.best_epoch, again.stopped_early) == (3 * STEPS, 1, True)
        assert (out / "metrics.jsonl").read_text() == before

    def test_more_epochs_continue(self, folder, tmp_path):
        out = tmp_path / "out"
        self.fit(folder, out)
        longer = replace(self.RECIPE, epochs=8)
        assert self.fit(folder, out, longer).steps == 5 * STEPS  # the patience counts from the extension
        assert self.fit(folder, out, longer).stopped_early
        assert json.loads((out / "run.json").read_text())["extensions"] == [{"from": 6, "to": 8, "epoch": 3.0}]

    def test_no_patience(self, folder, tmp_path):
        result = self.fit(folder, tmp_path / "out", replace(RECIPE, epochs=4))
        assert (result.steps, result.stopped_early) == (4 * STEPS, False)
        recipe = replace(self.RECIPE, epochs=4)
        assert fit(folder, tmp_path / "unseen", recipe).stopped_early is False  # without validation
        assert not (tmp_path / "unseen" / "predictions.png").exists()


class TestExtending:
    """More epochs continue from the last state, on the schedule of the new length."""

    def test_finished(self, folder, tmp_path):
        out, lines = tmp_path / "out", []
        validation = ClassificationDataset.open(folder)
        first = fit(folder, out, replace(RECIPE, warmup_epochs=1), validation=validation)
        best = first.best.read_bytes()
        longer = replace(RECIPE, epochs=4, warmup_epochs=2)  # the warm-up of the first training is kept
        result = fit(folder, out, longer, before=lambda _: 0, validation=validation, note=lines.append)
        wanted = replace(RECIPE, epochs=4, warmup_epochs=1)
        rates = [line["lr"] for line in metrics(out) if "loss" in line]
        assert rates[2 * STEPS :] == pytest.approx([wanted.peak_lr * wanted.lr_factor(2 + i / STEPS) for i in range(6)])
        assert result.steps == 4 * STEPS
        stored = json.loads((out / "run.json").read_text())
        assert stored["extensions"] == [{"from": 2, "to": 4, "epoch": 2.0}]
        assert (stored["recipe"]["epochs"], stored["recipe"]["warmup_epochs"]) == (4, 1)
        assert "Extended from 2 to 4 epochs: resumes after epoch 2 with learning rate 0.00155" in lines[-1]
        top1 = [line["top1"] for line in metrics(out) if "top1" in line]
        assert result.top1 == pytest.approx(max(top1))
        assert (first.best.read_bytes() == best) or max(top1[2:]) >= max(top1[:2])
        again = fit(folder, out, replace(RECIPE, epochs=4, warmup_epochs=1), before=stop_at(1), validation=validation)
        assert again.steps == 4 * STEPS

    def test_unfinished_and_twice(self, folder, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(Interrupted):
            fit(folder, out, before=stop_at(STEPS + 2))
        fit(folder, out, replace(RECIPE, epochs=3), before=lambda _: 1)
        assert fit(folder, out, replace(RECIPE, epochs=4), before=lambda _: 1).steps == 4 * STEPS
        stored = json.loads((out / "run.json").read_text())["extensions"]
        assert stored == [{"from": 2, "to": 3, "epoch": 1.0}, {"from": 3, "to": 4, "epoch": 3.0}]

    def test_anything_else_is_rejected(self, folder, tmp_path):
        out = tmp_path / "out"
        fit(folder, out)
        before = (out / "run.json").read_text()
        with pytest.raises(ValueError, match=r"another training: recipe\.epochs: it has 2, requested 1\."):
            fit(folder, out, replace(RECIPE, epochs=1))
        with pytest.raises(ValueError, match=r"another training: recipe\.base_lr: it has 0\.128, requested 0\.2\."):
            fit(folder, out, replace(RECIPE, epochs=4, base_lr=0.2))
        assert (out / "run.json").read_text() == before


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
class TestTensorBoard:
    def test_scalars(self, folder, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        out = tmp_path / "out"
        with pytest.raises(Interrupted):
            fit(folder, out, before=stop_at(6), validation=ClassificationDataset.open(folder))
        fit(folder, out, validation=ClassificationDataset.open(folder))
        events = EventAccumulator(str(out / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(out), rel=1e-5)
        assert [event.step for event in events.Scalars("top1")] == [3, 6]
        assert {"lr", "images_per_s", "top5"} <= set(events.Tags()["scalars"])

    def test_a_rejected_training_writes_nothing(self, folder, tmp_path):
        fit(folder, tmp_path / "out")
        files = sorted((tmp_path / "out").rglob("*"))
        with pytest.raises(ValueError, match="another training"):
            fit(folder, tmp_path / "out", replace(RECIPE, base_lr=0.1))
        assert sorted((tmp_path / "out").rglob("*")) == files


def test_without_tensorboard(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fit(folder, tmp_path / "out", replace(RECIPE, epochs=1))
    assert not (tmp_path / "out" / "tensorboard").exists()
    assert len(losses(tmp_path / "out")) == STEPS


def test_progress_bar(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_MIN_SECONDS", 0)
    fit(folder, tmp_path / "out", replace(RECIPE, epochs=1), progress=True)
    out, shown = capsys.readouterr()
    assert out == ""
    assert "training 1/" in shown
    assert re.search(r"loss \d\.\d+, lr 0\.002", shown)
    fit(folder, tmp_path / "quiet", replace(RECIPE, epochs=1))
    assert capsys.readouterr() == ("", "")


def test_notes_of_the_learning_rates(folder, tmp_path):
    lines = []
    fit(folder, tmp_path / "out", replace(RECIPE, epochs=1, layer_decay=0.5), note=lines.append)
    fit(folder, tmp_path / "flat", replace(RECIPE, epochs=1), note=lines.append)
    assert lines == [
        "Learning rate 0.002, 0.000125 in the first layers, by a cosine to 0.0002 after 1 epoch",
        "Learning rate 0.002, by a cosine to 0.0002 after 1 epoch",
    ]


TWO = replace(FROZEN, ema_decay=0.5)


def shared_run(folder, out, epochs_before_stop=None):
    """Train on two ranks, or in one process; without a GPU ``cpu`` is not needed."""
    validation = ClassificationDataset.open(folder.parent / "val")
    before = None if epochs_before_stop is None else stop_at(epochs_before_stop * STEPS + 2)
    cpu, save_minutes = torch.accelerator.is_available(), 10 if before is None else 0
    return fit(
        folder, out, TWO, validation=validation, on_broken="skip", save_minutes=save_minutes, cpu=cpu, before=before
    )


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "TinyViTBlock,MBConv",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


def shard_on_cpu():
    """Let accelerate, which shards on GPUs only, shard on the CPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def init_sharded(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_sharded


def train_rank(rank, port, folder, sharded):
    """Train on one of two ranks, with torchrun's variables; then again, interrupted in the second epoch."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    if sharded:
        os.environ |= FSDP2
        shard_on_cpu()
    result = shared_run(folder, folder.parent / "two")
    (folder.parent / f"result-{rank}.json").write_text(json.dumps(result.to_dict()))
    with pytest.raises(Interrupted):
        shared_run(folder, folder.parent / "stopped", 1)
    if sharded:
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedType

        assert AcceleratorState().distributed_type is DistributedType.FSDP
        shared_run(folder, folder.parent / "stopped")
    torch.distributed.destroy_process_group()


def train_ranks(folder, sharded=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(train_rank, rank, port, folder, sharded) for rank in range(2)]
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0, 0]


def assert_equal_runs(one, other):
    """Assert that metrics, except times, and weights are equal up to rounding."""
    assert len(metrics(one)) == len(metrics(other)) == 2 * STEPS + 2
    for first, second in zip(metrics(one), metrics(other), strict=True):
        for key in first.keys() - {"seconds", "images_per_s"}:
            assert second[key] == pytest.approx(first[key], rel=1e-4), (other.name, key)
    first, second = (weights(each / "last.safetensors").state_dict() for each in (one, other))
    assert all(torch.allclose(first[key], second[key], atol=2e-4) for key in first)


@pytest.mark.slow
@needs_gloo
def test_sharded_ranks_equal_one_process(folder, tmp_path):
    """FSDP2 with a sharded moving average; an interrupted training resumes on two ranks."""
    make_images(tmp_path / "val", each=7, seed=9)
    train_ranks(folder, sharded=True)
    shared_run(folder, tmp_path / "one")
    for name in ("two", "stopped"):
        assert_equal_runs(tmp_path / "one", tmp_path / name)


@needs_gloo
@pytest.mark.slow
def test_two_ranks_equal_one_process(folder, tmp_path):
    """Losses, accuracy, weights and names of corrupt images; an interrupted training resumes in one process."""
    damage(folder / "red" / "02.png")
    data = make_images(tmp_path / "val", each=7, seed=9)  # 17 and a corrupt one: the last batches have 2 and 0
    damage(data / "blue" / "05.png")
    for name in ("04.png", "05.png", "06.png"):
        (data / "red" / name).unlink()
    train_ranks(folder)
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["is_main_process"] for each in results] == [True, False]
    alone = shared_run(folder, tmp_path / "one")
    for each in results:
        assert each["top1"] == pytest.approx(alone.top1, abs=1e-4)
        assert tuple(each["broken"]) == alone.broken == ("red/02.png", "validation: blue/05.png")
    assert len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) < 2 * STEPS + 2
    shared_run(folder, tmp_path / "stopped")
    for name in ("two", "stopped"):
        assert_equal_runs(tmp_path / "one", tmp_path / name)
