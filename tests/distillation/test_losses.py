"""Distillation losses: against tensors, stored records and an online teacher."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kornia_tinyvit.data import Batch, ReplayableAugmentation
from kornia_tinyvit.distillation import (
    FeatureStore,
    LabelStore,
    Manifest,
    MissingRecordsError,
    OnlineDistillationLoss,
    StoredFeatureLoss,
    StoredLabelLoss,
    StoreError,
    StoreMismatchError,
    distillation_loss,
    soft_target_cross_entropy,
)
from kornia_tinyvit.training import ClassificationLoss
from tests.distillation.helpers import write_records

NUM_SAMPLES, NUM_CLASSES, SIZE = 12, 6, 16


def augment(preset="distill", **changes):
    return ReplayableAugmentation(SIZE, preset, seed=4, num_samples=NUM_SAMPLES, **changes)


def batch_of(augmentation, epoch=1, start=0, count=6):
    indices = augmentation.order.permutation(epoch)[start : start + count]
    crops = torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = augmentation.sample_params(epoch, indices)
    return Batch(crops, torch.from_numpy(indices % NUM_CLASSES), torch.ones(count), params, ())


@pytest.fixture
def outputs():
    return torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.fixture
def targets():
    return (2 * torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(2))).softmax(1)


@pytest.fixture
def store(tmp_path):
    manifest = Manifest(num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES, top_k=3, seed=4, shard_records=2)
    with LabelStore.create(tmp_path / "store", manifest) as store:
        yield store


def write(store, batch, values):
    write_records(store, batch.params.epoch, batch.params.indices, values, batch.params.checksums())


def restored(targets, top_k=3):
    """Return the distribution that a store of the largest probabilities represents."""
    top = targets.topk(top_k)
    rest = (1 - top.values.half().float().sum(1, keepdim=True)) / (NUM_CLASSES - top_k)
    return rest.expand(-1, NUM_CLASSES).scatter(1, top.indices, top.values.half().float())


def dense(classes, probabilities, count):
    """Return the dense distribution as in the official code: the remainder is uniform over the other classes."""
    rest = (1 - probabilities.sum(1, keepdim=True)) / max(count - classes.shape[1], 1)
    return rest.expand(-1, count).scatter(1, classes, probabilities)


@pytest.fixture
def sparse():
    torch.manual_seed(0)
    teacher = (3 * torch.randn(6, 12, dtype=torch.float64)).softmax(1)
    top = teacher.topk(4)
    return top.indices, top.values


class TestSoftTargetCrossEntropy:
    def test_equals_the_dense_loss(self, sparse):
        classes, probabilities = sparse
        logits = torch.randn(6, 12, requires_grad=True)
        expected = F.cross_entropy(logits, dense(classes, probabilities.float(), 12), reduction="none")
        loss = soft_target_cross_entropy(logits, classes, probabilities, reduction="none")
        assert torch.allclose(loss, expected, atol=1e-5)
        (gradient,) = torch.autograd.grad(expected.mean(), logits, retain_graph=True)
        (ours,) = torch.autograd.grad(soft_target_cross_entropy(logits, classes, probabilities), logits)
        assert torch.allclose(ours, gradient, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int64])
    def test_stored_types(self, sparse, dtype):
        classes, probabilities = sparse
        logits = torch.randn(6, 12)
        wide = soft_target_cross_entropy(logits, classes, probabilities)
        assert torch.allclose(
            soft_target_cross_entropy(logits, classes.to(dtype), probabilities.half()), wide, atol=2e-3
        )

    def test_all_classes_stored(self):
        logits, teacher = torch.randn(3, 5), torch.randn(3, 5).softmax(1)
        loss = soft_target_cross_entropy(logits, torch.arange(5).expand(3, 5), teacher)
        assert torch.allclose(loss, F.cross_entropy(logits, teacher), atol=1e-6)

    def test_sum_above_one_has_no_remainder(self):
        logits = torch.tensor([[2.0, 0.0, -50.0]])
        classes, probabilities = torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.2505]])
        loss = soft_target_cross_entropy(logits, classes, probabilities)
        assert torch.allclose(loss, -(probabilities * logits.log_softmax(1)[:, :2]).sum(), atol=1e-5)

    def test_half_precision_logits(self, sparse):
        loss = soft_target_cross_entropy(torch.randn(6, 12).bfloat16(), *sparse)
        assert loss.dtype == torch.float32

    def test_errors(self, sparse):
        classes, probabilities = sparse
        with pytest.raises(ValueError, match=r"shape \(5, K\)"):
            soft_target_cross_entropy(torch.randn(5, 12), classes, probabilities)
        with pytest.raises(ValueError, match="'mean' or 'none'"):
            soft_target_cross_entropy(torch.randn(6, 12), classes, probabilities, "sum")
        with pytest.raises(ValueError, match="4 classes are stored, but the logits have 3"):
            soft_target_cross_entropy(torch.randn(6, 3), classes, probabilities)


@pytest.mark.parametrize("index", [-1, 5, 255])
def test_class_index_out_of_range(index):
    classes = torch.tensor([[0, index]])
    with pytest.raises(ValueError, match=r"The stored classes are .* but the logits have 5"):
        soft_target_cross_entropy(torch.zeros(1, 5), classes, torch.full((1, 2), 0.5))


class TestDistillationLoss:
    def test_mixture(self, sparse):
        logits, labels = torch.randn(6, 12), torch.arange(6)
        soft, hard = soft_target_cross_entropy(logits, *sparse), F.cross_entropy(logits, labels)
        assert torch.allclose(distillation_loss(logits, *sparse), soft)
        assert torch.allclose(distillation_loss(logits, *sparse, labels, 0.25), 0.75 * soft + 0.25 * hard)
        assert torch.allclose(distillation_loss(logits, *sparse, labels, 1.0), hard)

    def test_errors(self, sparse):
        with pytest.raises(ValueError, match=r"hard_weight=0\.5 requires labels"):
            distillation_loss(torch.randn(6, 12), *sparse, hard_weight=0.5)
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            distillation_loss(torch.randn(6, 12), *sparse, hard_weight=1.5)


class TestStoredLabelLoss:
    def test_equals_the_dense_loss(self, store, outputs, targets):
        batch = batch_of(augment())
        write(store, batch, targets)
        loss = StoredLabelLoss(store, augment())(outputs, None, batch)
        assert torch.allclose(loss, F.cross_entropy(outputs, restored(targets), reduction="none"), atol=1e-5)

    @pytest.mark.parametrize("preset", ["finetune", "in1k"])
    @pytest.mark.parametrize("weight", [0.3, 1.0])
    def test_hard_labels(self, store, outputs, targets, preset, weight):
        augmentation = augment(preset)
        batch = batch_of(augmentation)
        write(store, batch, targets)
        loss = StoredLabelLoss(store, augmentation, hard_weight=weight)(outputs, None, batch)
        soft = F.cross_entropy(outputs, restored(targets), reduction="none")
        expected = (1 - weight) * soft + weight * ClassificationLoss(augmentation)(outputs, None, batch)
        assert torch.allclose(loss, expected, atol=1e-5)

    @pytest.mark.parametrize(
        "other", [augment("small"), augment("distill", flip=0.0), ReplayableAugmentation(SIZE, "distill", seed=5)]
    )
    def test_another_augmentation(self, store, outputs, targets, other):
        write(store, batch_of(augment(), count=NUM_SAMPLES), targets.repeat(2, 1))
        batch = Batch(*batch_of(augment())[:3], other.sample_params(1, batch_of(augment()).params.indices), ())
        with pytest.raises(StoreMismatchError, match=r"of 6 samples of epoch 1.* differ from .*distill save"):
            StoredLabelLoss(store, other)(outputs, None, batch)

    def test_missing(self, store, outputs, targets):
        write(store, batch_of(augment(), count=4), targets[:4])
        with pytest.raises(MissingRecordsError, match="2 of 6 requested records"):
            StoredLabelLoss(store, augment())(outputs, None, batch_of(augment()))

    def test_patience(self, store, outputs, targets):
        """Wait for a record that another thread writes, and raise once the time is over."""
        batch, reading = batch_of(augment()), threading.Event()
        reader = LabelStore(store.path)
        original = reader.read
        reader.read = lambda *args: (reading.set(), original(*args))[1]

        def later():
            reading.wait(30)
            time.sleep(0.05)
            write(store, batch, targets)

        thread = threading.Thread(target=later)
        thread.start()
        loss = StoredLabelLoss(reader, augment(), patience=60)(outputs, None, batch)
        thread.join()
        assert torch.allclose(loss, F.cross_entropy(outputs, restored(targets), reduction="none"), atol=1e-5)
        with pytest.raises(MissingRecordsError):
            StoredLabelLoss(reader, augment(), patience=0.01)(outputs, None, batch_of(augment(), start=6))


class TestStoredFeatureLoss:
    @pytest.fixture
    def features(self, tmp_path):
        manifest = Manifest(num_samples=NUM_SAMPLES, seed=4, kind="features", shape=(4, 2, 2), shard_records=2)
        with FeatureStore.create(tmp_path / "features", manifest) as store:
            batch = batch_of(augment())
            values = torch.arange(6 * 16).view(6, 4, 2, 2) / 8.0
            write(store, batch, values)
            yield store

    def test_mean_squared_error(self, features):
        outputs = (
            torch.arange(6 * 16).view(6, 4, 2, 2) / 8.0 + torch.tensor([0.0, 1, -2, 3, 0.5, 1])[:, None, None, None]
        )
        loss = StoredFeatureLoss(features)(outputs, None, batch_of(augment()))
        assert torch.allclose(loss, torch.tensor([0.0, 1, 4, 9, 0.25, 1]))

    def test_another_shape(self, features):
        with pytest.raises(StoreError, match=r"shape \(4, 4\) per image, but .*features holds \(4, 2, 2\)"):
            StoredFeatureLoss(features)(torch.zeros(6, 4, 4), None, batch_of(augment()))

    def test_another_augmentation(self, features):
        batch = batch_of(augment())
        changed = batch._replace(params=augment("small").sample_params(1, batch.params.indices))
        with pytest.raises(StoreMismatchError, match="differ from those stored"):
            StoredFeatureLoss(features)(torch.zeros(6, 4, 2, 2), None, changed)


class TestOnlineDistillationLoss:
    @pytest.fixture
    def teacher(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, NUM_CLASSES))
        network[1].running_mean.normal_()
        return network.eval()

    def test_equals_the_dense_loss(self, teacher, outputs):
        images = torch.randn(6, 3, SIZE, SIZE)
        loss = OnlineDistillationLoss(teacher)(outputs, images, None)
        with torch.no_grad():
            expected = F.cross_entropy(outputs, teacher(images).softmax(1), reduction="none")
        assert torch.allclose(loss, expected, atol=1e-6)
        loss.sum().backward()
        assert outputs.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in teacher.parameters())

    def test_teacher_in_training_mode_is_not_updated(self, teacher, outputs):
        images = torch.randn(6, 3, SIZE, SIZE)
        expected = OnlineDistillationLoss(teacher)(outputs, images, None)
        before = teacher[1].running_mean.clone()
        assert torch.equal(OnlineDistillationLoss(teacher.train())(outputs, images, None), expected)
        assert torch.equal(teacher[1].running_mean, before)

    def test_lower_precision(self, teacher, outputs):
        kinds = []
        teacher[3].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
        images = torch.randn(6, 3, SIZE, SIZE)
        whole = OnlineDistillationLoss(teacher)(outputs, images, None)
        half = OnlineDistillationLoss(teacher, torch.bfloat16)(outputs, images, None)
        assert kinds == [torch.float32, torch.bfloat16]
        assert half.dtype == torch.float32
        assert torch.allclose(whole, half, atol=0.05)
        assert not np.allclose(whole.detach(), half.detach(), atol=1e-7)

    def test_teacher_moves_to_the_device_of_the_images(self, teacher):
        devices = []
        teacher.to = lambda device: devices.append(device) or nn.Module.to(teacher, device)
        OnlineDistillationLoss(teacher)(torch.zeros(6, NUM_CLASSES), torch.zeros(6, 3, SIZE, SIZE), None)
        assert devices == [torch.device("cpu")]
